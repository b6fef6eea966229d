"""Image grids: labeled, before and after, step by step, one row per class."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GUTTER = 4
LABEL_SIZE = 14
LEGIBLE_SIDE = 96


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert a uint8 array `(H, W, C)` to a PIL image: gray, RGB or RGBA for C = 1, 3, 4."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def image_grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Arrange images row by row on a white background, as an RGB image.

    Small images are enlarged by the largest integer factor that keeps their longer side within `LEGIBLE_SIDE` pixels.

    Args:
        images: Images of the same size and mode (gray, RGB or RGBA).
        columns: Number of columns; None makes the grid about square.
        column_labels: Label above each column.
        row_labels: Label to the left of each row.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = max(1, LEGIBLE_SIDE // max(images[0].size))
    width, height = (side * factor for side in images[0].size)
    font = ImageFont.load_default(LABEL_SIZE)
    top = 2 * LABEL_SIZE if column_labels else GUTTER
    left = math.ceil(max(map(font.getlength, row_labels))) + 2 * LABEL_SIZE if row_labels else GUTTER
    right, bottom = left + columns * (width + GUTTER), top + rows * (height + GUTTER)
    grid = Image.new("RGB", (right, bottom), "white")
    for index, image in enumerate(images):
        tile = image.resize((width, height), Image.Resampling.NEAREST)
        corner = (left + index % columns * (width + GUTTER), top + index // columns * (height + GUTTER))
        grid.paste(tile, corner, tile if tile.mode == "RGBA" else None)
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + GUTTER) + width / 2, top / 2), label, "black", font, anchor="mm")
    for row, label in enumerate(row_labels):
        draw.text((left / 2, top + row * (height + GUTTER) + height / 2), label, "black", font, anchor="mm")
    return grid


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Show two images of the same size side by side with captions, typically grids of the same seeds."""
    return image_grid([before, after], columns=2, column_labels=("before", "after"))


def steps_strip(timesteps: Sequence[int], noisy: Sequence[Image.Image], clean: Sequence[Image.Image]) -> Image.Image:
    """Show the denoising of one image: timesteps, noisy samples, and the clean images predicted from them."""
    labels = [f"t = {timestep}" for timestep in timesteps]
    return image_grid([*noisy, *clean], len(timesteps), labels, row_labels=("noisy", "predicted"))


def rows_by_class(
    num_samples: int, classes: Sequence[str]
) -> tuple[list[int], Callable[[list[Image.Image]], Image.Image]]:
    """Plan a sample grid with one labeled row per class.

    Args:
        num_samples: Minimum number of images in total.
        classes: Class names, in the order of their labels.

    Returns:
        The class label of each image, and a function that arranges the images: `labels` and `grid` of a `TrainingJob`.
    """
    columns = math.ceil(num_samples / len(classes))
    labels = [label for label in range(len(classes)) for _ in range(columns)]
    return labels, partial(image_grid, columns=columns, row_labels=classes)
