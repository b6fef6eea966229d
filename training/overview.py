"""The overview of a run before its first step."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from ..core.files import format_size
from ..data.preprocessing import Preprocessing
from .arguments import RunArguments
from .job import TrainingJob
from .loading import TrainingData
from .model_card import describe_hardware, describe_precision
from .optimizers import state_bytes
from .plan import BatchPlan
from .posthoc_ema import PosthocEMA
from .sharding import local_shards, num_shards, original_class


def opening(job: TrainingJob, data: TrainingData, total_steps: int, accelerator: Accelerator) -> str:
    """Return the data, the length and the size of a run, in two sentences."""
    plan = data.plan
    images = f"{plan.num_images:,} images" if plan.num_images else "a stream of images"
    if data.validation_plan:
        images += f" ({data.validation_plan.num_images:,} more are held out)"
    precision = describe_precision(accelerator)
    return (
        f"Training on {images}: {describe_length(plan, total_steps)}, {describe_batch(plan)}. "
        f"{describe_parameters(job)} are trained, on {describe_hardware(accelerator)}, in {precision}."
    )


def overview(
    job: TrainingJob,
    data: TrainingData,
    args: RunArguments,
    total_steps: int,
    accelerator: Accelerator,
    posthoc_ema: PosthocEMA,
    first_step: int,
    activations: Sequence[int] | None,
) -> dict[str, str]:
    """Return the sizes of a run, its memory and its disk space, as rows of a table.

    Args:
        posthoc_ema: the EMAs of `--posthoc_ema`.
        first_step: the step from which it starts or resumes.
        activations: bytes that each network keeps for the backward pass, for one image; None if unknown.
    """
    plan = data.plan
    count = f"{plan.num_images:,} images" if plan.num_images else "a stream"
    length = describe_length(plan, total_steps)
    held_out = data.validation_plan and data.validation_plan.num_images
    return {
        "trained": describe_parameters(job),
        "images": f"{data.name}: {count}, used at {describe_size(data.preprocessing)}",
        **({"validation": f"{held_out:,} more, every {data.validation_every:,} steps"} if held_out else {}),
        "length": length + (f", of which {first_step:,} are done" if first_step else ""),
        "batch": describe_batch(plan),
        "hardware": f"{describe_hardware(accelerator)}, {describe_precision(accelerator)}",
        "memory": _memory(job, accelerator, posthoc_ema, activations),
        "disk": _disk(job, args, accelerator, posthoc_ema, total_steps),
        "run folder": args.output_dir,
    }


def saved_bytes(loss: Callable[[], object], networks: Iterable[torch.nn.Module]) -> int:
    """Return the bytes of the tensors that computing a loss keeps for the backward pass, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = loss()
    del losses  # until here it keeps the tensors, so that no two have the same address
    return sum(sizes.values())


def _memory(
    job: TrainingJob, accelerator: Accelerator, posthoc_ema: PosthocEMA, activations: Sequence[int] | None
) -> str:
    """Describe the memory of one process in a training step. Networks are updated one after the other."""
    parts = {
        "weights": sum(_bytes(local_shards(spec.network.parameters())) for spec in job.networks),
        "gradients": max(_trained_bytes(spec.network) for spec in job.networks),
        "optimizer": sum(state_bytes(spec.optimizer) for spec in job.networks) // num_shards(accelerator),
        "EMA": _bytes(job.ema.weights()),
    }
    if posthoc_ema.averages:
        parts["post-hoc EMA"] = _bytes(posthoc_ema.weights())
    more = ", and activations"
    if activations is not None:
        parts["activations"] = max(activations)
        more = ""
    listed = ", ".join(f"{format_size(size)} {name}" for name, size in parts.items())
    return f"about {format_size(sum(parts.values()))} per process, without libraries ({listed}){more}"


def _disk(
    job: TrainingJob, args: RunArguments, accelerator: Accelerator, posthoc_ema: PosthocEMA, total_steps: int
) -> str:
    """Describe the disk space for the pipeline, the checkpoints and the EMA snapshots.

    A checkpoint is removed after the next is written.
    """
    weights = sum(_bytes(spec.network.parameters()) for spec in job.networks)
    optimizers = sum(state_bytes(spec.optimizer) for spec in job.networks)
    pipeline = _bytes(job.ema.network.parameters())
    averages = (_bytes(job.ema.weights()) + _bytes(posthoc_ema.weights())) * num_shards(accelerator)
    checkpoint = weights + optimizers + averages
    saves = -(-total_steps // args.checkpointing_steps) if args.checkpointing_steps else 1
    kept = min(saves, args.checkpoints_total_limit + 1) if args.checkpoints_total_limit else saves
    folder = Path(args.output_dir).absolute()
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    snapshots = len(posthoc_ema.snapshot_steps)
    needed = kept * checkpoint + 2 * pipeline + snapshots * posthoc_ema.snapshot_bytes
    checkpoints = f"{kept} {'checkpoint' if kept == 1 else 'checkpoints'} of {format_size(checkpoint)}"
    if snapshots:
        checkpoints += f", {snapshots} EMA snapshots of {format_size(posthoc_ema.snapshot_bytes)}"
    verdict = "" if needed < free else ": not enough"
    return (
        f"about {format_size(needed)} ({checkpoints}, pipeline of {format_size(pipeline)}); {format_size(free)} are "
        f"free{verdict}"
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _trained_bytes(network: torch.nn.Module) -> int:
    return _bytes(parameter for parameter in network.parameters() if parameter.requires_grad)


def describe_size(preprocessing: Preprocessing) -> str:
    """Return the width, height and channels of the images that the network takes."""
    channels = "1 channel" if preprocessing.channels == 1 else f"{preprocessing.channels} channels"
    return f"{preprocessing.width}x{preprocessing.height}, {channels}"


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
        count = f"{trained:,}" + (f" of {total:,}" if trained < total else "")
        parts.append(f"{count} parameters ({original_class(spec.network).__name__})")
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
