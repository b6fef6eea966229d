"""Claims about --posthoc_ema: the snapshots of a run, and the EMAs that are computed from them."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from tiny import largest_difference, write_class_folders

from ddgan import finetune_few_step, train_class_conditional, train_ddgan
from ddgan.core.errors import InputError
from ddgan.scripts import train_classifier
from ddgan.training.arguments import RunArguments
from ddgan.training.loop import Trainer
from ddgan.training.posthoc_ema import TRACKED_LENGTHS, EMASnapshots, PosthocEMA, exponent
from ddgan.training.run_folder import RunFolder
from ddgan.training.stopping import RunStopped

FLAGS = ("--posthoc_ema", "--max_train_steps", 64, "--log_samples_every", 0, "--lr_scheduler", "constant")
LENGTHS = {0.03: 1e-3, 0.05: 1e-6, 0.07: 1e-3, 0.15: 1e-3, 0.2: 1e-3, 0.25: 1e-2}


def snapshots(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted((run / "ema_snapshots").iterdir())}


def assert_same_snapshots(a: Path, b: Path) -> None:
    first, second = snapshots(a), snapshots(b)
    assert first.keys() == second.keys()
    assert all(largest_difference(first[name], second[name]) == 0 for name in first)


def test_a_computed_ema_is_the_one_that_is_tracked_in_training(finetune, monkeypatch):
    """Of the weights of a real run: an EMA of each length, in float64, and the one from the snapshots of the run."""
    tracked: dict[float, list[torch.Tensor]] = {}
    final: list[torch.Tensor] = []
    train_step = Trainer._train_step

    def followed(self, batches):
        train_step(self, batches)
        step = self.progress.step
        final[:] = [parameter.detach().double() for parameter in self.job.ema.network.parameters()]
        for length in LENGTHS:
            decay = (1 - 1 / step) ** (exponent(length) + 1)
            before = tracked.get(length, final)
            tracked[length] = [decay * old + (1 - decay) * new for old, new in zip(before, final, strict=True)]

    monkeypatch.setattr(Trainer, "_train_step", followed)
    run = finetune("run", *FLAGS)
    opened = EMASnapshots.open(RunFolder(run))
    names = [name for name, _ in DDPMPipeline.from_pretrained(run).unet.named_parameters()]
    assert len(opened.files) == 16 and opened.step == 64
    for length, tolerance in LENGTHS.items():
        computed = opened.weights(length)
        assert computed.keys() == set(names)
        pairs = list(zip((computed[name] for name in names), tracked[length], final, strict=True))
        error = sum((ours - theirs).square().sum() for ours, theirs, _ in pairs) ** 0.5
        norm = sum(theirs.square().sum() for _, theirs, _ in pairs) ** 0.5
        moved = sum((theirs - last).square().sum() for _, theirs, last in pairs) ** 0.5
        assert error < tolerance * norm, length
        assert error < 0.1 * moved, length  # it differs from the newest weights, and by the right amount


def test_the_length_of_a_power_function_is_its_relative_standard_deviation():
    time = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for length in (0.01, 0.05, 0.1, 0.25):
        density = time ** exponent(length)
        density /= density.sum()
        mean = (density * time).sum()
        assert ((density * (time - mean) ** 2).sum() ** 0.5).item() == pytest.approx(length, rel=1e-3)


def test_what_does_not_change_in_training_is_exact_in_every_ema(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    network = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(network.weight, 0.5)
    network.bias.requires_grad_(False)
    ema = PosthocEMA(network, RunArguments(output_dir=str(tmp_path), posthoc_ema=True), 100)
    ema.prepare(Accelerator(cpu=True))
    for step in range(1, 101):
        ema.step(step)
        if step in ema.snapshot_steps:
            ema.save_snapshot(step)
    computed = EMASnapshots.open(RunFolder(tmp_path)).weights(0.25)
    assert computed.keys() == {"weight"}  # a frozen parameter takes no space
    assert (computed["weight"] - 0.5).abs().max() < 1e-6


def test_a_resumed_run_has_the_snapshots_of_an_uninterrupted_one(finetune, tmp_path):
    flags = (*FLAGS, "--checkpointing_steps", 30, "--checkpoints_total_limit", 0)
    straight = finetune("straight", *flags)
    assert [path.suffix for path in (straight / "ema_snapshots").iterdir()] == [".safetensors"] * 16
    resumed = shutil.copytree(straight, tmp_path / "resumed")
    # those after the checkpoint are written again, those before it stay
    for path in sorted((resumed / "ema_snapshots").iterdir())[7:]:
        path.write_bytes(b"damaged")
    (resumed / "ema_snapshots" / "step-00000031.safetensors").write_bytes(b"of a run with another number of steps")
    (resumed / "ema_snapshots" / ".tmp-0123-step-00000032.safetensors").write_bytes(b"of a killed process")
    finetune("resumed", *flags, "--resume_from_checkpoint", resumed / "checkpoints" / "step-00000030")
    assert_same_snapshots(straight, resumed)
    state = "checkpoints/step-00000064/posthoc_ema.safetensors"
    assert largest_difference(load_file(straight / state), load_file(resumed / state)) == 0


def test_a_snapshot_that_a_stopped_run_has_not_written_is_written_when_it_resumes(finetune, monkeypatch):
    straight = finetune("straight", "--posthoc_ema")
    train_step = Trainer._train_step

    def stopped(self, batches):
        train_step(self, batches)
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(RunStopped):
        patched.setattr(Trainer, "_train_step", stopped)
        finetune("resumed", "--posthoc_ema")
    run = straight.with_name("resumed")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(snapshots(run)) == 1
    finetune("resumed", "--posthoc_ema", "--resume_from_checkpoint", "latest")
    assert_same_snapshots(straight, run)


def test_snapshots_do_not_affect_training(finetune):
    plain, tracked = finetune("plain"), finetune("tracked", "--posthoc_ema")
    assert (plain / "metrics.csv").read_text() == (tracked / "metrics.csv").read_text()
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert largest_difference(load_file(plain / unet), load_file(tracked / unet)) == 0
    assert len(snapshots(tracked)) == 4 and not (plain / "ema_snapshots").exists()  # a run of four steps


def test_a_run_cannot_resume_with_another_setting(finetune):
    finetune("plain")
    with pytest.raises(InputError, match="saved with --posthoc_ema = False, but this run has True"):
        finetune("plain", "--posthoc_ema", "--resume_from_checkpoint", "latest")


def test_a_checkpoint_of_an_earlier_version_has_no_snapshots(finetune):
    run = finetune("run", "--max_train_steps", 2)
    (state,) = run.glob("checkpoints/*/state.json")
    content = json.loads(state.read_text())
    del content["post-hoc EMA"], content["checksum"], content["files"]
    state.write_text(json.dumps(content))
    resume = ("--max_train_steps", 4, "--resume_from_checkpoint", "latest")
    with pytest.raises(InputError, match="saved with --posthoc_ema = False"):
        finetune("run", "--posthoc_ema", *resume)
    finetune("run", *resume)


def test_a_dry_run_states_the_memory_and_the_disk_space(finetune, capsys):
    flags = ("--posthoc_ema", "--max_train_steps", 100)
    finetune("dry", *flags, "--dry_run")
    table = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert "362.1 kB post-hoc EMA" in table["memory"]
    count, size = re.search(r"(\d+) EMA snapshots of ([\d.]+) kB", table["disk"]).groups()
    run = finetune("run", *FLAGS)
    written = [path.stat().st_size for path in (run / "ema_snapshots").iterdir()]
    assert len(written) == int(count) == 16
    assert all(0 < size_written - float(size) * 1000 < 40_000 for size_written in written)  # names of tensors


OTHER_NETWORKS = {
    "ddgan": (
        train_ddgan,
        "--image_size 8 --block_out_channels 8 16 --attention_resolutions 4 --discriminator_channels 4 --latent_dim 4 "
        "--latent_embed_dim 8 --layers_per_block 1",
    ),
    "few-step": (
        finetune_few_step,
        "--start_model {model} --num_inference_steps 2 --distillation_steps 1 --teacher_samples 8 --teacher_steps 2",
    ),
    "class-conditional": (train_class_conditional, "--start_model {model}"),
}


@pytest.mark.parametrize("kind", OTHER_NETWORKS)
def test_every_network_with_a_pipeline_can_be_tracked(tiny_model, images, tmp_path, kind):
    command, flags = OTHER_NETWORKS[kind]
    run = tmp_path / "run"
    if kind == "class-conditional":
        images = write_class_folders(tmp_path / "classes")
    shared = f"--train_data_dir {images} --output_dir {run} --report_to none --max_train_steps 2 --batch_size 4"
    AcceleratorState._reset_state(reset_partial_state=True)
    command.main([*shared.split(), *flags.format(model=tiny_model).split(), "--posthoc_ema"])
    saved = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    last = load_file(run / "ema_snapshots" / "step-00000002.safetensors")
    assert {f"{length}/{name}" for length in TRACKED_LENGTHS for name in saved} == last.keys()


def test_a_classifier_cannot_be_tracked(images, tmp_path):
    with pytest.raises(InputError, match="--posthoc_ema is for pipelines"):
        train_classifier.main(["--train_data_dir", str(images), "--output_dir", str(tmp_path / "c"), "--posthoc_ema"])
