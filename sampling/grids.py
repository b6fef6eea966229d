"""Image grids: labeled, before and after, step by step, one row per class."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GUTTER = 4
LABEL_SIZE = 14
LEGIBLE_SIDE = 96


def to_pil(image: np.ndarray) -> Image.Image:
    """Convert a uint8 array `(H, W, C)` to a PIL image: gray, gray and alpha, RGB or RGBA for C = 1, 2, 3, 4."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def image_grid(
    images: Sequence[Image.Image],
    columns: int | None = None,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    label_size: int = LABEL_SIZE,
    gutter: int = GUTTER,
) -> Image.Image:
    """Arrange images row by row on a white background, as an RGB image.

    Small images are enlarged by the largest integer factor that keeps their longer side within `LEGIBLE_SIDE` pixels.

    Args:
        images: Images of the same size and mode: gray or RGB, with or without alpha.
        columns: Number of columns; None makes the grid about square.
        column_labels: Label above each column.
        row_labels: Label to the left of each row.
        label_size: Font size of the labels in pixels.
        gutter: Pixels between images.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = (side * _enlargement(images[0].size) for side in images[0].size)
    font = ImageFont.load_default(label_size)
    top = 2 * label_size if column_labels else gutter
    left = math.ceil(max(map(font.getlength, row_labels))) + 2 * label_size if row_labels else gutter
    right, bottom = left + columns * (width + gutter), top + rows * (height + gutter)
    grid = Image.new("RGB", (right, bottom), "white")
    for index, image in enumerate(images):
        tile = image.resize((width, height), Image.Resampling.NEAREST)
        corner = (left + index % columns * (width + gutter), top + index // columns * (height + gutter))
        grid.paste(tile, corner, tile if tile.has_transparency_data else None)
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        draw.text((left + column * (width + gutter) + width / 2, top / 2), label, "black", font, anchor="mm")
    for row, label in enumerate(row_labels):
        draw.text((left / 2, top + row * (height + gutter) + height / 2), label, "black", font, anchor="mm")
    return grid


def grid_of_classes(images: Sequence[Image.Image], classes: Sequence[str]) -> Image.Image:
    """Arrange images whose classes are used in turn.

    The grid has one labeled column per class, or one labeled row if a name is longer than an image is wide.

    Args:
        images: Images of the same size, as for `image_grid`: image i is of class i modulo the number of classes.
        classes: Name of each class.
    """
    classes = classes[: len(images)]
    font, size = ImageFont.load_default(LABEL_SIZE), images[0].size
    if max(map(font.getlength, classes)) <= size[0] * _enlargement(size):
        return image_grid(images, len(classes), classes)
    columns = math.ceil(len(images) / len(classes))
    blanks = [Image.new("RGB", size, "white")] * (columns * len(classes) - len(images))
    padded = [*images, *blanks]
    in_rows = [image for row in range(len(classes)) for image in padded[row :: len(classes)]]
    return image_grid(in_rows, columns, row_labels=classes)


def _enlargement(size: tuple[int, int]) -> int:
    return max(1, LEGIBLE_SIDE // max(size))


def before_after(before: Mapping[str, Image.Image], after: Mapping[str, Image.Image]) -> Image.Image:
    """Show grids of the same seeds before and after training, with captions.

    A single grid after training is to the right of those before; several are in a second row, below those before that
    have the same caption.

    Args:
        before: Images of the same size by caption, such as the number of sampling steps; it may be empty.
        after: Likewise, after training.
    """
    label_size = max(LABEL_SIZE, next(iter(after.values())).width // 24)
    grid = partial(image_grid, label_size=label_size, gutter=label_size)
    if len(after) == 1:
        captions = [f"before, {name}" if name else "before" for name in before]
        captions += [f"after, {name}" if name else "after" for name in after]
        images = [*before.values(), *after.values()]
        return grid(images, len(images), captions)
    names = list(dict.fromkeys([*before, *after]))
    blank = Image.new("RGB", next(iter(after.values())).size, "white")
    images = [row.get(name, blank) for row in (before, after) for name in names]
    return grid(images, len(names), names, row_labels=("before", "after"))


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
