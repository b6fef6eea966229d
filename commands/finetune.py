"""Fine-tune a pretrained unconditional diffusion pipeline."""

from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel

from ..core.errors import InputError
from ..core.files import location_name
from ..hub.cards import CardFacts, carry_over_license, string_literal
from ..sampling.generation import PipelineSampler, image_size
from ..sampling.loading import ddim_usage
from ..training.arguments import (
    DataArguments,
    EvaluationArguments,
    LearningRateArguments,
    RunArguments,
    ValidationArguments,
)
from ..training.ema import EMA
from ..training.job import TrainedNetwork, TrainingJob
from ..training.lr_schedules import lr_schedule
from ..training.model_card import FinishedRun, settings_for_card
from ..training.objectives.denoising import DenoisingObjective
from ..training.optimizers import adamw
from ..training.sample_grids import save_before_after
from ..training.session import Session
from ..training.start_model import load_start_model, new_model
from .arguments import TRAINED_PARTS, FinetuneArguments


def finetune(
    run: RunArguments,
    learning_rate: LearningRateArguments,
    data_args: DataArguments,
    evaluation: EvaluationArguments,
    validation: ValidationArguments,
    args: FinetuneArguments,
) -> FinishedRun:
    """Fine-tune a pretrained UNet, or train a new one, on images with the denoising loss and AdamW.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run, supports_fsdp=not learning_rate.use_8bit_adam)
    if args.model_config:
        torch.manual_seed(run.seed)  # same initial weights in every process and every run with this seed
        pipeline = new_model(args.model_config, data_args.size, args.prediction_type)
        facts: dict[str, Any] = {"tags": ["ddpm"]}
    else:
        assert args.start_model is not None
        pipeline = load_start_model(
            args.start_model, data_args.size, args.prediction_type, trust_remote_code=args.trust_remote_code
        )
        facts = {"tags": ["ddpm", "fine-tuned"], "base_model": location_name(args.start_model)}
        facts |= carry_over_license(args.start_model)
        facts["grids_before"] = {"": "The start model, from the same seeds."}
    unet = pipeline.unet
    data = session.load_data(data_args, unet.config.in_channels, image_size(unet.config), validation=validation)
    trained_parameters = freeze(unet, args)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    arguments = (run, learning_rate, data_args, evaluation, validation, args)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"An unconditional diffusion model trained from scratch on {data.name}."
        if args.start_model is None
        else f"An unconditional diffusion model: {location_name(args.start_model)}, fine-tuned on {data.name}.",
        usage=USAGE.format(
            model=string_literal(run.folder_name),
            scheduler=ddim_usage(pipeline, args.sample_steps),
            steps=args.sample_steps,
        ),
        settings=settings_for_card(*arguments),
        dataset=data.name,
        data_license=data.license,
        **facts,
    )
    job = TrainingJob(
        networks=[
            TrainedNetwork(
                network=unet,
                objective=DenoisingObjective(pipeline.scheduler, args.min_snr_gamma),
                optimizer=adamw(trained_parameters, learning_rate),
                lr_schedule=partial(lr_schedule, args=learning_rate),
            )
        ],
        pipeline=pipeline,
        ema=EMA(unet, run),
        sampler=PipelineSampler(args.sample_scheduler, args.sample_steps),
        finish=save_before_after,
        card=card,
        arguments=arguments,
    )
    return session.train(job, data, evaluation)


def freeze(unet: UNet2DModel, args: FinetuneArguments) -> list[torch.nn.Parameter]:
    """Freeze a part of the UNet and return the remaining trainable parameters.

    Raises:
        InputError: if there are none.
    """
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED_PARTS[args.freeze]))
    trained_parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if not trained_parameters:
        raise InputError(
            f"--freeze {args.freeze} leaves nothing to train: the UNet of {args.start_model or args.model_config} has "
            "no such part."
        )
    return trained_parameters


USAGE = """
from diffusers import DDIMScheduler, DDPMPipeline

pipe = DDPMPipeline.from_pretrained({model})
{scheduler}
image = pipe(num_inference_steps={steps}).images[0]
"""
