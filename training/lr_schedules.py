"""The course of a learning rate over the optimizer steps of a run."""

import math
from functools import partial

from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..core.errors import InputError
from .arguments import LearningRateArguments


def schedule(optimizer: Optimizer, total_steps: int, args: LearningRateArguments) -> LambdaLR:
    """What `--lr_scheduler` and `--lr_warmup_steps` ask for.

    Raises:
        InputError: if they do not go together.
    """
    try:
        return get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=total_steps
        )
    except ValueError as error:
        raise InputError(f"--lr_scheduler {args.lr_scheduler} cannot be used like this: {error}") from None


def cosine_by_epoch(optimizer: Optimizer, total_steps: int, lowest: float, steps_per_epoch: int | None) -> LambdaLR:
    """Half a cosine from each parameter group's learning rate down to `lowest`, constant within an epoch.

    Args:
        steps_per_epoch: None for a stream, where the rate goes down at every step.
    """

    def factor(step: int, peak: float) -> float:
        began = step - step % (steps_per_epoch or 1)
        progress = min(began / total_steps, 1.0)
        return (lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2) / peak

    return LambdaLR(optimizer, [partial(factor, peak=group["lr"]) for group in optimizer.param_groups])
