"""Fine-tune a pretrained unconditional diffusion pipeline on your own images.

    accelerate launch finetune_model.py --start_model google/ddpm-celebahq-256 --dataset_name \
        Norod78/Vintage-Faces-FFHQAligned --image_size 128 --batch_size 8 --grad_accumulation_steps 2 --num_epochs 16

Without a model, data or --config it runs the demo: examples/demo.yaml, with the embedded model and images.
From Python, call `finetune`.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DModel

from ddgan.core.cli import Arguments, option, parse_arguments
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import location_name
from ddgan.hub.cards import CardFacts, license_of
from ddgan.sampling.generation import PipelineSampler
from ddgan.sampling.loading import SCHEDULERS, ddim_usage
from ddgan.training.arguments import DataArguments, EvaluationArguments, LearningRateArguments, RunArguments
from ddgan.training.ema import EMA
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.lr_schedules import lr_schedule
from ddgan.training.model_card import FinishedRun, print_summary, settings_for_card
from ddgan.training.objectives.denoising import DenoisingObjective
from ddgan.training.sample_grids import save_before_after
from ddgan.training.session import Session
from ddgan.training.start_model import image_size, load_start_model

EXAMPLES = Path(__file__).parent / "examples"
EMBEDDED_MODEL = EXAMPLES / "models" / "noto-emoji-32"

# flags that name a model, data or settings; a command without any of them runs the demo
NOT_THE_DEMO = {"--config", "--start_model", "--dataset_name", "--train_data_dir"}

# --freeze choice -> substrings of the names of the parameters that are still trained
TRAINED_PARTS = {
    "none": ("",),
    "all_but_attention": ("attentions.",),
    "all_but_norms": ("norm",),
    "all_but_up_blocks": ("up_blocks.", "conv_norm_out", "conv_out"),
}


@dataclass
class FinetuneArguments(Arguments):
    """The model to fine-tune, and the loss."""

    _argument_group_name = "fine-tuning"

    start_model: str = option(
        str(EMBEDDED_MODEL), "pipeline folder or Hub repository of an unconditional UNet2DModel to start from"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with that pipeline")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "what the network predicts (default: same as the start model)"
    )
    min_snr_gamma: float | None = option(
        None, "weight the loss by min(SNR, gamma); 5 is common (default: no weighting)", above=0
    )
    freeze: str = option("none", "which part of the UNet to freeze", choices=TRAINED_PARTS)
    sample_scheduler: str = option("ddim", "scheduler for the sample grids", choices=SCHEDULERS)
    sample_steps: int = option(40, "sampling steps for these grids", minimum=1)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] in NOT_THE_DEMO for flag in argv):
        argv = ["--config", str(EXAMPLES / "demo.yaml"), *argv]
    kinds = (RunArguments, LearningRateArguments, DataArguments, EvaluationArguments, FinetuneArguments)
    print_summary(finetune(*parse_arguments(*kinds, argv=argv)))


def finetune(
    run: RunArguments,
    learning_rate: LearningRateArguments,
    data_args: DataArguments,
    evaluation: EvaluationArguments,
    args: FinetuneArguments,
) -> FinishedRun:
    """Fine-tune a pretrained UNet on images with the denoising loss and AdamW.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run, supports_fsdp=True)
    size = data_args.resolution or ([data_args.image_size] * 2 if data_args.image_size else None)
    pipeline = load_start_model(args.start_model, size, args.prediction_type, trust_remote_code=args.trust_remote_code)
    unet = pipeline.unet
    data = session.load_data(data_args, unet.config.in_channels, image_size(unet))
    trained_parameters = freeze(unet, args)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    arguments = (run, learning_rate, data_args, evaluation, args)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"An unconditional diffusion model: {location_name(args.start_model)}, fine-tuned on {data.name}.",
        usage=USAGE.format(
            model=run.folder_name, scheduler=ddim_usage(pipeline, args.sample_steps), steps=args.sample_steps
        ),
        settings=settings_for_card(*arguments),
        base_model=args.start_model,
        dataset=data.name,
        tags=["ddpm", "fine-tuned"],
        **license_of(args.start_model),
    )
    job = TrainingJob(
        networks=[
            TrainedNetwork(
                network=unet,
                objective=DenoisingObjective(pipeline.scheduler, args.min_snr_gamma),
                optimizer=torch.optim.AdamW(trained_parameters, lr=learning_rate.learning_rate, fused=True),
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
            f"--freeze {args.freeze} leaves nothing to train: the UNet of {args.start_model} has no such part."
        )
    return trained_parameters


USAGE = """
from diffusers import DDIMScheduler, DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{model}")
{scheduler}
image = pipe(num_inference_steps={steps}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
