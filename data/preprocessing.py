"""Conversion of images to tensors."""

import io
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from .images import CHANNEL_MODES, BrokenImageError, upright


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the network takes: (channels, height, width) in [-1, 1], for 1 to 4 channels."""

    channels: int
    height: int
    width: int
    center_crop: bool = False
    random_flip: bool = False

    def load(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """Decode, convert and resize: uint8 (channels, h, w) that covers (height, width) with one side equal."""
        pixels = torch.from_numpy(np.array(self._convert(image)))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        h, w = pixels.shape[1:]
        scale = max(self.height / h, self.width / w)
        size = [max(self.height, round(h * scale)), max(self.width, round(w * scale))]
        return TF.resize(pixels, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)

    def finish(self, pixels: torch.Tensor, sample_key: int) -> torch.Tensor:
        """Crop, flip and scale a loaded image to [-1, 1]; what is random is drawn from the sample's key."""
        random = Random(sample_key)
        spare = (pixels.shape[1] - self.height, pixels.shape[2] - self.width)
        top, left = (s // 2 if self.center_crop else random.randint(0, s) for s in spare)
        pixels = pixels[:, top : top + self.height, left : left + self.width]
        if self.random_flip and random.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)

    def _convert(self, image: Image.Image | np.ndarray) -> Image.Image:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        image = upright(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits, or floats in 0..1 or 0..255
            values = np.asarray(image, dtype=np.float64)
            wide = image.mode.startswith("I;16") or values.max() > 255
            scale = 255 / 65535 if wide else 255 if image.mode == "F" and values.max() <= 1 else 1
            image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
        if self.channels in (1, 3) and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(CHANNEL_MODES[self.channels])


def read_image(cell: Any, preprocessing: Preprocessing) -> torch.Tensor:
    """Read and load an image from its path, its encoded bytes (a cell of `datasets`), or its pixels.

    Raises:
        BrokenImageError: if it cannot be read.
    """
    try:
        if isinstance(cell, dict):
            cell = io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]
        return preprocessing.load(Image.open(cell) if isinstance(cell, (str, Path, io.BytesIO)) else np.asarray(cell))
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise BrokenImageError(str(error)) from error
