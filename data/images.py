"""Pictures as arrays that a network takes: reading, channels, size."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageMode
from torchvision.transforms.v2 import functional as TF

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CHANNEL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_TURNS = {  # what sets a picture upright, by its orientation in EXIF; at 1 it is
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RESIZE = "bicubic, antialiased, of 8-bit values (torchvision)"


def open_image(cell: Any) -> Image.Image:
    """Open a picture from its path, its encoded bytes (a cell of `datasets`: `{"bytes", "path"}`), or its pixels."""
    if isinstance(cell, dict):
        cell = io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]
    return Image.open(cell) if isinstance(cell, (str, Path, io.BytesIO)) else Image.fromarray(np.asarray(cell))


def file_bytes(cell: Any) -> bytes:
    """What is encoded in a cell as of `open_image`, or the bytes of its pixels; none of one that cannot be read."""
    if isinstance(cell, dict):
        cell = cell["bytes"] or cell["path"]
    if isinstance(cell, (str, Path)):
        try:
            return Path(cell).read_bytes()
        except OSError:
            return b""
    if cell is None:
        return b""
    return cell if isinstance(cell, bytes) else np.asarray(cell).tobytes()


def color_channels(picture: Image.Image) -> int:
    """1 for a grey picture of any depth, 3 for one with colours; transparency does not count."""
    return 1 if ImageMode.getmode(picture.mode).basemode == "L" else 3


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images (N, C, H, W), uint8, C = 1 or 3, as grey (luma of ITU-R 601) or with grey repeated as RGB."""
    if images.shape[1] == channels:
        return images
    return TF.rgb_to_grayscale(images) if channels == 1 else images.expand(-1, channels, -1, -1)


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images (N, C, H, W), uint8, whole and without regard to their aspect, by the filter `RESIZE`."""
    return TF.resize(images, [height, width], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """The 8-bit values of images in [-1, 1]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def upright(image: Image.Image) -> Image.Image:
    """The picture as its camera was held; one whose EXIF cannot be read counts as upright."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's readers of metadata raise whatever they stumble over
        return image
    return image if turn is None else image.transpose(turn)


class BrokenImageError(Exception):
    """An image of the data cannot be read; the message says why."""
