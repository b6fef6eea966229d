"""Image helpers: opening, EXIF orientation, channels, resizing and 8-bit conversion."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageMode, TiffImagePlugin
from torchvision.transforms.v2 import functional as TF

IMAGE_SUFFIXES = {
    *(
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".webp",
        ".avif",
        ".gif",
        ".bmp",
        ".dib",
    ),
    *(".tif", ".tiff", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi", ".pcx", ".sgi", ".psd"),
}
CHANNEL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
RESIZE = "bicubic, antialiased, of 8-bit values (torchvision)"

_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(Exception):
    """An image that cannot be read; the message says why."""


def open_image(cell: Any) -> Image.Image:
    """Open an image without decoding it.

    Args:
        cell: an item of an image source: a path, encoded bytes, alone or as `datasets` stores them (`{"bytes": ...,
            "path": ...}`), an image, or pixels (H, W) or (H, W, C), 0 to 255, in an array or in nested lists.

    Raises:
        BrokenImageError: if it is none of these.
    """
    content = encoded_or_path(cell)
    if isinstance(content, bytes):
        return Image.open(io.BytesIO(content))
    if isinstance(content, Path):
        return Image.open(content)
    if isinstance(cell, Image.Image):
        return cell
    if cell is None or isinstance(cell, dict):
        raise BrokenImageError("it is empty")
    return Image.fromarray(_pixels(cell))


def encoded_or_path(cell: Any) -> bytes | Path | None:
    """Return the encoded bytes of a cell (see `open_image`), or else its path; None if it has neither."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return Path(cell) if isinstance(cell, str) else cell if isinstance(cell, (bytes, Path)) else None


def _pixels(cell: Any) -> np.ndarray:
    try:
        pixels = np.asarray(cell)
    except ValueError:  # lists of different lengths
        pixels = np.empty(0, object)
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in CHANNEL_MODES)
    if pixels.size and shaped and pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255:
        return pixels.astype(np.uint8).squeeze(2) if pixels.shape[2:] == (1,) else pixels.astype(np.uint8)
    numbers = pixels.size and pixels.dtype.kind in "biuf"
    values = f", values {pixels.min():g} to {pixels.max():g}" if numbers else ""
    raise BrokenImageError(
        f"it holds {pixels.dtype} of shape {pixels.shape}{values}. Pixels must be integers from 0 to 255 of shape (H, "
        "W) or (H, W, C); or store encoded files, such as PNG, as bytes"
    )


def file_bytes(cell: Any) -> bytes:
    """Return the encoded bytes of a cell (see `open_image`) or those of its pixels; b"" if it cannot be read."""
    content = encoded_or_path(cell)
    if isinstance(content, Path):
        try:
            return content.read_bytes()
        except OSError:
            return b""
    if content is not None or cell is None or isinstance(cell, dict):
        return content or b""
    if isinstance(cell, Image.Image) and cell.mode in ("P", "PA"):  # the pixels are indices of colors
        cell = cell.convert("RGBA")
    return np.asarray(cell).tobytes()


def upright(image: Image.Image) -> Image.Image:
    """Undo the EXIF orientation of an image; one whose EXIF data cannot be read counts as upright."""
    image.load()
    transposition = _transposition(image)
    return image if transposition is None else image.transpose(transposition)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that `upright` gives an image, without decoding it."""
    swaps_sides = (
        Image.Transpose.TRANSPOSE,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_270,
    )
    width, height = image.size
    return (height, width) if _transposition(image) in swaps_sides else (width, height)


def _transposition(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises almost anything on damaged metadata
        return None


def stored_range(image: Image.Image) -> tuple[float, float]:
    """Return the values of black and white in a gray image whose file has not been decoded.

    They follow from the format: the full range of its bits for integers of up to 16 bits, 0 and 1 for floating-point
    numbers. Nothing is guessed from the values of a single image.

    Raises:
        BrokenImageError: for 32-bit integers, whose range no format states.
    """
    if image.mode == "F":
        return 0.0, 1.0
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # a TIFF file may have 12 bits per sample
        return 0.0, 2.0 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # in these two, Pillow widens 16 bits to 32
        raise BrokenImageError(
            "its pixels are 32-bit integers, whose range is not known. State the values of black and white with "
            "--value_range, for example --value_range 0 4095"
        )
    return 0.0, 65535.0 if image.mode == "I" else 255.0


def color_channels(image: Image.Image) -> int:
    """Return 1 for a gray image of any bit depth and 3 for a color image, ignoring transparency."""
    return 1 if ImageMode.getmode(image.mode).basemode == "L" else 3


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert images (N, C, H, W), uint8, C = 1 or 3, to gray (ITU-R 601 luma) or to RGB by repeating gray."""
    if images.shape[1] == channels:
        return images
    return TF.rgb_to_grayscale(images) if channels == 1 else images.expand(-1, channels, -1, -1)


def resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize images (..., H, W), uint8, with the filter `RESIZE`, ignoring their aspect ratio."""
    return TF.resize(images, [height, width], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Convert images in [-1, 1] to 8-bit values."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()
