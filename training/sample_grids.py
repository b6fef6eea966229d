"""Grids of samples from fixed seeds, which show the progress of a run."""

import torch
from accelerate import Accelerator
from PIL import Image

from ..core.files import replace_file
from ..sampling.grids import before_after
from .arguments import RunArguments
from .job import TrainingJob
from .run_folder import RunFolder


@torch.no_grad()
def sample_grid(job: TrainingJob, args: RunArguments, accelerator: Accelerator) -> Image.Image | None:
    """Sample the fixed seeds of a run, sharded over the processes, and return the grid in the main process."""
    assert job.sampler is not None
    indices = list(range(args.num_samples))
    with accelerator.split_between_processes(indices, apply_padding=True) as shard:
        own_indices: list[int] = shard  # pyright: ignore[reportAssignmentType]
        images: list[Image.Image] = []
        for start in range(0, len(own_indices), args.batch_size):  # a batch size that fits into memory during training
            batch = own_indices[start : start + args.batch_size]
            labels = job.labels and [job.labels[i] for i in batch]
            images += job.sampler(job.pipeline, [args.seed + i for i in batch], labels)  # pyright: ignore[reportArgumentType]
        image_of = dict(zip(own_indices, images, strict=True))
    if accelerator.num_processes > 1:
        gathered: list[dict[int, Image.Image]] = [{} for _ in range(accelerator.num_processes)]
        torch.distributed.all_gather_object(gathered, image_of)
        image_of = {index: image for part in gathered for index, image in part.items()}
    return job.grid([image_of[index] for index in indices]) if accelerator.is_main_process else None


def save_before_after(folder: RunFolder, step: int) -> None:
    """Save the grids of step 0 and of `step` side by side, if both exist and have the same size."""
    paths = [folder.grid(0), folder.grid(step)]
    if all(path.exists() for path in paths):
        before, after = map(Image.open, paths)
        if before.size == after.size:  # otherwise --num_samples has changed
            replace_file(folder.before_after, before_after(before, after).save)
