"""Conversion of images to tensors."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from .images import CHANNEL_MODES, BrokenImageError, open_image, resized, upright


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to the network's input: (channels, height, width) in [-1, 1], for 1 to 4 channels."""

    channels: int
    height: int
    width: int
    center_crop: bool = False
    random_flip: bool = False

    def load(self, image: Image.Image) -> torch.Tensor:
        """Decode, convert and resize an image, keeping its aspect ratio.

        Returns:
            uint8, (channels, h, w) with h >= height and w >= width, at least one of them equal.
        """
        pixels = torch.from_numpy(np.array(self._convert(image)))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        h, w = pixels.shape[1:]
        scale = max(self.height / h, self.width / w)
        return resized(pixels, max(self.height, round(h * scale)), max(self.width, round(w * scale)))

    def finish(self, pixels: torch.Tensor, sample_key: int) -> torch.Tensor:
        """Crop and flip a loaded image and scale it to [-1, 1]; the sample's key seeds the random choices."""
        random = Random(sample_key)
        margins = (pixels.shape[1] - self.height, pixels.shape[2] - self.width)
        top, left = (margin // 2 if self.center_crop else random.randint(0, margin) for margin in margins)
        pixels = pixels[:, top : top + self.height, left : left + self.width]
        if self.random_flip and random.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)

    def _convert(self, image: Image.Image) -> Image.Image:
        image = upright(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16-bit or 32-bit integers, or floats in 0..1 or 0..255
            values = np.asarray(image, dtype=np.float64)
            is_16_bit = image.mode.startswith("I;16") or values.max() > 255
            scale = 255 / 65535 if is_16_bit else 255 if image.mode == "F" and values.max() <= 1 else 1
            image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
        if self.channels in (1, 3) and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(CHANNEL_MODES[self.channels])


def read_image(cell: Any, preprocessing: Preprocessing) -> torch.Tensor:
    """Open an item of an image source (see `open_image`) and load it.

    Returns:
        the pixels, as returned by `Preprocessing.load`.

    Raises:
        BrokenImageError: if it cannot be read.
    """
    try:
        return preprocessing.load(open_image(cell))
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise BrokenImageError(str(error)) from error
