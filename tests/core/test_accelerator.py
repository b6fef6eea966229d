"""Accelerate is started as it is configured, or the reason why not is reported."""

import pytest
from accelerate.state import AcceleratorState

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
