"""Guidance losses on images, and their weighted sums."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image

from ..core.errors import InputError
from ..data.preprocessing import Preprocessing
from .arguments import MIRRORS, parse_color


class GuidanceLoss(ABC):
    """Base class of guidance losses, which can be scaled and added: `2 * ColorLoss("teal") + SymmetryLoss()`.

    Subclass it for a custom loss that can be added to others. [`GuidedPipeline`] itself accepts any callable.
    """

    @abstractmethod
    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        """Compute the loss of each image.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in [-1, 1].
            step (`int`, defaults to 0):
                Index of the sampling step, which seeds the random numbers of a loss. Subclasses without random numbers
                need not take it.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: The differentiable loss of each image, which depends only on that
            image.
        """

    def __add__(self, other: "GuidanceLoss") -> "WeightedSum":
        if not isinstance(other, GuidanceLoss):
            return NotImplemented
        return WeightedSum([*_terms(self), *_terms(other)])

    def __mul__(self, factor: float) -> "WeightedSum":
        if not isinstance(factor, Real):
            return NotImplemented
        return WeightedSum([(factor * weight, loss) for weight, loss in _terms(self)])

    __rmul__ = __mul__


class WeightedSum(GuidanceLoss):
    """Weighted sum of losses: the result of `+` and `*` on losses.

    Args:
        terms (`Sequence[tuple[float, GuidanceLoss]]`): Pairs of a weight and a loss.
    """

    def __init__(self, terms: Sequence[tuple[float, GuidanceLoss]]):
        self.terms = list(terms)

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        # custom losses need not take the step
        steps = [(step,) if "step" in inspect.signature(loss).parameters else () for _, loss in self.terms]
        values = [weight * loss(images, *options) for (weight, loss), options in zip(self.terms, steps, strict=True)]
        return sum(values)  # pyright: ignore[reportReturnType]


def _terms(loss: GuidanceLoss) -> list[tuple[float, GuidanceLoss]]:
    return loss.terms if isinstance(loss, WeightedSum) else [(1.0, loss)]


class ColorLoss(GuidanceLoss):
    """Mean absolute distance of all pixels to a color, in the units of the images: from 0 to 2.

    Args:
        target (`str` or `Sequence[float]`, defaults to `(0.1, 0.9, 0.5)`):
            Red, green and blue in [0, 1], or a CSS color: `"#BB2266"`, `"teal"`, `"hsl(200, 80%, 50%)"`.

    Raises:
        `InputError`: If the color is invalid, or the loss is called with images that have no color channels.
    """

    def __init__(self, target: str | Sequence[float] = (0.1, 0.9, 0.5)):
        if isinstance(target, str):
            target = parse_color(target)
        if len(target) != 3 or not all(0 <= value <= 1 for value in target):
            raise InputError(
                f"The color {tuple(target)} is not red, green and blue from 0 to 1. Write values up to 255 as "
                "'#BB2266'."
            )
        self.target = tuple(float(value) for value in target)

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        target = images.new_tensor(self.target).view(3, 1, 1) * 2 - 1
        return (_rgb(images) - target).abs().mean((1, 2, 3))


class SaturationLoss(GuidanceLoss):
    """Mean absolute distance of the pixels' chroma to a target: 0 guides towards gray, 1 towards pure colors.

    Chroma is max - min of red, green and blue in [0, 1]. (The S of HSV divides it by max, whose gradient is unbounded
    near black.)

    Args:
        target (`float`, defaults to 1.0): The target chroma, in [0, 1].

    Raises:
        `InputError`: If the target is outside [0, 1], or the loss is called with images that have no color channels.
    """

    def __init__(self, target: float = 1.0):
        if not 0 <= target <= 1:
            raise InputError(f"The saturation is {target}, but must be from 0 (gray) to 1 (pure colors).")
        self.target = target

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        rgb = _rgb(images)
        chroma = (rgb.amax(1) - rgb.amin(1)) / 2
        return (chroma - self.target).abs().mean((1, 2))


class TotalVariationLoss(GuidanceLoss):
    """Mean absolute difference of horizontal plus vertical neighbors, which smooths images (Rudin et al. 1992)."""

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        return images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3))


class SymmetryLoss(GuidanceLoss):
    """Mean absolute difference between an image and its mirror image.

    Args:
        mirror (`"left-right"` or `"top-bottom"`, defaults to `"left-right"`): The halves that should match.

    Raises:
        `InputError`: If `mirror` is neither of these.
    """

    def __init__(self, mirror: Literal["left-right", "top-bottom"] = "left-right"):
        if mirror not in MIRRORS:
            raise InputError(f"The symmetry is {mirror!r}, but must be 'left-right' or 'top-bottom'.")
        self.dim = 3 if mirror == "left-right" else 2

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        return (images - images.flip(self.dim)).abs().mean((1, 2, 3))


class ReferenceLoss(GuidanceLoss):
    """Mean squared distance to a reference image at low resolution, which transfers its layout but not its details.

    Both images are averaged over the cells of a `size` x `size` grid. The reference is cropped to the images' aspect
    ratio and converted to their number of channels.

    Args:
        reference (`PIL.Image.Image`): The reference image.
        size (`int`, defaults to 8): Number of cells along each side.

    Raises:
        `InputError`: If `size` is below 1, or the loss is called with images of fewer pixels along a side.
    """

    def __init__(self, reference: Image.Image, size: int = 8):
        if size < 1:
            raise InputError(f"`size` is {size}, but the grid must have at least 1 cell along each side.")
        reference.load()  # a file is decoded only once, before threads use it
        self.reference, self.size = reference, size
        self._fitted: dict[torch.Size, torch.Tensor] = {}  # by the shape of the images

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        channels, height, width = images.shape[1:]
        if min(height, width) < self.size:
            raise InputError(
                f"The grid of {self.size}x{self.size} cells is finer than these images of {height}x{width} pixels. "
                "Use a smaller `size`."
            )
        if images.shape[1:] not in self._fitted:
            fitted = Preprocessing(channels, height, width, center_crop=True).fit(self.reference)
            self._fitted[images.shape[1:]] = fitted
        difference = F.adaptive_avg_pool2d(images - self._fitted[images.shape[1:]].to(images.device), self.size)
        return difference.square().mean((1, 2, 3))


def _rgb(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] < 3:
        raise InputError(f"A color loss needs red, green and blue, but these images have {images.shape[1]} channels.")
    return images[:, :3]
