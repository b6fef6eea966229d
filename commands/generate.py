"""Generate images with a pipeline, one per seed, in PNG files or in shards.

The batch size and the number of threads change the order in which floating-point numbers are summed, so images are
generated in fixed groups of consecutive seeds.
"""

import inspect
import json
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .. import CLIPLoss, ColorLoss, GuidanceLoss, GuidedPipeline
from ..core.accelerator import start_accelerate
from ..core.errors import InputError
from ..core.files import remove_temporary_files, replace_file
from ..core.locks import locked
from ..core.threads import one_thread_per_operation, run_in_threads
from ..guidance.arguments import DEFAULT_MODEL, default_guidance_scale, needs_clip
from ..guidance.registry import includes_clip, parse_loss, sum_losses
from ..pipelines.pipeline_guided import DEFAULT_STEPS
from ..sampling.arguments import VARY_COLUMNS
from ..sampling.generation import check_call, class_label_ids, class_names, parse_class_labels
from ..sampling.grids import grid_of_classes, image_grid, steps_strip
from ..sampling.groups import GroupSampler, group_size, image_format
from ..sampling.image_files import ImageFiles, existing_files, read_images
from ..sampling.loading import DTYPES, load_guide, load_pipeline, pipeline_hash, with_scheduler
from ..sampling.steps import default_gradient, trained_steps
from ..sampling.traces import check_traceable, intermediates
from .arguments import GRID_IMAGES, GenerateArguments

IMAGES, SETTINGS, GRID, INTERMEDIATES = "images", "generate.json", "grid.png", "intermediates.png"


@dataclass(frozen=True)
class GeneratedImages:
    """Images in an output folder.

    Attributes:
        folder: the output folder.
        files: their PNG files, or shards of several images each.
        grid, intermediates: grid.png and intermediates.png, if they were requested.
    """

    folder: Path
    files: ImageFiles
    grid: Path | None = None
    intermediates: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """Paths of the files, in order."""
        return list(dict.fromkeys(map(self.files.path, range(len(self)))))

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Image.Image]:
        """Iterate over the images, reading each file once."""
        for image in islice(chain.from_iterable(map(read_images, self.paths)), len(self)):
            image.load()
            yield image

    @overload
    def __getitem__(self, i: int) -> Image.Image: ...

    @overload
    def __getitem__(self, i: slice) -> list[Image.Image]: ...

    def __getitem__(self, i: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]
        image = read_images(self.files.path(i))[i - self.files.images_of(i).start]
        image.load()
        return image


def generate(args: GenerateArguments) -> GeneratedImages:
    """Generate the images that are missing in the output folder, and print where they are.

    Raises:
        InputError: if the pipeline cannot be loaded or does not accept the arguments, or the folder contains images
            with other settings.
    """
    accelerator = start_accelerate()
    with locked(Path(args.output_dir), accelerator), one_thread_per_operation(accelerator.device) as threads:
        generate_images(args, accelerator, threads)
    folder = Path(args.output_dir)
    return GeneratedImages(
        folder=folder,
        files=ImageFiles(folder / IMAGES, args.format, args.num_images),
        grid=folder / GRID if args.grid else None,
        intermediates=folder / INTERMEDIATES if args.intermediates else None,
    )


def generate_images(args: GenerateArguments, accelerator: Accelerator, threads: int) -> None:
    """Generate the images that are missing in the output folder, in this number of threads."""
    loss = guidance_loss(args, accelerator.device) if args.is_guided else None
    assert args.pipeline is not None
    pipe = load_pipeline(args.pipeline, DTYPES[args.dtype], args.trust_remote_code, accelerator.device)
    guide = load_guide(args, accelerator.device)
    size = group_size(pipe, args.batch_size)
    if loss and includes_clip(loss) and accelerator.device.type == "cpu":
        size = 1  # the CLIP model takes most of the time, and much memory for each image
    num_inference_steps = args.num_inference_steps or next(iter(trained_steps(pipe)), None)
    guidance_scale = args.guidance_scale
    if args.is_guided:
        num_inference_steps = num_inference_steps or min(DEFAULT_STEPS, pipe.scheduler.config.num_train_timesteps)
        if guidance_scale is None:
            guidance_scale = default_guidance_scale(num_inference_steps)
    gradient = (args.guidance_gradient or default_gradient(pipe)) if args.is_guided else None
    others = {"guidance_scale": guidance_scale, "guide": guide, "eta": args.eta}
    options: dict[str, Any] = args.guidance | {name: value for name, value in others.items() if value is not None}
    if loss:
        options |= {"loss": loss, "gradient": gradient}
    class_labels = None
    if args.class_labels:
        class_labels = parse_class_labels(args.class_labels, class_names(getattr(pipe, "unet", None)))
    output = Path(args.output_dir)
    settings = {
        "pipeline": str(args.pipeline),
        "contents": pipeline_hash(pipe),
        "scheduler": args.scheduler,
        "num_inference_steps": num_inference_steps,
        "eta": args.eta,
        "class_labels": class_labels,
        "seed": args.seed,
        "vary": args.vary,
        "dtype": args.dtype,
        "device": accelerator.device.type,
        "images_at_once": size,
        "color": args.color,
        "clip_prompt": args.clip_prompt,
        "towards": args.towards,
        "clip_model": args.clip_model,
        "guidance_scale": guidance_scale,
        "guidance_gradient": gradient,
        "format": args.format,
        "autoguidance": args.autoguidance and str(args.autoguidance),
        "autoguidance_contents": guide and pipeline_hash(guide),
        "autoguidance_scale": args.autoguidance_scale,
        "class_guidance_scale": args.class_guidance_scale,
        "guidance_interval": args.guidance_interval,
    }
    if not args.overwrite:
        check_settings(output, settings)
    labels = class_label_ids(pipe, class_labels) if class_labels else None
    pipe = with_scheduler(pipe, args.scheduler, num_inference_steps)
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
    if args.vary and "z_generator" not in inspect.signature(pipe.__call__).parameters:
        raise InputError(f"--vary {args.vary} needs a DDGAN, because a {type(pipe).__name__} has no latent z.")
    check_call(pipe, num_inference_steps, labels and labels[:1], **options)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        prepare(output, settings, args.overwrite)
        if gradient == "model" and not args.guidance_gradient:
            print(
                "In few steps, images hardly follow guidance unless its gradient passes through the network, so "
                "--guidance_gradient model is used."
            )
    accelerator.wait_for_everyone()

    sampler = GroupSampler(pipe, size, args.seed, num_inference_steps, labels, options, args.vary)
    files = ImageFiles(output / IMAGES, args.format, args.num_images, sampler.class_label, image_format(pipe))
    total, missing = files.missing(size, sampler.offset, accelerator.process_index, accelerator.num_processes)
    count = sum(map(len, missing))

    def generate_group(indices: list[int]) -> int:
        files.add(indices, sampler(indices))
        return len(indices)

    progress = tqdm(total=total, initial=total - count, unit="image", disable=not accelerator.is_main_process)
    started = time.perf_counter()
    with progress, logging_redirect_tqdm(tqdm_class=tqdm):  # warnings are printed above the progress bar
        run_in_threads(generate_group, missing, threads, progress.update)

    accelerator.wait_for_everyone()
    rate = sum(gather_object([count])) / (time.perf_counter() - started)
    if accelerator.is_main_process:
        print(f"{args.num_images} images: {output / IMAGES}" + (f" ({rate:.3g} images per second)" if rate else ""))
        if args.grid:
            first_images = list(islice(GeneratedImages(output, files), GRID_IMAGES))
            replace_file(output / GRID, arrange(first_images, sampler).save)
            print(f"grid: {output / GRID}")
        if args.intermediates:
            steps = (args.intermediates, num_inference_steps)
            z_seed = {"z_seeds": [args.seed]} if args.vary else {}
            trace = intermediates(pipe, args.seed, *steps, sampler.class_label(0), **options, **z_seed)
            replace_file(output / INTERMEDIATES, steps_strip(*trace).save)
            print(f"denoising steps of the first image: {output / INTERMEDIATES}")
    accelerator.end_training()


def clip_guidance(images: Path) -> str | None:
    """Return the CLIP model that guided the images in a folder or shard of this command.

    Returns:
        Its name; None without guidance by CLIP, or if the settings of the images are unknown.
    """
    if not images.exists():  # they are on the Hub, or at a URL
        return None
    folder = images.resolve() if images.is_dir() else images.resolve().parent
    path = (folder.parent if folder.name == IMAGES else folder) / SETTINGS
    with suppress(OSError, ValueError, TypeError, AttributeError):  # missing, or not written by this command
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.get("clip_prompt") or any(map(needs_clip, settings.get("towards") or [])):
            return " ".join(settings.get("clip_model") or [DEFAULT_MODEL])
    return None


def guidance_loss(args: GenerateArguments, device: torch.device) -> GuidanceLoss:
    losses: list[GuidanceLoss] = [ColorLoss(args.color)] if args.color else []
    if args.clip_prompt:
        assert args.clip_model is not None
        losses.append(CLIPLoss(args.clip_prompt, *args.clip_model, device=device))
    losses += [parse_loss(text, args.clip_model, device) for text in args.towards or []]
    return sum_losses(losses)


def arrange(images: list[Image.Image], sampler: GroupSampler) -> Image.Image:
    """Return the grid of the first images: in line are those of a class, or with the same fixed randomness."""
    names: dict[Any, str] = {**class_names(getattr(sampler.pipe, "unet", None))}
    classes = [str(names.get(label, label)) for label in sampler.class_labels or []]
    if not sampler.vary:
        return grid_of_classes(images, classes) if 1 < len(classes) <= GRID_IMAGES // 2 else image_grid(images)
    fixed, varied = ("noise", "z") if sampler.vary == "z" else ("z", "noise")
    rows = []
    for row in range(math.ceil(len(images) / VARY_COLUMNS)):
        prefix = f"{classes[row % len(classes)]}, " if classes else ""
        rows.append(f"{prefix}{fixed} {sampler.seed + row}")
    columns = [f"{varied} {sampler.seed + column}" for column in range(min(len(images), VARY_COLUMNS))]
    return image_grid(images, VARY_COLUMNS, columns, rows)


def prepare(output: Path, settings: dict, overwrite: bool) -> None:
    """Write the settings of the images to come, and remove those that they replace."""
    if overwrite:
        for path in (*existing_files(output / IMAGES), output / GRID, output / INTERMEDIATES):
            path.unlink(missing_ok=True)
    for folder in (output, output / IMAGES):
        remove_temporary_files(folder)
    replace_file(output / SETTINGS, lambda path: path.write_text(json.dumps(settings, indent=2) + "\n"))


def check_settings(output: Path, settings: dict) -> None:
    """Check that existing images were generated with the same settings.

    Raises:
        InputError: if the settings of the images in the folder are different, unknown or cannot be read.
    """
    others = [path for name in (GRID, INTERMEDIATES) if (path := output / name).exists()]
    has_images, has_settings = bool(existing_files(output / IMAGES)), (output / SETTINGS).exists()
    if not (has_images or has_settings or others):
        return
    remedy = "Choose another --output_dir, or replace them with --overwrite"
    if not has_settings:
        found = f"{output / IMAGES} contains images" if has_images else f"There is {others[0]}"
        raise InputError(f"{found}, but no {SETTINGS} with the settings. {remedy}.")
    try:
        existing = dict(json.loads((output / SETTINGS).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(
            f"{output / SETTINGS} is damaged, so the settings of the images beside it are unknown ({error}). {remedy}."
        ) from error
    if not has_images and "contents" in existing:  # what an earlier command left
        return
    changes = [
        f"{name} was {existing.get(name)}, is {value}"
        for name, value in settings.items()
        if existing.get(name) != value
    ]
    if changes:
        raise InputError(
            f"The images in {output} were generated with other settings ({'; '.join(changes)}). {remedy}. With the "
            "same settings, new images are added to them."
        )
