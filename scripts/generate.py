"""Generate images with a pipeline from a folder or the Hub, one PNG file per seed.

    python scripts/generate.py --pipeline google/ddpm-cifar10-32 --num_images 64 --scheduler ddim --grid
    accelerate launch scripts/generate.py --pipeline google/ddpm-cifar10-32 --num_images 50000 --output_dir cifar
    python scripts/generate.py --pipeline examples/models/noto-emoji-32 --color "#BB2266" --guidance_scale 100 --grid

Image i depends only on the seed `--seed` + i, so any number of processes writes the same files, and running an
interrupted command again resumes it. The batch size and the number of threads change the order in which floating-point
numbers are summed, so images are generated in fixed groups of consecutive seeds: on a CPU 16 at 32x32 and fewer if
they are larger, on an accelerator `--batch_size`. A group is computed as a whole even if only some of its images are
missing. On a CPU each group takes one thread, and all cores work on different groups; `OMP_NUM_THREADS` limits their
number. On an accelerator guided images are reproducible only up to rounding, because some kernels sum gradients in a
nondeterministic order.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ddgan import CLIPLoss, ColorLoss, GuidanceLoss, GuidedPipeline
from ddgan.core.accelerator import start_accelerate
from ddgan.core.cli import option, parse_arguments
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import replace_file
from ddgan.core.locks import locked
from ddgan.core.threads import one_thread_per_operation, run_in_threads
from ddgan.guidance.registry import (
    CLIP_MODEL_HELP,
    TOWARDS_HELP,
    clip_model_names,
    includes_clip,
    parse_loss,
    sum_losses,
)
from ddgan.sampling.arguments import SamplingArguments
from ddgan.sampling.generation import class_names, parse_class_labels
from ddgan.sampling.grids import image_grid, steps_strip
from ddgan.sampling.groups import GroupSampler, group_size, split_into_groups
from ddgan.sampling.loading import pipeline_hash, with_scheduler
from ddgan.sampling.steps import trained_steps
from ddgan.sampling.traces import check_traceable, intermediates

SETTINGS = "generate.json"
GRID_IMAGES = 64
DEFAULT_GUIDANCE_SCALE = 40.0


@dataclass
class GenerateArguments(SamplingArguments):
    """The pipeline, how to sample it, and the output folder."""

    output_dir: str = option("generated", "folder for images/, grid.png, intermediates.png and generate.json")
    num_images: int = option(16, "total number of images; a higher number adds to existing images", minimum=1)
    batch_size: int = option(
        16, "images per batch on an accelerator; on a CPU it depends on the image size only", minimum=1
    )
    class_labels: list[str] | None = option(
        None, "classes of the images, used in turn, by label or by name: --class_labels 0 1 Sandal"
    )
    grid: bool = option(False, f"arrange the first {GRID_IMAGES} images in grid.png")
    intermediates: int | None = option(
        None, "show this many denoising steps of the first image in intermediates.png", minimum=1
    )
    color: str | None = option(None, "guide towards a color: '#BB2266', teal")
    clip_prompt: list[str] | None = option(None, "guide towards one or more texts with a CLIP model")
    towards: list[str] | None = option(None, TOWARDS_HELP)
    clip_model: list[str] | None = option(None, CLIP_MODEL_HELP)
    guidance_scale: float | None = option(
        None,
        "guidance scale of --color, --clip_prompt and --towards; larger images need a larger one (default: "
        f"{DEFAULT_GUIDANCE_SCALE:g}). Without these, classifier-free guidance towards --class_labels",
    )
    guidance_gradient: Literal["sample", "model"] | None = option(
        None, "model: differentiate through the network too, which takes more time and memory (default: sample)"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.pipeline:
            raise InputError("Pass a pipeline folder or Hub repository with --pipeline.")
        if self.clip_prompt or self.towards:
            self.clip_model = clip_model_names(self.clip_model)
        elif self.clip_model:
            raise InputError("--clip_model needs a --clip_prompt, or a CLIP loss in --towards.")
        if self.is_guided:
            self.guidance_scale = DEFAULT_GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale
            self.guidance_gradient = self.guidance_gradient or "sample"
        elif self.guidance_gradient or (self.guidance_scale is not None and not self.class_labels):
            raise InputError(
                "Guidance needs a target: pass --color, --clip_prompt or --towards, or for classifier-free guidance "
                "--class_labels."
            )

    @property
    def is_guided(self) -> bool:
        return bool(self.color or self.clip_prompt or self.towards)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(GenerateArguments, argv=argv)
    accelerator = start_accelerate()
    with locked(Path(args.output_dir), accelerator), one_thread_per_operation(accelerator.device) as threads:
        generate_images(args, accelerator, threads)


def generate_images(args: GenerateArguments, accelerator: Accelerator, threads: int) -> None:
    """Generate the images that are missing in the output folder, in this number of threads."""
    guidance = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    loss = guidance_loss(args, accelerator.device) if args.is_guided else None
    if loss:
        guidance |= {"loss": loss, "gradient": args.guidance_gradient}
    pipe = args.load(accelerator.device)
    if args.class_labels:
        args.class_labels = parse_class_labels(args.class_labels, class_names(getattr(pipe, "unet", None)))
    size = group_size(pipe, args.batch_size)
    if loss and includes_clip(loss) and accelerator.device.type == "cpu":
        size = 1  # the CLIP model takes most of the time, and much memory for each image
    num_inference_steps = args.num_inference_steps or next(iter(trained_steps(pipe)), None)
    output = Path(args.output_dir)
    settings = {
        "pipeline": args.pipeline,
        "contents": pipeline_hash(pipe),
        "scheduler": args.scheduler,
        "num_inference_steps": num_inference_steps,
        "class_labels": args.class_labels,
        "seed": args.seed,
        "dtype": args.dtype,
        "device": accelerator.device.type,
        "images_at_once": size,
        "color": args.color,
        "clip_prompt": args.clip_prompt,
        "towards": args.towards,
        "clip_model": args.clip_model,
        "guidance_scale": args.guidance_scale,
        "guidance_gradient": args.guidance_gradient,
    }
    check_settings(output, settings)
    pipe = with_scheduler(pipe, args.scheduler, args.num_inference_steps)
    if args.is_guided:
        try:
            pipe = GuidedPipeline.from_pipe(pipe)
        except ValueError as error:
            raise InputError(str(error)) from error
        pipe.set_progress_bar_config(disable=True)
    elif isinstance(pipe, GuidedPipeline):
        raise InputError("A GuidedPipeline needs a target: --color, --clip_prompt or --towards.")
    if args.intermediates:
        check_traceable(pipe)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_file(output / SETTINGS, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))

    sampler = GroupSampler(pipe, size, args.seed, num_inference_steps, args.class_labels, guidance)

    def generate(indices: list[int]) -> int:
        for i, image in zip(indices, sampler(indices), strict=True):
            replace_file(image_path(output, i), image.save)
        return len(indices)

    groups = split_into_groups(args.num_images, size, sampler.offset)
    shard = groups[accelerator.process_index :: accelerator.num_processes]
    missing = [[i for i in group if not is_complete(image_path(output, i))] for group in shard]
    total, count = sum(map(len, shard)), sum(map(len, missing))
    progress = tqdm(total=total, initial=total - count, unit="image", disable=not accelerator.is_main_process)
    started = time.perf_counter()
    with progress, logging_redirect_tqdm():  # warnings are printed above the progress bar
        run_in_threads(generate, filter(None, missing), threads, progress.update)

    accelerator.wait_for_everyone()
    rate = sum(gather_object([count])) / (time.perf_counter() - started)
    if accelerator.is_main_process:
        print(f"{args.num_images} images: {output / 'images'}" + (f" ({rate:.3g} images per second)" if rate else ""))
        if args.grid:
            first_images = [Image.open(image_path(output, i)) for i in range(min(args.num_images, GRID_IMAGES))]
            replace_file(output / "grid.png", image_grid(first_images).save)
            print(f"grid: {output / 'grid.png'}")
        if args.intermediates:
            steps = (args.intermediates, num_inference_steps)
            trace = intermediates(pipe, args.seed, *steps, sampler.class_label(0), **guidance)
            replace_file(output / "intermediates.png", steps_strip(*trace).save)
            print(f"denoising steps of the first image: {output / 'intermediates.png'}")
    accelerator.end_training()


def guidance_loss(args: GenerateArguments, device: torch.device) -> GuidanceLoss:
    losses: list[GuidanceLoss] = [ColorLoss(args.color)] if args.color else []
    if args.clip_prompt:
        assert args.clip_model is not None
        losses.append(CLIPLoss(args.clip_prompt, *args.clip_model, device=device))
    losses += [parse_loss(text, args.clip_model, device) for text in args.towards or []]
    return sum_losses(losses)


def image_path(output: Path, i: int) -> Path:
    return output / "images" / f"{i:06d}.png"


def is_complete(path: Path) -> bool:
    """Return whether an image exists and matches its checksums."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # Pillow's errors for a damaged file
        return False
    return True


def check_settings(output: Path, settings: dict) -> None:
    """Check that existing images were generated with the same settings.

    Raises:
        InputError: if the settings of the images in the folder are different, unknown or cannot be read.
    """
    if not (output / SETTINGS).exists():
        if (output / "images").exists():
            raise InputError(
                f"{output / 'images'} already exists, but there is no {SETTINGS} with the settings of its images. "
                "Choose another --output_dir."
            )
        return
    try:
        existing = dict(json.loads((output / SETTINGS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{output / SETTINGS} is damaged, so the settings of the images beside it are unknown ({error}). Choose "
            "another --output_dir."
        ) from error
    changes = [
        f"{name} was {existing.get(name)}, is {value}"
        for name, value in settings.items()
        if existing.get(name) != value
    ]
    if changes:
        raise InputError(
            f"The images in {output} were generated with other settings ({'; '.join(changes)}). Choose another "
            "--output_dir, or use the same settings to add to them."
        )


if __name__ == "__main__":
    run_command(main)
