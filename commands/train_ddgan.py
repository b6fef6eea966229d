"""Train a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022)."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from .. import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ..core.errors import InputError
from ..hub.cards import CardFacts, string_literal
from ..models.unet_ncsnpp import check_wavelet_levels
from ..sampling.generation import PipelineSampler
from ..training.arguments import DataArguments, EvaluationArguments, LabelArguments
from ..training.ema import EMA
from ..training.job import TrainedNetwork, TrainingJob
from ..training.lr_schedules import cosine_by_epoch
from ..training.model_card import FinishedRun, settings_for_card
from ..training.monitors import GANBalanceMonitor
from ..training.objectives.adversarial import (
    DiscriminatorObjective,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ..training.session import Session
from .arguments import DISCRIMINATORS, MAX_ATTENTION_HEIGHT, DDGANArguments, DDGANRunArguments


def train_ddgan(
    run: DDGANRunArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    evaluation: EvaluationArguments,
    args: DDGANArguments,
) -> FinishedRun:
    """Train a generator and a discriminator from scratch with gradient penalties and Adam.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
    """
    if label_args.label_column and not args.class_conditional:
        raise InputError(
            f"--label_column {label_args.label_column}: labels are only read with --class_conditional. Add it, or "
            "omit --label_column."
        )
    session = Session.open(run, supports_fp16=False)
    size = data_args.size or [32, 32]
    data = session.load_data(data_args, args.image_channels, size, label_args if args.class_conditional else None)
    labels, grid = session.plan_grid(data.classes)
    torch.manual_seed(run.seed)  # same initial weights in every process and every run with this seed
    generator, discriminator, scheduler = build(args, size, data.classes)
    args = replace(args, attention_resolutions=list(generator.config.attention_resolutions))
    if run.gradient_checkpointing:
        generator.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()

    gan = GANSetup(
        generator,
        discriminator,
        scheduler,
        args.diffaug,
        args.gan_loss,
        args.instance_noise,
        args.reconstruction_weight,
        args.energy_weight,
    )
    finite_differences = args.gradient_penalty == "finite_differences"
    penalties = GradientPenalties(args.r1_gamma, args.r2_gamma, args.lazy_reg, finite_differences)
    cosine = partial(cosine_by_epoch, lowest=args.lr_min, steps_per_epoch=data.plan.steps_per_epoch)
    adam = partial(torch.optim.Adam, betas=(args.adam_beta1, args.adam_beta2), fused=True)
    networks = [
        TrainedNetwork(
            name="d",
            network=discriminator,
            objective=DiscriminatorObjective(gan, penalties),
            optimizer=adam(discriminator.parameters(), args.lr_d),
            lr_schedule=cosine,
        ),
        TrainedNetwork(
            name="g",
            network=generator,
            objective=GeneratorObjective(gan),
            optimizer=adam(generator.parameters(), args.lr_g),
            lr_schedule=cosine,
            interval=args.d_steps,
        ),
    ]

    arguments = (session.run, data_args, label_args, evaluation, args)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"A Denoising Diffusion GAN ([arXiv 2112.07804](https://arxiv.org/abs/2112.07804)) trained on "
        f"{data.name}: it generates an image of {size[0]}x{size[1]} pixels in {args.num_train_timesteps} network "
        "evaluations.",
        usage=USAGE.format(model=string_literal(run.folder_name), inputs="class_labels=[0]" if data.classes else ""),
        settings=settings_for_card(*arguments),
        dataset=data.name,
        data_license=data.license,
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
        monitor=GANBalanceMonitor(args.gan_loss),
        card=card,
        arguments=arguments,
    )
    return session.train(job, data, evaluation)


def default_attention_resolutions(heights: Iterable[int]) -> list[int]:
    """Return the largest of the heights of the feature maps that is small enough for attention, [0] for none."""
    return [height for height in heights if 0 < height <= MAX_ATTENTION_HEIGHT][:1] or [0]


def attention_resolutions(args: DDGANArguments, size: list[int]) -> list[int]:
    """Return the heights of the generator's feature maps with attention, [0] for none.

    Raises:
        ValueError: if `args` names a height that no level has, or the wavelet transform does not fit the size.
    """
    check_wavelet_levels(args.wavelet_levels, *size)
    heights = [size[0] >> args.wavelet_levels + level for level in range(len(args.block_out_channels))]
    if args.attention_resolutions is None:
        return default_attention_resolutions(heights)
    if others := [height for height in args.attention_resolutions if height not in (0, *heights)]:
        raise InputError(
            f"--attention_resolutions {others[0]}: at {size[0]}x{size[1]} pixels the feature maps of the "
            f"{len(heights)} levels (--block_out_channels) have heights {', '.join(map(str, heights))}."
        )
    return args.attention_resolutions


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
            attention_resolutions=attention_resolutions(args, size),
            latent_dim=args.latent_dim,
            latent_embed_dim=args.latent_embed_dim,
            latent_mapping_layers=args.latent_mapping_layers,
            num_class_embeds=num_class_embeds,
            id2label=dict(enumerate(classes)) if classes else None,
            dropout=args.dropout,
            wavelet_levels=args.wavelet_levels,
        )
        discriminator = DDGANDiscriminator(
            sample_size=square,
            in_channels=args.image_channels,
            base_channels=2 * args.discriminator_channels,
            block_out_channels=[multiple * args.discriminator_channels for multiple in multiples],
            down_blocks=down_blocks,
            near_zero_conv_out=args.discriminator == "small",
            num_class_embeds=num_class_embeds,
            wavelet_levels=args.wavelet_levels,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return generator, discriminator, scheduler


USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model}, trust_remote_code=True)
image = pipe({inputs}).images[0]
"""
