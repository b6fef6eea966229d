"""Claims about finetune_few_step.py: plain pipelines of a few steps, exact runs, and clear errors."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image, ImageChops
from safetensors.torch import load_file
from tiny import (
    ROOT,
    largest_difference,
    level_difference,
    run_ranks,
    tiny_classes,
    tiny_unet,
    write_class_folders,
)

from ddgan import ClassConditionalPipeline, ContextUnet, finetune_few_step
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import replace_file
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.metrics import MetricValue
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import before_after, image_grid
from ddgan.sampling.loading import load_pipeline, with_scheduler
from ddgan.training import evaluator
from ddgan.training.checkpoints import Checkpoints
from ddgan.training.evaluator import Evaluation
from ddgan.training.monitors import DiscriminatorAccuracyMonitor, DiversityMonitor
from ddgan.training.objectives.few_step import FewStepProcess, Transition
from ddgan.training.teacher import Teacher
from ddgan.training.tracking import read_metrics


def few_step_flags(model, images, output, *flags) -> list[str]:
    short = "--report_to none --num_samples 2 --batch_size 8 --max_train_steps 4 --num_inference_steps 2"
    short += " --distillation_steps 1 --teacher_samples 8 --teacher_steps 4 --lr_g 1e-2"
    start = ["--start_model", model, "--train_data_dir", images, "--output_dir", output, *short.split()]
    return [str(flag) for flag in [*start, *flags]]


@pytest.fixture
def few_step(tiny_model, images, tmp_path):
    """Return a function that runs finetune_few_step.py in this process on `tiny_model` and `images`."""

    def run(name, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune_few_step.main(few_step_flags(tiny_model, images, tmp_path / name, *flags))
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
    images = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert images == ["samples/step-00000004.png", "before_after.png", "loss.png"]
    assert card.index(images[0]) < card.index("```python") < card.index("## License") < card.index(images[1])
    assert all((run / image).is_file() for image in images)


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


def grid_of(pipe, steps: int) -> Image.Image:
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.eval()
    return image_grid(sample(pipe, range(2), steps))


def same(a, b) -> bool:
    return ImageChops.difference(a, b).getbbox() is None


@pytest.mark.parametrize("counts", [[2], [2, 1]])
def test_before_after_compares_the_start_model_at_40_and_few_steps_with_the_result(few_step, tiny_model, counts):
    run = few_step("run", "--num_inference_steps", *counts)
    original = DDPMPipeline.from_pretrained(tiny_model)
    original.scheduler.register_to_config(timestep_spacing="trailing")
    ddim = with_scheduler(original, "ddim")
    trained = DDPMPipeline.from_pretrained(run)
    captions = {2: "2 steps", 1: "1 step"}
    before = {"40 DDIM steps": grid_of(ddim, 40)} | {captions[count]: grid_of(ddim, count) for count in counts}
    after = {captions[count]: grid_of(trained, count) for count in counts}
    assert same(Image.open(run / "before_after.png"), before_after(before, after))
    assert same(Image.open(run / "samples" / "step-00000000.png"), before["2 steps"])
    assert same(Image.open(run / "samples" / "step-00000004.png"), after["2 steps"])
    assert not same(before["2 steps"], after["2 steps"])
    listed = "2 and 1" if len(counts) > 1 else "2"
    assert f"It was trained for {listed} sampling steps." in (run / "README.md").read_text()


def test_a_run_killed_between_its_first_grids_completes_them(few_step, monkeypatch):
    straight = few_step("straight", "--num_inference_steps", 2, 1)
    saved = []

    def kill_at_the_second(path, write):
        saved.append(path)
        if len([path for path in saved if path.parent.name == "samples"]) == 2:
            raise KeyboardInterrupt
        replace_file(path, write)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr("ddgan.training.loop.replace_file", kill_at_the_second)
        few_step("run", "--num_inference_steps", 2, 1)
    run = few_step("run", "--num_inference_steps", 2, 1, "--resume_from_checkpoint", "latest")
    names = [sorted(path.name for path in (folder / "samples").iterdir()) for folder in (straight, run)]
    assert names[0] == names[1]
    assert len(names[0]) == 3 + 2
    assert same(Image.open(straight / "before_after.png"), Image.open(run / "before_after.png"))


def test_each_column_of_the_metrics_begins_with_its_stage(few_step, monkeypatch):
    monkeypatch.setattr("ddgan.commands.few_step.DISCRIMINATOR_HEAD_START", 1)
    run = few_step("run", "--distillation_steps", 2, "--save_model_every", 1)
    rows = read_metrics(run / "metrics.csv")
    missing = {name: [step for step, row in enumerate(rows) if np.isnan(row[name])] for name in rows[0]}
    assert {name: steps for name, steps in missing.items() if steps} == {
        **{f"d_{name}": [0] for name in ("learning_rate", "loss", "real", "fake", "penalty", "accuracy", "grad_norm")},
        "g_adversarial": [0, 1],
    }
    assert all(0 <= row["d_accuracy"] <= 1 for row in rows[1:])
    assert [row["g_learning_rate"] for row in rows] == pytest.approx([5e-5, 1e-4, 5e-4, 1e-3])
    assert [row["d_learning_rate"] for row in rows[1:]] == pytest.approx([1e-5, 2e-5, 3e-5])
    assert Image.open(run / "loss.png").width > 500
    card = (run / "README.md").read_text()
    assert "| discriminator loss | " in card and "nan" not in card
    last = (rows[2]["g_loss"] + rows[3]["g_loss"]) / 2
    assert f"| generator loss | {last:.4f}, mean of the last 2 steps |" in card


def test_a_run_that_ends_with_the_first_stage_has_no_discriminator(few_step, caplog):
    run = few_step("run", "--distillation_steps", 500, "--batch_size", 16)  # no discriminator could memorize 13 images
    assert "The run has 4 optimizer steps, so it ends with the first stage" in caplog.text
    rows = read_metrics(run / "metrics.csv")
    assert len(rows) == 4
    names = ("learning_rate", "loss", "distillation", "grad_norm")
    assert rows[0].keys() == {"step", "epoch", "images", *(f"g_{name}" for name in names)}
    assert not list(run.glob("checkpoints/*/model_1.safetensors"))
    card = (run / "README.md").read_text()
    assert "in 2 network evaluations: distilled from tiny. It was trained for 2 sampling steps." in card
    assert "discriminator" not in card
    assert DDPMPipeline.from_pretrained(run).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_networks_keep_what_they_predict_and_need_no_distillation(few_step, tmp_path, prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")
    model = save_model(tmp_path / "model", scheduler)
    run = few_step("run", "--start_model", model, "--distillation_steps", 0, "--distillation_weight", 0)
    assert "g_distillation" not in read_metrics(run / "metrics.csv")[0]
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
        for name in ("d_loss", "g_loss", "g_distillation"):
            assert first[name] == pytest.approx(second[name], rel=1e-3)  # Adam amplifies rounding


def last_state(run) -> list:
    """Return the metrics of a run of five steps, and its last weights and EMA weights."""
    checkpoint = run / "checkpoints" / "step-00000005"
    files = ("model.safetensors", "model_1.safetensors", "ema.safetensors")
    return [(run / "metrics.csv").read_text(), *(load_file(checkpoint / name) for name in files)]


def assert_same(a: list, b: list) -> None:
    assert a[0] == b[0]
    assert [largest_difference(*pair) for pair in zip(a[1:], b[1:], strict=True)] == [0, 0, 0]


# the first adversarial step is the fourth, that of the discriminator the third
STAGES = (
    "--distillation_steps",
    3,
    "--max_train_steps",
    5,
    "--checkpointing_steps",
    1,
    "--checkpoints_total_limit",
    0,
)


def test_a_run_resumes_bit_identical_in_and_between_its_stages(few_step, monkeypatch):
    monkeypatch.setattr("ddgan.commands.few_step.DISCRIMINATOR_HEAD_START", 1)
    run = few_step("run", *STAGES)
    straight = last_state(run)
    for step in (4, 3, 2, 1):
        few_step("run", *STAGES, "--resume_from_checkpoint", run / "checkpoints" / f"step-{step:08d}")
        assert_same(last_state(run), straight)


def test_a_killed_run_samples_the_start_model_only_until_it_has_done_so(few_step, monkeypatch):
    monkeypatch.setattr("ddgan.commands.few_step.DISCRIMINATOR_HEAD_START", 1)
    flags = (*STAGES, "--teacher_samples", 20)  # in two batches
    sample, save, batches = Teacher.sample, Checkpoints.save, []

    def killed_in_the_second_batch(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    def killed_at_the_third_checkpoint(self, step):
        if step == 3:
            raise KeyboardInterrupt
        save(self, step)

    def not_again(*args):
        raise AssertionError("the start model is sampled again")

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(Teacher, "sample", killed_in_the_second_batch)
        few_step("run", *flags)
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(Checkpoints, "save", killed_at_the_third_checkpoint)
        few_step("run", *flags)  # the folder contains no run yet
    straight = last_state(few_step("straight", *flags))
    monkeypatch.setattr(Teacher, "sample", not_again)
    for _ in range(2):  # the second time there is nothing left to do
        run = few_step("run", *flags, "--resume_from_checkpoint", "latest")
        assert_same(last_state(run), straight)
        assert not (run / "teacher.safetensors").exists()


def test_ctrl_c_while_the_start_model_is_sampled_prints_one_line(few_step, monkeypatch, capsys):
    monkeypatch.setattr(Teacher, "sample", lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a launcher of torch may have run in this process
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: few_step("run", *STAGES))
    assert stopped.value.code == 130
    printed = capsys.readouterr().err
    assert "\nStopped by Ctrl-C.\n" in printed and "Traceback" not in printed


# ---- rejected input


def test_a_few_step_model_is_neither_a_start_model_nor_resumed_for_other_numbers_of_steps(few_step, tmp_path):
    run = few_step("run")
    with pytest.raises(
        InputError, match=r"run is a few-step model already, for 2 steps.* the model that it was made from"
    ):
        few_step("other", "--start_model", run)
    with pytest.raises(InputError, match=r"sampling steps = \[2\], but this run has \[4, 2\]"):
        few_step("run", "--num_inference_steps", 4, 2, "--max_train_steps", 5, "--resume_from_checkpoint", "latest")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_inference_steps 4 1001", "--num_inference_steps 1001: .*only 1000 timesteps"),
        ("--teacher_steps 1001", "--teacher_steps is 1001; it must be at most 1000"),
        ("--num_inference_steps 0", "at least 1"),
        ("--num_inference_steps 4 61", "--num_inference_steps 61: DDPMScheduler cannot space 61 of 1000 timesteps"),
        ("--num_inference_steps 2 2", "twice"),
        ("--instance_noise 2", "--instance_noise is 2.0; it must be at most 1"),
        ("--gamma -1", "at least 0"),
        ("--distillation_steps -1", "at least 0"),
        ("--distillation_steps 0", "--distillation_steps is 0, but the network of .*tiny predicts the noise"),
        ("--teacher_samples 0", "at least 1"),
        ("--teacher_guidance_scale 2", "--teacher_guidance_scale 2 needs .* null class .*tiny has none"),
        (
            "--batch_size 4 --grad_accumulation_steps 4",
            "thirteen has 13 images, fewer than the 16 of one .*--batch_size",
        ),
        (
            "--ema_power 9",
            "half-life of 6931 optimizer steps .*--ema_decay 0.9999.* last stage .* 3 .*decay 0.0992",
        ),
        ("--mixed_precision fp16", "would use fp16 .*gradients.* bf16"),
        ("--label_column x", "--label_column x: .* is not class-conditional"),
    ],
)
def test_settings_that_cannot_work_are_rejected_before_training(few_step, tmp_path, flags, message):
    with pytest.raises(InputError, match=message) as raised:
        few_step("run", *flags.split())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_fp16_from_the_configuration_of_accelerate_is_rejected_too(few_step, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="would use fp16"):
        few_step("run")
    assert not (tmp_path / "run").exists()


# ---- class-conditional models


@pytest.fixture
def few_step_classes(few_step, tmp_path):
    """Return a function that runs finetune_few_step.py on a class-conditional network and images of its classes."""

    def run(name, *flags, network=None, **scheduler):
        model = tmp_path / "class-model"
        if not model.exists():
            scheduler = DDPMScheduler(**{"prediction_type": "v_prediction", "clip_sample": False, **scheduler})
            ClassConditionalPipeline(network or tiny_classes(class_dropout=0.3), scheduler).save_pretrained(model)
            write_class_folders(tmp_path / "class-images")
        return few_step(name, "--start_model", model, "--train_data_dir", tmp_path / "class-images", *flags)

    return run


def test_a_class_conditional_model_keeps_its_classes_and_samples_with_posterior_steps(few_step_classes, tmp_path):
    torch.manual_seed(0)
    ImageClassifier(8, 1, 3, (8,), id2label={0: "c", 1: "a", 2: "b"}).save_pretrained(tmp_path / "classifier")
    evaluation = ("--eval_every", 4, "--eval_images", 12, "--feature_extractor", tmp_path / "classifier")
    guidance = ("--teacher_guidance_scale", 2)
    run = few_step_classes("run", "--ema_decay", 0, *guidance, *evaluation, prediction_type="epsilon")
    pipe = ClassConditionalPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"c": 0, "a": 1, "b": 2}
    assert (pipe.has_null_class, pipe.unet.config.class_dropout) == (True, 0.3)
    assert pipe.scheduler.config["_num_inference_steps"] == [2]
    assert list(run.glob("pipeline_class_conditional_*.py")) and list(run.glob("unet/unet_class_conditioned_*.py"))
    assert 0 <= read_metrics(run / "metrics.csv")[-1]["class_accuracy@12"] <= 1

    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    image = pipe("a", num_inference_steps=2, latents=noise, generator=generator, output_type="latent").images
    process, generator = FewStepProcess(pipe.scheduler, [2]), torch.Generator().manual_seed(6)
    expected = noise
    for t, s in process.transitions:
        with torch.no_grad():
            output = pipe.unet(expected, t, torch.tensor([1])).sample
        step = Transition(t[None], s[None], expected)
        posterior_noise = torch.randn(noise.shape, generator=generator) if s >= 0 else torch.zeros_like(noise)
        expected = process.posterior_sample(process.predicted_image(output, expected, step.t), step, posterior_noise)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)

    samples = sample(pipe, range(3), 2, [0, 1, 2])  # two samples are rounded up to a row for each class
    grid = image_grid(samples, columns=1, row_labels=("c", "a", "b"))
    assert same(Image.open(run / "samples" / "step-00000004.png"), grid)
    assert Image.open(run / "before_after.png").width > 3 * grid.width
    card = (run / "README.md").read_text()
    assert "Its 3 classes are c, a, b" in card
    assert 'pipe(class_labels="c", num_inference_steps=2)' in card


@pytest.mark.parametrize(("dropout", "rows"), [(0.5, 4), (0.0, 3)])
def test_both_networks_train_every_class_and_the_null_class_if_there_is_one(few_step_classes, dropout, rows):
    network = tiny_classes(class_dropout=dropout)
    before = network.class_embedding.weight.detach().clone()
    checkpoint = sorted((few_step_classes("run", network=network) / "checkpoints").glob("step-*"))[-1]
    discriminator = load_file(checkpoint / "model.safetensors")["input_class_embedding.weight"]
    generator = load_file(checkpoint / "model_1.safetensors")["class_embedding.weight"]
    for after in (discriminator, generator):
        assert (before != after).any(dim=1).tolist() == [True] * rows


@pytest.mark.parametrize(
    ("network", "label"), [("one_hot", '"c"'), ("learned_variance", '"c"'), ("num_class_embeds", "0")]
)
def test_other_class_conditional_networks(few_step_classes, network, label):
    networks = {
        "one_hot": lambda: tiny_classes(class_emb_size=None, class_dropout=0.1),
        "learned_variance": lambda: tiny_classes(out_channels=2),
        "num_class_embeds": lambda: tiny_unet(num_class_embeds=3, in_channels=1, out_channels=1),
    }
    run = few_step_classes("run", network=networks[network]())
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert pipe.unet.config.out_channels == 1
    assert pipe([0, 2], num_inference_steps=2).images[1].size == (8, 8)
    assert f"pipe(class_labels={label}," in (run / "README.md").read_text()


def test_a_class_conditional_network_without_such_an_encoder_is_rejected(few_step_classes, tmp_path):
    network = ContextUnet(in_channels=1, n_feat=8, n_cfeat=3, height=8)
    with pytest.raises(
        InputError, match=r"unet \(ContextUnet\).* unconditional UNet2DModel or a ClassConditionedUnet"
    ):
        few_step_classes("run", network=network)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("images", "message"), [("other", "the model has no 'd'"), ("plain", "is not in a subfolder")]
)
def test_images_without_the_classes_of_the_model_are_rejected(few_step_classes, images, tmp_path, message):
    folder = write_class_folders(tmp_path / "images")
    if images == "other":
        (folder / "c").rename(folder / "d")
    else:
        Image.new("L", (8, 8)).save(folder / "0.png")
    with pytest.raises(InputError, match=message):
        few_step_classes("run", "--train_data_dir", folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("accuracy", "warnings"), [(0.99, 1), (0.9, 0), (0.5, 0)])
def test_the_monitor_warns_once_when_the_discriminator_has_won(accuracy, warnings):
    monitor = DiscriminatorAccuracyMonitor()
    messages = [monitor([{"g_loss": 0.1}, *[{"d_accuracy": accuracy}] * 10]) for _ in range(150)]
    assert messages[:49] == [None] * 49
    assert len(list(filter(None, messages))) == warnings


def evaluation(step=300, recall=0.5, coverage=0.8, near_copies=0.0, floor=0.02) -> Evaluation:
    values = {"recall@100": recall, "coverage@100": coverage, "near_copies@100": near_copies}
    metrics = {key: MetricValue(value) for key, value in values.items()}
    return Evaluation(step, metrics, {"near_copies": MetricValue(floor)}, {}, "", "images", None, [])


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"recall": 0.2}, "Since step 200 recall has fallen from 0.60 to 0.20, .*--distillation_weight or --gamma"),
        ({"coverage": 0.3}, "Since step 100 coverage has fallen from 0.90 to 0.30, .*--distillation_weight"),
        ({"recall": 0.45, "coverage": 0.7}, None),
        (
            {"near_copies": 0.3},
            "^30% of the samples are near-copies .*, against 2% .*--max_train_steps",
        ),
        ({"near_copies": 0.3, "floor": 0.25}, None),  # training images resemble each other as much
        ({"recall": 0.1, "near_copies": 1.0}, "recall has fallen .* 100% of the samples"),
    ],
)
def test_a_collapse_and_memorization_are_reported_once_with_the_flag_that_helps(changes, warning):
    earlier = [
        {"step": 100, "recall@100": 0.3, "coverage@100": 0.9, "near_copies@100": 0.0},
        {"step": 200, "recall@100": 0.6, "coverage@100": 0.7, "near_copies@100": 0.0},
    ]
    monitor = DiversityMonitor()
    assert monitor(evaluation(100), []) is None
    message = monitor(evaluation(300, **changes), earlier)
    assert message is None if warning is None else re.search(warning, message)
    assert monitor(evaluation(400, **changes), earlier) is None


def test_recall_near_zero_is_not_a_collapse():
    earlier = [{"step": 100, "recall@100": 0.08, "coverage@100": 0.1, "near_copies@100": 0.0}]
    assert DiversityMonitor()(evaluation(200, recall=0.0, coverage=0.03), earlier) is None


def test_a_resumed_run_compares_its_evaluations_with_those_before(few_step, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    ImageClassifier(8, 3, 3, (8,)).save_pretrained(tmp_path / "classifier")
    recalls, compute = iter([0.8, 0.3]), evaluator.compute_results

    def with_recall(*args, **kwargs):
        results = compute(*args, **kwargs)
        results.metrics["recall@12"].value = next(recalls)
        return results

    monkeypatch.setattr(evaluator, "compute_results", with_recall)
    flags = ("--eval_every", 2, "--eval_images", 12, "--feature_extractor", tmp_path / "classifier")
    few_step("run", *flags, "--max_train_steps", 2)
    assert "has fallen" not in "".join(capsys.readouterr())
    few_step("run", *flags, "--resume_from_checkpoint", "latest")
    assert "Since step 2 recall has fallen from 0.80 to 0.30" in "".join(capsys.readouterr())


# ---- several processes

# Adam turns gradients that are rounding noise into full steps, which these rates keep below the bounds
LOW_RATES = ("--lr_g", 1e-5, "--lr_d", 1e-5, "--distillation_lr", 1e-5)


def weights_with_gradients(file) -> dict[str, torch.Tensor]:
    """Weights without the biases whose gradients are nothing but rounding noise.

    Attention does not depend on the bias of its keys. As long as the discriminator is at chance, those of its heads
    have opposite gradients from real and generated images.
    """
    return {k: v for k, v in load_file(file).items() if not re.search(r"to_k\.bias|heads\.\d\.conv_out\.bias", k)}


@pytest.mark.slow
def test_two_processes_equal_one_also_if_one_has_no_image_left(few_step_classes, tmp_path):
    images = write_class_folders(tmp_path / "nine", 9)  # global batches of 8 and 1
    flags = ("--train_data_dir", images, "--num_inference_steps", 2, 1, "--teacher_samples", 40, *LOW_RATES)
    one = few_step_classes("one", *flags, prediction_type="epsilon")
    two = tmp_path / "two"
    arguments = few_step_flags(tmp_path / "class-model", images, two, *flags, "--batch_size", 4)
    run_ranks(ROOT / "finetune_few_step.py", *arguments, output=tmp_path / "output.txt", machines=2)
    rows = [read_metrics(run / "metrics.csv") for run in (one, two)]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6, nan_ok=True), a["step"]
    checkpoint, saved = Path("checkpoints", "step-00000004"), Path("unet", "diffusion_pytorch_model.safetensors")
    for file in (checkpoint / "model.safetensors", checkpoint / "model_1.safetensors", saved):
        assert largest_difference(weights_with_gradients(one / file), weights_with_gradients(two / file)) < 1e-7
    start = load_file(tmp_path / "class-model" / saved)
    assert largest_difference(start, load_file(two / checkpoint / "model_1.safetensors")) > 2e-6
    names = [sorted(path.name for path in (run / "samples").iterdir()) for run in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        assert level_difference(*(Image.open(run / "samples" / name) for run in (one, two))) <= 1
