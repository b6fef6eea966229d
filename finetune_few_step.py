"""Fine-tune a pretrained diffusion pipeline into one that samples in a few steps.

    accelerate launch finetune_few_step.py --start_model google/ddpm-celebahq-256 --train_data_dir path/to/images \
        --num_inference_steps 4 --output_dir my-4-step-model

The result is a plain `DDPMPipeline` that samples with the exact posterior steps of `DDPMScheduler`.
From Python, call `finetune_few_step`.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ddgan import UNetDiscriminator
from ddgan.core.cli import option, parse_arguments, require_above, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import location_name, replace_file
from ddgan.hub.cards import CardFacts, license_of
from ddgan.sampling.generation import PipelineSampler
from ddgan.sampling.grids import image_grid
from ddgan.training.arguments import DataArguments, EvaluationArguments, RunArguments
from ddgan.training.ema import EMA
from ddgan.training.job import TrainedNetwork, TrainingJob
from ddgan.training.model_card import FinishedRun, print_summary, settings_for_card
from ddgan.training.monitors import DiscriminatorAccuracyMonitor
from ddgan.training.objectives.few_step import (
    DiscriminatorObjective,
    FewStepProcess,
    FewStepSetup,
    GeneratorObjective,
)
from ddgan.training.run_folder import RunFolder
from ddgan.training.sample_grids import save_before_after
from ddgan.training.session import Session
from ddgan.training.start_model import image_size, load_start_model

CONVERSION_STEPS = 500  # for networks that predict the noise
WARMUP_STEPS = 20  # of the learning rates


@dataclass
class FewStepArguments:
    """The model to fine-tune, its number of sampling steps, and the losses."""

    _argument_group_name = "few steps"

    start_model: str = option("", "pipeline folder or Hub repository of an unconditional UNet2DModel to start from")
    trust_remote_code: bool = option(False, "run Python code that comes with that pipeline")
    num_inference_steps: list[int] = field(
        default_factory=lambda: [4],
        metadata={
            "help": "sampling steps; several numbers train one model for each of them, the first is its default"
        },
    )
    lr_g: float = option(1e-4, "learning rate of the network (Adam with betas 0.5 and 0.9)")
    lr_d: float = option(2e-4, "learning rate of the discriminator")
    gamma: float = option(0.1, "weight of the gradient penalties R1 and R2; 0 turns them off")
    reconstruction_weight: float = option(0.5, "weight of the distance to the training image behind a noisy one")
    instance_noise: float = option(0.5, "probability of noise on the clean images that the discriminator sees")
    conversion_steps: int | None = option(
        None,
        "first optimizer steps, in which a network that predicts the noise learns to predict v (default: "
        f"{CONVERSION_STEPS} if it does)",
    )
    conversion_lr: float = option(1e-3, "peak learning rate of these steps")

    def __post_init__(self):
        if not self.start_model:
            raise InputError("Name the pipeline to start from with --start_model.")
        if not self.num_inference_steps:
            raise InputError("--num_inference_steps needs at least one number.")
        require_at_least(1, self, "num_inference_steps")
        require_at_least(0, self, "gamma", "reconstruction_weight", "instance_noise", "conversion_steps")
        require_above(0, self, "lr_g", "lr_d", "conversion_lr")
        if self.instance_noise > 1:
            raise InputError(f"--instance_noise is {self.instance_noise}; a probability is at most 1.")


@dataclass
class FewStepRunArguments(RunArguments):
    """The training run: its length, what it logs and what it saves."""

    _default_output_dir: ClassVar = "few-step-model"

    max_grad_norm: float = option(0.0, "clip gradients to this norm; 0 turns clipping off")


def main(argv: list[str] | None = None) -> None:
    kinds = (FewStepRunArguments, DataArguments, EvaluationArguments, FewStepArguments)
    print_summary(finetune_few_step(*parse_arguments(*kinds, argv=argv)))


def finetune_few_step(
    run: FewStepRunArguments, data_args: DataArguments, evaluation: EvaluationArguments, args: FewStepArguments
) -> FinishedRun:
    """Fine-tune a pretrained UNet with a discriminator built from its encoder.

    Raises:
        InputError: if something in the arguments cannot be used.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run)
    size = data_args.resolution or ([data_args.image_size] * 2 if data_args.image_size else None)
    start = load_start_model(args.start_model, size, trust_remote_code=args.trust_remote_code)
    unet, steps = start.unet, args.num_inference_steps[0]
    data = session.load_data(data_args, unet.config.in_channels, image_size(unet))
    remove_learned_variance(unet)
    scheduler = few_step_scheduler(start.scheduler, args)
    save_start_grid(session, DDPMPipeline(unet, few_step_scheduler(start.scheduler, args, convert=False)), steps)
    predicts_noise = start.scheduler.config.prediction_type == "epsilon"
    conversion_steps = args.conversion_steps
    if conversion_steps is None:
        conversion_steps = CONVERSION_STEPS if predicts_noise else 0
    torch.manual_seed(run.seed)  # the same initial heads in every process and every run with this seed
    discriminator = UNetDiscriminator.from_unet(unet)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()

    process = FewStepProcess(scheduler, args.num_inference_steps)
    setup = FewStepSetup(unet, discriminator, process, instance_noise=args.instance_noise)
    adam = partial(torch.optim.Adam, betas=(0.5, 0.9), fused=True)
    networks = [
        TrainedNetwork(
            name="d",
            network=discriminator,
            objective=DiscriminatorObjective(setup, args.gamma),
            optimizer=adam(discriminator.parameters(), args.lr_d),
            lr_schedule=conversion_schedule,
        ),
        TrainedNetwork(
            name="g",
            network=unet,
            objective=GeneratorObjective(setup, args.reconstruction_weight, conversion_steps),
            optimizer=adam(unet.parameters(), args.lr_g),
            lr_schedule=partial(
                conversion_schedule, conversion_steps=conversion_steps, peak=args.conversion_lr / args.lr_g
            ),
        ),
    ]

    arguments = (run, data_args, evaluation, args)
    evaluations = "one network evaluation" if steps == 1 else f"{steps} network evaluations"
    card = CardFacts(
        title=run.model_save_name,
        summary=f"An unconditional diffusion model that generates an image in {evaluations}: "
        f"{location_name(args.start_model)}, fine-tuned on {data.name} with a discriminator. It was trained for "
        f"{' or '.join(map(str, args.num_inference_steps))} sampling steps.",
        usage=USAGE.format(model=run.folder_name, steps=steps),
        settings=settings_for_card(*arguments),
        base_model=args.start_model,
        dataset=data.name,
        tags=["ddpm", "fine-tuned", "few-step"],
        **license_of(args.start_model),
    )
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    job = TrainingJob(
        networks=networks,
        pipeline=pipeline,
        ema=EMA(unet, run),
        sampler=PipelineSampler("as-saved", steps),
        finish=save_before_after,
        monitor=DiscriminatorAccuracyMonitor(),
        card=card,
        arguments=arguments,
    )
    return session.train(job, data, evaluation)


def few_step_scheduler(scheduler: DDPMScheduler, args: FewStepArguments, convert: bool = True) -> DDPMScheduler:
    """Return a scheduler that takes exact posterior steps between the trailing timesteps of a noise process.

    Args:
        convert: whether a network that predicts the noise is converted to predict v.

    Raises:
        InputError: if the process has fewer timesteps than there are steps.
    """
    timesteps, prediction_type = scheduler.config.num_train_timesteps, scheduler.config.prediction_type
    if max(args.num_inference_steps) > timesteps:
        raise InputError(
            f"--num_inference_steps {max(args.num_inference_steps)}: the noise process of {args.start_model} has only "
            f"{timesteps} timesteps."
        )
    if convert and prediction_type == "epsilon":
        prediction_type = "v_prediction"
    config = dict(
        scheduler.config,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        variance_type="fixed_small",
        clip_sample=False,
        thresholding=False,
    )
    few_step = DDPMScheduler.from_config(config)
    assert isinstance(few_step, DDPMScheduler)
    # Diffusers keeps private keys of a config, and does not warn about them
    few_step.register_to_config(_num_inference_steps=args.num_inference_steps)
    return few_step


def remove_learned_variance(unet: UNet2DModel) -> None:
    """Keep only the output channels that predict the image: the variance of posterior steps is known."""
    channels = unet.config.in_channels
    if unet.config.out_channels == channels:
        return
    conv_out = unet.conv_out
    conv_out.out_channels = channels
    for name, parameter in list(conv_out.named_parameters()):
        setattr(conv_out, name, torch.nn.Parameter(parameter.detach()[:channels].clone()))
    unet.register_to_config(out_channels=channels)


def save_start_grid(session: Session, pipeline: DDPMPipeline, steps: int) -> None:
    """Save the grid of step 0 before the network is converted, since its output then means something else."""
    run, accelerator = session.run, session.accelerator
    path = RunFolder(run.output_dir).grid(0)
    if accelerator.is_main_process and not path.exists():
        pipeline.to(accelerator.device)
        pipeline.unet.eval()
        sampler, images = PipelineSampler("as-saved", steps), []
        for start in range(0, run.num_samples, run.batch_size):
            indices = range(start, min(start + run.batch_size, run.num_samples))
            images += sampler(pipeline, [run.seed + index for index in indices], None)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, image_grid(images).save)
    accelerator.wait_for_everyone()


def conversion_schedule(
    optimizer: Optimizer, total_steps: int, conversion_steps: int = 0, peak: float = 1.0
) -> LambdaLR:
    """Return a constant schedule after a short warmup, and before it one for the conversion: a warmup and a decay.

    Args:
        peak: of the conversion, as a multiple of the optimizer's learning rate.
    """

    def factor(step: int) -> float:
        if step < conversion_steps:
            return peak * min(1, (step + 1) / WARMUP_STEPS, 2 * (conversion_steps - step) / conversion_steps)
        return min(1, (step - conversion_steps + 1) / WARMUP_STEPS)

    return LambdaLR(optimizer, factor)


USAGE = """
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{model}")
image = pipe(num_inference_steps={steps}).images[0]
"""


if __name__ == "__main__":
    run_command(main)
