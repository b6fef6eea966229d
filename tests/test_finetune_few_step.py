"""Claims about finetune_few_step.py: plain pipelines of a few steps, exact runs, and clear errors."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from tiny import largest_difference, level_difference, tiny_unet

from ddgan import finetune_few_step
from ddgan.core.errors import InputError
from ddgan.sampling.generation import sample
from ddgan.sampling.loading import load_pipeline
from ddgan.training.monitors import DiscriminatorAccuracyMonitor
from ddgan.training.tracking import read_metrics


@pytest.fixture
def few_step(tiny_model, images, tmp_path):
    """Return a function that runs finetune_few_step.py in this process on `tiny_model` and `images`."""

    def run(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        short = "--report_to none --num_samples 2 --batch_size 8 --max_train_steps 4 --num_inference_steps 2"
        short += " --conversion_steps 1 --lr_g 1e-2"
        start = ["--start_model", tiny_model, "--train_data_dir", images, "--output_dir", tmp_path / name]
        finetune_few_step.main([str(flag) for flag in [*start, *short.split(), *flags]])
        return tmp_path / name

    return run


def save_model(folder, scheduler=None, **config):
    DDPMPipeline(tiny_unet(**config), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def test_the_result_is_a_plain_pipeline_with_a_scheduler_for_its_steps(few_step):
    run = few_step("run")
    pipe = DDPMPipeline.from_pretrained(run)
    config = pipe.scheduler.config
    assert (config.timestep_spacing, config.variance_type, config.clip_sample) == ("trailing", "fixed_small", False)
    assert config.prediction_type == "v_prediction"
    assert config["_num_inference_steps"] == [2]
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)
    assert not (run / "unet" / "discriminator_unet.py").exists()
    card = (run / "README.md").read_text()
    assert "pipe(num_inference_steps=2)" in card
    assert "in 2 network evaluations" in card


@pytest.mark.slow
def test_the_result_gives_the_same_image_without_this_package(few_step, tmp_path, capsys):
    run = few_step("run")
    assert "image = pipe(num_inference_steps=2).images[0]" in capsys.readouterr().out
    program = """
import sys
sys.modules["ddgan"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(5)).images[0]
print(type(pipe).__module__)
image.save(sys.argv[2])
"""
    command = [sys.executable, "-c", program, run, tmp_path / "image.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("diffusers."), done.stderr
    (expected,) = sample(load_pipeline(str(run)), [5])
    assert level_difference(Image.open(tmp_path / "image.png"), expected) <= 1  # of rounding


def test_step_0_shows_the_start_model_although_it_predicts_the_noise(few_step, tiny_model):
    run = few_step("run")
    scheduler = DDPMScheduler.from_pretrained(tiny_model / "scheduler", timestep_spacing="trailing", clip_sample=False)
    pipe = DDPMPipeline.from_pretrained(tiny_model, scheduler=scheduler)
    pipe.unet.eval()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    expected = pipe(batch_size=2, generator=generators, num_inference_steps=2).images[0]
    grid = Image.open(run / "samples" / "step-00000000.png")
    tile = grid.crop((4, 4, 100, 100)).resize((8, 8), Image.Resampling.NEAREST)
    assert np.abs(np.asarray(tile, int) - np.asarray(expected, int)).max() <= 1
    assert (run / "before_after.png").exists()


def test_metrics_tell_conversion_from_adversarial_steps(few_step):
    rows = read_metrics(few_step("run") / "metrics.csv")
    assert np.isnan([row["g_adversarial"] for row in rows]).tolist() == [True, False, False, False]
    assert all(0 <= row["d_accuracy"] <= 1 for row in rows)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_networks_keep_what_they_predict_and_need_no_conversion(few_step, tmp_path, prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")
    model = save_model(tmp_path / "model", scheduler)
    run = few_step("run", "--start_model", model, "--conversion_steps", 0)
    config = json.loads((run / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == prediction_type
    assert config["beta_schedule"] == "squaredcos_cap_v2"


def test_learned_variance_is_removed(few_step, tmp_path):
    scheduler = DDPMScheduler(variance_type="learned_range", prediction_type="v_prediction")
    run = few_step("run", "--start_model", save_model(tmp_path / "model", scheduler, out_channels=6))
    pipe = DDPMPipeline.from_pretrained(run)
    assert pipe.unet.config.out_channels == 3
    assert pipe(num_inference_steps=2).images[0].size == (8, 8)


def test_accumulation_gives_the_losses_of_one_batch(few_step, tmp_path):
    model = save_model(tmp_path / "model")  # without dropout, whose random numbers are those of a micro-batch
    whole = few_step("whole", "--start_model", model)
    parts = few_step("parts", "--start_model", model, "--batch_size", 4, "--grad_accumulation_steps", 2)
    for first, second in zip(*(read_metrics(run / "metrics.csv") for run in (whole, parts)), strict=True):
        for name in ("d_loss", "g_loss", "g_reconstruction"):
            assert first[name] == pytest.approx(second[name], rel=1e-3)  # Adam amplifies rounding


@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_gives_the_same_networks(few_step, stop):
    whole = few_step("whole")
    few_step("parts", "--max_train_steps", stop)
    parts = few_step("parts", "--resume_from_checkpoint", "latest")
    for name in ("model.safetensors", "model_1.safetensors", "ema.safetensors"):
        files = [sorted((run / "checkpoints").glob("step-*"))[-1] / name for run in (whole, parts)]
        assert largest_difference(*map(load_file, files)) == 0
    assert read_metrics(whole / "metrics.csv")[-1]["g_loss"] == read_metrics(parts / "metrics.csv")[-1]["g_loss"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_inference_steps 1001", "only 1000 timesteps"),
        ("--num_inference_steps 0", "at least 1"),
        ("--instance_noise 2", "a probability is at most 1"),
        ("--gamma -1", "at least 0"),
    ],
)
def test_wrong_flags_are_refused(few_step, flags, message):
    with pytest.raises(InputError, match=message):
        few_step("run", *flags.split())


def test_class_conditional_pipelines_are_refused(few_step, tmp_path):
    with pytest.raises(InputError, match="class-conditional"):
        few_step("run", "--start_model", save_model(tmp_path / "model", num_class_embeds=3))


@pytest.mark.parametrize(("accuracy", "warnings"), [(0.99, 1), (0.9, 0), (0.5, 0)])
def test_the_monitor_warns_once_when_the_discriminator_has_won(accuracy, warnings):
    monitor = DiscriminatorAccuracyMonitor()
    messages = [monitor([{"d_accuracy": accuracy}] * 10) for _ in range(150)]
    assert messages[:49] == [None] * 49
    assert len(list(filter(None, messages))) == warnings
