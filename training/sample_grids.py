"""Grids of samples from fixed seeds, which show the progress of a run."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from ..core.files import replace_file
from ..sampling.grids import before_after
from .arguments import RunArguments
from .job import Sampler, TrainingJob
from .run_folder import RunFolder

ORDINARY_GRID = {"": ""}

logger = logging.getLogger(__name__)


@torch.no_grad()
def sample_grid(
    sampler: Sampler, job: TrainingJob, args: RunArguments, accelerator: Accelerator
) -> Image.Image | None:
    """Sample the fixed seeds of a run, sharded over the processes, and return the grid in the main process."""
    indices = list(range(args.num_samples))
    with accelerator.split_between_processes(indices, apply_padding=True) as shard:
        own_indices: list[int] = shard  # pyright: ignore[reportAssignmentType]
        images: list[Image.Image] = []
        for start in range(0, len(own_indices), args.batch_size):  # a batch size that fits into memory during training
            batch = own_indices[start : start + args.batch_size]
            labels = job.labels and [job.labels[i] for i in batch]
            images += sampler([args.seed + i for i in batch], labels)
        image_of = dict(zip(own_indices, images, strict=True))
    if accelerator.num_processes > 1:
        gathered: list[dict[int, Image.Image]] = [{} for _ in range(accelerator.num_processes)]
        torch.distributed.all_gather_object(gathered, image_of)
        image_of = {index: image for part in gathered for index, image in part.items()}
    return job.grid([image_of[index] for index in indices]) if accelerator.is_main_process else None


def save_before_after(
    folder: RunFolder,
    step: int,
    before: Mapping[str, str] = ORDINARY_GRID,
    after: Mapping[str, str] = ORDINARY_GRID,
) -> None:
    """Save grids of step 0 and of `step` side by side, if there are any before and after and all have the same size.

    Otherwise an earlier such image is removed.

    Args:
        before, after: the names of these grids by caption (see `before_after`); missing grids are left out.
    """
    rows = []
    for grid_step, names in ((0, before), (step, after)):
        paths = {caption: folder.grid(grid_step, name) for caption, name in names.items()}
        grids = {caption: _read_grid(path) for caption, path in paths.items() if path.exists()}
        rows.append({caption: grid for caption, grid in grids.items() if grid is not None})
    if all(rows) and len({image.size for row in rows for image in row.values()}) == 1:  # or --num_samples has changed
        replace_file(folder.before_after, before_after(*rows).save)
    else:
        folder.before_after.unlink(missing_ok=True)  # that of an earlier attempt or of fewer steps


def _read_grid(path: Path) -> Image.Image | None:
    """Read a grid; None, with a warning, if its file is damaged."""
    try:
        with Image.open(path) as grid:
            grid.load()
            return grid
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for a damaged file
        logger.warning(f"The sample grid {path} is damaged and not shown: {error}.")
        return None
