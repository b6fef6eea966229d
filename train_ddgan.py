"""Train a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022) on your own images.

    accelerate launch train_ddgan.py --config examples/recipes/ddgan_mnist_16.yaml --train_data_dir path/to/MNIST

Without data or --config it uses examples/recipes/ddgan_emoji_32.yaml and the embedded images.
From Python, call `train_ddgan`.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from ddgan import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.core.cli import Arguments, option, parse_arguments
from ddgan.core.errors import InputError, run_command
from ddgan.hub.cards import CardFacts
from ddgan.sampling.generation import PipelineSampler
from ddgan.training.arguments import DataArguments, EvaluationArguments, LabelArguments, RunArguments
from ddgan.training.ema import EMA
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.lr_schedules import cosine_by_epoch
from ddgan.training.model_card import FinishedRun, print_summary, settings_for_card
from ddgan.training.monitors import GANBalanceMonitor
from ddgan.training.objectives.adversarial import DiscriminatorObjective, GANSetup, GeneratorObjective
from ddgan.training.session import Session

RECIPES = Path(__file__).parent / "examples" / "recipes"

# per block: multiples of --discriminator_channels, and whether it halves the resolution (appendix of the paper)
DISCRIMINATORS = {
    "small": ((2, 4, 8, 8), (False, True, True, True)),
    "large": ((4, 8, 8, 8, 8, 8), (True, True, True, True, True, True)),
}
MAX_WIDTH, MAX_LAYERS = 16_384, 100  # far above any network that can be trained
AUGMENTATIONS = ("color", "translation", "cutout")


@dataclass
class DDGANArguments(Arguments):
    """The noise process, the two networks, and their losses."""

    _argument_group_name = "DDGAN"

    num_train_timesteps: int = option(4, "denoising steps T", minimum=1, maximum=1000)
    beta_min: float = option(0.1, "noise process: lowest rate", above=0)
    beta_max: float = option(20.0, "noise process: highest rate", above=0)
    variance_schedule: Literal["vp", "geometric"] = option("vp", "noise process: how its variance grows")

    image_channels: Literal[1, 2, 3, 4] = option(3, "channels of the images: gray, gray and alpha, RGB, RGBA")
    class_conditional: bool = option(False, "condition both networks on the class labels of the images")
    block_out_channels: list[int] = option(
        [128, 256, 256, 256],
        "generator: channels of each level, highest resolution first",
        minimum=1,
        maximum=MAX_WIDTH,
    )
    layers_per_block: int = option(2, "generator: residual blocks per level", minimum=1, maximum=MAX_LAYERS)
    attention_resolutions: list[int] = option([16], "generator: feature map heights with attention", minimum=1)
    latent_dim: int = option(100, "generator: length of the latent z", minimum=1, maximum=MAX_WIDTH)
    latent_embed_dim: int = option(256, "generator: width of the mapping network of z", minimum=1, maximum=MAX_WIDTH)
    latent_mapping_layers: int = option(
        4, "generator: layers of the mapping network after the first", minimum=0, maximum=MAX_LAYERS
    )
    dropout: float = option(0.0, "generator: dropout probability", minimum=0, below=1)
    discriminator: str = option(
        "small", "the paper's discriminator for 32x32 (small) or 256x256 (large)", choices=DISCRIMINATORS
    )
    discriminator_channels: int = option(
        64, "discriminator: base width, which its blocks multiply", minimum=1, maximum=MAX_WIDTH
    )

    lr_g: float = option(1.6e-4, "learning rate of the generator (Adam with betas 0.5 and 0.9)", above=0)
    lr_d: float = option(1.25e-4, "learning rate of the discriminator", above=0)
    lr_min: float = option(
        1e-5, "final learning rate of both, after a cosine decay that is constant within an epoch", minimum=0
    )
    r1_gamma: float = option(0.05, "weight of the gradient penalty R1; 0 turns it off", minimum=0)
    lazy_reg: int = option(15, "steps between applications of R1", minimum=1)
    diffaug: list[str] = option(
        [], "differentiable augmentations, for small datasets: any of color,translation,cutout"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.lr_min > min(self.lr_g, self.lr_d):
            raise InputError(
                f"--lr_min is {self.lr_min}, the final value of --lr_g {self.lr_g} and --lr_d {self.lr_d}; it must "
                "not be greater than either."
            )
        self.diffaug = [name for names in self.diffaug for name in names.split(",") if name]
        if unknown := set(self.diffaug) - set(AUGMENTATIONS):
            raise InputError(f"--diffaug {' '.join(sorted(unknown))}: choose from {', '.join(AUGMENTATIONS)}.")


@dataclass
class DDGANRunArguments(RunArguments):
    """The training run: its length, what it logs and what it saves."""

    _default_output_dir: ClassVar = "ddgan-model"

    max_grad_norm: float = option(0.0, "clip gradients to this norm; 0 turns clipping off", minimum=0)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] in ("--config", "--dataset_name", "--train_data_dir") for flag in argv):
        argv = ["--config", str(RECIPES / "ddgan_emoji_32.yaml"), *argv]
    kinds = (DDGANRunArguments, DataArguments, LabelArguments, EvaluationArguments, DDGANArguments)
    print_summary(train_ddgan(*parse_arguments(*kinds, argv=argv)))


def train_ddgan(
    run: DDGANRunArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    evaluation: EvaluationArguments,
    args: DDGANArguments,
) -> FinishedRun:
    """Train a generator and a discriminator from scratch with the non-saturating loss, R1 and Adam.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run)
    size = data_args.resolution or [data_args.image_size or 32] * 2
    data = session.load_data(data_args, args.image_channels, size, label_args if args.class_conditional else None)
    labels, grid = session.plan_grid(data.classes)
    torch.manual_seed(run.seed)  # same initial weights in every process and every run with this seed
    generator, discriminator, scheduler = build(args, size, data.classes)
    if run.gradient_checkpointing:
        generator.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()

    gan = GANSetup(generator, discriminator, scheduler, args.diffaug)
    cosine = partial(cosine_by_epoch, lowest=args.lr_min, steps_per_epoch=data.plan.steps_per_epoch)
    adam = partial(torch.optim.Adam, betas=(0.5, 0.9), fused=True)
    networks = [
        TrainedNetwork(
            name="d",
            network=discriminator,
            objective=DiscriminatorObjective(gan, args.r1_gamma, args.lazy_reg),
            optimizer=adam(discriminator.parameters(), args.lr_d),
            lr_schedule=cosine,
        ),
        TrainedNetwork(
            name="g",
            network=generator,
            objective=GeneratorObjective(gan),
            optimizer=adam(generator.parameters(), args.lr_g),
            lr_schedule=cosine,
        ),
    ]

    arguments = (session.run, data_args, label_args, evaluation, args)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"A Denoising Diffusion GAN ([arXiv 2112.07804](https://arxiv.org/abs/2112.07804)) trained on "
        f"{data.name}: it generates an image of {size[0]}x{size[1]} pixels in {args.num_train_timesteps} network "
        "evaluations.",
        usage=USAGE.format(model=run.folder_name, inputs="class_labels=[0]" if data.classes else ""),
        settings=settings_for_card(*arguments),
        dataset=data.name,
        tags=["ddgan", "gan"],
    )
    pipeline = DDGANPipeline(generator, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    job = TrainingJob(
        networks=networks,
        pipeline=pipeline,
        ema=EMA(generator, run),
        sampler=PipelineSampler("as-saved", args.num_train_timesteps),
        labels=labels,
        grid=grid,
        monitor=GANBalanceMonitor(),
        card=card,
        arguments=arguments,
    )
    return session.train(job, data, evaluation)


def build(
    args: DDGANArguments, size: list[int], classes: list[str] | None
) -> tuple[NCSNpp, DDGANDiscriminator, DDGANScheduler]:
    """Return new networks and the noise process for images of this height and width.

    Raises:
        InputError: if the arguments do not fit together.
    """
    square = size[0] if size[0] == size[1] else tuple(size)
    multiples, down_blocks = DISCRIMINATORS[args.discriminator]
    num_class_embeds = len(classes) if classes else None
    try:
        scheduler = DDGANScheduler(
            args.num_train_timesteps, args.beta_min, args.beta_max, variance_schedule=args.variance_schedule
        )
        generator = NCSNpp(
            sample_size=square,
            in_channels=args.image_channels,
            out_channels=args.image_channels,
            block_out_channels=args.block_out_channels,
            layers_per_block=args.layers_per_block,
            attention_resolutions=args.attention_resolutions,
            latent_dim=args.latent_dim,
            latent_embed_dim=args.latent_embed_dim,
            latent_mapping_layers=args.latent_mapping_layers,
            num_class_embeds=num_class_embeds,
            dropout=args.dropout,
        )
        discriminator = DDGANDiscriminator(
            sample_size=square,
            in_channels=args.image_channels,
            base_channels=2 * args.discriminator_channels,
            block_out_channels=[multiple * args.discriminator_channels for multiple in multiples],
            down_blocks=down_blocks,
            near_zero_conv_out=args.discriminator == "small",
            num_class_embeds=num_class_embeds,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return generator, discriminator, scheduler


USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
image = pipe({inputs}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
