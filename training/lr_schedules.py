"""Learning-rate schedules over the optimizer steps of a run."""

import logging
import math
from functools import partial

from diffusers.optimization import get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ..core.errors import InputError
from .arguments import LearningRateArguments

logger = logging.getLogger(__name__)

_WARMUP_STEPS = 20  # of `two_stage_schedule`


def lr_schedule(optimizer: Optimizer, total_steps: int, args: LearningRateArguments) -> LambdaLR:
    """Return the schedule of `--lr_scheduler` and `--lr_warmup_steps`.

    Warns about warmup steps that have no effect, or are more than the run has.

    Raises:
        InputError: if the two cannot be combined.
    """
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        logger.warning(
            f"--lr_warmup_steps {args.lr_warmup_steps} has no effect with --lr_scheduler constant: use "
            "constant_with_warmup, or omit it."
        )
    elif args.lr_warmup_steps > total_steps:
        logger.warning(
            f"--lr_warmup_steps {args.lr_warmup_steps} is more than the {total_steps} steps of the run: the learning "
            f"rate rises only to {total_steps / args.lr_warmup_steps:.2g} times --learning_rate."
        )
    try:
        return get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=total_steps
        )
    except ValueError as error:
        raise InputError(f"--lr_scheduler {args.lr_scheduler} cannot be used with these settings: {error}") from None


def cosine_by_epoch(optimizer: Optimizer, total_steps: int, lowest: float, steps_per_epoch: int | None) -> LambdaLR:
    """Return a cosine decay from each parameter group's learning rate to `lowest`, constant within an epoch.

    Args:
        steps_per_epoch: None for a stream, where the rate decreases at every step.
    """

    def factor(step: int, peak: float) -> float:
        epoch_start = step - step % (steps_per_epoch or 1)
        progress = min(epoch_start / total_steps, 1.0)
        return (lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2) / peak

    return LambdaLR(optimizer, [partial(factor, peak=group["lr"]) for group in optimizer.param_groups])


def two_stage_schedule(
    optimizer: Optimizer, total_steps: int, first_stage: int = 0, first_peak: float = 1.0
) -> LambdaLR:
    """Return a schedule of one or two stages, each a short warmup and, in its second half, a linear decay to zero.

    Args:
        first_stage: optimizer steps of the first stage, at most `total_steps`; 0 for the second stage alone.
        first_peak: its peak learning rate, as a multiple of the optimizer's.
    """

    def factor(step: int) -> float:
        start, stop, peak = (0, first_stage, first_peak) if step < first_stage else (first_stage, total_steps, 1.0)
        decay = 2 * (stop - step) / max(1, stop - start)  # after the last step both can be 0
        return peak * min(1.0, (step - start + 1) / _WARMUP_STEPS, decay)

    return LambdaLR(optimizer, factor)


def set_peak_rates(schedule: LambdaLR, rates: list[float]) -> None:
    """Replace the peak learning rates of a schedule and keep its position.

    A resumed run thus uses its own learning rates, not those in the checkpoint.
    """
    schedule.base_lrs = rates
    for group, rate, factor in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
