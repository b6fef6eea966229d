"""Losses on pictures that pull a guided sampler, and their sums."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from ..core.errors import InputError


class GuidanceLoss(ABC):
    """
    How far pictures are from what is wanted. Losses scale and add: `2 * ColorLoss("teal") + SymmetryLoss()`.

    A loss of one's own is a subclass, or for [`GuidedPipeline`] alone any callable.
    """

    @abstractmethod
    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): values in [-1, 1].
            step (`int`): the sampler's step, from 0 on; it decides what a loss draws at random.

        Returns:
            One number for each image, which depends on that image alone: shape `(batch_size,)`, differentiable.
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
    """The sum of `(weight, loss)` pairs: what `+` and `*` on losses give."""

    def __init__(self, terms: Sequence[tuple[float, GuidanceLoss]]):
        self.terms = list(terms)

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        return sum(weight * loss(images, step) for weight, loss in self.terms)


def _terms(loss: GuidanceLoss) -> list[tuple[float, GuidanceLoss]]:
    return loss.terms if isinstance(loss, WeightedSum) else [(1.0, loss)]


class ColorLoss(GuidanceLoss):
    """
    Mean absolute distance of all pixels to one colour, in the images' own units: from 0 to 2.

    Args:
        target (`str` or three numbers in [0, 1], defaults to `(0.1, 0.9, 0.5)`):
            Red, green and blue; or what CSS calls the colour: `"#BB2266"`, `"teal"`, `"hsl(200, 80%, 50%)"`.

    Raises:
        `InputError`: for a colour that is none, and when called for images that have no colours.
    """

    def __init__(self, target: str | Sequence[float] = (0.1, 0.9, 0.5)):
        if isinstance(target, str):
            try:
                target = [value / 255 for value in ImageColor.getrgb(target)[:3]]
            except ValueError:
                raise InputError(
                    f"{target!r} is no colour that is known here. Give it as '#BB2266', by its CSS name ('teal'), or "
                    "as red, green and blue in 0 to 1."
                ) from None
        if len(target) != 3 or not all(0 <= value <= 1 for value in target):
            raise InputError(
                f"The colour {tuple(target)} is not red, green and blue in 0 to 1. Give values up to 255 as '#BB2266'."
            )
        self.target = tuple(float(value) for value in target)

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        target = images.new_tensor(self.target).view(3, 1, 1) * 2 - 1
        return (_rgb(images) - target).abs().mean((1, 2, 3))


class SaturationLoss(GuidanceLoss):
    """
    Mean absolute distance of the pixels' chroma to `target`: 0 pulls towards grey, 1 towards pure colours.

    Chroma is max - min of red, green and blue in [0, 1]. (The S of HSV divides it by max, which has no bounded
    gradient near black.)

    Args:
        target (`float`, defaults to 1.0): the chroma that is wanted, in [0, 1].

    Raises:
        `InputError`: for another target, and when called for images that have no colours.
    """

    def __init__(self, target: float = 1.0):
        if not 0 <= target <= 1:
            raise InputError(f"The saturation {target} is not in 0 (grey) to 1 (pure colours).")
        self.target = target

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        rgb = _rgb(images)
        chroma = (rgb.amax(1) - rgb.amin(1)) / 2
        return (chroma - self.target).abs().mean((1, 2))


class TotalVariationLoss(GuidanceLoss):
    """Mean absolute difference of horizontal neighbours plus that of vertical ones: it smooths (Rudin et al. 1992)."""

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        return images.diff(dim=2).abs().mean((1, 2, 3)) + images.diff(dim=3).abs().mean((1, 2, 3))


class SymmetryLoss(GuidanceLoss):
    """
    Mean absolute difference between a picture and its mirror image.

    Args:
        mirror (`"left-right"` or `"top-bottom"`, defaults to `"left-right"`): which halves shall be alike.

    Raises:
        `InputError`: for another word.
    """

    def __init__(self, mirror: Literal["left-right", "top-bottom"] = "left-right"):
        if mirror not in ("left-right", "top-bottom"):
            raise InputError(f"The symmetry {mirror!r} is unknown: it is 'left-right' or 'top-bottom'.")
        self.dim = 3 if mirror == "left-right" else 2

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        return (images - images.flip(self.dim)).abs().mean((1, 2, 3))


class ReferenceLoss(GuidanceLoss):
    """
    Mean squared distance to a reference picture at low resolution: its layout is taken over, not its details.

    Both are averaged over the cells of a grid of `size` x `size`. The reference is cropped to the images' proportions
    and converted to their number of channels.

    Args:
        reference (`PIL.Image.Image`): the picture.
        size (`int`, defaults to 8): cells along each side.

    Raises:
        `InputError`: for a size below 1, and when called for images that have fewer pixels along a side.
    """

    def __init__(self, reference: Image.Image, size: int = 8):
        if size < 1:
            raise InputError(f"The reference is compared on a grid of {size} cells a side; that must be at least 1.")
        self.reference, self.size = reference, size

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        channels, height, width = images.shape[1:]
        if min(height, width) < self.size:
            raise InputError(
                f"A reference at {self.size}x{self.size} is finer than these images of {height}x{width} pixels. Give "
                "a smaller size."
            )
        fitted = ImageOps.fit(self.reference.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]), (width, height))
        wanted = pil_to_tensor(fitted).to(images) / 127.5 - 1
        difference = F.adaptive_avg_pool2d(images - wanted, self.size)
        return difference.square().mean((1, 2, 3))


def _rgb(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] < 3:
        raise InputError(f"A loss on colours needs red, green and blue; these images have {images.shape[1]} channels.")
    return images[:, :3]
