"""Pull a pipeline's pictures towards a sum of losses, and see what that did: a grid, the losses, the scale schedules.

    python examples/guided_sampling.py
    python examples/guided_sampling.py --towards color:teal "0.5*symmetry" --guidance_scale 10 --gradient model
    python examples/guided_sampling.py --pipeline google/ddpm-celebahq-256 --towards "clip:a smiling old man" \
      --guidance_scale 4

Each of `--towards` is a loss, perhaps with a weight before it and what it takes after it: color:#BB2266,
clip:<sentence>, clip_picture:<picture>, saturation:<0 to 1>, total_variation, symmetry, reference:<picture>.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

from ddgan import (
    CLIPLoss,
    ColorLoss,
    GuidanceLoss,
    GuidedPipeline,
    ReferenceLoss,
    SaturationLoss,
    SymmetryLoss,
    TotalVariationLoss,
)
from ddgan.core.cli import option, parse_arguments, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.guidance.clip import DEFAULT_MODEL
from ddgan.pipelines.pipeline_guided import DEFAULT_STEPS, SCALE_SCHEDULES
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler

EMBEDDED = Path(__file__).parent / "models" / "noto-emoji-32"
LOSSES = {
    "color": ColorLoss,
    "saturation": lambda target: SaturationLoss(float(target)),
    "total_variation": TotalVariationLoss,
    "symmetry": SymmetryLoss,
    "reference": lambda path: ReferenceLoss(Image.open(path)),
}


@dataclass
class Arguments:
    """What is sampled, and what it is pulled towards."""

    pipeline: str = option(str(EMBEDDED), "pipeline folder or Hub repository")
    towards: list[str] = option(None, "losses, each weight*name:what (default: color:#BB2266)")
    clip_model: list[str] | None = option(
        None,
        "what clip and clip_picture see with: Hub id or folder of a model of Transformers, or of open_clip "
        f"hf-hub:<id>, or the name of an architecture and its pretrained tag (default: {DEFAULT_MODEL})",
    )
    guidance_scale: float = option(40.0, "how strongly they pull; larger pictures need more")
    gradient: Literal["sample", "model"] = option("sample", "through the prediction of x_0, or the network too")
    scale_schedule: Literal[tuple(SCALE_SCHEDULES)] = option("constant", "how the scale goes with the noise level")
    guidance_start: float = option(0.0, "share of the steps before which none is guided")
    guidance_end: float = option(1.0, "share of the steps after which none is guided")
    max_grad_norm: float | None = option(None, "each image's gradient is scaled down to this norm")
    scheduler: Literal["as-saved", *SCHEDULERS] = option("ddim", "scheduler to sample with")
    num_inference_steps: int | None = option(None, "network evaluations for a picture (default: 40)")
    class_labels: list[str] | None = option(
        None, "class of each picture, used in turn, by number or by name: --class_labels 0 1 Sandal"
    )
    num_images: int = option(8, "pictures, of the seeds from 0 on")
    output_dir: str = option("guided", "folder for grid.png, losses.png and schedules.png")

    def __post_init__(self):
        require_at_least(1, self, "num_inference_steps", "num_images")
        self.towards = self.towards or ["color:#BB2266"]
        self.clip_model = self.clip_model or [DEFAULT_MODEL]
        if len(self.clip_model) > 2:
            raise InputError(
                f"--clip_model {' '.join(self.clip_model)}: it takes one name, or an architecture of open_clip and "
                "its pretrained tag."
            )
        if self.class_labels:
            labels = [int(label) if label.isdecimal() else label for label in self.class_labels]
            self.class_labels = [labels[i % len(labels)] for i in range(self.num_images)]


def parse_loss(text: str, clip_model: list[str]) -> GuidanceLoss:
    weight, star, loss = text.partition("*")
    if not star or ":" in weight:  # a star within a sentence
        star, loss = "", text
    name, colon, what = loss.partition(":")
    losses = {
        **LOSSES,
        "clip": lambda prompt: CLIPLoss(prompt, *clip_model),
        "clip_picture": lambda path: CLIPLoss(Image.open(path), *clip_model),
    }
    if name not in losses:
        raise InputError(f"--towards {text}: there is no loss {name}. There are {', '.join(losses)}.")
    try:
        loss = losses[name](what) if colon else losses[name]()
        return float(weight) * loss if star else loss
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"--towards {text}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(Arguments, argv=argv)
    losses = [parse_loss(text, args.clip_model) for text in args.towards]
    loss = sum(losses[1:], start=losses[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = with_scheduler(load_pipeline(args.pipeline, device=device), args.scheduler)
    try:
        draw(GuidedPipeline.from_pipe(pipe), loss, args)
    except ValueError as error:
        raise InputError(str(error)) from error


def draw(pipe: GuidedPipeline, loss: GuidanceLoss, args: Arguments) -> None:
    steps = args.num_inference_steps or min(DEFAULT_STEPS, pipe.scheduler.config.num_train_timesteps)
    if round(args.guidance_start * steps) >= round(args.guidance_end * steps):
        raise InputError(
            f"--guidance_start {args.guidance_start:g} and --guidance_end {args.guidance_end:g}: of {steps} steps "
            "none is guided then. Give shares of the steps, the start below the end: 0 and 1 guide all."
        )
    rows = []
    for scale in (0.0, args.guidance_scale):
        output = pipe(
            loss,
            scale,
            batch_size=args.num_images,
            num_inference_steps=args.num_inference_steps,
            gradient=args.gradient,
            scale_schedule=args.scale_schedule,
            guidance_start=args.guidance_start,
            guidance_end=args.guidance_end,
            max_grad_norm=args.max_grad_norm,
            class_labels=args.class_labels,
            generator=[torch.Generator().manual_seed(seed) for seed in range(args.num_images)],
        )
        rows += output.images
        print(f"scale {scale:g}: mean loss at the last guided step {last_loss(output.guidance_losses):.4f}")

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    image_grid(rows, args.num_images, row_labels=("free", "guided")).save(folder / "grid.png")
    output.plot_losses().savefig(folder / "losses.png")
    pipe.plot_scale_schedules(args.num_inference_steps).savefig(folder / "schedules.png")
    print(f"pictures: {folder / 'grid.png'}, {folder / 'losses.png'}, {folder / 'schedules.png'}")


def last_loss(losses: torch.Tensor) -> float:
    """Of the steps, those that were not guided have no loss."""
    of_steps = losses.mean(1)
    return of_steps[~of_steps.isnan()][-1].item()


if __name__ == "__main__":
    run_command(main)
