"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv 2006.10738)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .randomness import PerSampleRNG


class DifferentiableAugmentation:
    """One random augmentation a sample, drawn at construction, that any number of its pictures can pass through.

    - `color`: brightness moved by -0.5 .. 0.5, saturation times 0 .. 2, contrast times 0.5 .. 1.5;
    - `translation`: moved by up to an eighth of the height and the width, zeros moving in;
    - `cutout`: zeros in a rectangle half as high and half as wide as the picture.

    Args:
        names: which of them.
        draws: the samples' randomness.
        height, width: of the pictures.
    """

    def __init__(self, names: Sequence[str], draws: PerSampleRNG, height: int, width: int):
        self.names = names
        self.size = height, width
        if "color" in names:
            brightness, saturation, contrast = draws.uniform(3, 1, 1, 1).unbind(1)
            self.brightness, self.saturation, self.contrast = brightness - 0.5, saturation * 2, contrast + 0.5
        if "translation" in names:
            self.reach = height // 8, width // 8
            uniform = draws.uniform(2)
            self.shift = [(uniform[:, i, None] * (2 * reach + 1)).long() for i, reach in enumerate(self.reach)]
        if "cutout" in names:
            self.hole = height // 2, width // 2
            uniform = draws.uniform(2)
            self.corner = [
                (uniform[:, i, None] * (side + 1 - hole % 2)).long() - hole // 2
                for i, (side, hole) in enumerate(zip(self.size, self.hole, strict=True))
            ]

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures (B, C, height, width) in [-1, 1], augmented; twice differentiable."""
        if "color" in self.names:
            pictures = pictures + self.brightness
            mean = pictures.mean(dim=1, keepdim=True)
            pictures = mean + (pictures - mean) * self.saturation
            mean = pictures.mean(dim=(1, 2, 3), keepdim=True)
            pictures = mean + (pictures - mean) * self.contrast
        rows, columns = (torch.arange(side, device=pictures.device) for side in self.size)
        if "translation" in self.names:
            up, left = self.reach
            padded = F.pad(pictures, (left, left, up, up)).permute(0, 2, 3, 1)
            batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
            down, right = self.shift  # 0 .. 2 reach, (B, 1)
            y, x = (down + rows)[:, :, None], (right + columns)[:, None, :]
            pictures = padded[batch, y, x].permute(0, 3, 1, 2)
        if "cutout" in self.names:
            high, wide = (
                (side >= corner) & (side < corner + hole)
                for side, corner, hole in zip((rows, columns), self.corner, self.hole, strict=True)
            )
            hole = high[:, :, None] & wide[:, None, :]
            pictures = pictures.masked_fill(hole[:, None], 0)
        return pictures
