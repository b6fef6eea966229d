"""Image grids."""

import numpy as np
import pytest
from PIL import Image

from ddgan.sampling.grids import (
    GUTTER,
    LABEL_SIZE,
    LEGIBLE_SIDE,
    before_after,
    image_grid,
    steps_strip,
    to_pil,
)

COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200)]
WHITE = (255, 255, 255)


def flat(color, width: int = 100, height: int = 100, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), color)


def is_white(image: Image.Image) -> bool:
    return (np.asarray(image) == 255).all()


def test_images_are_arranged_row_by_row_between_white_gutters():
    grid = image_grid([flat(color) for color in COLORS], columns=2)
    assert grid.size == (2 * 100 + 3 * GUTTER, 3 * 100 + 4 * GUTTER)
    for i, color in enumerate(COLORS):
        left, top = GUTTER + i % 2 * (100 + GUTTER), GUTTER + i // 2 * (100 + GUTTER)
        tile = np.asarray(grid.crop((left, top, left + 100, top + 100)))
        assert (tile == color).all()
    assert is_white(grid.crop((100 + GUTTER, 0, 100 + 2 * GUTTER, grid.height)))
    assert is_white(grid.crop((100 + 2 * GUTTER, 2 * 100 + 3 * GUTTER, *grid.size)))  # the empty sixth cell


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 2, 2), (5, 3, 2), (16, 4, 4), (17, 5, 4)])
def test_a_grid_is_about_square(count, columns, rows):
    grid = image_grid([flat("red")] * count)
    assert grid.size == (columns * (100 + GUTTER) + GUTTER, rows * (100 + GUTTER) + GUTTER)


@pytest.mark.parametrize(("side", "factor"), [(8, 12), (28, 3), (32, 3), (64, 1), (96, 1), (128, 1)])
def test_small_images_are_enlarged_by_an_integer_factor_without_blur(side, factor):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    grid = image_grid([to_pil(noise)])
    assert grid.size == (side * factor + 2 * GUTTER,) * 2
    assert factor == 1 or side * factor <= LEGIBLE_SIDE
    tile = np.asarray(grid.crop((GUTTER, GUTTER, GUTTER + side * factor, GUTTER + side * factor)))
    assert (tile == noise.repeat(factor, 0).repeat(factor, 1)).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_transparent_images_are_put_on_white(channels):
    transparent = to_pil(np.zeros((8, 8, channels), dtype=np.uint8))
    assert (np.asarray(image_grid([transparent])) == 255).all()


def test_rectangles_keep_their_aspect_ratio():
    grid = image_grid([flat("red", width=16, height=32)] * 2, columns=2)
    assert grid.size == (2 * 48 + 3 * GUTTER, 96 + 2 * GUTTER)


def test_gray_and_transparent_images_are_shown_on_white():
    gray = to_pil(np.full((100, 100, 1), 77, np.uint8))
    assert gray.mode == "L" and image_grid([gray]).getpixel((50, 50)) == (77, 77, 77)
    red_and_clear = to_pil(np.full((100, 100, 4), (255, 0, 0, 255), np.uint8))
    red_and_clear.paste((255, 0, 0, 0), (0, 0, 50, 100))
    grid = image_grid([red_and_clear])
    assert grid.getpixel((25 + GUTTER, 50)) == WHITE and grid.getpixel((75 + GUTTER, 50)) == (255, 0, 0)


def test_labels_are_in_separate_margins():
    plain = image_grid([flat("red")] * 4, columns=2)
    labelled = image_grid([flat("red")] * 4, 2, column_labels=["a", "b"], row_labels=["first", "second"])
    left, top = labelled.width - plain.width + GUTTER, labelled.height - plain.height + GUTTER
    tiles = np.asarray(labelled)[top:-GUTTER, left:-GUTTER]
    assert (tiles == np.asarray(plain)[GUTTER:-GUTTER, GUTTER:-GUTTER]).all()
    for column in range(2):
        start = left + column * (100 + GUTTER)
        assert not is_white(labelled.crop((start, 0, start + 100, top)))
    for row in range(2):
        start = top + row * (100 + GUTTER)
        assert not is_white(labelled.crop((0, start, left, start + 100)))
    assert is_white(labelled.crop((0, 0, left, top)))


def panels(comparison: Image.Image, rows: int, columns: int, side: int) -> list[list[Image.Image]]:
    """Cut out the panels of a comparison, row by row; the captions are above and to the left of them."""
    left, top = (size - n * (side + LABEL_SIZE) for size, n in zip(comparison.size, (columns, rows), strict=True))
    step = side + LABEL_SIZE
    return [
        [comparison.crop((x, y, x + side, y + side)) for x in range(left, comparison.width, step)]
        for y in range(top, comparison.height, step)
    ]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("names", [[""], ["40 DDIM steps", "4 steps"]])
def test_grids_before_and_after_are_side_by_side_with_captions_above(mode, names):
    before = {name: image_grid([flat(50 + i, mode=mode)] * 4) for i, name in enumerate(names)}
    after = {names[-1]: image_grid([flat(100, mode=mode)] * 4)}
    both = before_after(before, after)
    side = after[names[-1]].width
    (row,) = panels(both, 1, len(names) + 1, side)
    assert [panel.tobytes() for panel in row] == [grid.tobytes() for grid in (*before.values(), *after.values())]
    for i in range(len(row)):
        left = LABEL_SIZE + i * (side + LABEL_SIZE)
        assert not is_white(both.crop((left, 0, left + side, both.height - side - LABEL_SIZE)))


def test_several_grids_after_training_are_below_those_before():
    before = {
        name: flat(shade) for name, shade in (("40 DDIM steps", "black"), ("4 steps", "red"), ("1 step", "blue"))
    }
    after = {"4 steps": flat("yellow"), "1 step": flat("green")}
    first, second = panels(before_after(before, after), 2, 3, 100)
    assert [panel.tobytes() for panel in first] == [image.tobytes() for image in before.values()]
    assert is_white(second[0])
    assert [panel.tobytes() for panel in second[1:]] == [image.tobytes() for image in after.values()]


def test_captions_grow_with_the_grids():
    heights = [
        before_after({"": flat("red", side, side)}, {"": flat("red", side, side)}).height - side for side in (200, 900)
    ]
    assert heights[1] > 2 * heights[0]


def test_a_strip_shows_noise_above_predictions():
    strip = steps_strip([900, 500, 0], [flat("blue")] * 3, [flat("red")] * 3)
    middle = strip.width - GUTTER - 50
    assert strip.getpixel((middle, strip.height - GUTTER - 50)) == (255, 0, 0)
    assert strip.getpixel((middle, strip.height - 2 * GUTTER - 150)) == (0, 0, 255)
    assert strip.height > 2 * 100 + 3 * GUTTER and strip.width > 3 * 100 + 4 * GUTTER
