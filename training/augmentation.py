"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv 2006.10738)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .randomness import Draws


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

    def __init__(self, names: Sequence[str], draws: Draws, height: int, width: int):
        self.names = names
        self.size = height, width
        if "color" in names:
            brightness, saturation, contrast = draws.uniform(3, 1, 1, 1).unbind(1)
            self.brightness, self.saturation, self.contrast = brightness - 0.5, saturation * 2, contrast + 0.5
        sizes = torch.tensor([height, width], device=draws.device)
        if "translation" in names:
            self.reach = sizes // 8
            self.shift = (draws.uniform(2) * (2 * self.reach + 1)).long()  # 0 .. 2 reach
        if "cutout" in names:
            self.hole = sizes // 2
            self.corner = (draws.uniform(2) * (sizes + 1 - self.hole % 2)).long() - self.hole // 2

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
            up, left = self.reach.tolist()
            padded = F.pad(pictures, (left, left, up, up)).permute(0, 2, 3, 1)
            batch = torch.arange(len(pictures), device=pictures.device)[:, None, None]
            y = (self.shift[:, :1] + rows)[:, :, None]
            x = (self.shift[:, 1:] + columns)[:, None, :]
            pictures = padded[batch, y, x].permute(0, 3, 1, 2)
        if "cutout" in self.names:
            inside = [
                (side >= self.corner[:, i : i + 1]) & (side < self.corner[:, i : i + 1] + self.hole[i])
                for i, side in enumerate((rows, columns))
            ]
            hole = inside[0][:, :, None] & inside[1][:, None, :]
            pictures = pictures.masked_fill(hole[:, None], 0)
        return pictures
