"""Starting Accelerate as the user configured it, or explaining why that is not possible."""

import os
from typing import Any

from accelerate import Accelerator
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
    try:
        # the plugin keeps Accelerate from dividing the loss, too
        return Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"Accelerate cannot start as it is configured: {error} {_ADVICE}") from error
