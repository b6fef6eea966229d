"""Pictures from a finished pipeline: loading it, choosing its scheduler, and one picture for each seed."""

import copy
import functools
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import GatedRepoError
from PIL import Image

from ..core.errors import InputError
from ..hub.installed import installed_class
from .grids import to_pil

SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


def load_pipeline(
    path_or_repo: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """Load a pipeline from a local folder or a Hub repository, its weights as `dtype` (None: float32).

    The classes of this package are taken from the package, whatever code the folder or repository brings for them.

    Raises:
        InputError: where there is no pipeline, or one with code of its own that `trust_remote_code` does not allow.
    """
    folder = Path(path_or_repo)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(
            f"The folder {path_or_repo} holds no pipeline: it has no model_index.json. Give the folder that "
            "`save_pretrained` or a training run wrote, not one of its sub-folders."
        )
    try:
        pipeline_class = installed_class(path_or_repo)
        pipe = pipeline_class.from_pretrained(path_or_repo, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"The pipeline {path_or_repo} brings Python code of its own. Read that code, and if you trust it, "
                "allow it to run with --trust_remote_code (in Python: trust_remote_code=True)."
            ) from error
        if isinstance(error.__context__, GatedRepoError):  # Diffusers says that there is no such repository
            raise InputError(
                f"The Hub repository {path_or_repo} is gated. Accept its terms on its page, and log in as the one who "
                "did with `hf auth login` (or set HF_TOKEN)."
            ) from error
        reason = str(error).strip().splitlines()[0]
        if folder.is_dir():
            raise InputError(f"The pipeline in the folder {path_or_repo} cannot be loaded: {reason}") from error
        raise InputError(
            f"No pipeline {path_or_repo} was found: there is no such folder below {Path.cwd()}, and looking for it on "
            f"the Hugging Face Hub gave: {reason}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    # on a CPU the weights still lie in the file, at odd addresses, for which kernels sum in another order
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    return pipe


def pipeline_hash(pipe: DiffusionPipeline) -> str:
    """A fingerprint of weights and configs: a training run may have saved others into the same folder since."""
    found = hashlib.blake2b(digest_size=16)
    for name, part in sorted(pipe.components.items()):
        config = {key: value for key, value in getattr(part, "config", {}).items() if not key.startswith("_")}
        found.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        if isinstance(part, torch.nn.Module):
            for tensor in part.state_dict().values():
                found.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def with_scheduler(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """The same pipeline, weights shared, with the scheduler `name` of `SCHEDULERS` made from the config of its own.

    `as-saved` gives back the pipeline as it is. Where the saved scheduler clips the predicted clean image, so do those
    that are built for latents and call it thresholding.

    Raises:
        InputError: for a pipeline whose noise process the scheduler does not know, such as a DDGAN's.
    """
    if name == "as-saved":
        return pipe
    config = pipe.scheduler.config
    if SCHEDULERS[name] not in pipe.scheduler.compatibles:
        raise InputError(
            f"The {type(pipe.scheduler).__name__} of this {type(pipe).__name__} is a noise process of its own, which "
            f"the scheduler {name} cannot stand in for. Sample with the scheduler as saved."
        )
    # a threshold of at most sample_max_value = 1 is the plain clip to [-1, 1]
    clips = {"thresholding": True} if config.get("clip_sample") and name in ("dpmsolver", "unipc") else {}
    pipe = copy.copy(pipe)
    pipe.scheduler = SCHEDULERS[name].from_config(config, **clips)
    return pipe


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    class_labels: Sequence[int | str] | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Draw one picture for each seed: grey, RGB or RGBA, by the channels of the network.

    All noise of a picture comes from a CPU generator of its own, so that it depends on its seed alone: on a given
    device with the same number of seeds exactly, otherwise up to the rounding of the network's arithmetic. In a plain
    `DDPMPipeline` or `DDIMPipeline` the sample stays float32 whatever the dtype of the network. Any other pipeline
    is called as it is.

    Args:
        num_inference_steps: None leaves a pipeline of its own kind to its default; else all of a DDPM's, 50 of others.
        class_labels: a class for each seed, where the network is conditioned on one; a name, where it knows names.
        options: further arguments of the call of a pipeline of its own kind, such as the loss of a guided one.

    Raises:
        InputError: for more steps than were trained, for class labels that are missing, too many or unknown, and for
            what else a pipeline of its own kind does not take.
    """
    trained = pipe.scheduler.config.num_train_timesteps
    if num_inference_steps is not None and num_inference_steps > trained:
        raise InputError(
            f"{num_inference_steps} inference steps are more than the {trained} of this pipeline's training."
        )
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if type(pipe) in (DDPMPipeline, DDIMPipeline) and not options:
        if num_inference_steps is None:
            num_inference_steps = trained if isinstance(pipe.scheduler, DDPMScheduler) else min(50, trained)
        return _pictures(_denoise(pipe, generators, num_inference_steps, class_labels))
    accepted = inspect.signature(pipe.__call__).parameters
    if class_labels is None and getattr(accepted.get("class_labels"), "default", None) is inspect.Parameter.empty:
        known = ", ".join(getattr(pipe, "labels", []))
        raise InputError(
            f"A {type(pipe).__name__} draws the class that it is told, so each picture needs a class label"
            + (f": one of {known}." if known else ".")
        )
    arguments = {**options, "num_inference_steps": num_inference_steps, "class_labels": class_labels}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name in arguments:
        if name not in accepted:
            raise InputError(f"A {type(pipe).__name__} takes no {name}.")
    if "batch_size" in accepted:
        arguments["batch_size"] = len(seeds)
    arguments |= {"generator": generators, "output_type": "np"}
    needed = [each.name for each in accepted.values() if each.default is each.empty and "VAR" not in each.kind.name]
    if missing := [name for name in needed if name not in arguments]:
        raise InputError(f"A {type(pipe).__name__} draws nothing without its {' and '.join(missing)}, not given here.")
    try:
        images = pipe(**arguments).images
    except ValueError as error:
        raise InputError(str(error)) from error
    return [to_pil(image) for image in (images * 255).round().astype(np.uint8)]


class Step(NamedTuple):
    """A step of a scheduler, `number` (from 0) of `total`: what the network saw, and the clean images of its output.

    Both are tensors (N, C, H, W) in [-1, 1], or about that.
    """

    number: int
    total: int
    timestep: int
    noisy: torch.Tensor
    clean: torch.Tensor


@contextmanager
def trace_steps(pipe: DiffusionPipeline, watch: Callable[[Step], None]) -> Iterator[None]:
    """Within the block, `watch` is told of each step of the pipeline's scheduler; what it raises ends the sampling."""
    scheduler, numbers = pipe.scheduler, itertools.count()
    step = scheduler.step

    @functools.wraps(step)
    def watched_step(model_output, timestep, sample, *args, **kwargs):
        noisy = scheduler.scale_model_input(sample, timestep)
        output = step(model_output, timestep, sample, *args, **kwargs)
        clean = getattr(output, "pred_original_sample", None)
        if clean is None:
            clean = _predicted_clean(scheduler, model_output, int(timestep), sample)
        watch(Step(next(numbers), len(scheduler.timesteps), int(timestep), noisy, clean))
        return output

    scheduler.step = watched_step
    try:
        yield
    finally:
        del scheduler.step


class DenoisingTrace:
    """
    The way to the first picture of a batch, at `count` evenly spaced of its steps: all, where there are fewer.

    Attributes:
        timesteps: of these steps.
        noisy: the noisy samples that the network saw.
        clean: the clean images that it predicted from them; the last is the picture itself with all of `SCHEDULERS`.
    """

    def __init__(self, count: int):
        self.count, self.timesteps, self.noisy, self.clean = count, [], [], []

    def record(self, step: Step) -> None:
        last = step.total - 1
        if step.number in np.linspace(last, 0, min(self.count, step.total)).round():
            self.timesteps.append(step.timestep)
            self.noisy += _pictures(step.noisy[:1])
            self.clean += _pictures(step.clean[:1])


def sample_in_full_batches(
    draw: Callable[[list[int]], list[Image.Image]], numbers: Sequence[int], size: int
) -> list[Image.Image]:
    """The picture of each number, drawn so many at once: the last batch is filled up, and what is too much left out.

    An accelerator's arithmetic depends on the size of the batch, so a picture is exactly the same only in such ones.
    """
    pictures = []
    for start in range(0, len(numbers), size):
        batch = list(numbers[start : start + size])
        pictures += draw(batch + batch[-1:] * (size - len(batch)))[: len(batch)]
    return pictures


def intermediates(
    pipe: DiffusionPipeline,
    seed: int,
    count: int,
    num_inference_steps: int | None = None,
    class_label: int | str | None = None,
    **options: Any,
) -> tuple[list[int], list[Image.Image], list[Image.Image]]:
    """The timesteps, noisy samples and predicted clean images of the `DenoisingTrace` to one picture.

    Args:
        num_inference_steps, class_label, options: as of `sample`.
    """
    way = DenoisingTrace(count)
    with trace_steps(pipe, way.record):
        sample(pipe, [seed], num_inference_steps, None if class_label is None else [class_label], **options)
    return way.timesteps, way.noisy, way.clean


def _pictures(images: torch.Tensor) -> list[Image.Image]:
    """Pictures of images (N, C, H, W) that are clipped to [-1, 1]."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    return [to_pil(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def _denoise(pipe, generators, num_inference_steps, class_labels) -> torch.Tensor:
    """What the pipelines' own `__call__` does, for schedulers that scale the network's input too."""
    unet, scheduler = pipe.unet, pipe.scheduler
    condition = _class_condition(unet, class_labels)
    size, channels = unet.config.sample_size, unet.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    noisy_steps = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(num_inference_steps, device=unet.device)
    shape = (len(generators), channels, height, width)
    sample = randn_tensor(shape, generator=generators, device=unet.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        network_input = scheduler.scale_model_input(sample, t).to(unet.dtype)
        prediction = unet(network_input, t, **condition).sample.float()
        if not isinstance(scheduler, DDPMScheduler):  # the only one whose step uses a learned variance riding along
            prediction = prediction[:, :channels]
        sample = scheduler.step(prediction, t, sample, **noisy_steps).prev_sample
    return sample


def _class_condition(unet, class_labels) -> dict[str, torch.Tensor]:
    classes = unet.config.num_class_embeds
    if classes is None:
        if class_labels is not None:
            raise InputError("This network is not conditioned on a class: leave the class labels out.")
        return {}
    if class_labels is None or not all(label in range(classes) for label in class_labels):
        raise InputError(
            f"This network draws one of {classes} classes, so each picture needs a class label from 0 to "
            f"{classes - 1}; given were {'none' if class_labels is None else list(dict.fromkeys(class_labels))}."
        )
    return {"class_labels": torch.tensor(class_labels, device=unet.device)}


def _predicted_clean(scheduler, model_output, timestep: int, noisy) -> torch.Tensor:
    """x_0 from x_t and the network's output, for schedulers that do not hand it out (arXiv 2006.11239, eq. 15)."""
    signal = scheduler.alphas_cumprod[timestep].item()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (noisy - (1 - signal) ** 0.5 * model_output) / signal**0.5
    if kind == "v_prediction":
        return signal**0.5 * noisy - (1 - signal) ** 0.5 * model_output
    return model_output


@dataclass(frozen=True)
class PipelineSampler:
    """How a run draws from its pipeline.

    Attributes:
        scheduler: `as-saved`, or the name of one of `SCHEDULERS`.
        num_inference_steps, options: as of `sample`.
    """

    scheduler: str
    num_inference_steps: int
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, pipeline: DiffusionPipeline, seeds: list[int], labels: list[int] | None) -> list[Image.Image]:
        """A picture for each seed and, where there are classes, its class."""
        pipeline = with_scheduler(pipeline, self.scheduler)
        return sample(pipeline, seeds, self.num_inference_steps, labels, **self.options)

    def protocol(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """What a picture depends on beside the weights, its seed and its class."""
        scheduler = type(with_scheduler(pipeline, self.scheduler).scheduler).__name__
        return {"scheduler": scheduler, "num_inference_steps": self.num_inference_steps, **self.options}
