"""Conversion of images to tensors."""

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from .images import CHANNEL_MODES, BrokenImageError, color_channels, open_image, resized, stored_range, upright

_MAX_EXCESS = 16  # how much larger than the network's input an image may become when it is enlarged
_ROUNDING = 1e-3  # excess over the range of floating-point images that is clipped without a message
_LOW_CONTRAST = 1 / 8  # part of the range from black to white; images that use less of it are probably misread


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of an image to the network's input: (channels, height, width) in [-1, 1], for 1 to 4 channels.

    Attributes:
        channels, height, width: the network's input.
        center_crop: crop at the center instead of at random.
        random_flip: flip horizontally at random.
        value_range: values of black and white, in color images those of each channel; None means those of
            `images.stored_range`.
    """

    channels: int
    height: int
    width: int
    center_crop: bool = False
    random_flip: bool = False
    value_range: tuple[float, float] | None = None

    def load(self, image: Image.Image) -> torch.Tensor:
        """Decode, convert and resize an image, keeping its aspect ratio.

        Returns:
            uint8, (channels, h, w) with h >= height and w >= width, at least one of them equal. A small image that is
            so thin that this would take much more memory is returned as it is, for `finish` to crop and then resize.

        Raises:
            BrokenImageError: if pixels are not finite, or outside a range that is not stated.
        """
        pixels = torch.from_numpy(np.array(self._convert(image)))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        h, w = pixels.shape[1:]
        scale = max(self.height / h, self.width / w)
        if scale > 1 and h * w * scale**2 > _MAX_EXCESS * self.height * self.width:
            return pixels
        return resized(pixels, max(self.height, round(h * scale)), max(self.width, round(w * scale)))

    def finish(self, pixels: torch.Tensor, sample_key: int) -> torch.Tensor:
        """Crop and flip a loaded image and scale it to [-1, 1]; the sample's key seeds the random choices."""
        random = Random(sample_key)
        h, w = pixels.shape[1:]
        scale = max(1.0, self.height / h, self.width / w)  # above 1 if `load` has not resized the image
        height, width = (max(1, round(side / scale)) for side in (self.height, self.width))
        margins = (h - height, w - width)
        top, left = (margin // 2 if self.center_crop else random.randint(0, margin) for margin in margins)
        pixels = pixels[:, top : top + height, left : left + width]
        if scale > 1:
            pixels = resized(pixels, self.height, self.width)
        if self.random_flip and random.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)

    def fit(self, image: Image.Image) -> torch.Tensor:
        """Return an image as the network's input, without random choices if it is cropped at the center."""
        return self.finish(self.load(image), sample_key=0)

    def _convert(self, image: Image.Image) -> Image.Image:
        value_range = self.value_range
        if value_range is None and (image.mode[0] == "I" or image.mode == "F"):
            value_range = stored_range(image)
        image = upright(image)
        if value_range is not None:
            image = self._rescale(image, *value_range)
        if self.channels in (1, 3) and _has_alpha(image):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(CHANNEL_MODES[self.channels])

    def _rescale(self, image: Image.Image, black: float, white: float) -> Image.Image:
        """Convert an image to 8 bits, clipping its values to those of black and white; alpha is kept."""
        if image.mode[0] != "I" and image.mode not in ("F", "L"):
            image = image.convert("RGBA" if _has_alpha(image) else "RGB" if color_channels(image) == 3 else "L")
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise BrokenImageError(f"{(~np.isfinite(values)).sum()} of its {values.size} pixels are not finite")
        excess = max(black - values.min(), values.max() - white)
        if self.value_range is None and excess > _ROUNDING * (white - black):
            raise BrokenImageError(
                f"its values are {values.min():g} to {values.max():g}, but those of a floating-point image must be "
                f"{black:g} (black) to {white:g} (white). State other values of black and white with --value_range"
            )
        scaled = ((values - black) * (255 / (white - black))).clip(0, 255).round()
        if image.mode == "RGBA":
            scaled[..., 3] = values[..., 3]
        return Image.fromarray(scaled.astype(np.uint8))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def low_contrast(images: torch.Tensor) -> str | None:
    """Return a warning if images use only a small part of the range of values, as 12-bit images in 16-bit files do.

    Also if none of them has any structure, as if each were a single color.

    Args:
        images: images as the network gets them, (N, C, H, W) in [-1, 1].
    """
    low, high = images.amin().item(), images.amax().item()
    contrast = (images.amax((2, 3)) - images.amin((2, 3))).amax().item()  # within a channel of an image
    if contrast >= 2 * _LOW_CONTRAST or images[0, 0].numel() == 1:
        return None
    if high - low >= 2 * _LOW_CONTRAST:
        return (
            f"Each of the first {len(images)} images has nearly a single color: no channel varies by more than "
            f"{contrast / 2:.0%} of the way from black to white. Are they the images that you want?"
        )
    return (
        f"The first {len(images)} images have only values from {(low + 1) / 2:.0%} to {(high + 1) / 2:.0%} of the way "
        "from black to white. If their files store black and white as other values, state these with --value_range, "
        "for example --value_range 0 4095."
    )


def read_image(cell: Any, preprocessing: Preprocessing) -> torch.Tensor:
    """Open an item of an image source (see `open_image`) and load it.

    Returns:
        the pixels, as returned by `Preprocessing.load`.

    Raises:
        BrokenImageError: if it cannot be read.
    """
    try:
        return preprocessing.load(open_image(cell))
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise BrokenImageError(str(error)) from error
