"""Timestep spacing: let sampling start from noise, whatever the number of steps."""

import copy
import functools
import logging
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..core.errors import InputError

logger = logging.getLogger(__name__)

_LATEST_START = 0.9  # sampling must start in the last tenth of the noise process, where images are noise


def with_usable_spacing(scheduler: Any, num_inference_steps: int) -> Any:
    """Return a scheduler, or a copy with another spacing of the timesteps if it cannot sample well with its own.

    With `leading` spacing, the first of n timesteps is (T // n) (n - 1) of T: 666 for 334 steps of 1000, where an
    image is not noise yet, although sampling starts from noise. With an offset it may be T, which does not exist, and
    for as many steps as timesteps, solvers repeat timesteps. The last timesteps of n equal parts of the process,
    `trailing` spacing, have none of these problems (arXiv 2305.08891, sec. 3.3), but for some n Diffusers rounds them
    to an additional timestep -1; then they are spaced as in `linspace`.

    Raises:
        InputError: If the scheduler cannot take this number of steps.
    """
    check_steps(scheduler, num_inference_steps)
    saved: str = scheduler.config.timestep_spacing
    for spacing in dict.fromkeys((saved, "trailing", "linspace")):
        candidate = scheduler
        if spacing != saved:
            candidate = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
        timesteps = _timesteps(candidate, num_inference_steps)
        if timesteps is None or timesteps.max() < _LATEST_START * scheduler.config.num_train_timesteps:
            continue
        if spacing != saved:
            _log_once(
                f"Note: in {num_inference_steps} steps, {type(scheduler).__name__} samples with {spacing} timesteps, "
                f"which start from noise, instead of the {saved} ones in its config. There is nothing to change."
            )
        return candidate
    if _timesteps(scheduler, num_inference_steps) is None:
        raise InputError(
            f"A {type(scheduler).__name__} has no timesteps for sampling this pipeline in {num_inference_steps} steps "
            "(with `use_karras_sigmas`, for example, they may coincide). Use fewer steps, or another scheduler, such "
            "as ddim."
        )
    return scheduler


def _timesteps(scheduler: Any, num_inference_steps: int) -> torch.Tensor | None:
    """Return the timesteps of a scheduler, or None if it cannot sample with them."""
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except (ArithmeticError, AssertionError, IndexError, ValueError):  # as the schedulers of Diffusers report it
        return None
    timesteps, trained = scheduler.timesteps, scheduler.config.num_train_timesteps
    if len(timesteps) == 0 or timesteps.max() >= trained or -1 in timesteps:
        return None
    if hasattr(scheduler, "sigmas") and scheduler.order == 1:  # solvers of higher order repeat timesteps on purpose
        # a solver looks up its first timestep by value, and divides by the distances of the noise levels
        if (timesteps == timesteps[0]).sum() > 1:
            return None
        if not scheduler.config.get("use_karras_sigmas") and len(timesteps.unique()) < len(timesteps):
            return None
    return timesteps


def changed_spacing(pipe: DiffusionPipeline, scheduler: Any) -> dict[str, str]:
    """Return the `timestep_spacing` of a scheduler if it is not the one saved with a pipeline, else nothing."""
    spacing = scheduler.config.get("timestep_spacing")
    return {} if spacing == pipe.scheduler.config.get("timestep_spacing") else {"timestep_spacing": spacing}


def check_steps(scheduler: Any, num_inference_steps: int) -> None:
    """Check that there are no more steps than timesteps in training.

    Raises:
        InputError: If there are.
    """
    trained: int = scheduler.config.num_train_timesteps
    if num_inference_steps > trained:
        raise InputError(
            f"{num_inference_steps} inference steps are more than the {trained} timesteps that this pipeline was "
            "trained with."
        )


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
