"""Guidance losses without a pretrained model."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ddgan import (
    ColorLoss,
    GuidanceLoss,
    ReferenceLoss,
    SaturationLoss,
    SymmetryLoss,
    TotalVariationLoss,
)
from ddgan.core.errors import InputError

PHOTO = Image.linear_gradient("L").rotate(30).convert("RGB")
LOSSES = {
    "color": ColorLoss("teal"),
    "saturation": SaturationLoss(0.7),
    "total variation": TotalVariationLoss(),
    "left-right": SymmetryLoss(),
    "top-bottom": SymmetryLoss("top-bottom"),
    "reference": ReferenceLoss(PHOTO, 4),
    "sum": 2 * ColorLoss("teal") + 0.5 * (SymmetryLoss() + TotalVariationLoss()),
}


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain(red: float, green: float, blue: float) -> torch.Tensor:
    """Return one image of a single color, given in [0, 1]."""
    return torch.tensor([red, green, blue], dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 8, 8) * 2 - 1


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_an_image_does_not_depend_on_its_batch(name):
    images = noise(3, 3, 8, 12)
    losses = LOSSES[name](images)
    assert losses.shape == (3,) and len(set(losses.tolist())) == 3
    torch.testing.assert_close(losses, torch.cat([LOSSES[name](image) for image in images.split(1)]))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name):
    assert torch.autograd.gradcheck(LOSSES[name], noise(2, 3, 4, 6).requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_descent_lowers_the_loss(name):
    image = noise(1, 3, 8, 8).requires_grad_()
    before = LOSSES[name](image).item()
    optimizer = torch.optim.Adam([image], 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        LOSSES[name](image).sum().backward()
        optimizer.step()
    assert LOSSES[name](image).item() < before / 4


@pytest.mark.parametrize("target", ["#1ae680", "rgb(26, 230, 128)", (26 / 255, 230 / 255, 128 / 255)])
def test_a_color_has_several_notations(target):
    images = noise(2, 3, 4, 4)
    torch.testing.assert_close(ColorLoss(target)(images), ColorLoss("#1AE680")(images), rtol=1e-6, atol=0)
    torch.testing.assert_close(ColorLoss()(plain(0.1, 0.9, 0.5)), torch.zeros(1))


def test_color_distances_are_in_the_units_of_images():
    assert ColorLoss("white")(plain(0, 0, 0)).item() == 2
    assert ColorLoss("red")(plain(1, 0, 0)).item() == 0
    assert ColorLoss("red")(plain(1, 1, 0)).item() == pytest.approx(2 / 3)
    assert ColorLoss("red")(torch.cat([plain(1, 1, 0), torch.full((1, 1, 8, 8), 0.3)], 1)).item() == pytest.approx(
        2 / 3
    )


@pytest.mark.parametrize("target", ["teel", "#12345", (0.1, 0.2), (10, 200, 30), (-0.1, 0, 0)])
def test_invalid_colors_are_refused(target):
    with pytest.raises(InputError, match="color"):
        ColorLoss(target)


@pytest.mark.parametrize("loss", [ColorLoss(), SaturationLoss()])
def test_color_losses_refuse_gray_images(loss):
    with pytest.raises(InputError, match="1 channels"):
        loss(noise(1, 1, 8, 8))


def test_saturation_is_the_distance_of_chroma():
    assert SaturationLoss(1)(plain(0.4, 0.4, 0.4)).item() == pytest.approx(1)
    assert SaturationLoss(0)(plain(0.4, 0.4, 0.4)).item() == pytest.approx(0)
    assert SaturationLoss(0)(plain(1, 0.25, 0.5)).item() == pytest.approx(0.75)


def test_total_variation_counts_both_directions():
    stripes = torch.tensor([-1.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
    assert TotalVariationLoss()(stripes).item() == TotalVariationLoss()(stripes.mT).item() == 2
    assert TotalVariationLoss()(plain(0.2, 0.7, 0.1)).item() == 0


def test_symmetry_has_two_axes():
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    assert SymmetryLoss("top-bottom")(ramp).item() == 0
    assert SymmetryLoss("left-right")(ramp).item() > 0.5
    assert SymmetryLoss("left-right")(ramp.mT).item() == 0


def test_a_reference_is_compared_at_low_resolution_only():
    checker = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    black_and_white = Image.fromarray((checker * 255).byte().numpy())
    assert ReferenceLoss(black_and_white, 4)(torch.zeros(1, 1, 8, 8)).item() == pytest.approx(0, abs=1e-6)
    assert ReferenceLoss(black_and_white, 8)(torch.zeros(1, 1, 8, 8)).item() == pytest.approx(1)


def test_a_damaged_reference_is_reported_when_it_is_opened(tmp_path):
    PHOTO.save(tmp_path / "photo.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "photo.png").read_bytes()[:-200])
    with pytest.raises(OSError, match="truncated"):
        ReferenceLoss(Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_reference_is_fitted_to_the_images(channels):
    red = Image.new("RGB", (40, 10), "red")
    gray, rgb = [-0.4], [1, -1, -1]  # 76 of 255 is the luminance of red
    expected = {1: gray, 2: [*gray, 1], 3: rgb, 4: [*rgb, 1]}[channels]
    images = torch.tensor(expected).view(1, channels, 1, 1).expand(1, channels, 8, 6)
    assert ReferenceLoss(red, 2)(images).item() < 1e-4


@pytest.mark.parametrize("change", ["turned", "transparent", "16 bits"])
def test_a_reference_is_read_like_a_training_image(change):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # the upper half is white
    image = Image.fromarray(pixels)
    if change == "turned":
        buffer, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 3  # upside down
        image.rotate(180).save(buffer, "PNG", exif=exif)
        image = Image.open(buffer)
    elif change == "transparent":
        image = Image.new("RGBA", (8, 8), "black")
        image.putalpha(Image.fromarray(255 - pixels[..., 0]))
    else:
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    upper = torch.cat([torch.ones(1, 3, 4, 8), -torch.ones(1, 3, 4, 8)], 2)
    assert ReferenceLoss(image, 4)(upper).item() < 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: SaturationLoss(1.5), "1.5"),
        (lambda: SymmetryLoss("diagonal"), "left-right"),
        (lambda: ReferenceLoss(PHOTO, 0), "at least 1"),
        (lambda: ReferenceLoss(PHOTO, 16)(noise(1, 3, 8, 8)), "16x16"),
    ],
)
def test_invalid_arguments_are_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


def test_losses_add_and_scale():
    images = noise(3, 3, 8, 8)
    color, symmetry = ColorLoss(), SymmetryLoss()
    expected = 2 * color(images) - 0.5 * symmetry(images)
    torch.testing.assert_close((2 * color + symmetry * -0.5)(images), expected)
    torch.testing.assert_close((2 * (color + -0.25 * symmetry))(images), expected)


def test_a_custom_loss_can_be_added_and_receives_the_step():
    class Stepwise(GuidanceLoss):
        def __call__(self, images, step=0):
            return images.mean((1, 2, 3)) * step

    images = noise(2, 3, 8, 8)
    both = ColorLoss() + Stepwise()
    torch.testing.assert_close(both(images, step=3), ColorLoss()(images) + 3 * images.mean((1, 2, 3)))
    with pytest.raises(TypeError):
        ColorLoss() + (lambda images: images.mean())


def test_a_custom_loss_that_takes_no_step_can_be_added():
    class Left(GuidanceLoss):
        def __call__(self, images):
            return images[..., 0].mean((1, 2))

    images = torch.rand(2, 3, 8, 8)
    expected = 2 * Left()(images) + SymmetryLoss()(images)
    torch.testing.assert_close((2 * Left() + SymmetryLoss())(images, 3), expected)
