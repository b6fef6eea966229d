"""Conversion of images of every mode, bit depth, shape and orientation to tensors."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ddgan.core.errors import InputError
from ddgan.data.arguments import check_value_range
from ddgan.data.images import BrokenImageError, upright, upright_size
from ddgan.data.preprocessing import Preprocessing, low_contrast, read_image


def load(image, channels=3, size=(8, 8), **options) -> torch.Tensor:
    preprocessing = Preprocessing(channels, *size, **options)
    return preprocessing.finish(preprocessing.load(image), sample_key=0)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr"])
def test_every_mode_is_converted_to_the_channels_of_the_model(mode, channels, tmp_path):
    dtype, white = {"I;16": (np.uint16, 65535), "F": (np.float32, 1)}.get(mode, (np.uint8, 255))
    image = Image.fromarray(np.linspace(0, white, 64).reshape(8, 8).astype(dtype)).convert(mode)
    pixels = load(image, channels)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels[0, 0, 0] == pytest.approx(-1, abs=0.05)
    assert pixels[0, -1, -1] == pytest.approx(1, abs=0.05)


def test_16_bit_images_keep_their_range():
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    expected = torch.from_numpy(np.round(ramp * (255 / 65535)) / 127.5 - 1).float()
    assert torch.allclose(load(Image.fromarray(ramp), channels=1)[0], expected, atol=1e-6)


def test_dark_16_bit_images_stay_dark():
    dark = Image.fromarray(np.full((8, 8), 200, dtype=np.uint16))
    assert load(dark, channels=1).max() == pytest.approx(1 / 127.5 - 1)


RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


def read_tiff(tmp_path: Path, values: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    Image.fromarray(values).save(tmp_path / "image.tif")
    return read_image(tmp_path / "image.tif", Preprocessing(1, 8, 8, value_range=value_range))[0].numpy()


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (RAMP, None),
        (RAMP * 1.0004, None),  # the rounding of a resampled image
        (RAMP * 2 - 1, (-1, 1)),
        (RAMP * 3000, (0, 3000)),
        ((RAMP * 4095).astype(np.uint16), (0, 4095)),
        ((RAMP * 200).astype(np.int32), (0, 200)),
        (1 - RAMP, (1, 0)),
        ((RAMP * 65535).astype(np.uint16), None),
        ((RAMP * 100).astype(np.uint8), (0, 100)),
    ],
)
def test_the_values_of_black_and_white_can_be_stated(tmp_path, values, value_range):
    assert np.abs(read_tiff(tmp_path, values, value_range) - RAMP * 255).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "CMYK"])
def test_stated_values_of_black_and_white_apply_to_color_images_but_not_to_alpha(mode):
    gray = np.linspace(50, 100, 64).reshape(8, 8).astype(np.uint8)
    image = Image.fromarray(gray)
    image = image.convert(mode) if mode == "P" else image.convert("RGB").convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.new("L", (8, 8), 128))
    pixels = load(image, channels=4, value_range=(50, 100))
    np.testing.assert_allclose(pixels[:3], np.broadcast_to((gray - 50) / 25 - 1, (3, 8, 8)), atol=0.05)
    alpha = 128 if mode in ("RGBA", "LA") else 255
    assert ((pixels[3] + 1) * 127.5).round().unique() == alpha


def test_values_outside_the_stated_range_are_clipped(tmp_path):
    pixels = read_tiff(tmp_path, RAMP, (0.25, 0.75))
    assert (pixels[:2] == 0).all() and (pixels[6:] == 255).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP * 2 - 1, r"-1 to 1, but .* 0 \(black\) to 1 \(white\)\. State .*--value_range"),
        (RAMP * 255, "0 to 255, but .*--value_range"),
        ((RAMP * 200).astype(np.int32), "32-bit integers, whose range is not known.*--value_range 0 4095"),
        (np.where(RAMP == 0, np.nan, RAMP), "1 of its 64 pixels are not finite"),
        (np.where(RAMP == 1, np.inf, RAMP), "1 of its 64 pixels are not finite"),
    ],
)
def test_images_of_unknown_range_are_refused_instead_of_guessed(tmp_path, values, message):
    with pytest.raises(BrokenImageError, match=message):
        read_tiff(tmp_path, values)


def test_the_bits_of_a_file_decide_and_not_the_values_of_one_image(tmp_path):
    samples = np.array([4095, 2048] * 32, np.uint16)
    packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in samples.reshape(-1, 2))
    entries = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(packed))]
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in entries)
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    (tmp_path / "12bit.tif").write_bytes(header + packed + table + bytes(4))
    pixels = read_image(tmp_path / "12bit.tif", Preprocessing(1, 8, 8))[0]
    assert pixels[0].tolist() == [255, 128] * 4
    (tmp_path / "16bit.pgm").write_bytes(b"P5 8 8 65535\n" + np.full(64, 200, ">u2").tobytes())
    assert read_image(tmp_path / "16bit.pgm", Preprocessing(1, 8, 8)).max() == 1


def test_images_that_come_out_nearly_constant_have_a_warning():
    assert low_contrast(torch.rand(4, 1, 8, 8) * 2 - 1) is None
    assert "from 0% to 6% of the way" in low_contrast(torch.linspace(-1, -0.875, 64).view(1, 1, 8, 8))


def test_images_of_a_single_color_each_have_a_warning():
    colors = torch.rand(4, 3, 1, 1).mul(2).sub(1).expand(4, 3, 8, 8)
    assert "Each of the first 4 images has nearly a single color: no channel varies by more than 0%" in (
        low_contrast(colors)
    )
    assert low_contrast(torch.cat([colors, torch.rand(1, 3, 8, 8) * 2 - 1])) is None
    assert low_contrast(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)) is None, "one pixel has no structure"


@pytest.mark.parametrize("values", [[0], [0, 0], [0, float("nan")], [1, 2, 3]])
def test_a_range_of_values_is_two_different_numbers(values):
    with pytest.raises(InputError, match=r"--value_range .*two different numbers"):
        check_value_range(values)


def test_transparency_becomes_white_if_the_model_has_no_alpha():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(load(clear), torch.ones(3, 8, 8))
    assert load(clear, channels=4)[3].max() == -1
    palette = Image.new("P", (8, 8), 3)
    palette.info["transparency"] = 3
    assert torch.equal(load(palette, channels=1), torch.ones(1, 8, 8))


def test_a_photo_is_set_upright(tmp_path):
    photo = Image.new("RGB", (16, 8), "black")
    photo.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    pixels = load(Image.open(tmp_path / "photo.png"), size=(16, 8))
    assert pixels[:, 0].min() == 1
    assert pixels[:, -1].max() == -1


def test_a_photo_with_invalid_metadata_is_read(tmp_path):
    def saved(suffix: str, *rows: bytes, head: bytes = b"Exif\0\0II*\0\x08\0\0\0") -> Path:
        table = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
        photo.save(tmp_path / f"photo{suffix}", exif=head + table, quality=100)
        return tmp_path / f"photo{suffix}"

    photo = Image.new("RGB", (16, 8), "black")
    photo.paste("white", (0, 0, 8, 8))
    rotated = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    maker = struct.pack("<HHII", 0x010F, 5, 1, 8)  # a fraction in place of a name
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")  # a name in place of a number
    preprocessing = Preprocessing(1, 16, 8)
    for invalid in (maker, width):
        for suffix in (".jpg", ".png", ".webp"):
            pixels = read_image(saved(suffix, invalid, rotated), preprocessing)
            assert pixels[0, :4].min() > 250
            assert pixels[0, -4:].max() < 5
    upright = read_image(saved(".png", rotated, head=b"Exif\0\0none of EXIF"), Preprocessing(1, 8, 16))
    assert upright[0, :, :8].min() > upright[0, :, 8:].max()


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_undone_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "photo.png")))
    assert np.array_equal(read_image(tmp_path / "photo.png", Preprocessing(1, 8, 8))[0], expected)
    Image.new("L", (12, 8)).save(tmp_path / "wide.jpg", exif=exif)
    wide = Image.open(tmp_path / "wide.jpg")
    assert upright_size(wide) == upright(wide).size


def test_images_of_another_shape_are_cropped_not_distorted():
    wide = Image.new("L", (32, 8), 0)
    wide.paste(255, (12, 0, 20, 8))
    assert load(wide, channels=1, center_crop=True).min() == 1  # the white square in the middle
    crops = set()
    preprocessing = Preprocessing(1, 8, 8)
    for key in range(50):
        crops.add(preprocessing.finish(preprocessing.load(wide), key).mean().item())
    assert len(crops) > 5
    assert load(Image.new("L", (20, 30)), channels=1, size=(8, 16)).shape == (1, 8, 16)


def test_thin_images_are_cropped_before_they_are_enlarged():
    thin = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, 20000, 3), dtype=np.uint8))
    preprocessing = Preprocessing(3, 128, 64)
    pixels = preprocessing.load(thin)
    assert pixels.numel() <= 2 * 20000 * 3
    crops = [preprocessing.finish(pixels, key) for key in range(3)]
    assert all(crop.shape == (3, 128, 64) for crop in crops)
    assert not torch.equal(crops[0], crops[1])
    # an image that is just too thin is cropped to nearly the same pixels as one that is not
    gradient = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (4, 1))
    centers = [
        load(Image.fromarray(np.pad(gradient, ((0, 0), (margin, margin)))), 1, size=(8, 8), center_crop=True)
        for margin in (0, 60)
    ]
    assert (centers[0] - centers[1]).abs().max() < 0.05


def test_half_of_the_samples_are_flipped_depending_on_the_key_alone():
    ramp = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (8, 1)))
    preprocessing = Preprocessing(1, 8, 8, random_flip=True)
    flipped = [preprocessing.finish(preprocessing.load(ramp), key)[0, 0, 0] > -1 for key in range(400)]
    assert 150 < sum(flipped) < 250
    again = [preprocessing.finish(preprocessing.load(ramp), key)[0, 0, 0] > -1 for key in range(400)]
    assert flipped == again
