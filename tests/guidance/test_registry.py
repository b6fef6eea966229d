"""Guidance losses described by text."""

import pytest
import torch
from PIL import Image
from tiny_clip import save_clip

from ddgan import CLIPLoss, ColorLoss, ReferenceLoss, SaturationLoss, SymmetryLoss, TotalVariationLoss
from ddgan.core.errors import InputError
from ddgan.guidance.arguments import DEFAULT_MODEL, LOSS_FORMS, clip_model_names
from ddgan.guidance.registry import CLIP_LOSSES, LOSSES, parse_loss


def test_every_loss_can_be_named(tmp_path):
    assert {*LOSSES, *CLIP_LOSSES} == set(LOSS_FORMS)
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
    ("text", "reason"),
    [
        ("colour:teal", "there is no loss 'colour'. Choose from color,"),
        ("color:teel", "'teel' is not a known color"),
        ("many*color:teal", "'many' is not a finite number"),
        ("clip", "it needs an argument: clip:<sentence>"),
        ("clip: ", "it needs an argument: clip:<sentence>"),
        ("reference", "it needs an argument: reference:<image file>"),
        ("color", "it needs an argument: color:#BB2266"),
        ("saturation:1.5", "must be from 0 (gray) to 1"),
        ("0*symmetry", "with the weight 0 it has no effect"),
        ("symmetry:diagonal", "must be 'left-right' or 'top-bottom'"),
        ("total_variation:2", "total_variation takes no argument"),
        ("clip_image:nowhere.png", "nowhere.png"),
        ("reference:nowhere.png", "nowhere.png"),
        ("saturation:much", "'much' is not a finite number"),
    ],
)
def test_invalid_losses_are_refused_with_the_reason(text, reason):
    with pytest.raises(InputError) as error:
        parse_loss(text)
    assert str(error.value).startswith(f"The guidance loss {text!r} is invalid: ") and reason in str(error.value)


def test_a_clip_model_has_one_or_two_names():
    assert clip_model_names(None) == [DEFAULT_MODEL]
    assert clip_model_names("a") == clip_model_names(["a"]) == ["a"]
    assert clip_model_names(["ViT-B-32", "openai"]) == ["ViT-B-32", "openai"]
    with pytest.raises(InputError, match="a b c: it takes one name"):
        clip_model_names(["a", "b", "c"])
