"""Sample any pipeline folder or Hub repository into a folder of PNG files, one for each seed.

    python scripts/generate.py --pipeline google/ddpm-cifar10-32 --num_images 64 --scheduler ddim --grid
    accelerate launch scripts/generate.py --pipeline google/ddpm-cifar10-32 --num_images 50000 --output_dir cifar
    python scripts/generate.py --pipeline examples/models/noto-emoji-32 --color "#BB2266" --guidance_scale 100 --grid

Picture i is drawn from the seed `--seed` + i alone: the same files come out of any number of processes, and the same
command goes on where an interrupted one stopped. On a CPU each process draws picture by picture on one thread, because
the size of a batch and the number of threads change the order in which floating point numbers are summed: start as
many processes as there are cores. On an accelerator whole batches are drawn, the last one filled up; guided pictures
repeat themselves there up to the rounding of gradients, whose sums some kernels make in no fixed order.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ddgan import CLIPLoss, ColorLoss, GuidanceLoss, GuidedPipeline
from ddgan.core.cli import option, parse_arguments, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import replace_file
from ddgan.guidance.clip import DEFAULT_MODEL
from ddgan.sampling.generation import sample, sample_in_full_batches
from ddgan.sampling.grids import image_grid, steps_strip
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, pipeline_hash, with_scheduler
from ddgan.sampling.traces import intermediates

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = "generate.json"
GRID_IMAGES = 64


@dataclass
class GenerateArguments:
    """What is sampled, how, and where the pictures go."""

    pipeline: str | None = option(None, "pipeline folder or Hub repository")
    output_dir: str = option("generated", "folder for images/, grid.png, intermediates.png and generate.json")
    num_images: int = option(16, "pictures in all; a higher number adds to those that are there")
    batch_size: int = option(16, "pictures that an accelerator draws at once; on a CPU it is always one")
    seed: int = option(0, "seed of the first picture; the next ones follow it")
    scheduler: Literal["as-saved", *SCHEDULERS] = option("as-saved", "scheduler to sample with")
    num_inference_steps: int | None = option(
        None, "network evaluations for a picture (default: all of a DDPM's, 50 of others', or the pipeline's own)"
    )
    dtype: Literal[tuple(DTYPES)] = option("fp32", "number format of the network")
    class_labels: list[str] | None = option(
        None, "class of each picture, used in turn, by number or by name: --class_labels 0 1 Sandal"
    )
    trust_remote_code: bool = option(False, "run Python code that the pipeline brings along")
    grid: bool = option(False, f"lay the first {GRID_IMAGES} pictures out in grid.png")
    intermediates: int | None = option(
        None, "show this many steps on the way to the first picture in intermediates.png"
    )
    color: str | None = option(None, "pull the pictures towards a colour: '#BB2266', teal")
    clip_prompt: list[str] | None = option(None, "pull the pictures towards one sentence or several, by a CLIP model")
    clip_model: list[str] | None = option(
        None,
        "that model: Hub id or folder of one of Transformers, or of open_clip hf-hub:<id>, or the name of an "
        f"architecture and its pretrained tag (default: {DEFAULT_MODEL})",
    )
    guidance_scale: float | None = option(
        None,
        "how strongly --color and --clip_prompt pull; larger pictures need more (default: 40); without these, "
        "classifier-free guidance towards --class_labels",
    )
    guidance_gradient: Literal["sample", "model"] | None = option(
        None, "model: differentiate through the network too, for the time and memory that takes (default: sample)"
    )

    def __post_init__(self):
        if not self.pipeline:
            raise InputError("Name what to sample: --pipeline takes a pipeline folder or a repository on the Hub.")
        require_at_least(1, self, "num_images", "batch_size", "num_inference_steps", "intermediates")
        if self.class_labels:
            self.class_labels = [int(label) if label.isdecimal() else label for label in self.class_labels]
        if self.clip_model and (not self.clip_prompt or len(self.clip_model) > 2):
            raise InputError(
                f"--clip_model {' '.join(self.clip_model)}: it goes with a --clip_prompt, and takes one name, or an "
                "architecture of open_clip and its pretrained tag."
            )
        if self.is_guided:
            self.guidance_scale = 40.0 if self.guidance_scale is None else self.guidance_scale
            self.guidance_gradient = self.guidance_gradient or "sample"
            if self.clip_prompt:
                self.clip_model = self.clip_model or [DEFAULT_MODEL]
        elif (self.guidance_scale is not None and not self.class_labels) or self.guidance_gradient:
            raise InputError("Guidance towards what? --color, --clip_prompt or --class_labels say it.")

    @property
    def is_guided(self) -> bool:
        return bool(self.color or self.clip_prompt)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(GenerateArguments, argv=argv)
    accelerator = Accelerator()
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    at_once = 1 if on_cpu else args.batch_size

    guidance = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    if args.is_guided:
        loss = guidance_loss(args, accelerator.device)
        guidance = {"loss": loss, "guidance_scale": args.guidance_scale, "gradient": args.guidance_gradient}
    pipe = load_pipeline(args.pipeline, DTYPES[args.dtype], args.trust_remote_code, accelerator.device)
    output = Path(args.output_dir)
    settings = {
        "pipeline": args.pipeline,
        "contents": pipeline_hash(pipe),
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
        "class_labels": args.class_labels,
        "seed": args.seed,
        "dtype": args.dtype,
        "device": accelerator.device.type,
        "images_at_once": at_once,
        "color": args.color,
        "clip_prompt": args.clip_prompt,
        "clip_model": args.clip_model,
        "guidance_scale": args.guidance_scale,
        "guidance_gradient": args.guidance_gradient,
    }
    check_settings(output, settings)
    pipe = with_scheduler(pipe, args.scheduler)
    if args.is_guided:
        try:
            pipe = GuidedPipeline.from_pipe(pipe)
        except ValueError as error:
            raise InputError(str(error)) from error
        pipe.set_progress_bar_config(disable=True)
    elif isinstance(pipe, GuidedPipeline):
        raise InputError("This pipeline is a guided one: --color or --clip_prompt says towards what.")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        replace_file(output / SETTINGS, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))

    def label(i: int) -> int | str | None:
        return args.class_labels[i % len(args.class_labels)] if args.class_labels else None

    def draw(numbers: list[int]) -> list[Image.Image]:
        labels = [label(i) for i in numbers] if args.class_labels else None
        return sample(pipe, [args.seed + i for i in numbers], args.num_inference_steps, labels, **guidance)

    mine = range(accelerator.process_index, args.num_images, accelerator.num_processes)
    missing = [i for i in mine if not image_path(output, i).exists()]
    progress = tqdm(
        total=len(mine), initial=len(mine) - len(missing), unit="image", disable=not accelerator.is_main_process
    )
    for start in range(0, len(missing), at_once):
        batch = missing[start : start + at_once]
        for i, picture in zip(batch, sample_in_full_batches(draw, batch, at_once), strict=True):
            replace_file(image_path(output, i), picture.save)
        progress.update(len(batch))
    progress.close()

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{args.num_images} pictures: {output / 'images'}")
        if args.grid:
            first = [Image.open(image_path(output, i)) for i in range(min(args.num_images, GRID_IMAGES))]
            replace_file(output / "grid.png", image_grid(first).save)
            print(f"grid: {output / 'grid.png'}")
        if args.intermediates:
            steps = (args.intermediates, args.num_inference_steps)
            way = intermediates(pipe, args.seed, *steps, label(0), **guidance)
            replace_file(output / "intermediates.png", steps_strip(*way).save)
            print(f"the way to the first picture: {output / 'intermediates.png'}")
    accelerator.end_training()


def guidance_loss(args: GenerateArguments, device: torch.device) -> GuidanceLoss:
    losses = [ColorLoss(args.color)] if args.color else []
    if args.clip_prompt:
        losses.append(CLIPLoss(args.clip_prompt, *args.clip_model, device=device))
    return sum(losses[1:], start=losses[0])


def image_path(output: Path, i: int) -> Path:
    return output / "images" / f"{i:06d}.png"


def check_settings(output: Path, settings: dict) -> None:
    """Refuse to add to pictures that were made otherwise.

    Raises:
        InputError: if the settings of the pictures in the folder are not these, or not known.
    """
    if not (output / SETTINGS).exists():
        if (output / "images").exists():
            raise InputError(
                f"{output / 'images'} is there already, but no {SETTINGS} that says how its pictures were made. "
                "Give another --output_dir."
            )
        return
    found = json.loads((output / SETTINGS).read_text())
    differing = [
        f"{name} was {found.get(name)}, is {value}" for name, value in settings.items() if found.get(name) != value
    ]
    if differing:
        raise InputError(
            f"The pictures in {output} were made with other settings ({'; '.join(differing)}). Give another "
            "--output_dir, or the settings of before to add to them."
        )


if __name__ == "__main__":
    run_command(main)
