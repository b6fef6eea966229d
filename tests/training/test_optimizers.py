"""Claims about AdamW with a state of 8 bits."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import largest_difference, tiny_unet, weights

from ddgan.core.errors import InputError
from ddgan.training.arguments import LearningRateArguments
from ddgan.training.optimizers import adamw, state_bytes
from ddgan.training.tracking import read_metrics


@pytest.fixture
def bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="the extra [bitsandbytes] is not installed")


def moments(run: Path) -> list[torch.Tensor]:
    """The tensors of the optimizer in the newest checkpoint, without the tables of the 8-bit values."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    found = []
    for values in torch.load(newest / "optimizer.bin", weights_only=True)["state"].values():
        values = values | values.get("__bnb_optimizer_quant_state__", {})
        found += [v for k, v in values.items() if isinstance(v, torch.Tensor) and "qmap" not in k and k != "step"]
    return found


def test_a_missing_package_is_reported_with_the_command_that_installs_it(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr("ddgan.training.arguments.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--use_8bit_adam needs a package: bitsandbytes .of the extra .* pip install"
    ):
        finetune("run", "--use_8bit_adam")
    assert not (tmp_path / "run").exists()


def test_fsdp_is_refused(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr("ddgan.training.arguments.find_spec", lambda name: True)
    sharded = SimpleNamespace(is_fsdp2=True)
    monkeypatch.setattr("ddgan.training.session._start", lambda run, supports_fp16=True: sharded)
    with pytest.raises(InputError, match="not with --use_8bit_adam"):
        finetune("run", "--use_8bit_adam")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_ends_bit_identical(finetune, bitsandbytes):
    flags = ("--use_8bit_adam", "--lr_scheduler", "constant", "--max_train_steps")
    straight = finetune("straight", *flags, 6)
    finetune("run", *flags, 3)
    run = finetune("run", *flags, 6, "--resume_from_checkpoint", "latest")
    assert largest_difference(weights(straight), weights(run)) == 0
    states = [moments(folder) for folder in (straight, run)]
    assert any(tensor.dtype == torch.uint8 for tensor in states[0])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_it_trains_like_32_bits(finetune, tiny_model, bitsandbytes):
    # the settings of the optimizer differ from the defaults, and so their effect
    flags = ("--learning_rate", 1e-3, "--adam_beta1", 0.8, "--adam_weight_decay", 0.5)
    full, small = finetune("full", *flags), finetune("small", *flags, "--use_8bit_adam")
    start = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    moved = largest_difference(start, weights(full))
    assert 0 < largest_difference(weights(full), weights(small)) < moved
    losses = [[row["loss"] for row in read_metrics(run / "metrics.csv")] for run in (full, small)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_checkpoints_of_the_two_are_not_mixed(finetune, bitsandbytes):
    finetune("run", "--num_epochs", 1)
    with pytest.raises(InputError, match="--use_8bit_adam = False, but this run has True"):
        finetune("run", "--use_8bit_adam", "--resume_from_checkpoint", "latest")


def test_the_stated_size_of_the_state_is_that_in_the_checkpoint(finetune, bitsandbytes, capsys):
    run = finetune("run", "--use_8bit_adam")
    written = sum(tensor.nbytes for tensor in moments(run))
    parameters = list(tiny_unet(dropout=0.1).parameters())
    assert state_bytes(adamw(parameters, LearningRateArguments(use_8bit_adam=True))) == written
    assert written < state_bytes(adamw(parameters, LearningRateArguments()))
    finetune("dry", "--use_8bit_adam", "--dry_run")
    (stated,) = re.findall(r"([\d.]+) kB optimizer", capsys.readouterr().out)
    assert float(stated) == pytest.approx(written / 1000, abs=0.1)
