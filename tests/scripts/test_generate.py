"""scripts/generate.py, through its command line."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    HeunDiscreteScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
)
from PIL import Image
from tiny import (
    ROOT,
    few_step_scheduler,
    level_difference,
    run_ranks,
    run_script,
    tiny_classes,
    tiny_unet,
)

from ddgan import (
    ClassConditionalPipeline,
    ClassConditionedUnet,
    ColorLoss,
    DDGANPipeline,
    DDGANScheduler,
    GuidedPipeline,
    NCSNpp,
    api,
)
from ddgan.commands import generate as command
from ddgan.core.errors import InputError
from ddgan.core.locks import locked
from ddgan.data.images import open_image
from ddgan.data.sources import open_source
from ddgan.sampling import image_files
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import grid_of_classes
from ddgan.sampling.groups import GroupSampler
from ddgan.sampling.loading import load_pipeline, pipeline_hash, with_scheduler
from ddgan.scripts import generate

SCRIPT = ROOT / "scripts" / "generate.py"
SHORT = ("--scheduler", "ddim", "--num_inference_steps", "3", "--num_images", "7")


def flags(model: Path, output: Path, *more) -> list[str]:
    return [str(flag) for flag in ("--pipeline", model, "--output_dir", output, *SHORT, *more)]


def images(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "images").iterdir())}


@pytest.fixture
def whole(tiny_model, tmp_path) -> Path:
    """Output folder of seven images from one run."""
    generate.main(flags(tiny_model, tmp_path / "whole"))
    return tmp_path / "whole"


def test_every_image_has_its_own_seed(tiny_model, whole, tmp_path, capsys):
    assert sorted(images(whole)) == [f"{i:06d}.png" for i in range(7)]
    assert len(set(images(whole).values())) == 7
    generate.main(flags(tiny_model, tmp_path / "later", "--seed", 4, "--num_images", 2))
    assert list(images(tmp_path / "later").values()) == [images(whole)[f"{i:06d}.png"] for i in (4, 5)]
    assert "2 images: " in (printed := capsys.readouterr().out) and " images per second)" in printed


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """A network whose rounding depends on batch size, threads and memory alignment, because its sums are long.

    It generates images in groups of 16.
    """
    folder = tmp_path_factory.mktemp("models") / "wide"
    DDPMPipeline(tiny_unet(sample_size=32, block_out_channels=(64, 128)), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_images(wide_model, tmp_path_factory) -> dict[str, bytes]:
    """Images of two groups: four of the first and three of the second."""
    output = tmp_path_factory.mktemp("wide") / "whole"
    generate.main(flags(wide_model, output, "--seed", 12))
    return images(output)


def test_files_depend_only_on_their_seeds(wide_model, wide_images, two_threads, tmp_path):
    more = ("--seed", 14, "--num_images", 3, "--batch_size", 3)
    generate.main(flags(wide_model, tmp_path, *more))
    assert list(images(tmp_path).values()) == [wide_images[f"{i:06d}.png"] for i in (2, 3, 4)]
    assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_is_reported(tiny_model, two_threads, tmp_path):
    with pytest.raises(InputError, match="1000"):
        generate.main(flags(tiny_model, tmp_path, "--num_images", 99, "--num_inference_steps", 1001))


@pytest.mark.slow
def test_two_processes_write_the_same_files_as_one(wide_model, wide_images, tmp_path):
    output = tmp_path / "two"
    more = ("--seed", 12, "--grid", "--intermediates", 2)
    printed = run_ranks(SCRIPT, *flags(wide_model, output, *more), output=tmp_path / "output.txt", machines=2)
    assert images(output) == wide_images
    assert printed.count(str(output / "images")) == 1
    assert (output / "grid.png").exists() and (output / "intermediates.png").exists()


def test_a_few_step_pipeline_is_sampled_in_the_steps_it_was_trained_for(tmp_path, caplog):
    DDPMPipeline(tiny_unet(), few_step_scheduler(3)).save_pretrained(tmp_path / "model")

    def run(name: str, *more) -> dict[str, bytes]:
        flags = ("--pipeline", tmp_path / "model", "--output_dir", tmp_path / name, "--num_images", 2, *more)
        generate.main([str(flag) for flag in flags])
        return images(tmp_path / name)

    assert run("default") == run("explicit", "--num_inference_steps", 3) and not caplog.messages
    assert json.loads((tmp_path / "default" / "generate.json").read_text())["num_inference_steps"] == 3
    run("more", "--num_inference_steps", 7)
    (message,) = caplog.messages
    assert "trained for num_inference_steps=3 with DDPMScheduler" in message


def test_an_interrupted_run_continues(tiny_model, whole):
    expected = images(whole)
    folder = whole / "images"
    for i in (1, 3, 6):
        (folder / f"{i:06d}.png").unlink()
    (folder / ".tmp-000003.png").write_bytes(expected["000003.png"][:50])
    kept = (folder / "000000.png").stat().st_mtime_ns
    generate.main(flags(tiny_model, whole))
    assert images(whole) == expected
    assert not list(folder.glob(".tmp-*"))
    assert (folder / "000000.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize("how", ["empty", "truncated", "changed", "gray", "small"])
def test_damaged_images_and_images_of_another_kind_are_generated_again(tiny_model, whole, how):
    expected, file = images(whole), whole / "images" / "000003.png"
    content = expected[file.name]
    changed = content[:60] + bytes([content[60] ^ 1]) + content[61:]
    if how in ("gray", "small"):
        Image.new("L" if how == "gray" else "RGB", (8, 8) if how == "gray" else (8, 4)).save(file)
    else:
        file.write_bytes({"empty": b"", "truncated": content[:-20], "changed": changed}[how])
    generate.main(flags(tiny_model, whole))
    assert images(whole) == expected


@pytest.mark.parametrize("content", [b"", b'{"pipeline": ', b"[1]", b"\xff\xfe"])
def test_damaged_settings_are_reported(tiny_model, whole, content):
    (whole / "generate.json").write_bytes(content)
    with pytest.raises(InputError, match=r"generate\.json is damaged, so the settings .*Choose another --output_dir"):
        generate.main(flags(tiny_model, whole))


def test_two_commands_do_not_write_to_one_folder(tiny_model, whole):
    before = images(whole)
    with locked(whole, Accelerator()), pytest.raises(InputError, match=r"whole is in use: .* has been writing to it"):
        generate.main(flags(tiny_model, whole, "--num_images", 9))
    assert images(whole) == before
    assert sorted(path.name for path in whole.iterdir()) == ["generate.json", "images"]


def test_more_images_are_added_to_existing_ones(tiny_model, whole):
    generate.main(flags(tiny_model, whole, "--num_images", 9))
    assert len(images(whole)) == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # 40 in 40 steps, and in inverse proportion
        (["--color", "teal"], r"color was None, is teal; guidance_scale was None, is 533\.3"),
        (["--seed", 1], "seed was 0, is 1"),
        (["--scheduler", "euler"], "scheduler was ddim, is euler"),
        (["--num_inference_steps", 4], "num_inference_steps was 3, is 4"),
        (["--eta", 0.5], r"eta was None, is 0\.5"),
        (["--dtype", "bf16"], "dtype was fp32, is bf16"),
        (["--class_labels", 1], "class_labels was None, is \\[1\\]"),
    ],
)
def test_images_with_other_settings_are_not_added(tiny_model, whole, change, message):
    before = images(whole)
    with pytest.raises(InputError, match=message):
        generate.main(flags(tiny_model, whole, "--num_images", 9, *change))
    assert images(whole) == before


def test_images_of_other_weights_under_the_same_name_are_not_added(tmp_path):
    model, output = tmp_path / "model", tmp_path / "output"
    unet = tiny_unet()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(model)
    generate.main(flags(model, output))
    unet.conv_out.bias.data += 0.01
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(model)
    with pytest.raises(InputError, match="contents was"):
        generate.main(flags(model, output))


def test_nothing_is_added_to_images_with_unknown_settings(tiny_model, whole):
    (whole / "generate.json").unlink()
    with pytest.raises(InputError, match=r"no generate\.json"):
        generate.main(flags(tiny_model, whole))


def test_files_of_another_origin_are_not_replaced(tiny_model, tmp_path):
    for name in ("grid.png", "generate.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(InputError, match=r"grid\.png, but no generate\.json|contents was None"):
            generate.main(flags(tiny_model, folder, "--grid"))
        assert (folder / name).read_text() == "{}"


TINY_CONDITIONED = {
    "sample_size": 8,
    "num_classes": 3,
    "class_dropout": 0.1,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}


def test_settings_without_images_do_not_count(tiny_model, whole):
    for path in (whole / "images").iterdir():
        path.unlink()
    generate.main(flags(tiny_model, whole, "--seed", 1))
    assert len(images(whole)) == 7


def test_overwrite_replaces_images_unless_the_command_fails(tiny_model, whole, tmp_path):
    generate.main(flags(tiny_model, whole, "--grid", "--intermediates", 2))
    before = images(whole)
    with pytest.raises(InputError, match="not conditioned"):
        generate.main(flags(tiny_model, whole, "--overwrite", "--class_labels", 1))
    with pytest.raises(InputError, match="1000"):
        generate.main(flags(tiny_model, whole, "--overwrite", "--num_inference_steps", 1001))
    assert images(whole) == before and (whole / "grid.png").exists()
    other = ("--seed", 100, "--num_images", 3)
    generate.main(flags(tiny_model, tmp_path / "other", *other))
    generate.main(flags(tiny_model, whole, *other, "--overwrite"))
    assert images(whole) == images(tmp_path / "other")
    assert sorted(path.name for path in whole.iterdir()) == ["generate.json", "images"]


def test_classes_are_used_in_turn(tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    unet.class_embedding.weight.data *= 20
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    for name, labels in (("turn", [0, 2]), ("zero", [0]), ("two", [2])):
        generate.main(flags(tmp_path / "model", tmp_path / name, "--class_labels", *labels))
    turn, zero, two = (list(images(tmp_path / n).values()) for n in ("turn", "zero", "two"))
    assert zero != two
    assert turn == [(zero, two)[i % 2][i] for i in range(7)]


def test_classes_are_given_by_label_or_name_and_can_be_guided(tmp_path):
    unet = ClassConditionedUnet(**TINY_CONDITIONED, id2label=["ant", "bee", "cat"])
    unet.class_embedding.weight.data *= 20
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    for name, labels in (("numbers", [0, 2]), ("names", ["ant", "cat"])):
        generate.main(
            flags(tmp_path / "model", tmp_path / name, "--class_labels", *labels, "--guidance_scale", 2, "--grid")
        )
    generate.main(flags(tmp_path / "model", tmp_path / "plain", "--class_labels", 0, 2))
    assert images(tmp_path / "names") == images(tmp_path / "numbers")
    assert images(tmp_path / "plain") != images(tmp_path / "numbers")
    with pytest.raises(InputError, match="one of ant, bee, cat"):
        generate.main(flags(tmp_path / "model", tmp_path / "without"))
    with pytest.raises(InputError, match=r"no class 'bea' among .* 'bee'"):
        generate.main(flags(tmp_path / "model", tmp_path / "without", "--class_labels", *["ant"] * 6, "bea"))
    assert not (tmp_path / "without").exists()


def save_worse(model: Path, folder: Path) -> Path:
    """Save a pipeline like another one, with random weights."""
    pipe = load_pipeline(str(model))
    torch.manual_seed(1)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe.save_pretrained(folder)
    return folder


def test_autoguidance_of_an_unconditional_pipeline(tiny_model, whole, tmp_path):
    auto = ["--autoguidance", save_worse(tiny_model, tmp_path / "worse"), "--guidance_scale"]
    generate.main(flags(tiny_model, tmp_path / "one", *auto, 1))
    assert images(tmp_path / "one") == images(whole)
    generate.main(flags(tiny_model, tmp_path / "two", *auto, 2, "--grid", "--intermediates", 2))
    (expected,) = sample(
        with_scheduler(load_pipeline(str(tiny_model)), "ddim", 3),
        [4],
        3,
        guide=load_pipeline(str(tmp_path / "worse")),
        guidance_scale=2.0,
    )
    assert level_difference(Image.open(tmp_path / "two" / "images" / "000004.png"), expected) <= 1
    generate.main(flags(tiny_model, tmp_path / "part", *auto, 2, "--guidance_interval", 0, 5))
    assert images(whole) != images(tmp_path / "two") != images(tmp_path / "part") != images(whole)

    settings = json.loads((tmp_path / "part" / "generate.json").read_text())
    assert settings["autoguidance"] == str(tmp_path / "worse") and settings["guidance_interval"] == [0, 5]
    assert settings["autoguidance_contents"] == pipeline_hash(load_pipeline(str(tmp_path / "worse")))
    with pytest.raises(InputError, match=r"guidance_interval was \[0.0, 5.0\], is None"):
        generate.main(flags(tiny_model, tmp_path / "part", *auto, 2))
    shutil.copytree(tiny_model, tmp_path / "worse", dirs_exist_ok=True)
    with pytest.raises(InputError, match="autoguidance_contents was"):
        generate.main(flags(tiny_model, tmp_path / "two", *auto, 2))


def test_autoguidance_and_guidance_by_a_loss_combine(tiny_model, tmp_path):
    worse = save_worse(tiny_model, tmp_path / "worse")
    auto, color = ["--autoguidance", worse, "--autoguidance_scale", 2], ["--color", "teal", "--guidance_scale", 40]
    kinds = {
        "color": color,
        "both": [*auto, *color],
        "scale 1": ["--autoguidance", worse, "--autoguidance_scale", 1, *color],
        "interval": [*auto, *color, "--guidance_interval", 0, 5],
    }
    for name, more in kinds.items():
        generate.main(flags(tiny_model, tmp_path / name, *more))
    results = {name: images(tmp_path / name) for name in kinds}
    assert results.pop("scale 1") == results["color"]
    assert all(a != b for a, b in itertools.combinations(results.values(), 2))
    pipe = GuidedPipeline.from_pipe(with_scheduler(load_pipeline(str(tiny_model)), "ddim", 3))
    options = {"loss": ColorLoss("teal"), "guidance_scale": 40.0, "guide": load_pipeline(str(worse))}
    (expected,) = sample(pipe, [4], 3, autoguidance_scale=2.0, **options)
    assert level_difference(Image.open(tmp_path / "both" / "images" / "000004.png"), expected) <= 1
    settings = json.loads((tmp_path / "interval" / "generate.json").read_text())
    assert settings["autoguidance_scale"] == 2 and settings["guidance_interval"] == [0, 5]
    with pytest.raises(InputError, match=r"autoguidance_scale was 2\.0, is 3\.0"):
        generate.main(flags(tiny_model, tmp_path / "both", *auto, *color, "--autoguidance_scale", 3))


def test_few_step_pipelines_are_guided_through_their_network(tmp_path, capsys):
    DDPMPipeline(tiny_unet(), few_step_scheduler(3)).save_pretrained(tmp_path / "model")
    color = ["--scheduler", "as-saved", "--color", "teal"]
    for name, more in (("default", []), ("model", ["--guidance_gradient", "model"])):
        generate.main(flags(tmp_path / "model", tmp_path / name, *color, *more))
        printed = capsys.readouterr().out
        assert ("its gradient passes through the network, so --guidance_gradient model is used" in printed) == (
            name == "default"
        )
    generate.main(flags(tmp_path / "model", tmp_path / "sample", *color, "--guidance_gradient", "sample"))
    assert images(tmp_path / "default") == images(tmp_path / "model") != images(tmp_path / "sample")
    settings = json.loads((tmp_path / "default" / "generate.json").read_text())
    assert settings["guidance_gradient"] == "model"


def test_autoguidance_and_classifier_free_guidance_combine(tmp_path):
    unet = ClassConditionedUnet(**TINY_CONDITIONED)
    unet.class_embedding.weight.data *= 20
    model = tmp_path / "model"
    ClassConditionalPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(model)
    auto = ["--class_labels", 0, 2, "--autoguidance", save_worse(model, tmp_path / "worse"), "--guidance_scale"]
    kinds = {
        "plain": ["--class_labels", 0, 2],
        "scale 1": [*auto, 1],
        "classes": ["--class_labels", 0, 2, "--guidance_scale", 2],
        "classes, scale 1": [*auto, 1, "--class_guidance_scale", 2],
        "guide": [*auto, 1.5],
        "both": [*auto, 1.5, "--class_guidance_scale", 2],
        "interval": ["--class_labels", 0, 2, "--guidance_scale", 2, "--guidance_interval", 1, 5],
    }
    for name, more in kinds.items():
        generate.main(flags(model, tmp_path / name, *more))
    results = {name: images(tmp_path / name) for name in kinds}
    assert results.pop("plain") == results["scale 1"] and results.pop("classes") == results["classes, scale 1"]
    assert all(a != b for a, b in itertools.combinations(results.values(), 2))


def test_numbers_that_name_classes_mean_these_classes(tmp_path):
    unet = ClassConditionedUnet(**TINY_CONDITIONED, id2label=["1", "2", "10"])
    unet.class_embedding.weight.data *= 20
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    unet.register_to_config(id2label=None)
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "unnamed")
    generate.main(flags(tmp_path / "model", tmp_path / "named", "--class_labels", 2))
    generate.main(flags(tmp_path / "unnamed", tmp_path / "numbered", "--class_labels", 1))
    assert images(tmp_path / "named") == images(tmp_path / "numbered")
    with pytest.raises(InputError, match="no class '0' among the 3 classes"):
        generate.main(flags(tmp_path / "model", tmp_path / "other", "--class_labels", 0))


def guidance(clip: Path) -> list:
    towards = ["--color", "#BB2266", "--clip_prompt", "a rose", "a red one", "--clip_model", clip]
    return [*towards, "--guidance_scale", 20, "--guidance_gradient", "model"]


def distance(output: Path, color: tuple[int, int, int]) -> float:
    """Return the mean absolute distance of all pixels to a color."""
    return np.mean([np.abs(np.asarray(Image.open(path)) - color).mean() for path in (output / "images").iterdir()])


def test_guided_images_are_closer_to_the_color(tiny_model, tmp_path):
    color = ["--color", "#BB2266", "--guidance_scale", 40]
    for name, more in (("unguided", []), ("guided", color), ("stronger", [*color, "--guidance_scale", 80])):
        generate.main(flags(tiny_model, tmp_path / name, *more))
    names = ("unguided", "guided", "stronger")
    unguided, guided, stronger = (distance(tmp_path / name, (187, 34, 102)) for name in names)
    assert stronger < guided - 5 and guided < unguided - 5


def test_towards_guides_like_the_other_flags(tiny_model, tmp_path):
    for name, more in (("color", ["--color", "teal"]), ("towards", ["--towards", "color:teal"])):
        generate.main(flags(tiny_model, tmp_path / name, *more, "--guidance_scale", 40))
    generate.main(flags(tiny_model, tmp_path / "twice", "--towards", "2*color:teal", "--guidance_scale", 40))
    assert images(tmp_path / "towards") == images(tmp_path / "color") != images(tmp_path / "twice")
    settings = json.loads((tmp_path / "towards" / "generate.json").read_text())
    assert settings["towards"] == ["color:teal"]


def test_an_interrupted_guided_run_continues_with_the_same_images(wide_model, clip, tmp_path):
    generate.main(flags(wide_model, tmp_path / "whole", *guidance(clip), "--num_images", 4))
    generate.main(flags(wide_model, tmp_path / "parts", *guidance(clip), "--num_images", 1))
    generate.main(flags(wide_model, tmp_path / "parts", *guidance(clip), "--num_images", 4, "--batch_size", 3))
    assert images(tmp_path / "parts") == images(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / "generate.json").read_text())
    assert settings["clip_prompt"] == ["a rose", "a red one"] and settings["guidance_scale"] == 20
    with pytest.raises(InputError, match=r"guidance_scale was 20\.0, is 40\.0"):
        generate.main(flags(wide_model, tmp_path / "whole", *guidance(clip), "--guidance_scale", 40))


def test_guided_intermediates_end_in_the_final_image(tiny_model, tmp_path):
    generate.main(flags(tiny_model, tmp_path, "--color", "teal", "--num_images", 1, "--intermediates", 3))
    strip, first = Image.open(tmp_path / "intermediates.png"), Image.open(tmp_path / "images" / "000000.png")
    last = strip.crop((strip.width - 100, strip.height - 100, strip.width - 4, strip.height - 4))
    assert last.tobytes() == first.resize((96, 96), Image.Resampling.NEAREST).tobytes()


def test_guided_sampling_of_a_class_conditional_network_uses_the_labels(tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    unet.class_embedding.weight.data *= 20
    unet.register_to_config(id2label=["ant", "bee", "cat"])
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    for name, labels in (("turn", [0, "cat"]), ("zero", ["ant"])):
        generate.main(flags(tmp_path / "model", tmp_path / name, "--class_labels", *labels, "--color", "teal"))
    turn, zero = (list(images(tmp_path / name).values()) for name in ("turn", "zero"))
    assert [a == b for a, b in zip(turn, zero, strict=True)] == [i % 2 == 0 for i in range(7)]


def test_a_scheduler_that_cannot_guide_is_refused(tmp_path):
    DDPMPipeline(tiny_unet(), HeunDiscreteScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="HeunDiscreteScheduler does not support guidance"):
        generate.main(flags(tmp_path / "model", tmp_path / "out", "--scheduler", "as-saved", "--color", "teal"))


def test_a_guided_pipeline_needs_a_target(tmp_path):
    GuidedPipeline(tiny_unet(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="--color"):
        generate.main(flags(tmp_path / "model", tmp_path / "out"))
    generate.main(flags(tmp_path / "model", tmp_path / "out", "--color", "teal"))
    assert len(images(tmp_path / "out")) == 7


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_generates_nearly_the_same_images(tiny_model, whole, tmp_path, dtype):
    generate.main(flags(tiny_model, tmp_path / "half", "--dtype", dtype, "--num_images", 2))
    for name, half in images(tmp_path / "half").items():
        assert half != images(whole)[name]
        pixels = [np.asarray(Image.open(folder / "images" / name), int) for folder in (tmp_path / "half", whole)]
        assert np.abs(pixels[0] - pixels[1]).mean() < 8


def test_grid_and_intermediates_are_saved_next_to_the_images(tiny_model, whole, capsys):
    generate.main(flags(tiny_model, whole, "--grid", "--intermediates", 3))
    assert sorted(path.name for path in whole.iterdir()) == [
        "generate.json",
        "grid.png",
        "images",
        "intermediates.png",
    ]
    printed = capsys.readouterr().out
    assert all(str(whole / name) in printed for name in ("images", "grid.png", "intermediates.png"))
    assert "images per second" not in printed  # all existed
    grid, strip = Image.open(whole / "grid.png"), Image.open(whole / "intermediates.png")
    first = Image.open(whole / "images" / "000000.png").resize((96, 96), Image.Resampling.NEAREST)
    assert grid.crop((4, 4, 100, 100)).tobytes() == first.tobytes()
    last = strip.crop((strip.width - 100, strip.height - 100, strip.width - 4, strip.height - 4))
    assert last.tobytes() == first.tobytes()  # the last prediction is the first image


@pytest.mark.parametrize("names", [["ant", "bee"], ["ant", "a bee with a very long name"]])
def test_the_grid_has_a_column_or_a_row_per_class(tmp_path, names):
    unet = ClassConditionedUnet(**{**TINY_CONDITIONED, "num_classes": 2}, id2label=names)
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    generate.main(flags(tmp_path / "model", tmp_path, "--class_labels", *names, "--grid", "--num_images", 5))
    files = [Image.open(path) for path in sorted((tmp_path / "images").iterdir())]
    expected = grid_of_classes(files, names)
    assert Image.open(tmp_path / "grid.png").tobytes() == expected.tobytes()
    rows_of_classes = len(names[1]) > 3
    columns = 3 if rows_of_classes else 2
    cells = [files[i].resize((96, 96), Image.Resampling.NEAREST).convert("RGB") for i in range(5)]
    left, top = expected.width - columns * 100, 4 if rows_of_classes else 28
    for i, cell in enumerate(cells):
        column, row = (i // 2, i % 2) if rows_of_classes else (i % 2, i // 2)
        corner = left + column * 100, top + row * 100
        assert expected.crop((*corner, corner[0] + 96, corner[1] + 96)).tobytes() == cell.tobytes()


def test_intermediates_that_cannot_be_shown_are_refused_before_sampling(tmp_path):
    ScoreSdeVePipeline(tiny_unet(), ScoreSdeVeScheduler()).save_pretrained(tmp_path / "sde")
    ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler()).save_pretrained(tmp_path / "consistency")
    for name in ("sde", "consistency"):
        with pytest.raises(InputError, match="cannot be shown: omit --intermediates"):
            generate.main(flags(tmp_path / name, tmp_path / "out", "--scheduler", "as-saved", "--intermediates", 2))
    assert not (tmp_path / "out").exists()


def test_a_run_of_a_version_without_towards_continues(tiny_model, whole):
    settings = json.loads((whole / "generate.json").read_text())
    del settings["towards"]
    (whole / "generate.json").write_text(json.dumps(settings))
    generate.main(flags(tiny_model, whole, "--num_images", 9))
    assert len(images(whole)) == 9


def test_eta_scales_the_noise_of_the_steps(tiny_model, whole, tmp_path):
    for eta in (0, 1):
        generate.main(flags(tiny_model, tmp_path / str(eta), "--eta", eta))
    assert images(tmp_path / "0") == images(whole)
    assert not set(images(tmp_path / "1").values()) & set(images(whole).values())
    assert json.loads((tmp_path / "1" / "generate.json").read_text())["eta"] == 1


@pytest.fixture(scope="module")
def ddgan(tmp_path_factory) -> Path:
    """A DDGAN of two classes whose images depend on all its inputs; it generates images in groups of 32."""
    torch.manual_seed(0)
    latent = {"latent_dim": 5, "latent_embed_dim": 8, "latent_mapping_layers": 1}
    unet = NCSNpp(8, 3, 3, (8,), layers_per_block=1, attention_resolutions=(), num_class_embeds=2, **latent)
    unet.register_to_config(id2label=["ant", "bee"])
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    folder = tmp_path_factory.mktemp("models") / "ddgan"
    DDGANPipeline(unet, DDGANScheduler()).save_pretrained(folder)
    return folder


def generate_with_ddgan(ddgan: Path, output: Path, *more) -> list[Image.Image]:
    generate.main([str(flag) for flag in ("--pipeline", ddgan, "--output_dir", output, "--seed", 3, *more)])
    return [Image.open(output / "images" / name) for name in images(output)]


@pytest.mark.parametrize("vary", ["z", "noise"])
def test_rows_vary_z_or_noise_only(ddgan, tmp_path, vary):
    varied = ("--vary", vary, "--class_labels", "bee", "ant")
    grid = generate_with_ddgan(ddgan, tmp_path / "whole", *varied, "--num_images", 35)
    pipe = DDGANPipeline.from_pretrained(ddgan)
    pipe.set_progress_bar_config(disable=True)
    for i in (0, 1, 8, 34):
        row, column = divmod(i, 8)
        noise, z = (row, column) if vary == "z" else (column, row)
        (expected,) = sample(pipe, [3 + noise], None, [1 - row % 2], [3 + z])
        assert level_difference(grid[i], expected) <= 1  # another batch size
    differences = [level_difference(grid[0], grid[i]) for i in range(1, 35)]
    assert min(differences) > 5
    settings = json.loads((tmp_path / "whole" / "generate.json").read_text())
    assert (settings["vary"], settings["class_labels"]) == (vary, ["bee", "ant"])

    generate_with_ddgan(ddgan, tmp_path / "parts", *varied, "--num_images", 9)
    few = Image.open(tmp_path / "parts" / "grid.png")
    generate_with_ddgan(ddgan, tmp_path / "parts", *varied, "--num_images", 35, "--intermediates", 2)
    assert images(tmp_path / "parts") == images(tmp_path / "whole")
    whole, strip = (Image.open(tmp_path / "parts" / name) for name in ("grid.png", "intermediates.png"))
    assert (whole.width, whole.height - few.height) == (few.width, 3 * 100)  # five rows instead of two
    corner = (whole.width - 8 * 100, 28)
    first = whole.crop((*corner, corner[0] + 96, corner[1] + 96))
    assert first.tobytes() == grid[0].resize((96, 96), Image.Resampling.NEAREST).tobytes()
    last = strip.crop((strip.width - 100, strip.height - 100, strip.width - 4, strip.height - 4))
    assert level_difference(last.resize((8, 8), Image.Resampling.NEAREST), grid[0]) <= 1


def test_autoguidance_of_a_ddgan_is_refused(ddgan, tmp_path):
    with pytest.raises(InputError, match="A DDGANPipeline takes no guide: autoguidance is for DDPMPipeline"):
        generate_with_ddgan(
            ddgan, tmp_path / "out", "--class_labels", "bee", "--autoguidance", ddgan, "--guidance_scale", 2
        )
    assert not (tmp_path / "out").exists()


def test_autoguidance_by_a_model_of_other_images_is_refused(tiny_model, wide_model, tmp_path):
    auto = ("--autoguidance", wide_model, "--guidance_scale", 2)
    with pytest.raises(InputError, match=r"its image size .*: \(32, 32\) instead of \(8, 8\)"):
        generate.main(flags(tiny_model, tmp_path / "out", *auto))
    assert not (tmp_path / "out").exists()


def test_varied_images_are_not_added_to_others(ddgan, tmp_path):
    flags = ("--class_labels", "bee", "--num_images", 1)
    generate_with_ddgan(ddgan, tmp_path, *flags)
    with pytest.raises(InputError, match="vary was None, is z"):
        generate_with_ddgan(ddgan, tmp_path, *flags, "--vary", "z")


def test_settings_are_saved(whole):
    settings = json.loads((whole / "generate.json").read_text())
    assert (settings["scheduler"], settings["num_inference_steps"], settings["seed"]) == ("ddim", 3, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--num_images", 0], "at least 1"),
        (["--scheduler", "ddmp"], "ddpm"),
        (["--num_inference_step", 3], "--num_inference_steps"),
        (["--num_inference_steps", 1001], "1000"),
        (["--class_labels", 1], "not conditioned"),
        (["--pipeline", "nowhere"], "--pipeline nowhere: there is no such file or folder"),
        (["--pipeline", ""], "--pipeline"),
        (["--color", "teel"], "'teel' is not a known color"),
        (["--guidance_scale", 3], "--color, --clip_prompt or --towards, or .* --class_labels"),
        (["--guidance_scale", 3, "--class_labels", 1], "not conditioned"),
        (["--class_labels", "one"], "not conditioned"),
        (["--guidance_gradient", "model"], "--color"),
        (["--clip_model", "ViT-B-32"], "--clip_prompt"),
        (["--clip_model", "ViT-B-32", "--towards", "color:teal"], "or a CLIP loss in --towards"),
        (["--clip_prompt", "a rose", "--clip_model", "a", "b", "c"], "one name"),
        (["--clip_prompt", "a rose", "--clip_model", "./nowhere"], "nowhere cannot be loaded"),
        (["--color", "teal", "--class_labels", 1], "class"),
        (["--vary", "z"], "--vary z needs a DDGAN, because a DDPMPipeline has no latent z"),
        (["--vary", "noise", "--color", "teal"], "--vary does not work with guidance: omit --color"),
        (["--eta", -1], "--eta is -1"),
        (["--scheduler", "ddim", "--eta", 1.5], "An eta of 1.5 is for DDGANs: that of a DDIMScheduler is at most 1"),
        (["--autoguidance", "nowhere", "--guidance_scale", 2], "--autoguidance nowhere: there is no such file"),
        (["--autoguidance", "."], "--autoguidance needs its scale: pass --guidance_scale"),
        (["--autoguidance", ".", "--guidance_scale", 0.5], "--guidance_scale 0.5: with --autoguidance it must be at"),
        (["--autoguidance", ".", "--guidance_scale", 2], "The folder . holds no pipeline"),
        (["--autoguidance", ".", "--guidance_scale", 2, "--color", "teal"], "its scale: pass --autoguidance_scale"),
        (["--autoguidance_scale", 2, "--color", "teal"], "--autoguidance_scale and .*: pass a worse version"),
        (["--autoguidance_scale", 2], "--autoguidance_scale is for --autoguidance in addition to --color"),
        (["--autoguidance", ".", "--autoguidance_scale", 0.5, "--color", "teal"], "--autoguidance_scale is 0.5"),
        (["--guidance_interval", 0, 5, "--color", "teal"], "--guidance_interval are for autoguidance: pass a worse"),
        (["--class_labels", 1, "--guidance_gradient", "model"], "--guidance_gradient is for guidance by a loss"),
        (
            ["--autoguidance", ".", "--autoguidance_scale", 2, "--class_guidance_scale", 2, "--color", "teal"],
            "omit --class_guidance_scale, or --color",
        ),
        (["--class_labels", 1, "--class_guidance_scale", 2], "--class_guidance_scale is for .* --autoguidance"),
        (["--class_labels", 1, "--guidance_interval", 0, 5], "--guidance_interval needs guidance"),
        (["--guidance_interval", 5, 1, "--guidance_scale", 2], "--guidance_interval 5 1: pass two noise levels"),
        (["--guidance_interval", 5, "--guidance_scale", 2], "--guidance_interval 5: pass two noise levels"),
        (["--guidance_interval", -1, 5, "--guidance_scale", 2], "--guidance_interval is -1.0; it must be at least 0"),
        (["--scheduler", "ddpm", "--eta", 0.5], "The steps of a DDPMScheduler take no eta"),
    ],
)
def test_invalid_arguments_are_refused(tiny_model, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        generate.main(flags(tiny_model, tmp_path / "output", *wrong))


def test_invalid_input_ends_the_command_with_one_paragraph_and_exit_code_2(tiny_model, tmp_path):
    done = run_script(SCRIPT, *flags(tiny_model, tmp_path / "output", "--num_images", -1))
    assert done.returncode == 2
    assert "error: --num_images is -1" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Shards


SUFFIXES = {"npz": ".npz", "webdataset": ".tar"}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of four images."""
    monkeypatch.setattr(image_files, "SHARD_IMAGES", 4)


def pixels(output: Path) -> list[np.ndarray]:
    source = open_source(str(output / "images"))
    return [np.asarray(open_image(source[i])) for i in range(len(source))]


@pytest.mark.parametrize("file_format", SUFFIXES)
def test_shards_contain_the_same_images_as_png_files(tiny_model, whole, tmp_path, small_shards, file_format):
    images_in_shards = api.generate(
        pipeline=tiny_model,
        output_dir=tmp_path / "shards",
        scheduler="ddim",
        num_inference_steps=3,
        num_images=7,
        format=file_format,
        grid=True,
    )
    names = [f"shard-0000{i}{SUFFIXES[file_format]}" for i in range(2)]
    assert [path.name for path in images_in_shards.paths] == names == list(images(tmp_path / "shards"))
    expected = [np.asarray(Image.open(path)) for path in sorted((whole / "images").iterdir())]
    for found in (pixels(tmp_path / "shards"), list(images_in_shards), [images_in_shards[i] for i in range(7)]):
        assert len(found) == 7 and all((np.asarray(a) == b).all() for a, b in zip(found, expected, strict=True))
    generate.main(flags(tiny_model, whole, "--grid"))
    assert (tmp_path / "shards" / "grid.png").read_bytes() == (whole / "grid.png").read_bytes()


@pytest.mark.parametrize("file_format", SUFFIXES)
def test_shards_contain_the_class_of_each_image(tmp_path, small_shards, file_format):
    ClassConditionalPipeline(tiny_classes(), DDIMScheduler()).save_pretrained(tmp_path / "model")
    more = ("--class_labels", "b", "c", "--format", file_format)
    generate.main(flags(tmp_path / "model", tmp_path / "output", *more))
    labels = open_source(str(tmp_path / "output" / "images")).labels(None)
    assert [labels.classes[number] for number in labels.numbers or []] == ["2", "0", "2", "0", "2", "0", "2"]


@pytest.mark.parametrize("file_format", SUFFIXES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "temporary"])
def test_only_shards_that_are_missing_or_damaged_are_generated(
    tiny_model, tmp_path, small_shards, monkeypatch, file_format, damage
):
    more = ("--num_images", 11, "--format", file_format)
    generate.main(flags(tiny_model, tmp_path, *more))
    before = images(tmp_path)
    path = tmp_path / "images" / f"shard-00001{SUFFIXES[file_format]}"
    content = path.read_bytes()
    middle = content.index(b"IDAT") + 8 if file_format == "webdataset" else len(content) // 3
    changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    if damage in ("missing", "temporary"):
        path.unlink()
    else:
        path.write_bytes({"truncated": content[: min(1500, len(content) // 2)], "changed": changed}[damage])
    if damage == "temporary":
        (tmp_path / "images" / ".tmp-01234567-shard-00001.npz").write_bytes(content[:100])
    sampled, sampler = [], GroupSampler.__call__

    def recorded(self, indices):
        sampled.extend(indices)
        return sampler(self, indices)

    monkeypatch.setattr(GroupSampler, "__call__", recorded)
    generate.main(flags(tiny_model, tmp_path, *more))
    assert sampled == [4, 5, 6, 7]
    assert images(tmp_path) == before
    generate.main(flags(tiny_model, tmp_path, *more, "--num_images", 13))  # the last shard is written again
    assert sampled[4:] == [8, 9, 10, 11, 12]
    assert len(pixels(tmp_path)) == 13


def test_shards_in_threads_are_the_same(tiny_model, two_threads, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(command, "group_size", lambda pipe, batch_size: 3)  # of which a shard has a part
    more = ("--num_images", 40, "--seed", 1, "--format", "npz")
    generate.main(flags(tiny_model, tmp_path / "two", *more))
    torch.set_num_threads(1)
    generate.main(flags(tiny_model, tmp_path / "one", *more))
    assert images(tmp_path / "two") == images(tmp_path / "one") and len(images(tmp_path / "one")) == 10


def test_files_of_another_format_are_only_replaced_on_request(tiny_model, whole, small_shards):
    with pytest.raises(InputError, match="format was png, is npz"):
        generate.main(flags(tiny_model, whole, "--format", "npz"))
    generate.main(flags(tiny_model, whole, "--format", "npz", "--overwrite"))
    assert list(images(whole)) == ["shard-00000.npz", "shard-00001.npz"]
    generate.main(flags(tiny_model, whole, "--overwrite"))
    assert list(images(whole)) == [f"{i:06d}.png" for i in range(7)]


@pytest.mark.slow
def test_two_processes_write_the_same_shards_as_one(tiny_model, tmp_path):
    more = ("--num_images", 520, "--num_inference_steps", 1, "--format", "webdataset", "--seed", 1)
    generate.main(flags(tiny_model, tmp_path / "one", *more))
    run_ranks(SCRIPT, *flags(tiny_model, tmp_path / "two", *more), output=tmp_path / "output.txt", machines=2)
    assert images(tmp_path / "two") == images(tmp_path / "one") and len(images(tmp_path / "one")) == 2
