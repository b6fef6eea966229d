"""Which modes of a distribution samples reach, and whether conditional samples are what was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

STACKED_MNIST_MODES = 1000
STACKED_MNIST_SAMPLES = 25_600  # of which the modes are counted, in arXiv 2112.07804 and others


@dataclass(frozen=True)
class ModeCoverage:
    """How many of the modes of a distribution have a sample, and how evenly.

    Attributes:
        modes: those that have a sample.
        of: how many there are.
        kl: divergence of the samples' modes from the uniform distribution, in nats; 0 is the best.
    """

    modes: int
    of: int
    kl: float


def mode_coverage(modes: torch.Tensor, count: int) -> ModeCoverage:
    """Coverage from the mode of each sample, (N,), integers in 0 .. count-1."""
    if len(modes) == 0:
        raise ValueError("There is no sample whose mode could be counted.")
    if modes.min() < 0 or modes.max() >= count:
        raise ValueError(f"Modes are {modes.min()} to {modes.max()}, but must be within 0 to {count - 1}.")
    hits = torch.bincount(modes, minlength=count).double()
    found = hits[hits > 0] / hits.sum()
    return ModeCoverage(len(found), count, (found * (found * count).log()).sum().item())


def stacked_mnist_coverage(digits: torch.Tensor) -> ModeCoverage:
    """Modes of StackedMNIST (arXiv 1611.02163), whose images have a digit in each channel: 1,000 in all.

    They depend on the number of samples; the usual one is `STACKED_MNIST_SAMPLES`.

    Args:
        digits: (N, 3), what a digit classifier sees in each channel.
    """
    return mode_coverage(digits @ torch.tensor([100, 10, 1]), STACKED_MNIST_MODES)


def gaussian_grid(side: int = 5, spacing: float = 2.0) -> torch.Tensor:
    """Centres (side^2, 2) of the grid of Gaussians around 0; 5 gives the toy problem of 25 (arXiv 1705.07761)."""
    line = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
    return torch.cartesian_prod(line, line)


def gaussian_coverage(
    samples: torch.Tensor, centres: torch.Tensor, std: float, within: float = 3.0
) -> tuple[ModeCoverage, float]:
    """Modes of a mixture of isotropic Gaussians that samples reach, and the part of the samples that is at one.

    A sample is at the nearest mode if it is within so many standard deviations of its centre.

    Args:
        samples: (N, D).
        centres: (K, D).
        std: standard deviation of each mode, in each dimension.
        within: standard deviations; 3 is usual, and 98.9 % of the mixture's own samples lie there in the plane.
    """
    nearest = torch.cdist(samples.double(), centres.double()).min(1)
    at_one = nearest.values <= within * std
    coverage = mode_coverage(nearest.indices[at_one], len(centres)) if at_one.any() else None
    return coverage or ModeCoverage(0, len(centres), float("inf")), at_one.double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Conditional samples


def confusion(asked: torch.Tensor, seen: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts (classes, classes): row i, column j has the samples asked to be i that a classifier sees as j."""
    return torch.bincount(asked * classes + seen, minlength=classes**2).view(classes, classes)


def class_accuracies(counts: torch.Tensor) -> tuple[float, list[float | None]]:
    """Accuracy over all samples, and of each class, which is None where no sample was asked for."""
    asked, right = counts.sum(1).tolist(), counts.diagonal().tolist()
    return sum(right) / sum(asked), [r / a if a else None for r, a in zip(right, asked, strict=True)]


def confusion_picture(counts: torch.Tensor, names: Sequence[str]) -> Image.Image:
    """The counts as a table, each row shaded by its shares: darker is more."""
    font = ImageFont.load_default(13)
    left = 24 + max(int(font.getlength(name)) for name in names)
    cell, top = 44, left
    side = len(names) * cell
    picture = Image.new("L", (left + side + 8, top + side + 8), 255)
    draw = ImageDraw.Draw(picture)
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    for i, name in enumerate(names):
        middle = i * cell + cell // 2
        draw.text((left - 8, top + middle), name, 0, font, anchor="rm")
        upright = Image.new("L", (left, cell), 255)
        ImageDraw.Draw(upright).text((8, cell // 2), name, 0, font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (left + i * cell, 0))
        for j in range(len(names)):
            corner = (left + j * cell, top + i * cell)
            shade = round(255 * (1 - np.sqrt(shares[i, j].item())))
            draw.rectangle([corner, (corner[0] + cell - 2, corner[1] + cell - 2)], fill=shade)
            if counts[i, j]:
                middle_of_cell = (corner[0] + cell // 2 - 1, corner[1] + cell // 2 - 1)
                draw.text(middle_of_cell, str(counts[i, j].item()), 255 if shade < 128 else 0, font, anchor="mm")
    return picture
