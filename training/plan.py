"""The batch plan: which samples make up each optimizer step, and which process trains on them."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from .randomness import fold_in


@dataclass(frozen=True)
class BatchPlan:
    """The assignment of samples to optimizer steps, micro-batches and processes.

    An epoch is a permutation of the images, cut into global batches, one for each optimizer step; the last one of an
    epoch may be short. Everything is computed from the step, so a run can resume at any step.

    Args:
        num_images: images in an epoch; None for a stream, which is one endless epoch.
        batch_size: images in a micro-batch of one process.
        accumulation: micro-batches that each process accumulates in a step.
        processes: number of processes.
        seed: seed of the permutations and the sample keys.
    """

    num_images: int | None
    batch_size: int
    accumulation: int
    processes: int
    seed: int

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int | None:
        return None if self.num_images is None else ceil(self.num_images / self.global_batch_size)

    def epoch(self, step: int) -> float:
        """Return the number of epochs after `step` optimizer steps, as a fraction; always 0 for a stream."""
        steps_per_epoch = self.steps_per_epoch
        if self.num_images is None or steps_per_epoch is None:
            return 0.0
        epochs, steps = divmod(step, steps_per_epoch)
        return epochs + min(1.0, steps * self.global_batch_size / self.num_images)

    def global_batch(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of a step, the position of its first sample in the epoch, and its number of samples."""
        steps_per_epoch = self.steps_per_epoch
        if self.num_images is None or steps_per_epoch is None:
            return 0, step * self.global_batch_size, self.global_batch_size
        epoch, steps = divmod(step, steps_per_epoch)
        start = steps * self.global_batch_size
        return epoch, start, min(self.global_batch_size, self.num_images - start)

    def images_seen(self, step: int) -> int:
        """Return the number of samples in the first `step` optimizer steps."""
        epoch, start, _ = self.global_batch(step)
        return epoch * (self.num_images or 0) + start

    def micro_batches(self, step: int) -> int:
        """Return the number of micro-batches of each process in a step."""
        return ceil(self.global_batch(step)[2] / (self.batch_size * self.processes))

    def shard(self, step: int, micro_batch: int, rank: int) -> range:
        """Return the positions in the global batch that make up a micro-batch of one process.

        The processes share a short micro-batch evenly; some may get no sample of it.
        """
        start = micro_batch * self.batch_size * self.processes
        count = min(self.batch_size * self.processes, self.global_batch(step)[2] - start)
        return range(start + count * rank // self.processes, start + count * (rank + 1) // self.processes)

    def sample_key(self, step: int, position: int) -> int:
        """Return the key of the sample at a position in the global batch, which seeds all its random numbers."""
        return fold_in(self.seed, step, position)

    def image_index(self, step: int, position: int) -> int:
        """Return the index in the image source of the sample at a position in the global batch."""
        epoch, start, _ = self.global_batch(step)
        return int(_permutation(self.num_images, fold_in(self.seed, epoch))[start + position])


class ValidationPlan(BatchPlan):
    """The plan of passes over held-out images, whose random numbers are the same for every batch size."""

    def sample_key(self, step: int, position: int) -> int:
        """Return the key of an image in its pass, which does not depend on the global batch that contains it."""
        epoch, _, size = self.global_batch(step)
        return fold_in(self.seed, epoch, self.image_index(step, min(position, size - 1)))


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
