"""Claims about the validation loss: its images are never trained on, and its value is exact."""

import logging
import signal
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import ROOT, finetune_flags, largest_difference, make_dataset, run_ranks, weights, write_class_folders

from ddgan import train_class_conditional
from ddgan.core.errors import InputError, RunError
from ddgan.data.preprocessing import Preprocessing
from ddgan.training import tracking
from ddgan.training.arguments import DataArguments, ValidationArguments
from ddgan.training.loading import TrainingData, hold_out
from ddgan.training.objectives.denoising import DenoisingObjective
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG
from ddgan.training.tracking import read_metrics

PLAN = {"batch_size": 4, "accumulation": 1, "processes": 1, "seed": 0}
HELD_OUT = ("--validation_fraction", 0.25)  # 3 of 13 images


SAMPLES = "ddgan.training.loading._MIN_VALIDATION_SAMPLES"


@pytest.fixture(autouse=True)
def few_samples(request, monkeypatch):
    """Use fewer samples, for speed, but not in tests that start processes."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(SAMPLES, 16)


def every(steps: int, *more) -> list:
    return [*HELD_OUT, "--validation_every", steps, *more]


def validated(run: Path) -> dict[int, float]:
    """The validation loss of each step that has one."""
    values = {row["step"]: row["validation_loss"] for row in read_metrics(run / "metrics.csv")}
    return {step: value for step, value in values.items() if not isnan(value)}


def numbers(data: TrainingData, batches) -> set[int]:
    """The numbers of the images of `make_dataset` in batches."""
    return {round((value.item() + 1) * 127.5) for batch in batches for value in batch.images[:, 0, 0, 0]}


# ---------------------------------------------------------------------------------------------------------------------
# The held-out images


def test_held_out_images_are_never_trained_on_and_the_same_in_every_run(tmp_path):
    args = DataArguments(dataset_name=str(make_dataset(tmp_path / "numbers", 20)))
    validation = ValidationArguments(validation_fraction=0.3)
    found = []
    for changes in ({}, {"seed": 5}, {"batch_size": 2, "accumulation": 2}, {"batch_size": 2, "processes": 2}):
        plan = PLAN | changes
        ranks = [
            TrainingData(args, Preprocessing(1, 8, 8), rank, validation=validation, **plan)
            for rank in range(plan["processes"])
        ]
        trained = set.union(*(numbers(data, data.batches(0, 3 * data.plan.steps_per_epoch, None)) for data in ranks))
        held_out = set.union(*(numbers(data, data.validation_batches()) for data in ranks))
        assert len(held_out) == 6 and trained == set(range(20)) - held_out
        found.append(held_out)
    assert found.count(found[0]) == len(found)


def test_small_shares_hold_out_one_image_and_none_may_be_left_without():
    assert [len(part) for part in hold_out(list_of(13), 1e-6)] == [12, 1]
    assert [len(part) for part in hold_out(list_of(13), 0.5)] == [7, 6]
    with pytest.raises(InputError, match="Holding out 13 of 13 images leaves none to train on"):
        hold_out(list_of(13), 0.99)


def list_of(count: int):
    from ddgan.data.sources import ListedImages

    return ListedImages([None] * count)


def test_a_stream_is_refused(finetune, tmp_path):
    flags = ("--dataset_name", make_dataset(tmp_path / "stream", 13), "--streaming", "--max_train_steps", 1)
    with pytest.raises(InputError, match=r"--validation_fraction 0\.25 .* stream"):
        finetune("run", *flags, *HELD_OUT)
    assert not (tmp_path / "run").exists()


def test_a_run_resumes_only_with_the_same_images(finetune):
    finetune("run", "--num_epochs", 1, *HELD_OUT)
    with pytest.raises(
        InputError,
        match=r"number of images = 10, but this run has 13.* the same images and the same global batch size",
    ):
        finetune("run", "--resume_from_checkpoint", "latest")


# ---------------------------------------------------------------------------------------------------------------------
# The value


def test_it_is_the_loss_of_the_saved_weights_on_the_held_out_images(finetune, images, monkeypatch):
    monkeypatch.setattr(SAMPLES, 256)
    run = finetune("run", *every(2), "--random_flip", "--min_snr_gamma", 5, "--ema_decay", 0.5)
    assert list(validated(run)) == [0, 2, 4]
    pipe = DDPMPipeline.from_pretrained(run)  # with EMA weights, and dropout off
    args = DataArguments(train_data_dir=str(images))
    validation = ValidationArguments(validation_fraction=0.25)
    data = TrainingData(args, Preprocessing(3, 8, 8), 0, validation=validation, **{**PLAN, "batch_size": 3})
    objective = DenoisingObjective(DDPMScheduler.from_config(pipe.scheduler.config), 5.0)
    with torch.no_grad():
        losses = torch.cat(
            [
                objective(pipe.unet, MicroBatch(batch.images, None, PerSampleRNG(batch.keys, torch.device("cpu")), 0))[
                    "loss"
                ]
                for batch in data.validation_batches()
            ]
        )
    assert len(losses) == data.validation_samples == 3 * 86  # few images are used several times
    assert len(set(losses.tolist())) == len(losses)  # each time with another timestep and noise
    assert validated(run)[4] == pytest.approx(losses.mean().item(), rel=1e-5)
    trained = weights(run)
    pipe.unet.load_state_dict(trained)
    assert largest_difference(trained, load_file(run / "unet/diffusion_pytorch_model.safetensors")) > 1e-3


def test_it_does_not_change_while_the_weights_do_not(finetune):
    run = finetune("run", *every(1), "--learning_rate", 0)
    values = validated(run)
    assert list(values) == [0, 1, 2, 3, 4] and len(set(values.values())) == 1


def test_accumulation_gives_the_same_value(finetune):
    still = (*every(2), "--learning_rate", 0)
    whole = finetune("whole", *still, "--batch_size", 8)
    parts = finetune("parts", *still, "--batch_size", 2, "--grad_accumulation_steps", 4)
    other = finetune("other", *still, "--batch_size", 3, "--seed", 1)
    assert validated(parts) == pytest.approx(validated(whole), rel=1e-5)
    assert validated(other)[2] == pytest.approx(validated(whole)[2], rel=1e-5)


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(finetune, tiny_model, images, tmp_path):
    still = (*every(1), "--learning_rate", 0, "--max_train_steps", 2)
    one, two = finetune("one", *still, "--batch_size", 8), tmp_path / "two"
    flags = finetune_flags(tiny_model, images, two, *still, "--batch_size", 4)
    output = run_ranks(ROOT / "finetune_model.py", *flags, output=tmp_path / "output.txt", machines=2)
    assert validated(two) == pytest.approx(validated(one), rel=1e-5)
    assert output.count("step 2: validation loss") == 1


def test_training_is_bit_identical_however_often_it_is_computed(finetune):
    often = finetune("often", *every(1), "--dataloader_num_workers", 1)
    rarely = finetune("rarely", *every(100))
    assert list(validated(rarely)) == [0, 4]
    assert validated(often)[4] == validated(rarely)[4]
    assert largest_difference(weights(often), weights(rarely)) == 0
    losses = [[row["loss"] for row in read_metrics(run / "metrics.csv")[1:]] for run in (often, rarely)]
    assert losses[0] == losses[1]


def test_a_resumed_run_has_the_same_values(finetune, monkeypatch):
    flags = (*every(2), "--num_epochs", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 0)
    straight = finetune("straight", *flags)
    run = finetune("run", *flags)
    for step in (1, 2, 5):
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        finetune("run", *flags, "--resume_from_checkpoint", checkpoint)
        assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()

    # a signal while it is computed: the resumed run repeats it
    call = DenoisingObjective.__call__

    def stopped(objective, network, batch):
        if not torch.is_grad_enabled() and batch.step == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return call(objective, network, batch)

    for stop_at in (0, 2):
        name = f"stopped at {stop_at}"
        with monkeypatch.context() as patches, pytest.raises(SystemExit, match="143"):
            patches.setattr(DenoisingObjective, "__call__", stopped)
            finetune(name, *flags)
        stopped_rows = read_metrics(straight.parent / name / "metrics.csv")
        assert [row["step"] for row in stopped_rows] == list(range(stop_at and stop_at + 1))
        stopped_run = finetune(name, *flags, "--resume_from_checkpoint", "latest")
        assert (straight / "metrics.csv").read_text() == (stopped_run / "metrics.csv").read_text()
        assert largest_difference(weights(straight), weights(stopped_run)) == 0


def test_a_held_out_image_that_breaks_later_ends_the_run_with_a_checkpoint(finetune, images, tmp_path, monkeypatch):
    args = DataArguments(train_data_dir=str(images))
    validation = ValidationArguments(validation_fraction=0.25)
    data = TrainingData(args, Preprocessing(3, 8, 8), 0, validation=validation, **PLAN)
    name = Path(data.validation_images.source.name(0)).name
    copies = tmp_path / "copies"
    copies.mkdir()
    for path in images.iterdir():
        (copies / path.name).write_bytes(path.read_bytes())
    call = DenoisingObjective.__call__

    def break_it(objective, network, batch):
        if torch.is_grad_enabled():
            (copies / name).write_bytes(b"")
        return call(objective, network, batch)

    monkeypatch.setattr(DenoisingObjective, "__call__", break_it)
    with pytest.raises(RunError, match=name):
        finetune("run", "--train_data_dir", copies, *every(2))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


# ---------------------------------------------------------------------------------------------------------------------
# Where it is shown


def test_it_is_printed_plotted_tracked_and_on_the_card(finetune, capsys, caplog, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level(logging.INFO, "ddgan")
    plotted, new_figure = [], tracking._new_figure
    monkeypatch.setattr(tracking, "_new_figure", lambda **size: plotted.append(new_figure(**size)) or plotted[-1])
    # in the first step of the warmup the weights do not change, and at this rate they then get worse
    worse = ("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 2, "--learning_rate", 1, "--ema_decay", 0)
    run = finetune("run", *every(1), *worse, "--report_to", "tensorboard")
    values = validated(run)
    assert list(values) == [0, 1, 2, 3, 4] and values[0] == values[1] == min(values.values())
    printed = capsys.readouterr()
    lines = printed.out + printed.err
    assert f"step 0: validation loss {values[0]:.4f}, before training" in lines
    assert f"step 4: validation loss {values[4]:.4f} (lowest: {values[0]:.4f}, step 0)" in lines
    assert any(message.startswith("Training on 10 images (3 more are held out): ") for message in caplog.messages)
    row = f"{values[4]:.4f} at step 4, lowest {values[0]:.4f} at step 0; of 3 held-out images"
    assert f"| validation loss | {row} |" in ModelCard.load(run / "README.md").content
    (line,) = (line for line in plotted[-1].axes[0].get_lines() if line.get_label() == "validation_loss")
    assert (list(line.get_xdata()), list(line.get_ydata())) == (list(values), list(values.values()))
    events = next(path for path in (run / "logs").rglob("events*") if path.parent.name == "run")
    tracked = EventAccumulator(str(events)).Reload().Scalars("validation_loss")
    assert {event.step: event.value for event in tracked} == pytest.approx(values)


def test_a_dry_run_names_the_held_out_images(finetune, capsys):
    finetune("run", "--dry_run", *every(50))
    printed = capsys.readouterr().out
    assert "thirteen: 10 images" in printed
    assert "validation     3 more, every 50 steps" in printed


def test_a_class_conditional_run_has_one_too(tmp_path, monkeypatch):
    images = write_class_folders(tmp_path / "images")
    small = "--image_size 8 --batch_size 4 --num_samples 3 --report_to none --block_out_channels 8 16"
    small += " --layers_per_block 1 --attention_levels 1 --norm_num_groups 4 --sample_steps 2 --class_dropout 0.5"
    seen = []
    call = DenoisingObjective.__call__

    def record(objective, network, batch):
        if not torch.is_grad_enabled():
            seen.append(replace(batch))
        return call(objective, network, batch)

    monkeypatch.setattr(DenoisingObjective, "__call__", record)
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--train_data_dir", images, "--output_dir", tmp_path / "run", "--max_train_steps", 2, *every(1)]
    train_class_conditional.main([*map(str, flags), *small.split()])
    assert list(validated(tmp_path / "run")) == [0, 1, 2]
    # the value of image i is 20 i, and its class i % 3
    pairs = {
        (round((image[0, 0, 0].item() + 1) * 127.5) // 20 % 3, label.item())
        for b in seen
        for image, label in zip(b.images, b.labels, strict=True)
    }
    assert pairs and all(number == label for number, label in pairs)
