"""The overview of a run before its first step."""

import torch
from accelerate import Accelerator

from .arguments import RunArguments
from .job import TrainingJob
from .loading import TrainingData
from .model_card import describe_hardware, describe_precision
from .plan import BatchPlan


def opening(
    job: TrainingJob, data: TrainingData, args: RunArguments, total_steps: int, accelerator: Accelerator
) -> str:
    """Return the data, the length and the size of a run, in two sentences."""
    plan = data.plan
    images = f"{plan.num_images:,} images" if plan.num_images else "a stream of images"
    precision = describe_precision(accelerator)
    return (
        f"Training on {images}: {describe_length(plan, total_steps)}, {describe_batch(plan)}. "
        f"{describe_parameters(job)} are trained, on {describe_hardware(accelerator)}, in {precision}."
    )


def describe_length(plan: BatchPlan, total_steps: int) -> str:
    """Return the number of optimizer steps of a run and of an epoch."""
    if plan.steps_per_epoch is None:
        return f"{total_steps:,} steps"
    return f"{total_steps:,} steps ({plan.epoch(total_steps):.3g} epochs of {plan.steps_per_epoch:,})"


def describe_batch(plan: BatchPlan) -> str:
    """Return the global batch size and the product that gives it."""
    factors = {"per micro-batch": plan.batch_size, "accumulated": plan.accumulation, "processes": plan.processes}
    product = " x ".join(
        f"{count} {name}" for name, count in factors.items() if count > 1 or name == "per micro-batch"
    )
    several = plan.global_batch_size > plan.batch_size
    return f"global batch size {plan.global_batch_size:,}" + (f" ({product})" if several else "")


def describe_parameters(job: TrainingJob) -> str:
    """Return the number of trained parameters of each network, and how many are frozen."""
    parts = []
    for spec in job.networks:
        trained, total = count_parameters(spec.network)
        name = f" ({spec.name})" if spec.name else ""
        parts.append(f"{trained:,}" + (f" of {total:,}" if trained < total else "") + f" parameters{name}")
    return " and ".join(parts)


def count_parameters(network: torch.nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters."""
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def format_duration(seconds: float) -> str:
    """Return a duration in the largest suitable unit."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
