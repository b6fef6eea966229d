"""Train a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022) on your own images.

    accelerate launch train_ddgan.py --config examples/recipes/ddgan_mnist_16.yaml --train_data_dir path/to/MNIST

Where no data or --config is named it is examples/recipes/ddgan_emoji_32.yaml, on the embedded images.
"""

import math
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Literal

import torch

from ddgan import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.core.cli import option, parse_arguments, require_above, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.data.preprocessing import Preprocessing
from ddgan.hub.cards import CardFacts
from ddgan.sampling.generation import PipelineSampler
from ddgan.sampling.grids import image_grid, rows_by_class
from ddgan.training.arguments import DataArguments, EvaluationArguments, LabelArguments, RunArguments
from ddgan.training.evaluator import open_evaluator
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.loading import TrainingData
from ddgan.training.loop import Trainer, prepare_accelerator
from ddgan.training.lr_schedules import cosine_by_epoch
from ddgan.training.model_card import repository_for, settings_for_card
from ddgan.training.objectives.adversarial import DiscriminatorObjective, GANSetup, GeneratorObjective

RECIPES = Path(__file__).parent / "examples" / "recipes"

# channels of each block over --discriminator_channels, and which blocks halve the resolution (the paper's appendix)
DISCRIMINATORS = {
    "small": ((2, 4, 8, 8), (False, True, True, True)),
    "large": ((4, 8, 8, 8, 8, 8), (True, True, True, True, True, True)),
}
AUGMENTATIONS = ("color", "translation", "cutout")
SATURATED = 5  # D's mean logits further than this from zero, on the right sides: a loss below 0.014
GUESSING = 2 * math.log(2)  # D's loss where it says 50 : 50 of everything
PATIENCE = 500  # steps of the one, one after the other, or of the other, in the mean, before it is said


@dataclass
class DDGANArguments:
    """Which noise process, which networks, and how the two are set against each other."""

    _argument_group_name = "DDGAN"

    num_train_timesteps: int = option(4, "denoising steps T")
    beta_min: float = option(0.1, "the noise process: least of its rates")
    beta_max: float = option(20.0, "the noise process: largest of its rates")
    variance_schedule: Literal["vp", "geometric"] = option("vp", "the noise process: how its variance grows")

    image_channels: Literal[1, 2, 3, 4] = option(3, "channels of the images: grey, grey and alpha, RGB, RGBA")
    class_conditional: bool = option(False, "train with the images' class labels, and draw by them")
    block_out_channels: list[int] = field(
        default_factory=lambda: [128, 256, 256, 256], metadata={"help": "generator: width of each level, finest first"}
    )
    layers_per_block: int = option(2, "generator: residual blocks a level")
    attention_resolutions: list[int] = field(
        default_factory=lambda: [16], metadata={"help": "generator: heights at which it has attention"}
    )
    latent_dim: int = option(100, "generator: length of the latent z")
    latent_embed_dim: int = option(256, "generator: width of the network that maps z")
    latent_mapping_layers: int = option(4, "generator: layers of that network after its first")
    dropout: float = option(0.0, "generator: dropout probability")
    discriminator: Literal[tuple(DISCRIMINATORS)] = option("small", "the paper's for 32x32 (small) or 256x256 (large)")
    discriminator_channels: int = option(64, "discriminator: width, of which its blocks have multiples")

    lr_g: float = option(1.6e-4, "learning rate of the generator (Adam with betas 0.5 and 0.9)")
    lr_d: float = option(1.25e-4, "learning rate of the discriminator")
    lr_min: float = option(1e-5, "where both end, half a cosine later; constant within an epoch")
    r1_gamma: float = option(0.05, "weight of the gradient penalty R1; 0 leaves it out")
    lazy_reg: int = option(15, "steps from one R1 to the next")
    diffaug: list[str] = field(
        default_factory=list,
        metadata={"help": "differentiable augmentations for small datasets: any of color,translation,cutout"},
    )

    def __post_init__(self):
        require_at_least(1, self, "layers_per_block", "latent_dim", "latent_embed_dim", "discriminator_channels")
        require_at_least(1, self, "num_train_timesteps", "lazy_reg")
        require_at_least(0, self, "r1_gamma", "lr_min", "dropout", "latent_mapping_layers")
        require_above(0, self, "lr_g", "lr_d")
        if self.lr_min > min(self.lr_g, self.lr_d):
            raise InputError(
                f"--lr_min is {self.lr_min}, down to which --lr_g {self.lr_g} and --lr_d {self.lr_d} go: it must not "
                "be above them."
            )
        self.diffaug = [name for given in self.diffaug for name in given.split(",") if name]
        if unknown := set(self.diffaug) - set(AUGMENTATIONS):
            raise InputError(f"--diffaug {' '.join(sorted(unknown))}: known are {', '.join(AUGMENTATIONS)}.")


@dataclass
class DDGANRunArguments(RunArguments):
    """How a training run goes: its length, what it shows and what it keeps."""

    _default_output_dir: ClassVar = "ddgan-model"

    max_grad_norm: float = option(0.0, "gradients are scaled down to this norm; 0 leaves them")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] in ("--config", "--dataset_name", "--train_data_dir") for flag in argv):
        argv = ["--config", str(RECIPES / "ddgan_emoji_32.yaml"), *argv]
    kinds = (DDGANRunArguments, DataArguments, LabelArguments, EvaluationArguments, DDGANArguments)
    arguments = parse_arguments(*kinds, argv=argv)
    run, data_args, label_args, eval_args, args = arguments
    accelerator = prepare_accelerator(run)
    if accelerator.is_fsdp2:
        raise InputError("A DDGAN trains on several processes with --multi_gpu; its networks need no FSDP.")
    repo_id = repository_for(run) if run.push_to_hub and accelerator.is_main_process else None

    size = data_args.resolution or [data_args.image_size or 32] * 2
    preprocessing = Preprocessing(args.image_channels, *size, data_args.center_crop, data_args.random_flip)
    data = TrainingData(
        data_args,
        preprocessing,
        accelerator.process_index,
        label_args if args.class_conditional else None,
        batch_size=run.batch_size,
        accumulation=run.grad_accumulation_steps,
        processes=accelerator.num_processes,
        seed=run.seed,
    )
    labels, grid = rows_by_class(run.num_samples, data.classes) if data.classes else (None, image_grid)
    run.num_samples = len(labels) if labels else run.num_samples
    torch.manual_seed(run.seed)  # the networks begin the same in every process and every run of this seed
    generator, discriminator, scheduler = build(args, size, data.classes)
    if run.gradient_checkpointing:
        generator.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()

    adversaries = GANSetup(generator, discriminator, scheduler, args.diffaug)
    course = partial(cosine_by_epoch, lowest=args.lr_min, steps_per_epoch=data.plan.steps_per_epoch)
    objectives = DiscriminatorObjective(adversaries, args.r1_gamma, args.lazy_reg), GeneratorObjective(adversaries)
    players = [
        TrainedNetwork(
            name, network, objective, torch.optim.Adam(network.parameters(), rate, (0.5, 0.9), fused=True), course
        )
        for name, network, objective, rate in zip(
            ("d", "g"), (discriminator, generator), objectives, (args.lr_d, args.lr_g), strict=True
        )
    ]

    card = CardFacts(
        title=run.model_save_name,
        summary=f"A Denoising Diffusion GAN ([arXiv 2112.07804](https://arxiv.org/abs/2112.07804)) trained on "
        f"{data.name}: it draws a picture of {size[0]}x{size[1]} pixels in {args.num_train_timesteps} evaluations of "
        "its network.",
        usage=USAGE.format(
            model=Path(run.output_dir).resolve().name, inputs="class_labels=[0]" if data.classes else ""
        ),
        settings=settings_for_card(*arguments),
        dataset=data.name,
        tags=["ddgan", "gan"],
    )
    pipeline = DDGANPipeline(generator, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    sampler = PipelineSampler("as-saved", args.num_train_timesteps)
    evaluator = open_evaluator(eval_args, run, data, accelerator)
    job = TrainingJob(players, pipeline, generator, sampler, card, arguments, labels, grid, Watch())
    trainer = Trainer(job, data, run, accelerator, repo_id, evaluator)
    trainer.run()
    if accelerator.is_main_process:
        trainer.finish()


def build(
    args: DDGANArguments, size: list[int], classes: list[str] | None
) -> tuple[NCSNpp, DDGANDiscriminator, DDGANScheduler]:
    """New networks and the noise process for pictures of this height and width.

    Raises:
        InputError: if they cannot be like that.
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


class Watch:
    """Says, once each, that the discriminator has long won, or done worse than guess: the generator learns no more."""

    def __init__(self):
        self.sure, self.losses, self.said = 0, deque(maxlen=PATIENCE), set()

    def __call__(self, rows: list[dict[str, float]]) -> str | None:
        for row in rows:
            self.sure = self.sure + 1 if row["d_real"] > SATURATED and row["d_fake"] < -SATURATED else 0
            if math.isnan(row["d_r1"]):  # else it is part of the loss
                self.losses.append(row["d_loss"])
        if self.sure >= PATIENCE and "sure" not in self.said:
            self.said.add("sure")
            return (
                f"The discriminator has told real from generated almost without a doubt for {self.sure} steps (mean "
                f"outputs {rows[-1]['d_real']:.1f} and {rows[-1]['d_fake']:.1f}): the generator falls behind. A "
                "larger --r1_gamma, a smaller --lr_d, or --diffaug translation cutout on a small dataset usually help."
            )
        loss = fmean(self.losses) if len(self.losses) == PATIENCE else 0
        if loss > GUESSING + 0.01 and "guesses" not in self.said:
            self.said.add("guesses")
            return (
                f"The discriminator has told real from generated worse than by guessing for {PATIENCE} steps (mean "
                f"loss {loss:.3f}, that of guesses {GUESSING:.3f}): the generator learns little from it. A smaller "
                "--lr_d, an --lr_g below it, or --diffaug without color usually help."
            )
        return None


USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
image = pipe({inputs}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
