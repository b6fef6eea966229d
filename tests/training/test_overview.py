"""Claims about what a run prints before and during its first steps."""

import logging
import re

import pytest
import torch
from tiny import make_dataset

from ddgan import train_ddgan
from ddgan.core.errors import InputError
from ddgan.training.overview import saved_bytes


def test_a_run_prints_its_size_and_estimates_its_time(finetune, caplog):
    caplog.set_level(logging.INFO, "ddgan")
    finetune("run", "--max_train_steps", 12, "--grad_accumulation_steps", 2, "--batch_size", 4)
    opening = (
        "Training on 13 images: 12 steps (6 epochs of 2), global batch size 8 (4 per micro-batch x 2 accumulated)."
    )
    (message,) = [message for message in caplog.messages if message.startswith(opening)]
    assert "45,259 parameters (UNet2DModel) are trained, on CPU" in message and message.endswith("in fp32.")
    (estimate,) = [message for message in caplog.messages if "remaining steps" in message]
    assert estimate.endswith("seconds, without sample grids and saves.")


def test_a_resumed_run_prints_which_settings_have_changed(finetune, caplog):
    caplog.set_level(logging.INFO, "ddgan")
    finetune("run", "--num_epochs", 1, "--random_flip")
    resume = ["--resume_from_checkpoint", "latest"]
    finetune("run", "--num_epochs", 2, "--learning_rate", 2e-3, "--min_snr_gamma", 5, *resume)
    changed = "--num_epochs 1 -> 2, --learning_rate 0.01 -> 0.002, --random_flip True -> False"
    changed += ", --min_snr_gamma None -> 5.0."
    assert caplog.messages.count(f"Settings changed since the last start: {changed}") == 1
    caplog.clear()
    finetune("run", "--num_epochs", 2, "--learning_rate", 2e-3, "--min_snr_gamma", 5, *resume)
    assert not any("Changed" in message for message in caplog.messages)


def test_frozen_parameters_and_streams_are_named(finetune, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ddgan")
    data = make_dataset(tmp_path / "stream", 13)
    flags = ["--dataset_name", data, "--streaming", "--max_train_steps", 1, "--freeze", "all_but_attention"]
    finetune("run", "--mixed_precision", "bf16", *flags)
    assert any("a stream of images: 1 steps" in m and "4,480 of 45,259" in m for m in caplog.messages)
    assert any(message.startswith("On most CPUs bf16 trains several times slower") for message in caplog.messages)


def test_a_dry_run_prints_the_sizes_of_the_run_and_writes_nothing(finetune, tmp_path, capsys):
    short = ["--grad_accumulation_steps", 2, "--batch_size", 4, "--checkpointing_steps", 2]
    run = finetune("dry/run", "--dry_run", "--push_to_hub", "--eval_every", 1, *short)
    assert not run.parent.exists()
    table = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert table["images"] == "thirteen: 13 images, used at 8x8, 3 channels"
    assert table["length"] == "4 steps (2 epochs of 2)"
    assert table["batch"] == "global batch size 8 (4 per micro-batch x 2 accumulated)"
    assert "181.0 kB weights, 181.0 kB gradients, 362.1 kB optimizer, 181.0 kB EMA" in table["memory"]
    run = finetune("dry/run", *short)
    count, size = re.search(r"(\d) checkpoints of ([\d.]+) kB", table["disk"]).groups()
    checkpoints = list((run / "checkpoints").iterdir())
    written = sum(path.stat().st_size for path in checkpoints[0].rglob("*"))
    assert int(count) == len(checkpoints) == 2
    assert 0 < written - float(size) * 1000 < 200_000  # names of tensors, random states and so on


def test_a_dry_run_checks_the_checkpoint_to_resume_from_and_leaves_the_run_as_it_is(finetune, capsys):
    run = finetune("run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    resume = ["--resume_from_checkpoint", "latest", "--dry_run"]
    finetune("run", "--num_epochs", 4, *resume)
    assert "8 steps (4 epochs of 2), of which 4 are done" in capsys.readouterr().out
    with pytest.raises(InputError, match="seed = 0, but this run has 1"):
        finetune("run", "--seed", 1, *resume)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_dry_run_of_a_gan_names_both_networks(images, tmp_path, capsys):
    small = "--image_size 8 --block_out_channels 8 16 --attention_resolutions 4 --discriminator_channels 4 --dry_run"
    small += " --latent_dim 4 --latent_embed_dim 8 --layers_per_block 1 --report_to none"
    train_ddgan.main(["--train_data_dir", str(images), "--output_dir", str(tmp_path / "run"), *small.split()])
    printed = capsys.readouterr().out
    assert re.search(r"parameters \(DDGANDiscriminator\) and [\d,]+ parameters \(NCSNpp\)", printed)
    assert "activations)" in printed and not (tmp_path / "run").exists()


def test_saved_bytes_are_those_of_the_tensors_for_the_backward_pass():
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    images = torch.rand(3, 8)
    # the inputs of the two linear layers; ReLU shares its output with the second
    assert saved_bytes(lambda: network(images).sum(), [network]) == 4 * (3 * 8 + 3 * 16)
