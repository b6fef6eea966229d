"""Claims about examples/guided_sampling.py, through its command line."""

import runpy

import pytest
import torch
from PIL import Image
from tiny import ROOT
from tiny_clip import save_clip

from ddgan import CLIPLoss, ColorLoss, ReferenceLoss, SaturationLoss, SymmetryLoss, TotalVariationLoss
from ddgan.errors import InputError

example = runpy.run_path(str(ROOT / "examples" / "guided_sampling.py"), run_name="example")


def run(*flags):
    example["main"]([str(flag) for flag in flags])


def test_pictures_are_pulled_and_shown(tiny_model, tmp_path, capsys):
    short = ["--num_inference_steps", 4, "--num_images", 2, "--guidance_scale", 10, "--guidance_end", 0.75]
    towards = ["--towards", "color:teal", "0.5*symmetry", "--scale_schedule", "sqrt_alpha_bar"]
    run("--pipeline", tiny_model, *towards, *short, "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    free, pulled = (float(line.rsplit(" ", 1)[1]) for line in printed.splitlines()[:2])
    assert pulled < free - 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "losses.png", "schedules.png"]
    assert str(tmp_path / "grid.png") in printed


def test_every_loss_can_be_named(tmp_path, monkeypatch):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    torch.manual_seed(0)
    save_clip(tmp_path / "clip")
    monkeypatch.setitem(example["LOSSES"], "clip", lambda text: CLIPLoss(text, str(tmp_path / "clip")))
    texts = {
        "2*color:teal": 2 * ColorLoss("teal"),
        "clip:a red rose": CLIPLoss("a red rose", str(tmp_path / "clip")),
        "saturation:0.5": SaturationLoss(0.5),
        "0.1*total_variation": 0.1 * TotalVariationLoss(),
        "symmetry": SymmetryLoss(),
        "-1*symmetry:top-bottom": -1 * SymmetryLoss("top-bottom"),
        f"reference:{tmp_path / 'red.png'}": ReferenceLoss(Image.new("RGB", (16, 16), "red")),
    }
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    for text, expected in texts.items():
        torch.testing.assert_close(example["parse_loss"](text)(pictures), expected(pictures))


@pytest.mark.parametrize(
    "wrong", ["colour:teal", "color:teel", "many*color:teal", "clip", "reference:nowhere.png", "saturation:much"]
)
def test_what_is_no_loss_is_said(wrong):
    with pytest.raises(InputError, match=f"--towards {wrong.replace('*', '.')}"):
        example["parse_loss"](wrong)
