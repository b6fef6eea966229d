"""Record the intermediate steps of sampling: noisy samples and the clean images predicted from them."""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..core.errors import InputError
from .generation import sample, to_pil_images


class Step(NamedTuple):
    """A step of a scheduler.

    Attributes:
        number: Index of the step, from 0.
        total: Number of steps.
        timestep: The scheduler's timestep.
        noisy: Input of the network, `(N, C, H, W)`.
        clean: Clean images predicted from it, `(N, C, H, W)`, in about [-1, 1].
    """

    number: int
    total: int
    timestep: int
    noisy: torch.Tensor
    clean: torch.Tensor


def check_traceable(pipe: DiffusionPipeline) -> None:
    """Check that the steps of a pipeline can be traced.

    Raises:
        InputError: If its scheduler does not predict a clean image in each step.
    """
    if not hasattr(pipe.scheduler, "step") or not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise InputError(
            f"The denoising steps of a {type(pipe).__name__} with a {type(pipe.scheduler).__name__} cannot be shown: "
            "omit --intermediates."
        )


@contextmanager
def trace_steps(pipe: DiffusionPipeline, on_step: Callable[[Step], None]) -> Iterator[None]:
    """Within the block, call `on_step` after each step of the pipeline's scheduler; an exception ends the sampling."""
    scheduler, numbers = pipe.scheduler, itertools.count()
    step = scheduler.step

    @functools.wraps(step)
    def traced_step(model_output, timestep, sample, *args, **kwargs):
        noisy = scheduler.scale_model_input(sample, timestep)
        output = step(model_output, timestep, sample, *args, **kwargs)
        clean = getattr(output, "pred_original_sample", None)
        if clean is None:
            clean = _predict_clean(scheduler, model_output, int(timestep), sample)
        on_step(Step(next(numbers), len(scheduler.timesteps), int(timestep), noisy, clean))
        return output

    scheduler.step = traced_step
    try:
        yield
    finally:
        del scheduler.step


class DenoisingTrace:
    """The denoising of the first image of a batch, recorded at evenly spaced steps.

    Args:
        count: Number of steps to record; all, if there are fewer.

    Attributes:
        timesteps: The recorded timesteps.
        noisy: The noisy samples that the network received.
        clean: The clean images predicted from them. With all `SCHEDULERS` the last one is the final image.
    """

    def __init__(self, count: int):
        self.count = count
        self.timesteps: list[int] = []
        self.noisy: list[Image.Image] = []
        self.clean: list[Image.Image] = []

    def record(self, step: Step) -> None:
        """Record a step if it is one of the evenly spaced ones; pass this to `trace_steps`."""
        last = step.total - 1
        if step.number in np.linspace(last, 0, min(self.count, step.total)).round():
            self.timesteps.append(step.timestep)
            self.noisy += to_pil_images(step.noisy[:1])
            self.clean += to_pil_images(step.clean[:1])


def intermediates(
    pipe: DiffusionPipeline,
    seed: int,
    count: int,
    num_inference_steps: int | None = None,
    class_label: int | str | None = None,
    **options: Any,
) -> tuple[list[int], list[Image.Image], list[Image.Image]]:
    """Generate one image and return the timesteps, noisy samples and clean images of its `DenoisingTrace`.

    Args:
        count: Number of steps to record.
        num_inference_steps, class_label, options: As for `sample`.

    Raises:
        InputError: See `check_traceable` and `sample`.
    """
    check_traceable(pipe)
    trace = DenoisingTrace(count)
    with trace_steps(pipe, trace.record):
        sample(pipe, [seed], num_inference_steps, None if class_label is None else [class_label], **options)
    return trace.timesteps, trace.noisy, trace.clean


def _predict_clean(scheduler, model_output: torch.Tensor, timestep: int, noisy: torch.Tensor) -> torch.Tensor:
    """Compute x_0 from x_t and the network's output where `step` does not return it (arXiv 2006.11239, eq. 15)."""
    alpha_bar = scheduler.alphas_cumprod[timestep].item()
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha_bar) ** 0.5 * model_output) / alpha_bar**0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * noisy - (1 - alpha_bar) ** 0.5 * model_output
    return model_output
