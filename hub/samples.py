"""Sample images for model cards, and the call arguments that generate them with any pipeline.

standalone_check.py runs this file in a process without this package, so it must not import the package.
"""

import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SAMPLES = "card_samples.png"


def save_samples(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save nine sample images for the model card in a folder, in place of those of earlier weights.

    They are generated with seeds 0 to 8, cycling through the classes. If that fails, a warning is issued and no file
    is left. A file of this name that was not written by this function is kept.
    """
    file = folder / SAMPLES
    if file.exists() and not samples_caption(file):
        return
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    in_training = [module for network in networks for module in network.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        arguments = sample_arguments(pipe, 9)
        images = pipe(**arguments).images  # pyright: ignore[reportCallIssue]
        settings = [f"Seeds 0 to 8, {len(pipe.scheduler.timesteps)} steps"]
        settings += ["the classes in turn"] * ("class_labels" in arguments) + ["no guidance"] * ("loss" in arguments)
        caption = PngInfo()
        caption.add_text("Caption", f"{', '.join(settings)}; uncurated.")
        factor = max(1, 96 // max(images[0].size))
        images = [image.resize((factor * image.width, factor * image.height), Image.NEAREST) for image in images]
        temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
        try:
            make_image_grid(images, 3, 3).save(temporary, pnginfo=caption)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:  # of any kind: the weights can be published without sample images
        file.unlink(missing_ok=True)
        warnings.warn(f"The model card has no sample images, because generating them failed: {error}", stacklevel=2)
    finally:
        for module in in_training:
            module.training = True


def samples_caption(file: Path) -> str | None:
    """Return how the images in a file of `save_samples` were generated; None for any other file."""
    try:
        with Image.open(file) as image:
            return image.info.get("Caption")
    except OSError:  # it does not exist or is not an image
        return None


def shows_samples(card: str) -> bool:
    """Return whether a model card, possibly an edited one, shows the images of `save_samples`."""
    return f"]({SAMPLES})" in card


def sample_arguments(pipe: DiffusionPipeline, count: int, num_inference_steps: int | None = None) -> dict[str, Any]:
    """Return call arguments for `count` images with seeds from 0, cycling through the classes, without guidance.

    Args:
        num_inference_steps: None for the pipeline's default, at most 50. A few-step pipeline is always sampled in the
            number of steps that it was trained for.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in range(count)]}
    if trained := pipe.scheduler.config.get("_num_inference_steps"):
        arguments["num_inference_steps"] = trained[0]
    elif steps := num_inference_steps or accepted["num_inference_steps"].default:
        arguments["num_inference_steps"] = min(steps, 50, pipe.scheduler.config.get("num_train_timesteps", 50))
    if "loss" in accepted:  # required by the pipeline; its scale makes it ineffective
        arguments |= {"loss": lambda images: images.square().mean((1, 2, 3)), "guidance_scale": 0.0}
    if "class_labels" in accepted:
        sizes = [pipe.unet.config.get(name) for name in ("num_classes", "n_cfeat", "num_class_embeds")]
        if classes := next(filter(None, sizes), None):
            arguments["class_labels"] = [seed % classes for seed in range(count)]
    if "batch_size" in accepted:
        arguments["batch_size"] = count
    return arguments
