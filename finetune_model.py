"""Fine-tune a pretrained unconditional diffusion pipeline on your own images.

    accelerate launch finetune_model.py --start_model google/ddpm-celebahq-256 --dataset_name \
        Norod78/Vintage-Faces-FFHQAligned --image_size 128 --batch_size 8 --grad_accumulation_steps 2 --num_epochs 16

Where no model, data or --config is named it is the demo: examples/demo.yaml, the embedded model and images.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from ddgan.core.cli import option, parse_arguments, require_above, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import replace_file
from ddgan.data.images import CHANNEL_MODES
from ddgan.data.preprocessing import Preprocessing
from ddgan.hub.cards import CardFacts, license_of
from ddgan.sampling.generation import PipelineSampler
from ddgan.sampling.grids import before_after
from ddgan.sampling.loading import SCHEDULERS, load_pipeline
from ddgan.training.arguments import DataArguments, EvaluationArguments, LearningRateArguments, RunArguments
from ddgan.training.evaluator import open_evaluator
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.loading import TrainingData
from ddgan.training.loop import Trainer, prepare_accelerator
from ddgan.training.lr_schedules import schedule
from ddgan.training.model_card import repository_for, settings_for_card
from ddgan.training.objectives.denoising import DenoisingObjective

EXAMPLES = Path(__file__).parent / "examples"
EMBEDDED_MODEL = EXAMPLES / "models" / "noto-emoji-32"

# flags that say what to train from or on, or how; a command without any of them is the demo
NOT_THE_DEMO = {"--config", "--start_model", "--dataset_name", "--train_data_dir"}

# the parameters that each choice of --freeze leaves to be trained, by parts of their names
TRAINED_PARTS = {
    "none": ("",),
    "all_but_attention": ("attentions.",),
    "all_but_norms": ("norm",),
    "all_but_up_blocks": ("up_blocks.", "conv_norm_out", "conv_out"),
}


@dataclass
class FinetuneArguments:
    """What is fine-tuned, and towards which loss."""

    _argument_group_name = "fine-tuning"

    start_model: str = option(
        str(EMBEDDED_MODEL), "pipeline folder or Hub repository of an unconditional UNet2DModel to start from"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "what the network predicts (default: what the start model predicts)"
    )
    min_snr_gamma: float | None = option(None, "weigh the loss by min(SNR, gamma); 5 is usual (default: no weights)")
    freeze: Literal[tuple(TRAINED_PARTS)] = option("none", "train only this part of the UNet and keep the rest")
    sample_scheduler: Literal[tuple(SCHEDULERS)] = option("ddim", "scheduler for the grids of samples")
    sample_steps: int = option(40, "network evaluations for a sample in those grids")

    def __post_init__(self):
        require_at_least(1, self, "sample_steps")
        require_above(0, self, "min_snr_gamma")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.split("=")[0] in NOT_THE_DEMO for flag in argv):
        argv = ["--config", str(EXAMPLES / "demo.yaml"), *argv]
    kinds = (RunArguments, LearningRateArguments, DataArguments, EvaluationArguments, FinetuneArguments)
    arguments = parse_arguments(*kinds, argv=argv)
    run, rate, data_args, eval_args, args = arguments
    accelerator = prepare_accelerator(run)
    repo_id = repository_for(run) if run.push_to_hub and accelerator.is_main_process else None

    pipeline = load_start_model(args, data_args)
    unet = pipeline.unet
    height, width = picture_size(unet)
    preprocessing = Preprocessing(unet.config.in_channels, height, width, data_args.center_crop, data_args.random_flip)
    data = TrainingData(
        data_args,
        preprocessing,
        accelerator.process_index,
        batch_size=run.batch_size,
        accumulation=run.grad_accumulation_steps,
        processes=accelerator.num_processes,
        seed=run.seed,
    )
    parts = TRAINED_PARTS[args.freeze]
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(
            f"--freeze {args.freeze} leaves nothing to train: the UNet of {args.start_model} has no such part."
        )
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained, lr=rate.learning_rate, fused=True)

    name = model_name(args.start_model)
    card = CardFacts(
        title=run.model_save_name,
        summary=f"An unconditional diffusion model: {name}, fine-tuned on {data.name}.",
        usage=USAGE.format(model=Path(run.output_dir).resolve().name, steps=args.sample_steps),
        settings=settings_for_card(*arguments),
        base_model=args.start_model,
        dataset=data.name,
        tags=["ddpm", "fine-tuned"],
        **license_of(args.start_model),
    )
    objective = DenoisingObjective(pipeline.scheduler, args.min_snr_gamma)
    player = TrainedNetwork("", unet, objective, optimizer, partial(schedule, args=rate))
    sampler = PipelineSampler(args.sample_scheduler, args.sample_steps)
    evaluator = open_evaluator(eval_args, run, data, accelerator)
    job = TrainingJob([player], pipeline, unet, sampler, card, arguments)
    trainer = Trainer(job, data, run, accelerator, repo_id, evaluator)
    trainer.run()
    if accelerator.is_main_process:
        grids = [trainer.sample_path(step) for step in (0, trainer.step)]
        if grids[0].exists():
            before, after = map(Image.open, grids)
            if before.size == after.size:  # else --num_samples has changed
                replace_file(Path(run.output_dir) / "before_after.png", before_after(before, after).save)
        trainer.finish()


def load_start_model(args: FinetuneArguments, data_args: DataArguments) -> DDPMPipeline:
    """The pipeline to start from, with the noise process that is trained, at the size that is asked for.

    Raises:
        InputError: if it is not found, is of another kind, or its UNet cannot take the size.
    """
    found = load_pipeline(args.start_model)
    unet = getattr(found, "unet", None)
    if (
        not isinstance(unet, UNet2DModel)
        or set(found.components) != {"unet", "scheduler"}
        or DDPMScheduler not in found.scheduler.compatibles
    ):
        raise InputError(
            f"--start_model {args.start_model} is a {type(found).__name__} with the parts "
            f"{', '.join(f'{name} ({type(part).__name__})' for name, part in found.components.items())}. Fine-tuning "
            "takes a pipeline of pixels with an unconditional UNet2DModel and a scheduler of DDPM's kind, such as "
            "google/ddpm-celebahq-256."
        )
    if unet.class_embedding is not None:
        raise InputError(
            f"The UNet of {args.start_model} is told a class. Fine-tuning takes one that draws without; "
            "train_class_conditional.py trains one by class from the start."
        )
    if unet.config.in_channels not in CHANNEL_MODES:
        raise InputError(
            f"The UNet of {args.start_model} takes {unet.config.in_channels} channels; images have 1 to 4."
        )
    size = data_args.resolution or ([data_args.image_size] * 2 if data_args.image_size else None)
    if size:
        factor = 2 ** (len(unet.config.block_out_channels) - 1)
        if any(side < factor or side % factor for side in size):
            lower = [max(factor, side // factor * factor) for side in size]
            upper = [low + factor for low in lower]
            raise InputError(
                f"The UNet of {args.start_model} halves its input {len(unet.config.block_out_channels) - 1} times, so "
                f"height and width must be multiples of {factor}; {size[0]} x {size[1]} is not. The nearest it can "
                f"take are {lower[0]} x {lower[1]} and {upper[0]} x {upper[1]}."
            )
        unet.register_to_config(sample_size=size[0] if size[0] == size[1] else list(size))
    if unet.config.sample_size is None:
        raise InputError(f"The UNet of {args.start_model} does not say its size; say it with --image_size.")
    unet.register_to_config(_name_or_path=model_name(args.start_model))  # not where it lies on this machine
    scheduler = DDPMScheduler.from_config(found.scheduler.config)
    if args.prediction_type:
        scheduler.register_to_config(prediction_type=args.prediction_type)
    return DDPMPipeline(unet, scheduler)


def model_name(model: str) -> str:
    """How a model is called: a repository by its id, a folder by its own name."""
    return Path(model).resolve().name if Path(model).exists() else model


def picture_size(unet: UNet2DModel) -> tuple[int, int]:
    """Height and width of the pictures that a UNet makes."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


USAGE = """
from diffusers import DDIMScheduler, DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{model}")
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
image = pipe(num_inference_steps={steps}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
