"""Pictures laid out for people to look at: grids, before and after, the way from noise to picture."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GUTTER = 4
LABEL_SIZE = 14
LEGIBLE_SIDE = 96


def to_pil(image: np.ndarray) -> Image.Image:
    """An image (H, W, C), uint8, as a grey, RGB or RGBA picture for C = 1, 3, 4."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def image_grid(
    pictures: Sequence[Image.Image],
    columns: int | None = None,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures of one size and mode (grey, RGB or RGBA) out row by row on white, as RGB.

    Small ones are enlarged by a whole factor, as far as their longer side stays within `LEGIBLE_SIDE` pixels.

    Args:
        columns: None makes the grid about square.
        column_labels: one above each column.
        row_labels: one beside each row.
    """
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    factor = max(1, LEGIBLE_SIDE // max(pictures[0].size))
    width, height = (side * factor for side in pictures[0].size)
    font = ImageFont.load_default(LABEL_SIZE)
    top = 2 * LABEL_SIZE if column_labels else GUTTER
    left = math.ceil(max(map(font.getlength, row_labels))) + 2 * LABEL_SIZE if row_labels else GUTTER
    right, bottom = left + columns * (width + GUTTER), top + rows * (height + GUTTER)
    grid = Image.new("RGB", (right, bottom), "white")
    for index, picture in enumerate(pictures):
        tile = picture.resize((width, height), Image.Resampling.NEAREST)
        corner = (left + index % columns * (width + GUTTER), top + index // columns * (height + GUTTER))
        grid.paste(tile, corner, tile if tile.mode == "RGBA" else None)
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + GUTTER) + width / 2, top / 2), label, "black", font, anchor="mm")
    for row, label in enumerate(row_labels):
        draw.text((left / 2, top + row * (height + GUTTER) + height / 2), label, "black", font, anchor="mm")
    return grid


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two pictures of one size side by side, captioned: most often grids of the same seeds."""
    return image_grid([before, after], columns=2, column_labels=("before", "after"))


def steps_strip(timesteps: Sequence[int], noisy: Sequence[Image.Image], clean: Sequence[Image.Image]) -> Image.Image:
    """The way to one picture: noisy samples, below each the clean image predicted from it, above it the timestep."""
    labels = [f"t = {timestep}" for timestep in timesteps]
    return image_grid([*noisy, *clean], len(timesteps), labels, row_labels=("noisy", "predicted"))


def rows_by_class(
    num_samples: int, classes: Sequence[str]
) -> tuple[list[int], Callable[[list[Image.Image]], Image.Image]]:
    """What a job shows of its classes: a row for each, in order, with its name; at least so many pictures in all.

    Returns:
        `labels` and `grid` of a `TrainingJob`.
    """
    columns = -(-num_samples // len(classes))
    labels = [label for label in range(len(classes)) for _ in range(columns)]
    return labels, partial(image_grid, columns=columns, row_labels=classes)
