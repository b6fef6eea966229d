"""Train a class-conditional diffusion model on handwritten digits or any images with class labels.

    accelerate launch train_class_conditional.py --recipe fast --dataset mnist --data_dir data

Without --recipe or --config it uses `--recipe tutorial`, and without data it trains on MNIST.
From Python, call `train_class_conditional`.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from diffusers import DDPMScheduler
from torchvision.datasets import MNIST, FashionMNIST

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, ContextUnet
from ddgan.core.cli import Arguments, option, parse_arguments
from ddgan.core.errors import InputError, run_command
from ddgan.hub.cards import CardFacts
from ddgan.sampling.generation import PipelineSampler
from ddgan.sampling.loading import ddim_usage
from ddgan.training.arguments import (
    MAX_GRID_IMAGES,
    DataArguments,
    EvaluationArguments,
    LabelArguments,
    LearningRateArguments,
    RunArguments,
)
from ddgan.training.ema import EMA
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.lr_schedules import lr_schedule
from ddgan.training.model_card import FinishedRun, print_summary, settings_for_card
from ddgan.training.objectives.denoising import ClassConditionalObjective
from ddgan.training.session import Session

RECIPES = {
    name: Path(__file__).parent / "examples" / "recipes" / f"class_conditional_{name}.yaml"
    for name in ("tutorial", "fast", "emoji_32")
}
DATASETS = {"mnist": MNIST, "fashion_mnist": FashionMNIST}
NUM_TRAIN_TIMESTEPS = 1000
MIN_WIDTH = 8  # channels of one attention head in the blocks of Diffusers
MAX_WIDTH, MAX_LAYERS = 16_384, 100  # far above any network that can be trained


@dataclass
class ClassConditionalArguments(Arguments):
    """The class-conditional network, and its loss."""

    _argument_group_name = "class conditioning"
    _alternatives = ({"dataset", "dataset_name", "train_data_dir"},)

    dataset: str | None = option(
        None,
        "images in --data_dir, downloaded if missing (default: mnist, unless other images are named)",
        choices=DATASETS,
    )
    data_dir: str = option("data", "folder with torchvision's MNIST/raw or FashionMNIST/raw")

    unet: Literal["class_conditioned", "context"] = option(
        "class_conditioned", "pass the class as extra input channels, or as factors of the features"
    )
    image_channels: Literal[1, 2, 3, 4] = option(1, "channels of the images: gray, gray and alpha, RGB, RGBA")
    class_dropout: float = option(
        0.0, "probability of the null class in training; above 0 allows classifier-free guidance", minimum=0, below=1
    )
    block_out_channels: list[int] = option(
        [32, 64, 64],
        "channels of each level, highest resolution first; context: only the first is used",
        minimum=MIN_WIDTH,
        maximum=MAX_WIDTH,
    )
    class_emb_size: int = option(
        4, "class_conditioned: size of the class embedding; 0: one-hot vectors", minimum=0, maximum=MAX_WIDTH
    )
    layers_per_block: int = option(2, "class_conditioned: residual blocks per level", minimum=1, maximum=MAX_LAYERS)
    attention_levels: list[int] = option(
        [1, 2], "class_conditioned: levels with attention; 0 is the highest resolution", minimum=0
    )
    norm_num_groups: int = option(
        32, "class_conditioned: groups of the group norms; must divide the channels of every level", minimum=1
    )

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "what the network predicts")
    min_snr_gamma: float | None = option(
        None, "weight the loss by min(SNR, gamma); 5 is common (default: no weighting)", above=0
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform", "distribution of the timesteps: uniform, or concentrated in the middle"
    )
    sample_steps: int = option(50, "DDIM steps for the sample grids", minimum=1)
    guidance_scale: float = option(
        1.0, "classifier-free guidance scale for these grids; above 1 needs --class_dropout"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.block_out_channels:
            raise InputError("--block_out_channels needs at least one width.")
        if self.guidance_scale > 1 and not self.class_dropout:
            raise InputError(
                f"--guidance_scale {self.guidance_scale} needs a null class for the unconditional prediction: train "
                "with --class_dropout 0.1, or sample with --guidance_scale 1."
            )


@dataclass
class ClassConditionalLearningRateArguments(LearningRateArguments):
    """The learning rate and its schedule."""

    learning_rate: float = option(1e-3, "peak learning rate (Adam)", minimum=0)


@dataclass
class ClassConditionalRunArguments(RunArguments):
    """The training run: its length, what it logs and what it saves."""

    _default_output_dir: ClassVar = "class-conditional"

    num_samples: int = option(
        80,
        "images in a sample grid with one row per class, rounded up to full rows",
        minimum=1,
        maximum=MAX_GRID_IMAGES,
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] in ("--config", "--recipe") for flag in argv):
        argv = ["--recipe", "tutorial", *argv]
    arguments = parse_arguments(
        ClassConditionalRunArguments,
        ClassConditionalLearningRateArguments,
        DataArguments,
        LabelArguments,
        EvaluationArguments,
        ClassConditionalArguments,
        argv=argv,
        recipes=RECIPES,
    )
    print_summary(train_class_conditional(*arguments))


def train_class_conditional(
    run: ClassConditionalRunArguments,
    learning_rate: ClassConditionalLearningRateArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    evaluation: EvaluationArguments,
    args: ClassConditionalArguments,
) -> FinishedRun:
    """Train a class-conditional network from scratch with the denoising loss and Adam.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run)
    with session.accelerator.main_process_first():  # the other processes find the downloaded files
        chosen_data = choose_data(args, data_args)
    size = data_args.resolution or [data_args.image_size or 28] * 2
    data = session.load_data(chosen_data, args.image_channels, size, label_args)
    classes = data.classes
    assert classes is not None  # images without labels raise an error
    labels, grid = session.plan_grid(classes)
    torch.manual_seed(run.seed)  # same initial weights in every process and every run with this seed
    unet = build(args, size, classes)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    scheduler = DDPMScheduler(
        NUM_TRAIN_TIMESTEPS, beta_schedule="squaredcos_cap_v2", prediction_type=args.prediction_type
    )
    objective = ClassConditionalObjective(
        scheduler,
        len(classes),
        args.class_dropout,
        min_snr_gamma=args.min_snr_gamma,
        timestep_sampling=args.timestep_sampling,
    )

    pipeline = ClassConditionalPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    arguments = (session.run, learning_rate, data_args, label_args, evaluation, args)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"A class-conditional diffusion model trained on {data.name}, for images of {size[0]}x{size[1]} "
        f"pixels. Its {len(classes)} classes are {', '.join(classes)}; the sample grid has one row per class.",
        usage=USAGE.format(
            model=run.folder_name,
            name=json.dumps(classes[0], ensure_ascii=False),
            guidance=f"guidance_scale={args.guidance_scale}, " if args.class_dropout else "",
            scheduler=ddim_usage(pipeline, args.sample_steps),
            steps=args.sample_steps,
        ),
        settings=settings_for_card(*arguments),
        dataset=data.name,
        tags=["ddpm", "class-conditional"],
    )
    job = TrainingJob(
        networks=[
            TrainedNetwork(
                network=unet,
                objective=objective,
                optimizer=torch.optim.Adam(unet.parameters(), lr=learning_rate.learning_rate, fused=True),
                lr_schedule=partial(lr_schedule, args=learning_rate),
            )
        ],
        pipeline=pipeline,
        ema=EMA(unet, run),
        sampler=PipelineSampler("ddim", args.sample_steps, {"guidance_scale": args.guidance_scale}),
        labels=labels,
        grid=grid,
        card=card,
        arguments=arguments,
    )
    return session.train(job, data, evaluation)


def choose_data(args: ClassConditionalArguments, data_args: DataArguments) -> DataArguments:
    """Return data arguments in which `--dataset` is replaced by its folder, downloaded if it is missing.

    Raises:
        InputError: if `data_args` also names images, or the download fails.
    """
    other = data_args.dataset_name or data_args.train_data_dir
    if args.dataset and other:
        raise InputError(
            f"--dataset {args.dataset} and {other} both name the images to train on. Use only one of them."
        )
    if other:
        return data_args
    dataset_class = DATASETS[args.dataset or "mnist"]
    folder = Path(args.data_dir) / dataset_class.__name__
    part = "t10k" if data_args.split == "test" else "train"
    files = [folder / "raw" / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    if not all(file.is_file() for file in files):
        try:
            dataset_class(args.data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"The images of {dataset_class.__name__} are not in {folder} (expected "
                f"{' and '.join(file.name for file in files)} in its subfolder raw), and downloading them failed: "
                f"{' '.join(str(error).split())} Set --data_dir to the folder that contains {dataset_class.__name__}, "
                "or name other images with --dataset_name or --train_data_dir."
            ) from error
    return replace(data_args, train_data_dir=str(folder))


def build(args: ClassConditionalArguments, size: list[int], classes: list[str]) -> ClassConditionedUnet | ContextUnet:
    """Return a new network for images of this height and width and these classes.

    Raises:
        InputError: if the arguments do not fit together.
    """
    widths = args.block_out_channels
    shared = {
        "in_channels": args.image_channels,
        "out_channels": args.image_channels,
        "class_dropout": args.class_dropout,
        "id2label": dict(enumerate(classes)),
    }
    try:
        if args.unet == "context":
            if size[0] != size[1]:
                raise InputError(f"The context network generates square images; {size[0]} x {size[1]} is not square.")
            return ContextUnet(
                n_feat=widths[0],
                n_cfeat=len(classes),
                height=size[0],
                num_train_timesteps=NUM_TRAIN_TIMESTEPS,
                **shared,
            )
        factor = 2 ** (len(widths) - 1)
        if any(side % factor for side in size):
            raise InputError(
                f"--block_out_channels {' '.join(map(str, widths))} halves the image {len(widths) - 1} times, so "
                f"height and width must be multiples of {factor}; {size[0]} x {size[1]} is not."
            )
        if unknown := set(args.attention_levels) - set(range(len(widths))):
            raise InputError(
                f"--attention_levels {' '.join(map(str, sorted(unknown)))}: the levels of this network are 0 to "
                f"{len(widths) - 1}, one for each value of --block_out_channels."
            )
        attention = ["Attn" if level in args.attention_levels else "" for level in range(len(widths))]
        return ClassConditionedUnet(
            sample_size=size[0] if size[0] == size[1] else tuple(size),
            num_classes=len(classes),
            class_emb_size=args.class_emb_size or None,
            layers_per_block=args.layers_per_block,
            block_out_channels=widths,
            down_block_types=[f"{kind}DownBlock2D" for kind in attention],
            up_block_types=[f"{kind}UpBlock2D" for kind in reversed(attention)],
            norm_num_groups=args.norm_num_groups,
            **shared,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


USAGE = """
from diffusers import DDIMScheduler, DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
{scheduler}
image = pipe(class_labels={name}, {guidance}num_inference_steps={steps}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
