"""Mode coverage of unconditional samples, and class accuracy of conditional ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..core.extras import missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STACKED_MNIST_MODES = 1000
_NUMBERED_CLASSES = 100  # with more, a confusion matrix is plotted without texts


@dataclass(frozen=True)
class ModeCoverage:
    """The number of modes that have at least one sample, and how evenly the samples are spread over all modes.

    Attributes:
        modes: number of modes with a sample.
        of: total number of modes.
        kl: KL divergence of the samples' modes from the uniform distribution, in nats; 0 is the best.
    """

    modes: int
    of: int
    kl: float


def mode_coverage(modes: torch.Tensor, count: int) -> ModeCoverage:
    """Compute the coverage from the mode of each sample: (N,), integers in 0 .. count-1."""
    if len(modes) == 0:
        raise ValueError("There are no samples to count modes in.")
    if modes.min() < 0 or modes.max() >= count:
        raise ValueError(f"Modes are {modes.min()} to {modes.max()}, but must be within 0 to {count - 1}.")
    hits = torch.bincount(modes, minlength=count).double()
    frequencies = hits[hits > 0] / hits.sum()
    return ModeCoverage(len(frequencies), count, (frequencies * (frequencies * count).log()).sum().item())


def stacked_mnist_coverage(digits: torch.Tensor) -> ModeCoverage:
    """Compute the coverage of StackedMNIST (arXiv 1611.02163): one digit per channel, 1,000 modes in total.

    The number of covered modes depends on the number of samples; the usual one is `STACKED_MNIST_SAMPLES`.

    Args:
        digits: (N, 3), the digit that a classifier predicts for each channel.
    """
    return mode_coverage(digits @ torch.tensor([100, 10, 1]), STACKED_MNIST_MODES)


def gaussian_grid(side: int = 5, spacing: float = 2.0) -> torch.Tensor:
    """Return the centers (side^2, 2) of a grid of Gaussians around 0; the toy problem of arXiv 1705.07761 has 25."""
    line = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
    return torch.cartesian_prod(line, line)


def gaussian_coverage(
    samples: torch.Tensor, centers: torch.Tensor, std: float, max_deviations: float = 3.0
) -> tuple[ModeCoverage, float]:
    """Compute the mode coverage of a mixture of isotropic Gaussians, and the fraction of samples that lie at a mode.

    A sample lies at the nearest mode if it is at most `max_deviations` standard deviations from its center.

    Args:
        samples: (N, D).
        centers: (K, D).
        std: standard deviation of each mode, in each dimension.
        max_deviations: usually 3; 98.9% of the samples of a two-dimensional mixture itself lie within 3.
    """
    nearest = torch.cdist(samples.double(), centers.double()).min(1)
    is_at_mode = nearest.values <= max_deviations * std
    fraction = is_at_mode.double().mean().item()
    if not is_at_mode.any():
        return ModeCoverage(0, len(centers), float("inf")), fraction
    return mode_coverage(nearest.indices[is_at_mode], len(centers)), fraction


# ---------------------------------------------------------------------------------------------------------------------
# Conditional samples


def confusion_matrix(requested: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Count the samples of requested class i that are predicted as j: (num_classes, num_classes), i in rows."""
    counts = torch.bincount(requested * num_classes + predicted, minlength=num_classes**2)
    return counts.view(num_classes, num_classes)


def class_accuracies(confusion: torch.Tensor) -> tuple[float, list[float | None]]:
    """Compute the accuracy over all samples and that of each class, which is None for a class without samples."""
    totals, correct = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    per_class = [hits / total if total else None for hits, total in zip(correct, totals, strict=True)]
    return sum(correct) / sum(totals), per_class


def confusion_matrix_plot(confusion: torch.Tensor, class_names: Sequence[str]) -> "Figure":
    """Plot a confusion matrix; each row is shaded by the fractions of its samples: darker is more.

    With up to 100 classes it also has their names and the numbers of samples.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            f"The plot of the confusion matrix needs a package: {missing_extra('matplotlib', 'eval')}."
        ) from None

    num_classes = len(class_names)
    fractions = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    shades = fractions.sqrt().numpy()  # the square root keeps rare confusions visible
    side = min(1.5 + 0.42 * num_classes, 45)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shades, cmap="gray_r", vmin=0, vmax=1)
    if num_classes <= _NUMBERED_CLASSES:
        for i, j in confusion.nonzero().tolist():
            color = "white" if shades[i, j] > 0.5 else "black"
            axes.text(j, i, str(confusion[i, j].item()), color=color, ha="center", va="center", fontsize=9)
        axes.set_xticks(range(num_classes), class_names, rotation=90)
        axes.set_yticks(range(num_classes), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("requested class")
    return figure
