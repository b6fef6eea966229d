"""The commands as functions, for notebooks and other programs.

    from ddgan.api import finetune, generate

    run = finetune(start_model="google/ddpm-celebahq-256", train_data=images, image_size=64, max_train_steps=1000)
    run.pipeline(num_inference_steps=40).images[0]

Each function is named like its command and takes the flags as keywords, with the same checks. Unlike the commands,
`finetune` and `train_ddgan` do not fall back to the demo's settings if no data are passed. Where a flag names a
pipeline, it takes a `DiffusionPipeline`, too; where it names images, a list of PIL images, a `datasets.Dataset` or a
`datasets.DatasetDict`. A YAML file for `--config` is passed as `config`. Importing this module is cheap: PyTorch and
Diffusers are imported by the first call.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, TypeVar

from .commands.arguments import (
    CLASS_CONDITIONAL_ARGUMENTS,
    CLASSIFIER_ARGUMENTS,
    DDGAN_ARGUMENTS,
    FEW_STEP_ARGUMENTS,
    FINETUNE_ARGUMENTS,
    ChooseEMAArguments,
    ConvertArguments,
    EvaluateArguments,
    GenerateArguments,
    PushArguments,
)
from .core.cli import default_of, expand_user, read_config
from .core.errors import InputError, RunError
from .core.locations import EXAMPLES, find
from .training.arguments import DataArguments

if TYPE_CHECKING:
    from pathlib import Path

    from .commands.choose_ema import ChosenEMA
    from .commands.generate import GeneratedImages
    from .evaluation.results import Results
    from .training.model_card import FinishedRun

__all__ = [
    "InputError",
    "RunError",
    "choose_ema",
    "convert",
    "evaluate",
    "few_step",
    "finetune",
    "generate",
    "push",
    "train_class_conditional",
    "train_classifier",
    "train_ddgan",
]

_TRAIN_DATA, _CONFIG = "train_data", "config"

_Result = TypeVar("_Result")


def _takes_flags_of(
    *kinds: type, config: str | None = None
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Make a function of dataclasses of arguments take their fields as keywords.

    Args:
        kinds: the dataclasses, in the order in which the function takes them.
        config: the default of the keyword `config`.
    """
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind)}
    parameters = [Parameter(name, Parameter.KEYWORD_ONLY, default=default_of(fields[name])) for name in fields]
    if any(issubclass(kind, DataArguments) for kind in kinds):
        parameters.append(Parameter(_TRAIN_DATA, Parameter.KEYWORD_ONLY, default=None))
    parameters.append(Parameter(_CONFIG, Parameter.KEYWORD_ONLY, default=config))
    known = {parameter.name for parameter in parameters}

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        name = function.__name__

        @functools.wraps(function)
        def call(**flags: Any) -> _Result:
            if unknown := next((flag for flag in flags if flag not in known), None):
                closest = difflib.get_close_matches(unknown, known, n=1)
                hint = f"Did you mean {closest[0]}?" if closest else f"help({name}) lists them."
                raise InputError(f"{name} takes no argument {unknown}. {hint}")
            values = _values(kinds, {_CONFIG: config, **flags})
            names = [[field.name for field in dataclasses.fields(kind) if field.name in values] for kind in kinds]
            arguments = [kind(**{name: values[name] for name in own}) for kind, own in zip(kinds, names, strict=True)]
            with _nothing_left_behind():
                return function(*arguments)

        call.__signature__ = Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        return call

    return decorate


def _values(kinds: tuple[type, ...], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the fields that are set, with `config` and `train_data` replaced by what they stand for."""
    flags = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    config, images = flags.pop(_CONFIG), flags.pop(_TRAIN_DATA, None)
    if images is not None:
        if named := [name for name in ("dataset_name", "train_data_dir") if flags.get(name) is not None]:
            raise InputError(f"{_TRAIN_DATA} and {named[0]} both name the images to train on. Use only one of them.")
        is_name = isinstance(images, str) and find(expand_user(images)) is None
        is_stream = flags.get("streaming") and not isinstance(images, str)
        flags["dataset_name" if is_name or is_stream else "train_data_dir"] = images
    overriding = [name for name, value in flags.items() if value is not None]
    return (read_config(str(config), *kinds, overriding=overriding) if config is not None else {}) | flags


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """Leave no state of Accelerate behind, and end with KeyboardInterrupt instead of SystemExit after Ctrl-C."""
    from .core.accelerator import no_state_left
    from .training.stopping import RunStopped

    with no_state_left():
        try:
            yield
        except RunStopped as stopped:
            if stopped.signal_name == "SIGINT":
                raise KeyboardInterrupt(
                    "The run was stopped after it had saved a checkpoint. Repeat the call with "
                    "resume_from_checkpoint='latest'."
                ) from None
            raise


@_takes_flags_of(*FINETUNE_ARGUMENTS)
def finetune(*arguments: Any) -> "FinishedRun":
    """Fine-tune an unconditional pipeline on images.

    Args:
        start_model: a `DiffusionPipeline`, which is not changed, a pipeline folder or a Hub repository.
        train_data: a list of PIL images, a `datasets.Dataset`, a path, or the name of a dataset on the Hub.
        flags: the flags of `ddgan finetune`.

    Returns:
        The run: its `folder`, `files` (paths), `metrics` (one row for each step), `facts`, and `pipeline`.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
        KeyboardInterrupt: after Ctrl-C, when a checkpoint is saved.
    """
    from .commands.finetune import finetune as run

    return run(*arguments)


@_takes_flags_of(*FEW_STEP_ARGUMENTS)
def few_step(*arguments: Any) -> "FinishedRun":
    """Fine-tune a pipeline into one that samples in a few steps; see `finetune` and `ddgan few-step`."""
    from .commands.few_step import finetune_few_step

    return finetune_few_step(*arguments)


@_takes_flags_of(*DDGAN_ARGUMENTS)
def train_ddgan(*arguments: Any) -> "FinishedRun":
    """Train a Denoising Diffusion GAN; see `finetune` and `ddgan train-ddgan`."""
    from .commands.train_ddgan import train_ddgan as run

    return run(*arguments)


@_takes_flags_of(*CLASS_CONDITIONAL_ARGUMENTS, config=str(EXAMPLES / "recipes" / "class_conditional_tutorial.yaml"))
def train_class_conditional(*arguments: Any) -> "FinishedRun":
    """Train a class-conditional diffusion model; see `finetune` and `ddgan train-class-conditional`."""
    from .commands.train_class_conditional import train_class_conditional as run

    return run(*arguments)


@_takes_flags_of(*CLASSIFIER_ARGUMENTS)
def train_classifier(*arguments: Any) -> "FinishedRun":
    """Train a classifier for evaluation, and measure its accuracy; see `finetune` and `ddgan train-classifier`.

    Load it with `ddgan.evaluation.classifier.ImageClassifier.from_pretrained(run.folder)`.
    """
    from .commands.train_classifier import train_classifier as run

    return run(*arguments)


@_takes_flags_of(GenerateArguments)
def generate(*arguments: Any) -> "GeneratedImages":
    """Generate one image for each seed into a folder; images that exist already are kept.

    Args:
        pipeline, autoguidance: a `DiffusionPipeline`, which is not changed, a pipeline folder or a Hub repository.
        flags: the flags of `ddgan generate`.

    Returns:
        The images, as a sequence, and their `paths`.

    Raises:
        InputError: if the arguments are invalid, or the folder contains images with other settings.
    """
    from .commands.generate import generate as run

    return run(*arguments)


@_takes_flags_of(EvaluateArguments)
def evaluate(*arguments: Any) -> "Results":
    """Measure a pipeline, or images, against reference images.

    Args:
        pipeline, autoguidance: see `generate`.
        images, reference, held_out: a list of PIL images, a `datasets.Dataset`, a path, or the name of a dataset.
        flags: the flags of `ddgan evaluate`.

    Returns:
        The results: `metrics` by name and number of images, their `protocol` and `warnings`; None in processes other
        than the main one.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if an image cannot be read, or the results cannot be written.
    """
    from .commands.evaluate import evaluate as run

    return run(*arguments)  # pyright: ignore[reportReturnType]


@_takes_flags_of(ChooseEMAArguments)
def choose_ema(*arguments: Any) -> "ChosenEMA":
    """Choose the length of a run's EMA after training; see `evaluate` and `ddgan choose-ema`.

    Args:
        run: the folder of a run with `posthoc_ema=True`.
        reference: a list of PIL images, a `datasets.Dataset`, a path, or the name of a dataset.
        flags: the flags of `ddgan choose-ema`.

    Returns:
        The outcome: the chosen `length`, the `results` of every length, and the `pipeline` in its `folder`; None in
        processes other than the main one.

    Raises:
        InputError: if the arguments are invalid, or the run has no snapshots.
        RunError: if an image cannot be read, or the pipeline cannot be written.
    """
    from .commands.choose_ema import choose_ema as run

    return run(*arguments)  # pyright: ignore[reportReturnType]


@_takes_flags_of(ConvertArguments)
def convert(*arguments: Any) -> "Path":
    """Convert a published checkpoint of DDGANs to a pipeline folder, and return it; see `ddgan convert`."""
    from .commands.convert import convert as run

    return run(*arguments)


@_takes_flags_of(PushArguments)
def push(*arguments: Any) -> str:
    """Publish a pipeline folder on the Hugging Face Hub, and return the address of its page; see `ddgan push`."""
    from .commands.push import push as run

    return run(*arguments)
