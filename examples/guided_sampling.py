"""Guide a pipeline by a sum of losses and show the effect: image grid, losses, scale schedules.

    python examples/guided_sampling.py
    python examples/guided_sampling.py --towards color:teal "0.5*symmetry" --guidance_scale 10 --gradient model
    python examples/guided_sampling.py --pipeline google/ddpm-celebahq-256 --towards "clip:a smiling old man" \
      --guidance_scale 4

Each value of `--towards` is a loss, optionally with a weight in front and an argument behind: color:#BB2266,
clip:<sentence>, clip_image:<image>, saturation:<0 to 1>, total_variation, symmetry, reference:<image>.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ddgan import GuidanceLoss, GuidedPipeline
from ddgan.core import cli
from ddgan.core.cli import option, parse_arguments
from ddgan.core.errors import InputError, run_command
from ddgan.guidance.arguments import (
    CLIP_MODEL_HELP,
    MAX_GUIDANCE_SCALE,
    TOWARDS_HELP,
    clip_model_names,
    default_guidance_scale,
)
from ddgan.guidance.registry import parse_loss, sum_losses
from ddgan.pipelines.pipeline_guided import DEFAULT_STEPS, SCALE_SCHEDULES
from ddgan.sampling.generation import class_names, parse_class_labels
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler
from ddgan.sampling.steps import default_gradient, trained_steps

EMBEDDED_MODEL = Path(__file__).parent / "models" / "noto-emoji-32"
DEFAULT_LOSS = "color:#BB2266"


@dataclass
class Arguments(cli.Arguments):
    """The pipeline, the guidance, and the output folder."""

    pipeline: str = option(str(EMBEDDED_MODEL), "pipeline folder or Hub repository")
    towards: list[str] | None = option(None, f"{TOWARDS_HELP} (default: {DEFAULT_LOSS})")
    clip_model: list[str] | None = option(None, CLIP_MODEL_HELP)
    guidance_scale: float | None = option(
        None,
        "guidance scale; larger images need a larger one, and a negative one guides away from the target (default: "
        f"{default_guidance_scale(1):g} / number of steps)",
        minimum=-MAX_GUIDANCE_SCALE,
        maximum=MAX_GUIDANCE_SCALE,
    )
    gradient: Literal["sample", "model"] | None = option(
        None,
        "model: differentiate through the network too (default: model for a few-step pipeline, otherwise sample)",
    )
    scale_schedule: str = option(
        "constant", "factor of the guidance scale as a function of the noise level", choices=SCALE_SCHEDULES
    )
    guidance_start: float = option(0.0, "fraction of the steps at which guidance starts", minimum=0, maximum=1)
    guidance_end: float = option(1.0, "fraction of the steps at which guidance ends", minimum=0, maximum=1)
    max_grad_norm: float | None = option(None, "maximum norm of each image's gradient", above=0)
    scheduler: str = option("ddim", "scheduler to sample with", choices=["as-saved", *SCHEDULERS])
    num_inference_steps: int | None = option(
        None, f"denoising steps (default: as trained for a few-step pipeline, otherwise {DEFAULT_STEPS})", minimum=1
    )
    class_labels: list[str] | None = option(
        None, "classes of the images, used in turn, by label or by name: --class_labels 0 1 Sandal"
    )
    num_images: int = option(8, "number of images, with seeds from 0", minimum=1)
    output_dir: str = option("guided", "folder for grid.png, losses.png and schedules.png")

    def __post_init__(self):
        super().__post_init__()
        self.towards = self.towards or [DEFAULT_LOSS]
        self.clip_model = clip_model_names(self.clip_model)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(Arguments, argv=argv)
    loss = sum_losses([parse_loss(text, args.clip_model) for text in args.towards])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = with_scheduler(load_pipeline(args.pipeline, device=device), args.scheduler, args.num_inference_steps)
    if args.class_labels:
        labels = parse_class_labels(args.class_labels, class_names(getattr(pipe, "unet", None)))
        args.class_labels = [labels[i % len(labels)] for i in range(args.num_images)]
    try:
        compare(GuidedPipeline.from_pipe(pipe), loss, args)
    except ValueError as error:
        raise InputError(str(error)) from error


def compare(pipe: GuidedPipeline, loss: GuidanceLoss, args: Arguments) -> None:
    """Generate the same seeds without and with guidance, and save the comparison."""
    steps = args.num_inference_steps
    if steps is None:
        steps, *_ = trained_steps(pipe) or [min(DEFAULT_STEPS, pipe.scheduler.config.num_train_timesteps)]
    if round(args.guidance_start * steps) >= round(args.guidance_end * steps):
        raise InputError(
            f"--guidance_start {args.guidance_start:g} and --guidance_end {args.guidance_end:g}: of {steps} steps "
            "none is guided. Pass fractions of the steps with start below end; 0 and 1 guide all steps."
        )
    images = []
    for scale in (0.0, default_guidance_scale(steps) if args.guidance_scale is None else args.guidance_scale):
        output = pipe(
            loss,
            scale,
            batch_size=args.num_images,
            num_inference_steps=args.num_inference_steps,
            gradient=args.gradient or default_gradient(pipe),
            scale_schedule=args.scale_schedule,
            guidance_start=args.guidance_start,
            guidance_end=args.guidance_end,
            max_grad_norm=args.max_grad_norm,
            class_labels=args.class_labels,
            generator=[torch.Generator().manual_seed(seed) for seed in range(args.num_images)],
        )
        images += output.images
        print(f"scale {scale:g}: mean loss at the last guided step {last_loss(output.guidance_losses):.4f}")

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    image_grid(images, args.num_images, row_labels=("unguided", "guided")).save(folder / "grid.png")
    output.plot_losses().savefig(folder / "losses.png")
    pipe.plot_scale_schedules(args.num_inference_steps).savefig(folder / "schedules.png")
    print(f"images: {folder / 'grid.png'}, {folder / 'losses.png'}, {folder / 'schedules.png'}")


def last_loss(losses: torch.Tensor) -> float:
    """Return the mean loss of the last guided step; the losses of unguided steps are NaN."""
    step_losses = losses.mean(1)
    return step_losses[~step_losses.isnan()][-1].item()


if __name__ == "__main__":
    run_command(main)
