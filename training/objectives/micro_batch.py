"""The images of a micro-batch and the random numbers of its samples, as objectives take them."""

from dataclasses import dataclass

import torch

from ..randomness import PerSampleRNG


@dataclass
class MicroBatch:
    """A micro-batch as an objective sees it.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        labels: their classes, (B,), if the run has labels.
        rng: the random numbers of the samples.
        step: index of the optimizer step, from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    rng: PerSampleRNG
    step: int
