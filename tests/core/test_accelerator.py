"""Accelerate is started as it is configured, or the reason why not is reported."""

import os

import pytest
from accelerate.state import AcceleratorState, PartialState

from ddgan.core import accelerator
from ddgan.core.accelerator import start_accelerate
from ddgan.core.errors import InputError


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "configured for DeepSpeed, which is not supported.*accelerate config"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "configured for Megatron-LM, which is not supported"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "configured for fp8 precision, which is not supported"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "pass --grad_accumulation_steps 4"),
    ],
)
def test_unsupported_configurations_are_reported(monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=message):
        start_accelerate(grad_accumulation_steps=2)


@pytest.mark.parametrize("steps", ["1", "2", "auto"])
def test_gradients_are_not_divided_by_the_configured_accumulation(monkeypatch, steps):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    assert start_accelerate(grad_accumulation_steps=2).gradient_accumulation_steps == 1


def test_commands_that_do_not_train_ignore_the_accumulation(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert start_accelerate().gradient_accumulation_steps == 1


LAUNCHED = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_MIXED_PRECISION": "no"}
RANK_1 = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (LAUNCHED, "`accelerate launch` has started one process instead of several.*torchrun"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set.*ddgan <command> --num_processes N"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS is 2, but RANK is not set.*examples/slurm"),
    ],
)
def test_several_processes_are_never_several_runs(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        start_accelerate()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start_accelerate().num_processes == 1


def test_fsdp_without_gpus_is_reported(monkeypatch):
    monkeypatch.setattr(accelerator, "_device_count", lambda: 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"FSDP, which needs GPUs.*omit --config_file, and set --num_processes"):
        start_accelerate()


def test_processes_that_accelerate_does_not_connect_are_reported(monkeypatch):
    monkeypatch.setattr(accelerator, "_device_count", lambda: 2)
    PartialState(cpu=True)
    for name, value in RANK_1.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"started 2 processes, but Accelerate connects 1 of them.*--num_processes N"):
        start_accelerate()


def test_more_processes_than_gpus_are_reported(monkeypatch):
    monkeypatch.setattr(accelerator, "_device_count", lambda: 1)
    for name, value in RANK_1.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="2 processes on this machine need as many GPUs, but it has 1: start fewer"):
        start_accelerate()
    assert "ACCELERATE_USE_CPU" not in os.environ
