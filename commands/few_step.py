"""Fine-tune a pretrained diffusion pipeline into one that samples in a few steps."""

import json
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .. import ClassConditionalPipeline, UNetDiscriminator
from ..core.errors import InputError
from ..core.files import location_name
from ..hub.cards import CardFacts, license_of
from ..sampling.generation import PipelineSampler
from ..training.arguments import DataArguments, EvaluationArguments, LabelArguments
from ..training.ema import EMA, half_life
from ..training.job import TrainedNetwork, TrainingJob
from ..training.loading import TrainingData
from ..training.model_card import FinishedRun, settings_for_card
from ..training.monitors import DiscriminatorAccuracyMonitor, DiversityMonitor
from ..training.objectives.few_step import (
    DiscriminatorObjective,
    FewStepProcess,
    FewStepSetup,
    GeneratorObjective,
)
from ..training.sample_grids import save_before_after
from ..training.session import Session
from ..training.start_model import TrainedUNet, class_names, image_size, load_start_model
from .arguments import CONVERSION_STEPS, FewStepArguments, FewStepRunArguments

WARMUP_STEPS = 20  # of the learning rates
DDIM_STEPS = 40  # of the start model, for comparison


def finetune_few_step(
    run: FewStepRunArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    evaluation: EvaluationArguments,
    args: FewStepArguments,
) -> FinishedRun:
    """Fine-tune a pretrained UNet with a discriminator built from its encoder.

    A class-conditional network keeps its classes and its null class. The null class replaces labels as often as in the
    training of the start model (`class_dropout`), in both networks. Otherwise no loss would see it: guidance would use
    predictions of a network that was never trained for few steps, or, after a conversion, that mean something else.

    Raises:
        InputError: if something in the arguments cannot be used.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run, supports_fp16=False)
    size = data_args.resolution or ([data_args.image_size] * 2 if data_args.image_size else None)
    start = load_start_model(args.start_model, size, allow_classes=True, trust_remote_code=args.trust_remote_code)
    unet = start.unet
    scheduler = few_step_scheduler(start.scheduler, args)
    data = session.load_data(
        data_args,
        unet.config.in_channels,
        image_size(unet),
        label_args if isinstance(start, ClassConditionalPipeline) else None,
        classes=class_names(start),
    )
    labels, grid = session.plan_grid(data.classes)
    conversion_steps = args.conversion_steps
    if conversion_steps is None:
        conversion_steps = CONVERSION_STEPS if start.scheduler.config.prediction_type == "epsilon" else 0
    check_length(run, data, conversion_steps)
    remove_learned_variance(unet)
    torch.manual_seed(run.seed)  # the same initial heads in every process and every run with this seed
    discriminator = UNetDiscriminator.from_unet(unet)
    if run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        discriminator.enable_gradient_checkpointing()

    process = FewStepProcess(scheduler, args.num_inference_steps)
    setup = FewStepSetup(unet, discriminator, process, instance_noise=args.instance_noise)
    if isinstance(start, ClassConditionalPipeline) and start.has_null_class:
        setup.null_class, setup.class_dropout = start.num_classes, unet.config.class_dropout
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

    arguments = (session.run, data_args, label_args, evaluation, args)
    pipeline = type(start)(unet, scheduler)
    unconverted = type(start)(unet, few_step_scheduler(start.scheduler, args, convert=False))
    for pipe in (start, unconverted, pipeline):
        pipe.set_progress_bar_config(disable=True)
    job = TrainingJob(
        networks=networks,
        pipeline=pipeline,
        ema=EMA(unet, run),
        **compared_samples(args.num_inference_steps, start, unconverted, pipeline),
        labels=labels,
        grid=grid,
        monitor=DiscriminatorAccuracyMonitor(),
        evaluation_monitor=DiversityMonitor(),
        card=describe(args, start, data, arguments),
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


def check_length(run: FewStepRunArguments, data: TrainingData, conversion_steps: int) -> None:
    """Check that the images fill a batch, and that the conversion and the EMA fit into the run.

    Raises:
        InputError: if not.
    """
    plan, total_steps = data.plan, data.total_steps(run)
    if plan.num_images is not None and plan.num_images < plan.global_batch_size:
        raise InputError(
            f"{data.name} has {plan.num_images} images, fewer than the {plan.global_batch_size} of one optimizer step "
            "(--batch_size x --grad_accumulation_steps x processes). A discriminator that sees every image in every "
            "step memorizes them: use more images or a smaller --batch_size."
        )
    adversarial_steps = total_steps - conversion_steps
    if adversarial_steps < 1:
        raise InputError(
            f"The run has {total_steps} optimizer steps, but the first {conversion_steps} (--conversion_steps) "
            "convert the network to v-prediction, so none are left to train it for few sampling steps. Train longer "
            "with --max_train_steps or --num_epochs."
        )
    steps = half_life(run, total_steps)
    if steps > adversarial_steps:
        raise InputError(
            f"The EMA weights would have a half-life of {steps:.0f} optimizer steps (--ema_decay {run.ema_decay}, "
            f"--ema_inv_gamma {run.ema_inv_gamma}, --ema_power {run.ema_power}), but only {adversarial_steps} steps "
            "train for few sampling steps, so the saved network would hardly change. Train for more steps, or use a "
            f"shorter average: --ema_decay {0.5 ** (10 / adversarial_steps):.3g} has a half-life of a tenth of them."
        )


def remove_learned_variance(unet: TrainedUNet) -> None:
    """Keep only the output channels that predict the image: the variance of posterior steps is known."""
    channels = unet.config.in_channels
    if unet.config.out_channels == channels:
        return
    conv_out = (unet if isinstance(unet, UNet2DModel) else unet.unet).conv_out
    conv_out.out_channels = channels
    for name, parameter in list(conv_out.named_parameters()):
        setattr(conv_out, name, torch.nn.Parameter(parameter.detach()[:channels].clone()))
    unet.register_to_config(out_channels=channels)


def compared_samples(
    step_counts: list[int], start: DiffusionPipeline, unconverted: DiffusionPipeline, trained: DiffusionPipeline
) -> dict[str, Any]:
    """Return how to sample, and which grids before_after.png shows, as arguments of a `TrainingJob`.

    Those are, from the same seeds, the start model with many DDIM steps, and the start model and the result with each
    number of posterior steps. The three pipelines share their network, which at step 0 is that of the start model.

    Args:
        step_counts: numbers of steps, the default first.
        start: the start model with its own scheduler.
        unconverted: the start model with posterior steps.
        trained: the pipeline that is trained and saved.
    """
    ddim_steps = min(DDIM_STEPS, start.scheduler.config.num_train_timesteps)
    names = {count: f"{count}-steps" for count in step_counts} | {step_counts[0]: ""}
    samplers = {names[count]: PipelineSampler("as-saved", count) for count in step_counts}
    captions = {"1 step" if count == 1 else f"{count} steps": names[count] for count in step_counts}
    return {
        "sampler": samplers[""],
        "start_samplers": {
            "ddim": partial(PipelineSampler("ddim", ddim_steps), start),
            **{name: partial(sampler, unconverted) for name, sampler in samplers.items()},
        },
        "final_samplers": {name: partial(sampler, trained) for name, sampler in samplers.items()},
        "finish": partial(save_before_after, before={f"{ddim_steps} DDIM steps": "ddim", **captions}, after=captions),
    }


def describe(args: FewStepArguments, start: DiffusionPipeline, data: TrainingData, arguments: tuple) -> CardFacts:
    """Return the facts for the model card of a run; `arguments` are all its arguments, those of the run first."""
    run, steps = arguments[0], args.num_inference_steps[0]
    evaluations = "one network evaluation" if steps == 1 else f"{steps} network evaluations"
    kind, classes, tags = "An unconditional", "", ["ddpm", "fine-tuned", "few-step"]
    usage = UNCONDITIONAL_USAGE.format(model=run.folder_name, steps=steps)
    if isinstance(start, ClassConditionalPipeline):
        names = data.classes or []
        kind, tags = "A class-conditional", [*tags, "class-conditional"]
        classes = f" Its {len(names)} classes are {', '.join(names)}; the sample grid has one row per class."
        label = json.dumps(names[0], ensure_ascii=False) if start.labels else 0
        usage = CLASS_USAGE.format(model=run.folder_name, label=label, steps=steps)
    return CardFacts(
        title=run.model_save_name,
        summary=f"{kind} diffusion model that generates an image in {evaluations}: "
        f"{location_name(args.start_model)}, fine-tuned on {data.name} with a discriminator. It was trained for "
        f"{' or '.join(map(str, args.num_inference_steps))} sampling steps.{classes}",
        usage=usage,
        settings=settings_for_card(*arguments),
        base_model=args.start_model,
        dataset=data.name,
        tags=tags,
        **license_of(args.start_model),
    )


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


UNCONDITIONAL_USAGE = """
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained("{model}")
image = pipe(num_inference_steps={steps}).images[0]
"""

CLASS_USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", trust_remote_code=True)
image = pipe(class_labels={label}, num_inference_steps={steps}).images[0]
"""
