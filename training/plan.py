"""The batch plan: which samples make each optimizer step, on which process."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from .randomness import fold_in


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a run are dealt out to optimizer steps, micro-batches and processes.

    An epoch is a permutation of the images, cut into global batches; the last one of an epoch may be
    shorter. Everything is computed from the step, so a run can be taken up at any of them.

    Args:
        num_images: images in an epoch; None for a stream, which is one endless epoch.
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
        """Passes over the data that are complete after `step` optimizer steps (0 throughout for a stream)."""
        if self.num_images is None:
            return 0.0
        whole, part = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, part * self.global_batch_size / self.num_images)

    def global_batch(self, step: int) -> tuple[int, int, int]:
        """Epoch, position of the first sample in it, and number of samples of the optimizer step with index `step`."""
        if self.num_images is None:
            return 0, step * self.global_batch_size, self.global_batch_size
        epoch, part = divmod(step, self.steps_per_epoch)
        start = part * self.global_batch_size
        return epoch, start, min(self.global_batch_size, self.num_images - start)

    def images_seen(self, step: int) -> int:
        """Samples that `step` optimizer steps have trained on."""
        epoch, start, _ = self.global_batch(step)
        return epoch * (self.num_images or 0) + start

    def micro_batches(self, step: int) -> int:
        """Micro-batches that each process trains on in a step."""
        return ceil(self.global_batch(step)[2] / (self.batch_size * self.processes))

    def shard(self, step: int, micro_batch: int, rank: int) -> range:
        """Positions in the window that a process trains on in a micro-batch; a short one is shared out evenly."""
        start = micro_batch * self.batch_size * self.processes
        count = min(self.batch_size * self.processes, self.global_batch(step)[2] - start)
        return range(start + count * rank // self.processes, start + count * (rank + 1) // self.processes)

    def sample_key(self, step: int, position: int) -> int:
        return fold_in(self.seed, step, position)

    def image_index(self, step: int, position: int) -> int:
        epoch, start, _ = self.global_batch(step)
        return int(_permutation(self.num_images, fold_in(self.seed, epoch))[start + position])


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))
