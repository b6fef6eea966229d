"""Claims about training from Python, without a command line."""

import sys
from pathlib import Path

import pytest
from accelerate import notebook_launcher
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from tiny import largest_difference, weights

from ddgan.commands.arguments import FinetuneArguments
from ddgan.commands.finetune import finetune as finetune_function
from ddgan.training.arguments import (
    DataArguments,
    EvaluationArguments,
    LearningRateArguments,
    RunArguments,
    ValidationArguments,
)
from ddgan.training.tracking import read_metrics


def arguments(model: Path, images: Path, output: Path, **run) -> tuple:
    """The argument dataclasses of a run that is as short as possible."""
    return (
        RunArguments(output_dir=str(output), report_to="none", batch_size=4, max_train_steps=2, num_samples=2, **run),
        LearningRateArguments(learning_rate=1e-2),
        DataArguments(train_data_dir=str(images)),
        EvaluationArguments(),
        ValidationArguments(),
        FinetuneArguments(start_model=str(model), sample_steps=2),
    )


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["notebook", "--no_such_flag"])


def test_dataclasses_train_without_a_command_line(tiny_model, images, tmp_path, capsys):
    result = finetune_function(*arguments(tiny_model, images, tmp_path / "run"))
    assert (result.folder, result.upload) == (tmp_path / "run", None)
    assert (result.facts.step, result.facts.total_steps) == (2, 2)
    assert result.facts.losses["loss"] > 0
    assert DDPMPipeline.from_pretrained(result.folder).unet.config.sample_size == 8
    assert capsys.readouterr().out == "", "the library printed something"


def test_python_and_the_command_line_train_the_same_weights(finetune, tiny_model, images, tmp_path):
    finetune_function(*arguments(tiny_model, images, tmp_path / "python"))
    command = finetune("command", "--batch_size", 4, "--max_train_steps", 2)
    assert largest_difference(weights(tmp_path / "python"), weights(command)) == 0


def test_the_notebook_launcher_trains(tiny_model, images, tmp_path):
    notebook_launcher(finetune_function, arguments(tiny_model, images, tmp_path / "run"), num_processes=1)
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")) == 2
