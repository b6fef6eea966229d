"""Fine-tune a pretrained diffusion pipeline into one that samples in a few steps.

The network first learns from samples of the start model (distillation), then also from a discriminator that compares
its samples with the images (adversarial training).
"""

import logging
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from .. import ClassConditionalPipeline, UNetDiscriminator
from ..core.errors import InputError
from ..core.files import location_name
from ..hub.cards import CardFacts, carry_over_license, string_literal
from ..sampling.generation import PipelineSampler, image_size
from ..training.arguments import DataArguments, EvaluationArguments, LabelArguments
from ..training.ema import EMA, half_life
from ..training.job import TrainedNetwork, TrainingJob
from ..training.loading import TrainingData
from ..training.lr_schedules import two_stage_schedule
from ..training.model_card import FinishedRun, settings_for_card
from ..training.monitors import DiscriminatorAccuracyMonitor, DiversityMonitor
from ..training.objectives.few_step import (
    DiscriminatorObjective,
    FewStepProcess,
    FewStepSetup,
    GeneratorObjective,
)
from ..training.run_folder import RunFolder
from ..training.sample_grids import save_before_after
from ..training.session import Session
from ..training.start_model import load_start_model, model_classes
from ..training.teacher import Teacher, generate_samples
from .arguments import FewStepArguments, FewStepRunArguments

logger = logging.getLogger(__name__)

DISCRIMINATOR_HEAD_START = 100  # optimizer steps of the discriminator before the first adversarial step
DDIM_STEPS = 40  # of the start model, for comparison


def finetune_few_step(
    run: FewStepRunArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    evaluation: EvaluationArguments,
    args: FewStepArguments,
) -> FinishedRun:
    """Fine-tune a pretrained UNet in two stages, distillation and adversarial training.

    Before training the start model generates samples with DDIM. In the first stage the network learns to map each
    noisy image on the way to the image that DDIM reaches from it. In the second it also learns from a discriminator, a
    copy of the start model's encoder whose training begins a little earlier; the loss of the first stage, weighted,
    keeps the variety of the samples. A run that ends with the first stage has no discriminator.

    A class-conditional network keeps its classes and its null class. The null class replaces labels as often as in the
    training of the start model (`class_dropout`), in all losses. Otherwise no loss would see it, and guidance would
    use predictions that were never trained for few steps or, in a network that now predicts v, mean something else.

    Raises:
        InputError: if something in the arguments cannot be used.
        RunError: if the run fails after it has started.
    """
    session = Session.open(run, supports_fp16=False)
    start = load_start_model(
        args.start_model,
        data_args.size,
        allow_classes=True,
        allow_few_step=False,
        trust_remote_code=args.trust_remote_code,
    )
    check_start_model(start, args)
    if label_args.label_column and not isinstance(start, ClassConditionalPipeline):
        raise InputError(
            f"--label_column {label_args.label_column}: {args.start_model} is not class-conditional, so no labels are "
            "read. Omit it."
        )
    start.scheduler.register_to_config(timestep_spacing="trailing")  # DDIM starts from noise alone, as training does
    unet = start.unet
    pipeline = type(start)(unet, few_step_scheduler(start.scheduler, args.num_inference_steps))
    for pipe in (start, pipeline):
        pipe.set_progress_bar_config(disable=True)
    data = session.load_data(
        data_args,
        unet.config.in_channels,
        image_size(unet.config),
        label_args if isinstance(start, ClassConditionalPipeline) else None,
        classes=model_classes(start),
    )
    labels, grid = session.plan_grid(data.classes)
    total_steps = data.total_steps(run)
    distillation_steps = min(args.distillation_steps, total_steps)
    check_length(run, data, distillation_steps)

    discriminator = None
    if total_steps > distillation_steps:
        torch.manual_seed(run.seed)  # the same initial heads in every process and every run with this seed
        discriminator = UNetDiscriminator.from_unet(unet)
    if run.gradient_checkpointing:
        for network in filter(None, (unet, discriminator)):
            network.enable_gradient_checkpointing()

    process = FewStepProcess(pipeline.scheduler, args.num_inference_steps)
    setup = FewStepSetup(unet, discriminator, process, args.instance_noise)
    if isinstance(start, ClassConditionalPipeline) and start.has_null_class:
        setup.null_class, setup.class_dropout = start.num_classes, unet.config.class_dropout
    objective = GeneratorObjective(setup, distillation_steps, args.distillation_weight)
    adam = partial(torch.optim.Adam, betas=(0.5, 0.99), fused=True)
    networks = [
        TrainedNetwork(
            name="g",
            network=unet,
            objective=objective,
            optimizer=adam(unet.parameters(), args.lr_g),
            lr_schedule=partial(
                two_stage_schedule, first_stage=distillation_steps, first_peak=args.distillation_lr / args.lr_g
            ),
        )
    ]
    if discriminator:
        networks.insert(
            0,
            TrainedNetwork(
                name="d",
                network=discriminator,
                objective=DiscriminatorObjective(setup, args.gamma),
                optimizer=adam(discriminator.parameters(), args.lr_d),
                lr_schedule=two_stage_schedule,
                first_step=max(0, distillation_steps - DISCRIMINATOR_HEAD_START),
            ),
        )

    teacher_process = FewStepProcess(start.scheduler, args.num_inference_steps)
    teacher = Teacher(start, teacher_process, args.teacher_steps, args.teacher_guidance_scale)
    samplers, captions = compared_samples(args.num_inference_steps, start, pipeline)

    def prepare(folder: RunFolder) -> None:
        if distillation_steps or args.distillation_weight:
            objective.teacher = generate_samples(
                teacher, args.teacher_samples, run.seed, folder.teacher, session.accelerator
            )

    def finish(folder: RunFolder, step: int) -> None:
        save_before_after(folder, step, *captions)
        folder.teacher.unlink(missing_ok=True)

    arguments = (session.run, data_args, label_args, evaluation, args)
    job = TrainingJob(
        networks=networks,
        pipeline=pipeline,
        ema=EMA(unet, run),
        **samplers,
        labels=labels,
        grid=grid,
        prepare=prepare,
        finish=finish,
        last_stage=distillation_steps if discriminator else 0,
        monitor=DiscriminatorAccuracyMonitor(),
        evaluation_monitor=DiversityMonitor(),
        card=describe(args, start, data, arguments, discriminator is not None, *captions),
        arguments=arguments,
    )
    return session.train(job, data, evaluation)


def check_start_model(start: DiffusionPipeline, args: FewStepArguments) -> None:
    """Check that a start model has what the arguments ask for.

    Raises:
        InputError: if not.
    """
    timesteps, steps = start.scheduler.config.num_train_timesteps, max(args.num_inference_steps)
    if steps > timesteps:
        raise InputError(
            f"--num_inference_steps {steps}: the noise process of {args.start_model} has only {timesteps} timesteps."
        )
    scheduler = few_step_scheduler(start.scheduler, args.num_inference_steps)
    for count in args.num_inference_steps:
        scheduler.set_timesteps(count)
        if scheduler.timesteps.min() < 0:  # a rounding error of Diffusers
            raise InputError(
                f"--num_inference_steps {count}: DDPMScheduler cannot space {count} of {timesteps} timesteps "
                "evenly. Use another number."
            )
    if args.teacher_steps > timesteps:
        raise InputError(
            f"--teacher_steps is {args.teacher_steps}; it must be at most {timesteps}, the timesteps of the noise "
            f"process of {args.start_model}."
        )
    if start.scheduler.config.prediction_type == "epsilon" and not args.distillation_steps:
        raise InputError(
            f"--distillation_steps is 0, but the network of {args.start_model} predicts the noise, from which images "
            "cannot be computed accurately at high noise levels. In these steps it learns to predict v instead: use a "
            "few hundred."
        )
    if args.teacher_guidance_scale != 1 and not (isinstance(start, ClassConditionalPipeline) and start.has_null_class):
        raise InputError(
            f"--teacher_guidance_scale {args.teacher_guidance_scale:g} needs a class-conditional model with a null "
            f"class (class_dropout above 0 in the config of its network), but {args.start_model} has none. Leave the "
            "flag out."
        )


def few_step_scheduler(scheduler: DDPMScheduler, step_counts: list[int]) -> DDPMScheduler:
    """Return a scheduler that takes exact posterior steps between the trailing timesteps of a noise process.

    Its network predicts v if that of the start model predicts the noise.
    """
    predicts_noise = scheduler.config.prediction_type == "epsilon"
    config = dict(
        scheduler.config,
        prediction_type="v_prediction" if predicts_noise else scheduler.config.prediction_type,
        timestep_spacing="trailing",
        variance_type="fixed_small",
        clip_sample=False,
        thresholding=False,
    )
    few_step = DDPMScheduler.from_config(config)
    assert isinstance(few_step, DDPMScheduler)
    # Diffusers keeps private keys of a config, and does not warn about them
    few_step.register_to_config(_num_inference_steps=step_counts)
    return few_step


def check_length(run: FewStepRunArguments, data: TrainingData, distillation_steps: int) -> None:
    """Check that the images fill a batch of the adversarial stage, and that the EMA fits into the last stage.

    Raises:
        InputError: if not.
    """
    plan, total_steps = data.plan, data.total_steps(run)
    adversarial_steps = total_steps - distillation_steps
    if adversarial_steps and plan.num_images is not None and plan.num_images < plan.global_batch_size:
        raise InputError(
            f"{data.name} has {plan.num_images} images, fewer than the {plan.global_batch_size} of one optimizer step "
            "(--batch_size x --grad_accumulation_steps x processes). A discriminator that sees every image in every "
            "step memorizes them: use more images or a smaller --batch_size."
        )
    if not adversarial_steps:
        logger.warning(
            f"The run has {total_steps} optimizer steps, so it ends with the first stage (--distillation_steps): it "
            "has no discriminator and learns nothing from the training images. For adversarial training set a larger "
            "--max_train_steps."
        )
    last_stage = adversarial_steps or distillation_steps
    steps = half_life(run, total_steps)
    if steps > last_stage:
        raise InputError(
            f"The EMA weights would have a half-life of {steps:.0f} optimizer steps (--ema_decay {run.ema_decay}, "
            f"--ema_inv_gamma {run.ema_inv_gamma}, --ema_power {run.ema_power}), but the last stage of the run has "
            f"only {last_stage} steps, so it would hardly change the saved network. Train for more steps, or use a "
            f"shorter average: --ema_decay {0.5 ** (10 / last_stage):.3g} has a half-life of a tenth of them."
        )


def compared_samples(
    step_counts: list[int], start: DiffusionPipeline, trained: DiffusionPipeline
) -> tuple[dict[str, Any], tuple[dict[str, str], dict[str, str]]]:
    """Return how to sample, and which grids before_after.png shows.

    Those are, from the same seeds, the start model with many and with each number of DDIM steps, and the result with
    each number of posterior steps. The pipelines share their network, which at step 0 is that of the start model.

    Args:
        step_counts: numbers of steps, the default first.
        start: the start model.
        trained: the pipeline that is trained and saved.

    Returns:
        the samplers of a `TrainingJob`, and the names of the grids before and after training by caption.
    """
    ddim_steps = min(DDIM_STEPS, start.scheduler.config.num_train_timesteps)
    names = {count: f"{count}-steps" for count in step_counts} | {step_counts[0]: ""}
    before = {"ddim": PipelineSampler("ddim", ddim_steps)}
    before |= {name: PipelineSampler("ddim", count) for count, name in names.items()}
    after = {name: PipelineSampler("as-saved", count) for count, name in names.items()}
    samplers = {
        "sampler": after[""],
        "start_samplers": {name: partial(sampler, start) for name, sampler in before.items()},
        "final_samplers": {name: partial(sampler, trained) for name, sampler in after.items()},
    }
    captions = {"1 step" if count == 1 else f"{count} steps": names[count] for count in step_counts}
    return samplers, ({f"{ddim_steps} DDIM steps": "ddim"} | captions, captions)


def describe(
    args: FewStepArguments,
    start: DiffusionPipeline,
    data: TrainingData,
    arguments: tuple,
    adversarial: bool,
    before: dict[str, str],
    after: dict[str, str],
) -> CardFacts:
    """Return the facts for the model card of a run.

    Args:
        arguments: all its arguments, those of the run first.
        adversarial: whether it has an adversarial stage.
        before, after: the names of the grids before and after training by number of steps; see `compared_samples`.
    """
    run, steps = arguments[0], args.num_inference_steps[0]
    evaluations = "one network evaluation" if steps == 1 else f"{steps} network evaluations"
    kind, classes, tags = "An unconditional", "", ["ddpm", "fine-tuned", "few-step"]
    model = location_name(args.start_model)
    origin = f"distilled from {model}" + (
        f", and fine-tuned on {data.name} with a discriminator" if adversarial else ""
    )
    usage = UNCONDITIONAL_USAGE.format(model=string_literal(run.folder_name), steps=steps)
    if isinstance(start, ClassConditionalPipeline):
        names = data.classes or []
        kind, tags = "A class-conditional", [*tags, "class-conditional"]
        classes = f" Its {len(names)} classes are {', '.join(names)}; the sample grid has one row per class."
        label = string_literal(names[0]) if start.labels else 0
        usage = CLASS_USAGE.format(model=string_literal(run.folder_name), label=label, steps=steps)
    return CardFacts(
        title=run.model_save_name,
        summary=f"{kind} diffusion model that generates an image in {evaluations}: {origin}. It was trained for "
        f"{_listed(args.num_inference_steps)} sampling steps.{classes}",
        usage=usage,
        settings=settings_for_card(*arguments),
        base_model=location_name(args.start_model),
        dataset=data.name,
        data_license=data.license,
        tags=tags,
        grids_before={name: f"The start model in {steps}, from the same seeds." for steps, name in before.items()},
        grids_after={name: f"In {steps}, from the same seeds." for steps, name in after.items() if name},
        **carry_over_license(args.start_model),
    )


def _listed(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


UNCONDITIONAL_USAGE = """
from diffusers import DDPMPipeline

pipe = DDPMPipeline.from_pretrained({model})
image = pipe(num_inference_steps={steps}).images[0]
"""

CLASS_USAGE = """
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({model}, trust_remote_code=True)
image = pipe(class_labels={label}, num_inference_steps={steps}).images[0]
"""
