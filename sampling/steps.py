"""The default number of sampling steps, and the numbers that a few-step pipeline was trained for."""

import functools
import logging
from typing import Literal

from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline

from .. import ClassConditionalPipeline, GuidedPipeline

logger = logging.getLogger(__name__)


def trained_steps(pipe: DiffusionPipeline) -> list[int]:
    """Return the numbers of sampling steps that a pipeline was trained for, its default first.

    Few-step fine-tuning writes them into the scheduler's config. Empty for any other pipeline.
    """
    return pipe.scheduler.config.get("_num_inference_steps") or []


def default_gradient(pipe: DiffusionPipeline) -> Literal["sample", "model"]:
    """Return the default `gradient` of guidance by a loss: through the network for few-step pipelines.

    Their images hardly change with the other gradient, see docs/guidance.md.
    """
    return "model" if trained_steps(pipe) else "sample"


def default_steps(pipe: DiffusionPipeline) -> int | None:
    """Return the default number of sampling steps; None for pipelines whose default is not known here.

    It is the first of `trained_steps` for a few-step pipeline; otherwise, in a plain `DDPMPipeline` or `DDIMPipeline`,
    all timesteps of training for DDPM and at most 50 for other schedulers.
    """
    if trained := trained_steps(pipe):
        return trained[0]
    if type(pipe) in (DDPMPipeline, DDIMPipeline):
        timesteps: int = pipe.scheduler.config.num_train_timesteps
        return timesteps if isinstance(pipe.scheduler, DDPMScheduler) else min(50, timesteps)
    if isinstance(pipe, (ClassConditionalPipeline, GuidedPipeline)):
        return pipe._choose_steps(None)
    return None


def steps_warning(pipe: DiffusionPipeline, num_inference_steps: int) -> str | None:
    """Return a warning, one sentence, if a few-step pipeline was not trained for its scheduler or number of steps."""
    trained, scheduler = trained_steps(pipe), pipe.scheduler
    if not trained or (num_inference_steps in trained and isinstance(scheduler, DDPMScheduler)):
        return None
    return (
        f"This pipeline was trained for num_inference_steps={' or '.join(map(str, trained))} with DDPMScheduler "
        f"(posterior steps); num_inference_steps={num_inference_steps} with {type(scheduler).__name__} may give worse "
        "images."
    )


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless the same one was logged before in this process."""
    logger.warning(message)
