"""Claims about train_class_conditional.py: what a run writes, that it is reproducible, and what it rejects."""

import gzip
import hashlib
import shutil
import subprocess
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from PIL import Image, ImageChops
from safetensors.torch import load_file
from tiny import (
    ROOT,
    command,
    ended,
    free_port,
    largest_difference,
    make_dataset,
    tiny_pipeline,
    weights,
    write_class_folders,
    write_idx,
)
from torchvision.datasets import MNIST

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, ContextUnet, train_class_conditional
from ddgan.commands.arguments import (
    ClassConditionalArguments,
    ClassConditionalLearningRateArguments,
    ClassConditionalRunArguments,
)
from ddgan.commands.train_class_conditional import build, choose_data
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import InputError
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import with_scheduler
from ddgan.train_class_conditional import RECIPES
from ddgan.training.arguments import DataArguments
from ddgan.training.tracking import read_metrics

SCRIPT = ROOT / "train_class_conditional.py"
CLASS_CONDITIONED = "--block_out_channels 8 16 --layers_per_block 1 --attention_levels 1 --norm_num_groups 4"
CONTEXT = "--unet context --block_out_channels 8"
RUN = "--batch_size 4 --max_train_steps 6 --num_samples 4 --sample_steps 2 --report_to none --cache_images false"
GUIDED = [
    "--class_dropout",
    "0.5",
    "--guidance_scale",
    "2",
    "--timestep_sampling",
    "logit_normal",
    "--min_snr_gamma",
    "5",
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> Path:
    """13 gray images in three subfolders, so that the last global batch of 4 in each epoch is short."""
    return write_class_folders(tmp_path_factory.mktemp("data") / "kinds")


def write_digits(raw: Path, prefix: str = "train") -> Path:
    """Write six images of 8x8 and their labels, as torchvision lays them out."""
    write_idx(raw / f"{prefix}-images-idx3-ubyte", np.repeat(np.arange(6), 64).reshape(6, 8, 8))
    write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.array([0, 1, 2, 2, 1, 0]))
    return raw


@pytest.fixture
def train(kinds, tmp_path):
    """Run train_class_conditional.py's main in this process; returns the run folder."""

    def run(name: str, *more, network: str = CLASS_CONDITIONED, data=("--train_data_dir", kinds), size=8) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        start = [*data, "--output_dir", tmp_path / name, "--image_size", size, *network.split(), *RUN.split()]
        train_class_conditional.main([str(flag) for flag in [*start, *more]])
        return tmp_path / name

    return run


def state(run: Path) -> dict[str, torch.Tensor]:
    """Return the network, its EMA weights and the optimizer state of the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [file for file in ("model.safetensors", "ema.safetensors") if (newest / file).exists()]
    tensors = {f"{file}/{name}": value for file in files for name, value in load_file(newest / file).items()}
    for i, values in torch.load(newest / "optimizer.bin", weights_only=True)["state"].items():
        tensors |= {f"optimizer/{i}/{name}": value for name, value in values.items()}
    return tensors


def arguments(*argv) -> tuple:
    types = (
        ClassConditionalRunArguments,
        ClassConditionalLearningRateArguments,
        DataArguments,
        ClassConditionalArguments,
    )
    return parse_arguments(*types, argv=list(argv), recipes=RECIPES)


def test_a_run_saves_a_pipeline_that_generates_each_class_and_a_grid_with_a_row_for_each(train, capsys):
    run = train("run", *GUIDED, "--log_samples_every", 3, "--gradient_checkpointing", "--ema_decay", 0.9)
    assert f"DiffusionPipeline.from_pretrained('{run}', trust_remote_code=True)\n" in capsys.readouterr().out
    pipe = ClassConditionalPipeline.from_pretrained(run)
    config = pipe.unet.config
    assert (config.num_classes, config.class_dropout, config.in_channels) == (3, 0.5, 1)
    assert pipe.labels == {"a": 0, "b": 1, "c": 2}
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.timestep_spacing) == ("squaredcos_cap_v2", "trailing")
    images = pipe(["c", "a"], guidance_scale=2, num_inference_steps=2).images
    assert [(image.size, image.mode) for image in images] == [((8, 8), "L")] * 2
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-0000000{i}.png" for i in (0, 3, 6)]

    # four samples are rounded up to three rows of two; seeds count up from --seed
    samples = sample(with_scheduler(pipe, "ddim", 2), range(6), 2, [0, 0, 1, 1, 2, 2], guidance_scale=2.0)
    expected = image_grid(samples, columns=2, row_labels=("a", "b", "c"))
    assert ImageChops.difference(Image.open(run / "samples" / "step-00000006.png"), expected).getbbox() is None

    card = (run / "README.md").read_text()
    assert "Its 3 classes are a, b, c" in card
    assert 'pipe(class_labels="a", guidance_scale=2.0, num_inference_steps=2)' in card
    assert "samples/step-00000006.png" in card and (run / "loss.png").exists()
    assert list(run.glob("pipeline_class_conditional_*.py")) and list(run.glob("unet/unet_class_conditioned_*.py"))


def test_config_yaml_repeats_the_run(train, tmp_path):
    run = train("run", *GUIDED, "--recipe", "fast", "--attention_levels")  # an empty list
    blocks = ClassConditionalPipeline.from_pretrained(run).unet.config.down_block_types
    assert list(blocks) == ["DownBlock2D"] * 2
    AcceleratorState._reset_state(reset_partial_state=True)
    train_class_conditional.main(["--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert largest_difference(state(run), state(tmp_path / "again")) == 0


def test_config_yaml_repeats_a_run_on_a_dataset_by_name(train, tmp_path):
    write_digits(tmp_path / "data" / "MNIST" / "raw")
    run = train("run", data=("--dataset", "mnist", "--data_dir", tmp_path / "data"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_class_conditional.main(["--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert largest_difference(state(run), state(tmp_path / "again")) == 0


@pytest.mark.parametrize("network", [CLASS_CONDITIONED, CONTEXT])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(train, network):
    straight = train("straight", *GUIDED, "--random_flip", network=network)
    train("resumed", *GUIDED, "--random_flip", "--max_train_steps", 3, network=network)
    resumed = train("resumed", *GUIDED, "--random_flip", "--resume_from_checkpoint", "latest", network=network)
    assert largest_difference(state(straight), state(resumed)) == 0
    assert (straight / "metrics.csv").read_text() == (resumed / "metrics.csv").read_text()


@pytest.mark.slow
def test_two_machines_resume_the_run_of_one_and_train_the_same_weights(train, kinds, tmp_path):
    """Also with a short global batch, of which one of them gets no image."""
    flags = (*GUIDED, "--learning_rate", 1e-6, "--max_train_steps")
    one = train("one", *flags, 3, "--batch_size", 6)  # global batches of 6, 6 and 1
    two = Path(shutil.copytree(one, tmp_path / "two"))
    flags = (*flags, 6, "--resume_from_checkpoint", "latest", "--batch_size")
    train("one", *flags, 6)
    data = ("--train_data_dir", kinds, "--output_dir", two, "--image_size", 8)
    network = (*CLASS_CONDITIONED.split(), *RUN.split())
    torchrun = ("torch.distributed.run", "--nnodes", 2, "--master_addr", "127.0.0.1", "--master_port", free_port())
    nodes = []
    for rank in range(2):
        launcher = (*torchrun, "--node_rank", rank)
        arguments, environment = command(SCRIPT, *data, *network, *flags, 3, launcher=launcher)
        nodes.append(subprocess.Popen(arguments, env=environment, text=True, stderr=subprocess.PIPE))
    with ended(nodes):
        for node in nodes:
            _, printed = node.communicate(timeout=300)
            assert node.returncode == 0, printed
    a, b = state(one), state(two)
    networks = [name for name in a if not name.startswith("optimizer")]
    assert max((a[name] - b[name]).abs().max() for name in networks) < 1e-6
    assert [row["loss"] for row in read_metrics(two / "metrics.csv")] == pytest.approx(
        [row["loss"] for row in read_metrics(one / "metrics.csv")], abs=1e-6
    )
    assert "| global batch size | 6, 2 processes |" in (two / "README.md").read_text()


def test_the_null_class_falls_on_the_same_images_however_a_batch_is_split(train):
    slow = ["--learning_rate", "1e-7", "--batch_size"]  # Adam turns gradients that are rounding noise into full steps
    whole, parts = train("whole", *GUIDED, *slow, 4), train("parts", *GUIDED, *slow, 1, "--grad_accumulation_steps", 4)
    rows = [read_metrics(run / "metrics.csv") for run in (whole, parts)]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], abs=1e-6)
    assert [row["grad_norm"] for row in rows[0]] == pytest.approx([row["grad_norm"] for row in rows[1]], rel=1e-4)


@pytest.mark.parametrize(("dropout", "trained"), [(0.5, [True] * 4), (0, [True] * 3)])
def test_every_class_is_trained_and_the_null_class_if_there_is_one(train, dropout, trained):
    run = train("run", "--class_dropout", dropout)
    *_, args = arguments(*CLASS_CONDITIONED.split(), "--class_dropout", str(dropout))
    torch.manual_seed(0)
    before = build(args, [8, 8], ["a", "b", "c"]).class_embedding.weight
    after = weights(run)["class_embedding.weight"]
    assert (before != after).any(dim=1).tolist() == trained


def test_the_context_network_learns_classes_as_contexts(train):
    run = train("run", *GUIDED, network=CONTEXT)
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert isinstance(pipe.unet, ContextUnet)
    assert (pipe.unet.config.n_cfeat, pipe.unet.config.n_feat, pipe.unet.config.height) == (3, 8, 8)
    assert pipe.unet.config.num_train_timesteps == pipe.scheduler.config.num_train_timesteps == 1000
    mixed = torch.tensor([[0.5, 0.5, 0.0]])
    assert pipe(mixed, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


# ---- recipes


def test_the_tutorial_recipe_is_the_tutorials_network_and_settings():
    run, rate, _, args = arguments("--recipe", "tutorial")
    unet = build(args, [28, 28], [str(digit) for digit in range(10)])
    expected = ClassConditionedUnet()
    shapes = [{name: tensor.shape for name, tensor in network.state_dict().items()} for network in (unet, expected)]
    assert shapes[0] == shapes[1]
    for name in ("sample_size", "class_dropout", "norm_num_groups", "attention_head_dim"):
        assert unet.config[name] == expected.config[name]
    assert (run.batch_size, run.num_epochs, run.ema_decay, run.max_grad_norm) == (128, 10, 0, 0)
    assert (rate.learning_rate, rate.lr_scheduler, rate.lr_warmup_steps) == (1e-3, "constant", 0)
    assert (args.prediction_type, args.min_snr_gamma, args.class_dropout) == ("epsilon", None, 0)


def test_config_overrides_a_recipe_and_flags_both(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch_size: 7\nnum_epochs: 9\n")
    run, _, _, args = arguments(
        "--num_epochs", "11", "--recipe", "fast", "--config", str(tmp_path / "mine.yaml"), "--class_emb_size", "0"
    )
    assert (run.batch_size, run.num_epochs) == (7, 11)
    assert args.prediction_type == yaml.safe_load(RECIPES["fast"].read_text())["prediction_type"] == "v_prediction"
    assert build(args, [28, 28], ["one", "two"]).class_embedding is None
    with pytest.raises(InputError, match="choose from"):
        arguments("--recipe", "slow")


def test_a_flag_overrides_its_alternatives_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.yaml").write_text(
        "image_size: 16\nmax_train_steps: 9\ntrain_data_dir: mine\nmixed_precision: no\n"
    )
    config = ["--config", str(tmp_path / "mine.yaml")]
    run, _, data, args = arguments(*config, "--resolution", "8", "16", "--num_epochs", "5", "--dataset", "mnist")
    assert (data.image_size, data.resolution, run.max_train_steps, run.num_epochs) == (None, [8, 16], None, 5)
    assert (data.train_data_dir, args.dataset, run.mixed_precision) == (None, "mnist", "no")
    run, _, data, _ = arguments("--recipe", "emoji_32", *config)
    assert (data.dataset_name, data.train_data_dir, data.image_size, run.max_train_steps) == (None, "mine", 16, 9)


# ---- start models


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    """A pipeline for gray images, with a linear noise schedule and a license."""
    folder = tmp_path_factory.mktemp("models") / "unconditional"
    tiny_pipeline(DDPMScheduler(500), in_channels=1, out_channels=1, freq_shift=1).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_an_unconditional_model_becomes_class_conditional(train, unconditional):
    run = train("run", "--start_model", unconditional, *GUIDED, network="", size=16)
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert pipe.labels == {"a": 0, "b": 1, "c": 2}
    assert pipe.unet.config.sample_size == 16
    assert (pipe.scheduler.config.num_train_timesteps, pipe.scheduler.config.beta_schedule) == (500, "linear")
    before = load_file(unconditional / "unet" / "diffusion_pytorch_model.safetensors")
    after = {name.removeprefix("unet."): weight for name, weight in weights(run).items()}
    assert after.keys() == before.keys() | {"class_embedding.weight"}
    assert after["class_embedding.weight"].any()
    assert 0 < largest_difference(before, {name: after[name] for name in before}) < 0.1
    generated = pipe(["b", "c"], guidance_scale=2, num_inference_steps=2, output_type="np").images
    assert generated.shape == (2, 16, 16, 1)

    card = (run / "README.md").read_text()
    assert "A class-conditional diffusion model: unconditional, fine-tuned on kinds" in card
    assert "| class_dropout | 0.5 |" in card and "block_out_channels" not in card
    assert "license: mit" in card and "fine-tuned" in yaml.safe_load(card.split("---")[1])["tags"]


def test_a_class_conditional_model_is_trained_further(train, tmp_path, kinds):
    first = train("first", *GUIDED)
    again = train("again", "--start_model", first, "--learning_rate", 0, *GUIDED, network="")
    assert largest_difference(weights(first), weights(again)) == 0
    config = ClassConditionalPipeline.from_pretrained(again).unet.config
    assert (config.conditioning, config.class_dropout) == ("input", 0.5)
    with pytest.raises(InputError, match=r"--class_dropout 0 does not fit .*, which was trained with 0\.5"):
        train("other", "--start_model", first, network="")
    renamed = shutil.copytree(kinds, tmp_path / "renamed")
    (renamed / "c").rename(renamed / "d")
    with pytest.raises(InputError, match="renamed has no 'c', and the model has no 'd'"):
        train("other", "--start_model", first, *GUIDED, network="", data=("--train_data_dir", renamed))


def test_a_start_model_replaces_the_network_of_a_recipe(unconditional):
    *_, args = arguments("--recipe", "fast", "--start_model", str(unconditional))
    assert (args.class_dropout, args.prediction_type) == (0.1, None)
    assert args.block_out_channels == ClassConditionalArguments().block_out_channels


def test_a_learned_variance_is_removed(train, tmp_path):
    tiny_pipeline(in_channels=1, out_channels=2).save_pretrained(tmp_path / "learned")
    pipe = ClassConditionalPipeline.from_pretrained(train("run", "--start_model", tmp_path / "learned", network=""))
    assert pipe.unet.config.out_channels == 1
    assert pipe(class_labels=0, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--block_out_channels", 8, 16, "--norm_num_groups", 4], "--block_out_channels, --norm_num_groups would"),
        (["--unet", "context"], "--unet would describe a new network"),
        (["--image_channels", 3], "--image_channels 3 does not fit .*, whose images have 1"),
        (["--image_size", 9], "multiples of 2; 9 x 9 is not"),
    ],
)
def test_settings_that_contradict_a_start_model_are_refused(train, unconditional, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        train("run", "--start_model", unconditional, *more, network="")
    assert not (tmp_path / "run" / "metrics.csv").exists()


# ---- data


@pytest.mark.parametrize(
    ("dataset", "folder", "names"),
    [("mnist", "MNIST", ["0", "1", "2"]), ("fashion_mnist", "FashionMNIST", ["T-shirt/top", "Trouser", "Pullover"])],
)
def test_torchvision_folders_are_named_as_datasets(train, tmp_path, dataset, folder, names):
    write_digits(tmp_path / "data" / folder / "raw")
    run = train("run", data=("--dataset", dataset, "--data_dir", tmp_path / "data"))
    assert list(ClassConditionalPipeline.from_pretrained(run).labels)[:3] == names
    assert f"trained on {folder}" in (run / "README.md").read_text()


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Path:
    """A folder that torchvision downloads MNIST from."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    yield folder
    server.shutdown()
    server.server_close()


def test_missing_data_is_downloaded(train, tmp_path, mirror, monkeypatch):
    resources = []
    for prefix in ("train", "t10k"):
        for file in write_digits(tmp_path / prefix, prefix).iterdir():
            packed = mirror / f"{file.name}.gz"
            packed.write_bytes(gzip.compress(file.read_bytes()))
            resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
    monkeypatch.setattr(MNIST, "resources", resources)
    run = train("run", data=("--data_dir", tmp_path / "data"))  # MNIST is the default
    assert (tmp_path / "data" / "MNIST" / "raw" / "train-labels-idx1-ubyte").is_file()
    assert ClassConditionalPipeline.from_pretrained(run).num_classes == 3


def test_a_failed_download_is_reported(train, tmp_path, mirror):
    message = r"MNIST are not in .*data.MNIST .*downloading them failed.*not found.*--data_dir"
    with pytest.raises(InputError, match=message):
        train("run", data=("--dataset", "mnist", "--data_dir", tmp_path / "data"))


def test_a_column_of_labels_is_named(train, tmp_path):
    data = ("--dataset_name", make_dataset(tmp_path / "digits", 6))
    with pytest.raises(InputError, match=r"no column of class labels.*--label_column"):
        train("run", data=data)
    run = train("run", "--label_column", "number", "--image_channels", 3, data=data)
    pipe = ClassConditionalPipeline.from_pretrained(run)
    assert (pipe.num_classes, pipe.unet.config.in_channels) == (6, 3)


# ---- rejected input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--guidance_scale", 2], "needs a null class"),
        (["--class_dropout", 1], "must be less than 1"),
        (["--class_dropout", -0.1], "must be at least 0"),
        (["--dataset", "mnist"], "--dataset mnist and .*kinds both name"),
        (["--data_dir", "data"], "--data_dir data and .*kinds both name"),
        (["--block_out_channels"], "at least one width"),
        (["--block_out_channels", 8, 16, 16, 16, 16], "multiples of 16; 8 x 8 is not"),
        (["--attention_levels", 2], "levels of this network are 0 to 1"),
        (["--norm_num_groups", 5], "divisible"),
        (["--unet", "context", "--resolution", 8, 12], "--resolution takes a height and a width"),
        (["--unet", "context", "--image_size", 10], "multiple of 4"),
        (["--learning_rates", 1], "Did you mean --learning_rate"),
    ],
)
def test_invalid_settings_are_reported_before_training(train, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        train("run", *more)
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_images_without_classes_are_rejected(train, images, tmp_path):
    with pytest.raises(InputError, match="is not in a subfolder"):
        train("run", data=("--train_data_dir", images))
    assert not (tmp_path / "run").exists()


def test_the_split_determines_which_files_are_needed(tmp_path):
    write_digits(tmp_path / "MNIST" / "raw", "t10k")
    *_, data_args, args = arguments("--data_dir", str(tmp_path), "--split", "test")
    chosen = choose_data(args, data_args)
    assert chosen.train_data_dir == str(tmp_path / "MNIST")
