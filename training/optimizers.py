"""The optimizer AdamW, with its state in 32 or in 8 bits."""

from collections.abc import Iterable
from functools import partial
from math import ceil

import torch

from .arguments import LearningRateArguments

# of bitsandbytes: parameters with fewer elements keep a state of 32 bits, and blocks of a state share a scale
_MIN_8BIT_SIZE, _BLOCK_SIZE = 4096, 256


def adamw(parameters: Iterable[torch.nn.Parameter], args: LearningRateArguments) -> torch.optim.Optimizer:
    """Return AdamW with these settings, from bitsandbytes with `--use_8bit_adam` (arXiv 2110.02861)."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        optimizer = partial(AdamW8bit, min_8bit_size=_MIN_8BIT_SIZE)
    else:
        optimizer = partial(torch.optim.AdamW, fused=True)
    return optimizer(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.adam_weight_decay,
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the two moments that Adam keeps of each parameter, before or after its first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return 2 * sum(_moment_bytes(parameter, has_8bit_state(optimizer)) for parameter in parameters)


def has_8bit_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer is that of `--use_8bit_adam`."""
    return type(optimizer).__name__ == "AdamW8bit"


def _moment_bytes(parameter: torch.nn.Parameter, in_8_bits: bool) -> int:
    if not in_8_bits:
        return parameter.nbytes
    if parameter.numel() < _MIN_8BIT_SIZE:
        return 4 * parameter.numel()
    return parameter.numel() + 4 * ceil(parameter.numel() / _BLOCK_SIZE)
