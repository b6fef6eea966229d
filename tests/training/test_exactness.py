"""Invariants: a step is the same however it is split, and a run however it is interrupted."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from tiny import (
    ROOT,
    command,
    ended,
    finetune_flags,
    free_port,
    largest_difference,
    run_ranks,
    tiny_unet,
    weights,
    write_images,
)

from ddgan.training.tracking import read_metrics

SCRIPT = ROOT / "finetune_model.py"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.csv")]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, EMA weights, optimizer and metrics are bit-identical."""
    newest = [sorted((run / "checkpoints").glob("step-*"))[-1] for run in (a, b)]
    assert newest[0].name == newest[1].name
    for file in ("model.safetensors", "ema.safetensors"):
        assert largest_difference(*(load_file(folder / file) for folder in newest)) == 0, file
    states = [torch.load(folder / "optimizer.bin", weights_only=True)["state"] for folder in newest]
    assert states[0].keys() == states[1].keys()
    for i in states[0]:
        for name, value in states[0][i].items():
            assert torch.equal(value, states[1][i][name]), (i, name)
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert largest_difference(load_file(a / unet), load_file(b / unet)) == 0


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_is_left():
    with ended(started):
        yield
    started.clear()


def start(model: Path, images: Path, output: Path, *flags, launcher: Sequence = ()) -> subprocess.Popen:
    arguments, environment = command(SCRIPT, *finetune_flags(model, images, output, *flags), launcher=launcher)
    process = subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    started.append(process)
    return process


def wait_for_rank(launcher: subprocess.Popen, rank: int, killed: int = 0) -> int:
    """Return the process id of a rank, once the launcher has started it, again if its earlier process was killed."""
    end = time.monotonic() + 240
    while time.monotonic() < end and launcher.poll() is None:
        for process in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank) and process.pid != killed:
                    return process.pid
        time.sleep(0.1)
    raise AssertionError(f"rank {rank} was not started")


def wait_for_steps(run: Path, steps: int) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if (run / "metrics.csv").exists() and len((run / "metrics.csv").read_text().splitlines()) > steps:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not reach step {steps}")


# dropout depends on how a batch is split, so these start from a model without it
@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "no-dropout"
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


# Adam divides by the root of the squared gradient, so it turns a gradient that is rounding noise into a full step.
# At this rate four such steps stay below the bound on the difference; the gradients are compared by their norms.
LOW_RATE = ("--learning_rate", "1e-6", "--max_grad_norm", "0")


def test_accumulated_micro_batches_equal_one_batch_also_if_it_is_short(finetune, model):
    whole = finetune("whole", "--start_model", model, "--batch_size", 8, *LOW_RATE)
    parts = finetune("parts", "--start_model", model, "--batch_size", 2, "--grad_accumulation_steps", 4, *LOW_RATE)
    assert len(losses(whole)) == 4  # two epochs of 13 images: global batches of 8 and 5
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    norms = [[row["grad_norm"] for row in read_metrics(run / "metrics.csv")] for run in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    moved = largest_difference(weights(whole), load_file(model / "unet/diffusion_pytorch_model.safetensors"))
    assert moved > 1e-6
    assert largest_difference(weights(whole), weights(parts)) < 1e-6


@pytest.mark.slow
def test_two_processes_equal_one_also_if_one_has_no_image_left(finetune, model, tmp_path):
    images = write_images(tmp_path / "nine", 9)  # global batches of 8 and 1: in the second, one process has no image
    rate = (*LOW_RATE, "--posthoc_ema")
    one = finetune("one", "--start_model", model, "--train_data_dir", images, *rate, "--batch_size", 8)
    two = tmp_path / "two"
    several_nodes = ("accelerate.commands.launch", "--config_file", "examples/accelerate/several_nodes.yaml")
    sizes = ("--num_machines", 2, "--num_processes", 2, "--mixed_precision", "no")
    address = ("--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    launcher = (*several_nodes, *sizes, *address, "--machine_rank")
    nodes = [start(model, images, two, *rate, "--batch_size", 4, launcher=(*launcher, i)) for i in range(2)]
    for node in nodes:
        output, _ = node.communicate(timeout=300)
        assert node.returncode == 0, output
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
    assert largest_difference(weights(one), weights(two)) < 1e-6
    norms = [[row["grad_norm"] for row in read_metrics(run / "metrics.csv")] for run in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # Adam would hide a gradient of the wrong scale
    averages = [load_file(run / "ema_snapshots" / "step-00000004.safetensors") for run in (one, two)]
    assert largest_difference(*averages) < 1e-6
    assert "| global batch size | 8, 2 processes |" in (two / "README.md").read_text()
    for name in ("samples/step-00000004.png", "before_after.png", "loss.png"):
        assert (two / name).exists()


def test_a_run_is_reproducible_and_depends_on_the_seed(finetune):
    first, again, other = (finetune(name, "--seed", seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert_same_run(first, again)
    assert losses(first) != losses(other)


def test_neither_samples_nor_saves_nor_workers_disturb_training(finetune):
    plain = finetune("plain", "--random_flip")
    busy = finetune(
        "busy",
        "--random_flip",
        *["--log_samples_every", "1", "--save_model_every", "1", "--checkpointing_steps", "1"],
        "--dataloader_num_workers",
        2,
        "--cache_images",
    )
    assert_same_run(plain, busy)
    assert len(list((busy / "checkpoints").iterdir())) == 2  # --checkpoints_total_limit


def test_ema_weights_are_saved_and_never_trained(finetune):
    ema, plain = finetune("ema"), finetune("plain", "--ema_decay", 0)
    assert largest_difference(weights(ema), weights(plain)) == 0
    saved = load_file(ema / "unet/diffusion_pytorch_model.safetensors")
    newest = sorted((ema / "checkpoints").glob("step-*"))[-1]
    shadow = load_file(newest / "ema.safetensors")
    assert sorted(t.sum().item() for t in saved.values()) == sorted(t.sum().item() for t in shadow.values())
    assert largest_difference(saved, weights(ema)) > 1e-4


@pytest.mark.slow
def test_a_signal_finishes_the_step_and_the_resumed_run_ends_bit_identical(finetune, tiny_model, images, tmp_path):
    flags = ("--num_epochs", 80, "--dataloader_num_workers", 1)
    straight = finetune("straight", *flags)
    run, resume = tmp_path / "stopped", ("--resume_from_checkpoint", "latest")
    for number, reached in ((signal.SIGUSR1, 11), (signal.SIGINT, 71)):
        process = start(tiny_model, images, run, *flags, *resume)
        wait_for_steps(run, reached)
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        assert f"Stopped by {number.name} after step" in output
        assert ("There is no checkpoint in" in output) == (reached == 11)
        assert "--resume_from_checkpoint latest" in output
        assert "Traceback" not in output
        assert 0 < len(losses(run)) < 160
    assert finetune("stopped", *flags, *resume) == run
    assert_same_run(straight, run)


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_run_that_resumes_to_the_same_end(finetune, tiny_model, images, tmp_path):
    flags = (
        "--num_epochs",
        40,
        *["--checkpointing_steps", "7", "--save_model_every", "9", "--log_samples_every", "11"],
    )
    straight = finetune("straight", *flags)
    run = tmp_path / "killed"
    moments = random.Random(0)
    for reached in (1, 40):
        process = start(tiny_model, images, run, *flags, "--resume_from_checkpoint", "latest")
        wait_for_steps(run, reached)
        time.sleep(moments.random() * 0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finetune("killed", *flags, "--resume_from_checkpoint", "latest")
    assert_same_run(straight, run)
    assert not list(run.rglob(".tmp-*"))


@pytest.mark.slow
def test_two_processes_restart_stop_together_and_resume_bit_identical(tiny_model, images, tmp_path, monkeypatch):
    """One of them is killed twice, restarted by torchrun with the other, and then both get a signal."""
    flags = ("--num_epochs", 30, "--batch_size", 4, "--checkpointing_steps", 4)
    straight, run = tmp_path / "straight", tmp_path / "stopped"
    run_ranks(SCRIPT, *finetune_flags(tiny_model, images, straight, *flags), output=tmp_path / "output.txt")
    flags = (*flags, "--resume_from_checkpoint", "latest")
    # otherwise the processes of the second restart read the addresses of the first
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "--max_restarts", 3)
    process, killed = start(tiny_model, images, run, *flags, launcher=launcher), 0
    for reached in (5, 15):
        rank = wait_for_rank(process, 1, killed)
        wait_for_steps(run, reached)
        os.kill(rank, signal.SIGKILL)
        killed = rank
    wait_for_rank(process, 1, killed)
    wait_for_steps(run, 25)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert "Stopped by SIGTERM after step" in output
    assert output.count("Resuming from") == 2
    assert 25 <= len(losses(run)) < 60
    again = finetune_flags(tiny_model, images, run, *flags)
    run_ranks(SCRIPT, *again, output=tmp_path / "output.txt")
    assert_same_run(straight, run)


def test_learning_rates_count_optimizer_steps_not_micro_batches(finetune):
    flags = ("--lr_warmup_steps", 2, "--lr_scheduler", "linear", "--num_epochs", 4)
    rates = [
        [row["learning_rate"] for row in read_metrics(run / "metrics.csv")]
        for run in (finetune("a", *flags), finetune("b", *flags, "--batch_size", 2, "--grad_accumulation_steps", 4))
    ]
    assert rates[0] == rates[1]
    assert rates[0][:3] == pytest.approx([0, 5e-3, 1e-2])
    assert len(rates[0]) == 8
