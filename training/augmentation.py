"""Differentiable augmentation of a discriminator's inputs (Zhao et al. 2020, arXiv 2006.10738)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .randomness import PerSampleRNG


class DifferentiableAugmentation:
    """One random augmentation per sample, fixed at construction and applied identically to all its images.

    - `color`: brightness shifted by -0.5 .. 0.5, saturation times 0 .. 2, contrast times 0.5 .. 1.5;
    - `translation`: shifted by up to an eighth of the height and the width, filled with zeros;
    - `cutout`: zeros in a rectangle half as high and half as wide as the image.

    Args:
        names: augmentations to apply.
        rng: the random numbers of the samples.
        height, width: size of the images.
    """

    def __init__(self, names: Sequence[str], rng: PerSampleRNG, height: int, width: int):
        self.names = names
        self.size = height, width
        if "color" in names:
            brightness, saturation, contrast = rng.uniform(3, 1, 1, 1).unbind(1)
            self.brightness, self.saturation, self.contrast = brightness - 0.5, saturation * 2, contrast + 0.5
        if "translation" in names:
            self.max_shift = height // 8, width // 8
            uniform = rng.uniform(2)
            self.shift = [(uniform[:, i, None] * (2 * limit + 1)).long() for i, limit in enumerate(self.max_shift)]
        if "cutout" in names:
            self.hole = height // 2, width // 2
            uniform = rng.uniform(2)
            self.corner = [
                (uniform[:, i, None] * (side + 1 - hole % 2)).long() - hole // 2
                for i, (side, hole) in enumerate(zip(self.size, self.hole, strict=True))
            ]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the augmented images (B, C, height, width) in [-1, 1]; twice differentiable."""
        if "color" in self.names:
            images = images + self.brightness
            mean = images.mean(dim=1, keepdim=True)
            images = mean + (images - mean) * self.saturation
            mean = images.mean(dim=(1, 2, 3), keepdim=True)
            images = mean + (images - mean) * self.contrast
        rows, columns = (torch.arange(side, device=images.device) for side in self.size)
        if "translation" in self.names:
            max_down, max_right = self.max_shift
            padded = F.pad(images, (max_right, max_right, max_down, max_down)).permute(0, 2, 3, 1)
            batch = torch.arange(len(images), device=images.device)[:, None, None]
            down, right = self.shift  # 0 .. 2 * max_shift, (B, 1)
            y, x = (down + rows)[:, :, None], (right + columns)[:, None, :]
            images = padded[batch, y, x].permute(0, 3, 1, 2)
        if "cutout" in self.names:
            in_rows, in_columns = (
                (side >= corner) & (side < corner + hole)
                for side, corner, hole in zip((rows, columns), self.corner, self.hole, strict=True)
            )
            mask = in_rows[:, :, None] & in_columns[:, None, :]
            images = images.masked_fill(mask[:, None], 0)
        return images
