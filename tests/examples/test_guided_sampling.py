"""examples/guided_sampling.py, through its command line."""

import runpy

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tiny import ROOT

from ddgan import ClassConditionalPipeline, ClassConditionedUnet
from ddgan.core.errors import InputError

example = runpy.run_path(str(ROOT / "examples" / "guided_sampling.py"), run_name="example")


def run(*flags):
    example["main"]([str(flag) for flag in flags])


def test_guided_images_are_compared_with_unguided_ones(tiny_model, tmp_path, capsys):
    short = ["--num_inference_steps", 4, "--num_images", 2, "--guidance_scale", 10, "--guidance_end", 0.75]
    towards = ["--towards", "color:teal", "0.5*symmetry", "--scale_schedule", "sqrt_alpha_bar"]
    run("--pipeline", tiny_model, *towards, *short, "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    unguided, guided = (float(line.rsplit(" ", 1)[1]) for line in printed.splitlines()[:2])
    assert guided < unguided - 0.05
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "losses.png", "schedules.png"]
    assert str(tmp_path / "grid.png") in printed


def test_classes_are_used_in_turn_by_label_or_name(tmp_path):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = ClassConditionedUnet(num_classes=3, id2label={0: "cat", 1: "dog", 2: "wolf"}, **sizes, **blocks)
    for parameter in unet.parameters():  # at initialization the class hardly matters
        torch.nn.init.normal_(parameter, std=0.2)
    ClassConditionalPipeline(unet.eval(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    short = ["--pipeline", tmp_path / "model", "--towards", "symmetry", "--num_inference_steps", 2, "--num_images", 3]
    for name, labels in (("turn", ["dog", 2]), ("each", [1, "wolf", 1]), ("other", [1, 2, 0])):
        run(*short, "--class_labels", *labels, "--output_dir", tmp_path / name)
    turn, each, other = (Image.open(tmp_path / name / "grid.png") for name in ("turn", "each", "other"))
    assert turn == each != other
    with pytest.raises(InputError, match="no class 'bird'"):
        run(*short, "--class_labels", "bird", "--output_dir", tmp_path / "wrong")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance_end", 0], "--guidance_end 0: of 4 steps none is guided"),
        (["--guidance_start", 0.5, "--guidance_end", 0.6], "--guidance_start 0.5 and --guidance_end 0.6: of 4 steps"),
        (["--guidance_end", 2], "--guidance_end is 2.0; it must be at most 1"),
        (["--num_inference_steps", 0], "--num_inference_steps is 0"),
        (["--clip_model", "a", "b", "c"], "--clip_model a b c: it takes one name"),
        (["--towards", "colour:teal"], "The guidance loss 'colour:teal' is invalid: there is no loss 'colour'"),
    ],
)
def test_invalid_flags_are_refused(tiny_model, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run("--pipeline", tiny_model, "--num_inference_steps", 4, "--output_dir", tmp_path, *flags)
