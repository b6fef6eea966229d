"""Starting Accelerate as the user configured it, or explaining why that is not possible."""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, str_to_bool

from .errors import InputError

# settings of `accelerate config` that no command supports, as environment variables of the launcher
_UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_ADVICE = "Change it with `accelerate config`, or pass a file of examples/accelerate with --config_file."


def start_accelerate(grad_accumulation_steps: int | None = None, **options: Any) -> Accelerator:
    """Return an `Accelerator`.

    Args:
        grad_accumulation_steps: number of micro-batches that a training run accumulates itself.
        options: further arguments of `Accelerator`.

    Raises:
        InputError: if the configuration of Accelerate is not supported, or this machine does not support it.
    """
    for variable, name in _UNSUPPORTED.items():
        if str_to_bool(os.environ.get(variable, "false")):
            raise InputError(f"Accelerate is configured for {name}, which is not supported. {_ADVICE}")
    precision = options.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"Accelerate is configured for {precision} precision, which is not supported. {_ADVICE}")
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if grad_accumulation_steps and configured not in ("1", "auto", str(grad_accumulation_steps)):
        raise InputError(
            f"Accelerate is configured for {configured} gradient accumulation steps, but the run accumulates "
            f"{grad_accumulation_steps}: pass --grad_accumulation_steps {configured}, or change the configuration."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        options["cpu"] = True  # otherwise Accelerate does not connect the processes of torchrun or notebook_launcher
    try:
        # the plugin keeps Accelerate from dividing the loss, too
        accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"Accelerate cannot start as it is configured: {error} {_ADVICE}") from error
    if accelerator.device.type == "cpu" and multiprocessing.parent_process() is not None:
        # in a fork of a process that has used OpenMP threads, such as a notebook, it would wait for new ones forever
        torch.set_num_threads(1)
    if not accelerator.is_main_process:  # all processes have the same input, so the warnings of one are enough
        logging.getLogger("ddgan").setLevel(logging.ERROR)
    return accelerator


@contextmanager
def no_state_left() -> Iterator[None]:
    """Remove the state of an `Accelerator` made within the block, which later ones in the process would share.

    They could not have another mixed precision, and `accelerate.notebook_launcher` would refuse to start. The state of
    an `Accelerator` made before is kept.
    """
    if AcceleratorState._shared_state:
        yield
        return
    had_devices = bool(PartialState._shared_state)
    try:
        yield
    finally:
        is_alone = not PartialState._shared_state or PartialState().num_processes == 1
        AcceleratorState._reset_state(reset_partial_state=is_alone and not had_devices)
