"""Claims about train_ddgan.py: what a run writes, and that it equals the plain computation however it is split."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, largest_difference, run_ranks, write_images

from ddgan import DDGANPipeline, train_ddgan
from ddgan.commands.arguments import DDGANArguments, DDGANRunArguments
from ddgan.commands.train_ddgan import build
from ddgan.core import accelerator
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import InputError, RunError
from ddgan.data.preprocessing import Preprocessing
from ddgan.training.arguments import DataArguments, LabelArguments
from ddgan.training.loading import TrainingData
from ddgan.training.monitors import GANBalanceMonitor
from ddgan.training.objectives.adversarial import (
    DiscriminatorObjective,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG
from ddgan.training.tracking import read_metrics

SCRIPT = ROOT / "train_ddgan.py"
GENERATOR = "--block_out_channels 8 16 --layers_per_block 1 --attention_resolutions 4 --latent_dim 4"
MAPPING = "--latent_embed_dim 8 --latent_mapping_layers 1 --discriminator_channels 2"
RUN = "--image_size 8 --batch_size 4 --max_train_steps 6 --num_samples 4 --report_to none --lazy_reg 2 --r1_gamma 1"
OTHER_LOSS = "--gan_loss relativistic --r2_gamma 1 --gradient_penalty finite_differences --instance_noise 0.1"
# Adam turns gradients that are rounding noise into full steps; at these rates they stay below the bounds
LOW_RATES = ["--lr_g", "2e-7", "--lr_d", "2e-7", "--lr_min", "1e-7"]
GLOBAL_BATCH_8 = ["--grad_accumulation_steps", 2]
STARTED = [*GLOBAL_BATCH_8, "--max_train_steps", 4, "--lr_g", "1e-2", "--lr_d", "1e-2"]
RESUME = ["--resume_from_checkpoint", "latest", "--max_train_steps", 8]


def flags(images: Path, output: Path, *more) -> list[str]:
    start = ["--train_data_dir", images, "--output_dir", output, *GENERATOR.split(), *MAPPING.split(), *RUN.split()]
    return [str(flag) for flag in [*start, *more]]


@pytest.fixture
def train(images, tmp_path):
    """Run train_ddgan.py's main in this process on 13 images; returns the run folder."""

    def run(name: str, *more, data: Path = images) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        train_ddgan.main(flags(data, tmp_path / name, *more))
        return tmp_path / name

    return run


def test_the_large_discriminator_has_six_blocks(train, tmp_path):
    data = write_images(tmp_path / "large", 4, (64, 64))
    size = ("--image_size", 64, "--attention_resolutions", 0, "--max_train_steps", 1)
    run = train("large-run", "--discriminator", "large", *size, data=data)
    assert "| discriminator | large |" in (run / "README.md").read_text()
    with pytest.raises(InputError, match=r"6 times, which is too often .*--discriminator small"):
        train("too-small", "--discriminator", "large")


@pytest.fixture
def started(train) -> Path:
    """A run with global batches of 8 images, past the start, where the networks output almost nothing."""
    return train("started", *STARTED)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """12 gray images in three subfolders."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(12):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(folder / "abc"[i % 3] / f"{i}.png")
    return folder


def state(run: Path) -> dict[str, torch.Tensor]:
    """Return both networks, the EMA weights and both optimizer states of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = ("model.safetensors", "model_1.safetensors", "ema.safetensors")
    tensors = {f"{file}/{name}": value for file in files for name, value in load_file(newest / file).items()}
    for file in ("optimizer.bin", "optimizer_1.bin"):
        for i, values in torch.load(newest / file, weights_only=True)["state"].items():
            tensors |= {f"{file}/{i}/{name}": value for name, value in values.items()}
    return tensors


def assert_same(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


def test_a_run_saves_a_pipeline_that_generates_images(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("run", "--log_samples_every", 3, "--gradient_checkpointing", "--report_to", "tensorboard")
    pipe = DDGANPipeline.from_pretrained(run)
    assert pipe(batch_size=2, generator=[torch.Generator().manual_seed(i) for i in range(2)]).images[0].size == (8, 8)
    assert pipe.scheduler.config.num_train_timesteps == 4
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-0000000{i}.png" for i in (0, 3, 6)]
    rows = read_metrics(run / "metrics.csv")
    assert [row["d_r1"] == row["d_r1"] for row in rows] == [True, False] * 3  # NaN: not due
    for name in ("d_loss", "g_loss", "d_real", "d_fake", "d_grad_norm", "g_grad_norm"):
        assert all(abs(row[name]) < 100 for row in rows)
    events = next(path for path in (run / "logs").rglob("events*") if path.parent.name == "run")
    tracked = EventAccumulator(str(events)).Reload()
    for name in ("d_loss", "d_real", "d_fake", "d_grad_norm", "g_grad_norm", "d_r1"):
        newest = [row[name] for row in rows if row[name] == row[name]][-1]
        assert tracked.Scalars(name)[-1].value == pytest.approx(newest)
    card = (run / "README.md").read_text()
    assert "trained from scratch" in card.lower()
    assert "| discriminator loss |" in card and "| generator loss |" in card
    assert (run / "loss.png").exists()


def test_learning_rates_follow_half_a_cosine_in_steps_of_an_epoch(train):
    run = train("run", "--max_train_steps", 8, "--lr_g", "4e-4", "--lr_d", "2e-4", "--lr_min", "1e-4")
    rows = read_metrics(run / "metrics.csv")  # 13 images: four steps an epoch
    assert [row["g_learning_rate"] for row in rows] == pytest.approx([4e-4] * 4 + [2.5e-4] * 4)
    assert [row["d_learning_rate"] for row in rows] == pytest.approx([2e-4] * 4 + [1.5e-4] * 4)


def test_the_generator_is_updated_once_in_d_steps_steps(train):
    run = train("run", "--max_train_steps", 8, "--d_steps", 3, "--lr_g", "4e-4", "--lr_min", "1e-4")
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows if not math.isnan(row["g_loss"])] == [1, 4, 7]
    assert [row["step"] for row in rows if math.isnan(row["d_loss"])] == []
    rates = [row["g_learning_rate"] for row in rows if not math.isnan(row["g_learning_rate"])]
    assert rates == pytest.approx([4e-4, 4e-4, 2.5e-4])  # four steps an epoch, updates or not


def test_the_run_equals_the_plain_computation_also_with_gradient_accumulation(train, started, images):
    """Compared with a loop written out here, over global batches of 8 and 5 images in two micro-batches."""
    more = ["--diffaug", "color,translation", *LOW_RATES]
    argv = flags(images, started, *RESUME, *more)
    _, data_args, _, args = parse_arguments(
        DDGANRunArguments,
        DataArguments,
        LabelArguments,
        DDGANArguments,
        argv=argv,
    )
    generator, discriminator, scheduler = build(args, [8, 8], None)
    gan = GANSetup(generator.train(), discriminator.train(), scheduler, args.diffaug)
    objectives = (
        DiscriminatorObjective(gan, GradientPenalties(args.r1_gamma, interval=args.lazy_reg)),
        GeneratorObjective(gan),
    )
    optimizers = [torch.optim.Adam(n.parameters(), 1e-6, (0.5, 0.9)) for n in (discriminator, generator)]
    checkpoint = started / "checkpoints" / "step-00000004"
    for i, (network, optimizer) in enumerate(zip((discriminator, generator), optimizers, strict=True)):
        suffix = f"_{i}" if i else ""
        network.load_state_dict(load_file(checkpoint / f"model{suffix}.safetensors"))
        optimizer.load_state_dict(torch.load(checkpoint / f"optimizer{suffix}.bin", weights_only=True))
        assert tuple(optimizer.param_groups[0]["betas"]) == (0.5, 0.9)

    run = train("started", *GLOBAL_BATCH_8, *RESUME, *more)
    data = TrainingData(data_args, Preprocessing(3, 8, 8), 0, batch_size=4, accumulation=2, processes=1, seed=0)
    batches = data.batches(4, 8, None)
    for step, row in enumerate(read_metrics(run / "metrics.csv")[4:], start=4):
        global_batch = [next(batches) for _ in range(2)]
        num_images = sum(len(batch.images) for batch in global_batch)
        assert num_images == (8, 5)[step % 2]
        networks = zip((discriminator, generator), objectives, optimizers, ("d", "g"), strict=True)
        for stream, (network, objective, optimizer, name) in enumerate(networks):
            for group in optimizer.param_groups:
                group["lr"] = row[f"{name}_learning_rate"]
            losses = [
                objective(network, MicroBatch(b.images, None, PerSampleRNG(b.keys, b.images.device, stream), step))[
                    "loss"
                ]
                for b in global_batch
            ]
            loss = torch.cat(losses).sum() / num_images
            loss.backward()
            norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
            assert row[f"{name}_loss"] == pytest.approx(loss.item(), abs=1e-6)
            assert row[f"{name}_grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
            optimizer.step()
            optimizer.zero_grad()
            discriminator.zero_grad()  # the generator's update leaves gradients there, unlike in the run
    trained = state(run)
    for file, network in (("model.safetensors", discriminator), ("model_1.safetensors", generator)):
        saved = {name.removeprefix(f"{file}/"): value for name, value in trained.items() if name.startswith(file)}
        assert largest_difference(saved, network.state_dict()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], OTHER_LOSS.split()], ids=["paper", "other"])
def test_two_processes_equal_one_that_accumulates(train, tmp_path, more):
    """With global batches that are never short: minibatch statistics depend on which images share a micro-batch."""
    images = write_images(tmp_path / "images", 16)
    one = train("one", *STARTED, data=images)
    shutil.copytree(one, tmp_path / "two")
    train("one", *GLOBAL_BATCH_8, *RESUME, *LOW_RATES, *more, data=images)
    two = flags(images, tmp_path / "two", *RESUME, *LOW_RATES, *more)
    run_ranks(SCRIPT, *two, output=tmp_path / "output.txt", machines=2)
    a, b = state(one), state(tmp_path / "two")
    networks = [name for name in a if name.startswith("model")]
    assert max((a[name] - b[name]).abs().max() for name in networks) < 1e-6
    rows = [read_metrics(run / "metrics.csv") for run in (one, tmp_path / "two")]
    for first, second in zip(*rows, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(("stop", "more"), [(3, []), (5, [*OTHER_LOSS.split(), "--d_steps", 3])])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(train, stop, more):
    straight = train("straight", "--random_flip", *more)
    train("resumed", "--random_flip", "--checkpointing_steps", stop, *more)
    run = straight.parent / "resumed"
    checkpoint = run / "checkpoints" / f"step-{stop:08d}"
    train("resumed", "--random_flip", "--resume_from_checkpoint", checkpoint, *more)
    assert_same(straight, run)


def test_the_loss_and_the_penalties_are_those_of_the_flags(train):
    run = train("run", *OTHER_LOSS.split(), "--max_train_steps", 2)
    first, second = read_metrics(run / "metrics.csv")
    assert first["d_loss"] == pytest.approx(math.log(2) + first["d_r1"] + first["d_r2"], abs=1e-3)
    assert second["g_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert "g_reconstruction" not in first and "g_energy" not in first
    run = train("reconstruction", "--reconstruction_weight", 20, "--energy_weight", 20, "--max_train_steps", 1)
    (row,) = read_metrics(run / "metrics.csv")
    assert row["g_reconstruction"] > 0 and row["g_energy"] > 0
    assert row["g_loss"] == pytest.approx(math.log(2) + row["g_reconstruction"] + row["g_energy"], abs=1e-3)


def test_networks_on_wavelet_sub_bands_train_and_are_saved(train):
    run = train("run", "--image_size", 16, "--wavelet_levels", 1, "--max_train_steps", 2)
    networks = [load_file(run / "checkpoints" / "step-00000002" / f"model{i}.safetensors") for i in ("", "_1")]
    assert sorted(weights["conv_in.weight"].shape[1] for weights in networks) == [3 * 4, 2 * 3 * 4]
    pipe = DDGANPipeline.from_pretrained(run)
    assert pipe.unet.config.wavelet_levels == 1
    assert pipe(batch_size=1).images[0].size == (16, 16)


def test_mixed_precision_stays_near_and_keeps_r1_in_float32(train, started):
    shutil.copytree(started, started.with_name("mixed"))
    exact = train("started", *GLOBAL_BATCH_8, *RESUME, *LOW_RATES)
    mixed = train("mixed", *GLOBAL_BATCH_8, *RESUME, *LOW_RATES, "--mixed_precision", "bf16")
    first, second = (read_metrics(run / "metrics.csv")[4] for run in (exact, mixed))
    assert second["d_r1"] == first["d_r1"]
    assert second["d_real"] == first["d_real"]
    assert second["d_fake"] != first["d_fake"]
    assert second["g_loss"] != first["g_loss"]
    assert second["g_loss"] == pytest.approx(first["g_loss"], abs=1e-2)


def test_a_class_conditional_run_generates_each_class(train, kinds):
    run = train("run", "--class_conditional", "--image_channels", 1, "--num_samples", 4, data=kinds)
    assert yaml.safe_load((run / "config.yaml").read_text())["num_samples"] == 6  # two in each of the three rows
    grid = Image.open(next((run / "samples").glob("*.png")))
    assert grid.height > grid.width  # three rows of two images, and the names
    pipe = DDGANPipeline.from_pretrained(run)
    assert pipe.unet.config.num_class_embeds == 3
    assert pipe.labels == {"a": 0, "b": 1, "c": 2}
    assert pipe(batch_size=2, class_labels=[0, 2]).images[0].mode == "L"
    assert "class_labels=[0]" in (run / "README.md").read_text()
    with pytest.raises(ValueError, match="from 0 to 2"):
        pipe(batch_size=1)


@pytest.mark.parametrize(
    ("size", "levels", "expected"),
    [([32, 32], 3, [16]), ([24, 24], 3, [12]), ([20, 36], 3, [10]), ([8, 8], 1, [8]), ([64, 64], 2, [0])],
)
def test_attention_is_by_default_at_the_largest_feature_map_of_at_most_16(size, levels, expected):
    small = {"layers_per_block": 1, "discriminator_channels": 2, "latent_embed_dim": 8, "latent_mapping_layers": 1}
    generator, *_ = build(DDGANArguments(block_out_channels=[8] * levels, **small), size, None)
    assert list(generator.config.attention_resolutions) == expected
    found = [size[0] >> level for level, block in enumerate(generator.down_blocks) if block.attentions]
    assert found == [height for height in expected if height]


def test_an_image_size_without_a_feature_map_of_16_is_trained_by_default(images, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    other_flags = flags(images, tmp_path / "run", "--image_size", 24, "--max_train_steps", 1)
    start = other_flags.index("--attention_resolutions")
    train_ddgan.main(other_flags[:start] + other_flags[start + 2 :])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["attention_resolutions"] == [12]
    assert DDGANPipeline.from_pretrained(tmp_path / "run").unet.config.attention_resolutions == [12]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--diffaug", "colour"], "colour: choose from color, translation, cutout"),
        (["--variance_schedule", "geometric"], "Possible values: 0 <= eps < 1 and 0 < beta_min"),
        (["--block_out_channels", "8", "8", "8", "8", "8"], "too many to halve images of 8x8"),
        (["--discriminator", "large"], "too often for images of 8x8"),
        (["--wavelet_levels", "1"], "too often for sub-bands of a wavelet transform of 4x4"),
        (["--wavelet_levels", "4"], "images of 8x8 pixels can be halved that many times only if"),
        (["--class_conditional"], "is not in a subfolder"),
        (["--attention_resolutions", "5"], "--attention_resolutions 5: .* of the 2 levels .* have heights 8, 4"),
        (["--lr_g", "0"], "--lr_g is 0.0; it must be greater than 0"),
        (["--block_out_channels", "8", "3"], "--block_out_channels is 3; it must be at least 4"),
        (["--lr_g", "5e-6"], "--lr_min is 1e-05, the final value of --lr_g 5e-06 and .* must not be greater"),
        (["--mixed_precision", "fp16"], "would use fp16 .*gradients.* bf16"),
        (["--learning_rate", "1"], "Unknown flag --learning_rate"),
    ],
)
def test_invalid_settings_are_reported_before_training(train, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        train("run", *more)
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_half_precision_that_overflows_at_every_scale_ends_in_a_clear_error(train, tmp_path, monkeypatch):
    def with_scaler(**kwargs):
        created = Accelerator(**kwargs)
        created.scaler = torch.amp.GradScaler("cpu", init_scale=math.inf)
        return created

    monkeypatch.setattr(accelerator, "Accelerator", with_scaler)
    with pytest.raises(RunError, match="gradient of step 51, like those of the 50 before it, is not finite"):
        train("run", "--max_train_steps", 70)
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")) == 50


def test_a_run_folder_cannot_shadow_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="import a folder of that name here instead of this package"):
        train_ddgan.main(["--train_data_dir", "images", "--output_dir", "ddgan"])
    assert DDGANRunArguments().output_dir != "ddgan"


def logged(d_real: float, d_fake: float, d_r1: float = math.nan) -> dict[str, float]:
    loss = math.log1p(math.exp(-d_real)) + math.log1p(math.exp(d_fake)) + (0 if math.isnan(d_r1) else d_r1)
    return {"d_loss": loss, "d_real": d_real, "d_fake": d_fake, "d_r1": d_r1}


def test_a_discriminator_that_keeps_winning_causes_one_warning():
    monitor = GANBalanceMonitor()
    winning, even = logged(9.0, -9.0), logged(0.5, -0.5)
    assert monitor([winning] * 400) is None
    assert monitor([even] + [winning] * 400) is None
    assert "--r1_gamma" in monitor([winning] * 200)
    assert monitor([winning] * 1000) is None


def test_a_relativistic_discriminator_is_judged_by_the_difference_of_the_logits():
    def row(d_real, d_fake):
        return {"d_loss": math.log1p(math.exp(d_fake - d_real)), "d_real": d_real, "d_fake": d_fake, "d_r1": math.nan}

    assert GANBalanceMonitor("relativistic")([row(20.0, 19.0)] * 500) is None
    assert "--r1_gamma" in GANBalanceMonitor("relativistic")([row(20.0, 14.0)] * 500)
    assert "at chance 0.693" in GANBalanceMonitor("relativistic")([row(7.0, 7.1)] * 500)


def test_a_discriminator_at_chance_causes_one_warning():
    monitor = GANBalanceMonitor()
    guessing, learning = [logged(0.3, 0.3), logged(-0.3, -0.3)], logged(0.2, -0.2)
    assert monitor(guessing * 200 + [learning] * 100) is None
    assert monitor(guessing * 150 + [learning] * 200) is None
    assert monitor(guessing * 100 + [learning] * 300 + [logged(0.2, -0.2, 1.0)] * 1000) is None  # R1 does not count
    assert "mean loss 1.409, at chance 1.386" in monitor(guessing * 250)
    assert monitor(guessing * 500) is None
    assert "--r1_gamma" in monitor([logged(9.0, -9.0)] * 500)
