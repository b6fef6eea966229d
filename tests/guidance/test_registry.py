"""Guidance losses described by text."""

import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from ddgan import CLIPLoss, ColorLoss, ReferenceLoss, SaturationLoss, SymmetryLoss, TotalVariationLoss
from ddgan.core.errors import InputError
from ddgan.guidance.clip import DEFAULT_MODEL
from ddgan.guidance.registry import clip_model_names, parse_loss


def test_every_loss_can_be_named(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    torch.manual_seed(0)
    save_clip(tmp_path / "clip")
    clip, red = str(tmp_path / "clip"), Image.new("RGB", (16, 16), "red")
    expected_losses = {
        "2*color:teal": 2 * ColorLoss("teal"),
        "clip:a red rose": CLIPLoss("a red rose", clip),
        f"-0.5*clip_image:{tmp_path / 'red.png'}": -0.5 * CLIPLoss(red, clip),
        "clip:a *red* rose": CLIPLoss("a *red* rose", clip),
        "saturation:0.5": SaturationLoss(0.5),
        "0.1*total_variation": 0.1 * TotalVariationLoss(),
        "symmetry": SymmetryLoss(),
        "-1*symmetry:top-bottom": -1 * SymmetryLoss("top-bottom"),
        f"reference:{tmp_path / 'red.png'}": ReferenceLoss(red),
    }
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for text, expected in expected_losses.items():
        torch.testing.assert_close(parse_loss(text, clip)(images), expected(images))


@pytest.mark.parametrize(
    "text",
    [
        "colour:teal",
        "color:teel",
        "many*color:teal",
        "clip",
        "clip_image:nowhere.png",
        "reference:nowhere.png",
        "saturation:much",
    ],
)
def test_invalid_losses_are_named(text):
    with pytest.raises(InputError, match=f"guidance loss '{text.replace('*', '.')}' is invalid"):
        parse_loss(text)


def test_a_clip_model_has_one_or_two_names():
    assert clip_model_names(None) == [DEFAULT_MODEL]
    assert clip_model_names("a") == clip_model_names(["a"]) == ["a"]
    assert clip_model_names(["ViT-B-32", "openai"]) == ["ViT-B-32", "openai"]
    with pytest.raises(InputError, match="a b c: it takes one name"):
        clip_model_names(["a", "b", "c"])
