"""Train a class-conditional diffusion model."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from torchvision.datasets import MNIST, FashionMNIST

from .. import ClassConditionalPipeline, ClassConditionedUnet, ContextUnet
from ..core.accelerator import one_process_first
from ..core.errors import InputError
from ..core.files import location_name
from ..hub.cards import CardFacts, carry_over_license, string_literal
from ..sampling.generation import PipelineSampler, image_size
from ..sampling.loading import ddim_usage
from ..training.arguments import DataArguments, EvaluationArguments, LabelArguments, ValidationArguments
from ..training.ema import EMA
from ..training.job import TrainedNetwork, TrainingJob
from ..training.lr_schedules import lr_schedule
from ..training.model_card import FinishedRun, settings_for_card
from ..training.objectives.denoising import ClassConditionalObjective
from ..training.optimizers import adamw
from ..training.session import Session
from ..training.start_model import load_start_model, model_classes
from .arguments import (
    NETWORK_SETTINGS,
    ClassConditionalArguments,
    ClassConditionalLearningRateArguments,
    ClassConditionalRunArguments,
)

DATASETS = {"mnist": MNIST, "fashion_mnist": FashionMNIST}
NUM_TRAIN_TIMESTEPS = 1000


def train_class_conditional(
    run: ClassConditionalRunArguments,
    learning_rate: ClassConditionalLearningRateArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    evaluation: EvaluationArguments,
    validation: ValidationArguments,
    args: ClassConditionalArguments,
) -> FinishedRun:
    """Train a class-conditional network, new or pretrained, with the denoising loss and AdamW.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run)
    start = load_start(args, data_args)
    with one_process_first(session.accelerator):  # of those that download the images
        chosen_data = choose_data(args, data_args)
    size = data_args.size or [28, 28] if start is None else list(image_size(start.unet.config))
    channels = args.image_channels or 1 if start is None else start.unet.config.in_channels
    known_classes = model_classes(start) if start else None
    data = session.load_data(chosen_data, channels, size, label_args, classes=known_classes, validation=validation)
    classes = data.classes
    assert classes is not None  # images without labels raise an error
    labels, grid = session.plan_grid(classes)
    arguments = (session.run, learning_rate, data_args, label_args, evaluation, validation, args)
    settings = settings_for_card(*arguments)
    if start is None:
        torch.manual_seed(run.seed)  # same initial weights in every process and every run with this seed
        unet = build(args, size, classes)
        scheduler = DDPMScheduler(
            NUM_TRAIN_TIMESTEPS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type=args.prediction_type or "epsilon",
            timestep_spacing="trailing",  # samples in a few steps then start from noise (arXiv 2305.08891, sec. 3.3)
        )
        origin, facts = f" trained on {data.name}", {}
    else:
        assert args.start_model is not None
        unet, scheduler = start.unet, start.scheduler
        if known_classes is None:
            unet = ClassConditionedUnet.from_unet(unet, len(classes), args.class_dropout, dict(enumerate(classes)))
        origin = f": {location_name(args.start_model)}, fine-tuned on {data.name}"
        facts = {"base_model": location_name(args.start_model), **carry_over_license(args.start_model)}
        settings = {name: value for name, value in settings.items() if name not in NETWORK_SETTINGS}
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    objective = ClassConditionalObjective(
        scheduler,
        len(classes),
        args.class_dropout,
        min_snr_gamma=args.min_snr_gamma,
        timestep_sampling=args.timestep_sampling,
    )

    pipeline = ClassConditionalPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"A class-conditional diffusion model{origin}, for images of {size[0]}x{size[1]} pixels. Its "
        f"{len(classes)} classes are {', '.join(classes)}; the sample grid has one row per class.",
        usage=USAGE.format(
            model=string_literal(run.folder_name),
            name=string_literal(classes[0]),
            guidance=f"guidance_scale={args.guidance_scale}, " if args.class_dropout else "",
            scheduler=ddim_usage(pipeline, args.sample_steps),
            steps=args.sample_steps,
        ),
        settings=settings,
        dataset=data.name,
        data_license=data.license,
        tags=["ddpm", "class-conditional", *(["fine-tuned"] if start else [])],
        **facts,
    )
    job = TrainingJob(
        networks=[
            TrainedNetwork(
                network=unet,
                objective=objective,
                optimizer=adamw(unet.parameters(), learning_rate),
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
    if other and (flag := next((name for name in ("dataset", "data_dir") if getattr(args, name)), None)):
        raise InputError(
            f"--{flag} {getattr(args, flag)} and {other} both name the images to train on. Use only one of them."
        )
    if other:
        return data_args
    dataset_class = DATASETS[args.dataset or "mnist"]
    root = args.data_dir or "data"
    folder = Path(root) / dataset_class.__name__
    part = "t10k" if data_args.split == "test" else "train"
    files = [folder / "raw" / f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    if not all(file.is_file() for file in files):
        try:
            dataset_class(root, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"The images of {dataset_class.__name__} are not in {folder} (expected "
                f"{' and '.join(file.name for file in files)} in its subfolder raw), and downloading them failed: "
                f"{' '.join(str(error).split()).rstrip('.')}. Set --data_dir to the folder that contains "
                f"{dataset_class.__name__}, or name other images with --dataset_name or --train_data_dir."
            ) from error
    return replace(data_args, train_data_dir=str(folder))


def load_start(
    args: ClassConditionalArguments, data_args: DataArguments
) -> DDPMPipeline | ClassConditionalPipeline | None:
    """Return the start model; None for a new network.

    Raises:
        InputError: see `load_start_model`; or if its network is class-conditional, but no `ClassConditionedUnet`, or
            was trained with another probability of the null class; or if it generates images of other channels.
    """
    if args.start_model is None:
        return None
    start = load_start_model(
        args.start_model,
        data_args.size,
        args.prediction_type,
        allow_classes=True,
        trust_remote_code=args.trust_remote_code,
    )
    if isinstance(start, ClassConditionalPipeline):
        if not isinstance(start.unet, ClassConditionedUnet):
            raise InputError(
                f"--start_model {args.start_model} has a class-conditional {type(start.unet).__name__}: start from an "
                "unconditional UNet2DModel, or from a ClassConditionedUnet."
            )
        if start.unet.config.class_dropout != args.class_dropout:
            raise InputError(
                f"--class_dropout {args.class_dropout:g} does not fit --start_model {args.start_model}, which was "
                f"trained with {start.unet.config.class_dropout:g}: pass this value."
            )
    channels = start.unet.config.in_channels
    if args.image_channels not in (None, channels):
        raise InputError(
            f"--image_channels {args.image_channels} does not fit --start_model {args.start_model}, whose images have "
            f"{channels}."
        )
    return start


def build(args: ClassConditionalArguments, size: list[int], classes: list[str]) -> ClassConditionedUnet | ContextUnet:
    """Return a new network for images of this height and width and these classes.

    Raises:
        InputError: if the arguments do not fit together.
    """
    widths = args.block_out_channels
    channels = args.image_channels or 1
    shared = {
        "in_channels": channels,
        "out_channels": channels,
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

pipe = DiffusionPipeline.from_pretrained({model}, trust_remote_code=True)
{scheduler}
image = pipe(class_labels={name}, {guidance}num_inference_steps={steps}).images[0]
"""
