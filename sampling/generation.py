"""Generate images from a pipeline, each from its own seed."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    ModelMixin,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .. import ClassConditionalPipeline, DDGANScheduler
from ..core.errors import InputError, RunError
from ..pipelines.pipeline_class_conditional import Autoguidance, count_classes, takes_learned_variance
from .grids import to_pil
from .loading import with_scheduler
from .spacing import changed_spacing, check_steps
from .steps import default_steps, steps_warning, warn_once

Z_STREAM = 1 << 31  # flips a bit of a seed, for other random numbers than those of the seed itself


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    num_inference_steps: int | None = None,
    class_labels: Sequence[int | str] | None = None,
    z_seeds: Sequence[int] | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Generate one image per seed, with the channels of the network: gray or RGB, with or without alpha.

    All noise of an image comes from its own CPU generator, so that the image depends only on its seed: exactly, for a
    given device, number of threads and number of seeds, otherwise up to the rounding of the network's arithmetic;
    `GroupSampler` keeps these the same. In a plain `DDPMPipeline` or `DDIMPipeline` the sample stays float32 whatever
    the dtype of the network. For any other pipeline its own `__call__` is used.

    Args:
        pipe: The pipeline.
        seeds: One seed per image.
        num_inference_steps: Number of denoising steps. None means the first of `trained_steps` for a few-step
            pipeline, otherwise all timesteps of training for DDPM and at most 50 for other schedulers in these two
            pipelines, and the default in any other pipeline. A few-step pipeline warns once about other numbers.
        class_labels: One class per seed if the network is class-conditional: a label or, if there are names, a name.
        z_seeds: For a DDGAN, one seed per image for the latent z, which does not repeat the noise of the same seed in
            `seeds`. By default they come from the generator of all other noise.
        options: Further arguments for the call of the pipeline, such as the loss of a guided one. `eta`, the scale of
            the noise in each step, is also for plain pipelines with a scheduler whose `step` takes it. Plain pipelines
            also take `guide`, a worse version of the pipeline for autoguidance (arXiv 2406.02507), with
            `guidance_scale` (at least 1) and `guidance_interval`, as `ClassConditionalPipeline` does. In a guided
            pipeline, the scale of the guide is `autoguidance_scale`.

    Raises:
        InputError: If there are more steps than in training, if class labels are missing, unexpected or unknown, if a
            seed is not from 0 to 2^32 - 1, or if the pipeline does not accept an argument.
        RunError: If the values of an image are not finite.
    """
    for seed in (*seeds, *(z_seeds or ())):
        if seed not in range(1 << 32):  # a CPU generator takes 32 bits: others would repeat the image of another seed
            raise InputError(f"The seed is {seed}; it must be from 0 to {(1 << 32) - 1}.")
    if num_inference_steps is not None:
        check_steps(pipe.scheduler, num_inference_steps)
    if "eta" in options and "eta" not in inspect.signature(pipe.scheduler.step).parameters:
        raise InputError(f"The steps of a {type(pipe.scheduler).__name__} take no eta.")
    if options.get("eta", 0) > 1 and not isinstance(pipe.scheduler, DDGANScheduler):
        raise InputError(
            f"An eta of {options['eta']:g} is for DDGANs: that of a {type(pipe.scheduler).__name__} is at most 1."
        )
    plain_options = {"eta"}
    if "guide" in options:
        plain_options |= {"guide", "guidance_scale", "guidance_interval"}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    num_inference_steps = num_inference_steps or default_steps(pipe)
    is_plain = type(pipe) in (DDPMPipeline, DDIMPipeline)
    if is_plain and z_seeds is None and options.keys() <= plain_options:
        assert num_inference_steps is not None  # these pipelines have a default
        if warning := steps_warning(pipe, num_inference_steps):
            warn_once(warning)
        samples = _denoise(pipe, generators, num_inference_steps, class_labels, **options)
        _check_finite(samples, seeds)
        return to_pil_images(samples)

    parameters = inspect.signature(pipe.__call__).parameters
    needs_labels = getattr(parameters.get("class_labels"), "default", None) is inspect.Parameter.empty
    if isinstance(pipe, ConsistencyModelPipeline):  # without labels, it draws them from the global generator
        needs_labels = count_classes(pipe.unet) is not None
    if class_labels is None and needs_labels:
        names = ", ".join(getattr(pipe, "labels", []))
        raise InputError(
            f"A {type(pipe).__name__} is class-conditional, so each image needs a class label"
            + (f": one of {names}." if names else ".")
        )
    z_generators = z_seeds and [torch.Generator("cpu").manual_seed(seed ^ Z_STREAM) for seed in z_seeds]
    arguments = {
        **options,
        "z_generator": z_generators,
        "num_inference_steps": num_inference_steps,
        "class_labels": class_labels,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not is_plain and "guide" in options and "guide" not in parameters:
        raise InputError(
            f"A {type(pipe).__name__} takes no guide: autoguidance is for DDPMPipeline, DDIMPipeline, "
            "ClassConditionalPipeline and GuidedPipeline."
        )
    for name in arguments:
        if name not in parameters and not (is_plain and name in plain_options):
            raise InputError(f"A {type(pipe).__name__} takes no {name}.")
    if "batch_size" in parameters:
        arguments["batch_size"] = len(seeds)
    arguments |= {"generator": generators, "output_type": "np"}
    required = [p.name for p in parameters.values() if p.default is p.empty and "VAR" not in p.kind.name]
    if missing := [name for name in required if name not in arguments]:
        raise InputError(f"A {type(pipe).__name__} cannot be called without {' and '.join(missing)}.")
    try:
        images = pipe(**arguments).images  # pyright: ignore[reportCallIssue]
    except ValueError as error:
        raise InputError(str(error)) from error
    _check_finite(torch.from_numpy(images), seeds)
    return [to_pil(image) for image in (images * 255).round().astype(np.uint8)]


def check_call(
    pipe: DiffusionPipeline,
    num_inference_steps: int | None = None,
    class_labels: Sequence[int | str] | None = None,
    **options: Any,
) -> None:
    """Check the arguments of `sample` as far as possible without evaluating a network.

    Raises:
        InputError: As for `sample`.
    """

    class NetworkReached(Exception):
        pass

    def stop(*_) -> None:
        raise NetworkReached

    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    hooks = [network.register_forward_pre_hook(stop) for network in networks]
    try:
        sample(pipe, [0], num_inference_steps, class_labels, **options)
    except NetworkReached:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def sample_in_full_batches(
    generate: Callable[[list[int]], list[Image.Image]], indices: Sequence[int], batch_size: int
) -> list[Image.Image]:
    """Generate the image of each index in batches of equal size; the last batch is padded and the surplus discarded.

    The arithmetic of an accelerator depends on the batch size, so only batches of equal size give identical images.

    Args:
        generate: Returns the images of a list of indices.
        indices: The images to generate.
        batch_size: Number of images per call.
    """
    images = []
    for start in range(0, len(indices), batch_size):
        batch = list(indices[start : start + batch_size])
        padding = batch[-1:] * (batch_size - len(batch))
        images += generate(batch + padding)[: len(batch)]
    return images


@dataclass(frozen=True)
class PipelineSampler:
    """The settings with which a training run samples from its pipeline.

    Attributes:
        scheduler: `as-saved`, or a key of `SCHEDULERS`.
        num_inference_steps: As for `sample`.
        options: Further arguments, as for `sample`.
    """

    scheduler: str
    num_inference_steps: int
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, pipeline: DiffusionPipeline, seeds: list[int], labels: list[int] | None) -> list[Image.Image]:
        """Generate one image per seed and, for a class-conditional pipeline, class label."""
        pipeline = with_scheduler(pipeline, self.scheduler, self.num_inference_steps)
        return sample(pipeline, seeds, self.num_inference_steps, labels, **self.options)

    def protocol(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """Return the settings that an image depends on besides the weights, its seed and its class.

        Raises:
            InputError: If the pipeline cannot be sampled with these settings.
        """
        scheduler = with_scheduler(pipeline, self.scheduler, self.num_inference_steps).scheduler
        check_steps(scheduler, self.num_inference_steps)
        return {
            "scheduler": type(scheduler).__name__,
            **changed_spacing(pipeline, scheduler),
            "num_inference_steps": self.num_inference_steps,
            **self.options,
        }


def image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of the images of a network from its config."""
    size = config["sample_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def class_names(network: ModelMixin | None) -> dict[int, str]:
    """Return the name of each class by its label; empty if the network has none."""
    id2label = getattr(network, "config", {}).get("id2label") or {}
    return {int(k): v for k, v in (id2label.items() if isinstance(id2label, dict) else enumerate(id2label))}


def parse_class_labels(texts: Sequence[str | int], names: Mapping[int, str]) -> list[int | str]:
    """Parse class labels from the command line: digits are labels, anything else is a class name.

    Where classes have numbers as names that are not their labels, digits in a text are names, too.

    Args:
        texts: The labels or names; integers, from Python, are always labels.
        names: The name of each class by its label, as returned by `class_names`.
    """
    are_names = any(name.isdecimal() and name != str(label) for label, name in names.items())
    are_labels = [isinstance(text, int) or (text.isdecimal() and not are_names) for text in texts]
    return [int(text) if is_label else text for text, is_label in zip(texts, are_labels, strict=True)]


def class_label_ids(pipe: DiffusionPipeline, labels: Sequence[int | str]) -> list[int]:
    """Return the numbers of class labels.

    Args:
        pipe: A pipeline.
        labels: Labels or, if the config of its network has names, names.

    Raises:
        InputError: If the network of the pipeline is not class-conditional or lacks one of these classes.
    """
    if (unet := getattr(pipe, "unet", None)) is None or count_classes(unet) is None:
        raise InputError("This network is not conditioned on a class: do not pass class labels.")
    try:
        return ClassConditionalPipeline(unet, pipe.scheduler).encode_class_labels(list(labels)).tolist()
    except ValueError as error:
        raise InputError(str(error)) from error


def to_pil_images(images: torch.Tensor) -> list[Image.Image]:
    """Convert a tensor `(N, C, H, W)`, clipped to [-1, 1], to PIL images."""
    images = (images.float() / 2 + 0.5).clamp(0, 1)
    return [to_pil(image) for image in (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()]


def _check_finite(images: torch.Tensor, seeds: Sequence[int]) -> None:
    finite = images.isfinite().flatten(1).all(1).tolist()
    if broken := [str(seed) for seed, is_finite in zip(seeds, finite, strict=True) if not is_finite]:
        raise RunError(
            f"The image of seed {', '.join(broken)} is not finite and would be black. The weights are damaged, the "
            "guidance scale is too large, or the network exceeds the range of fp16 (use fp32 or bf16)."
        )


def _denoise(
    pipe: DiffusionPipeline,
    generators: list[torch.Generator],
    num_inference_steps: int,
    class_labels: Sequence[int | str] | None,
    guide: DiffusionPipeline | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] | None = None,
    **step_options: Any,
) -> torch.Tensor:
    """Sample like a `DDPMPipeline` or `DDIMPipeline`, also with a guide and with schedulers that scale samples."""
    unet, scheduler = pipe.unet, pipe.scheduler
    try:
        guidance = None if guide is None else Autoguidance(guide, pipe, guidance_scale, guidance_interval)
    except ValueError as error:
        raise InputError(str(error)) from error
    condition = _class_condition(unet, class_labels)
    channels, (height, width) = unet.config.in_channels, image_size(unet.config)
    uses_variance = takes_learned_variance(scheduler)
    accepted = inspect.signature(scheduler.step).parameters
    step_kwargs = {**step_options, "generator": generators} if "generator" in accepted else dict(step_options)
    scheduler.set_timesteps(num_inference_steps, device=unet.device)
    shape = (len(generators), channels, height, width)
    sample = randn_tensor(shape, generator=generators, device=unet.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(sample, t)
        output = unet(model_input.to(unet.dtype), t, **condition).sample.float()
        active_guidance = guidance if guidance is not None and guidance.is_active(t) else None
        if active_guidance is not None:
            output = output + active_guidance.update(output, model_input, t, **condition)
        if "use_clipped_model_output" in accepted:  # for the reason given in ClassConditionalPipeline
            step_kwargs["use_clipped_model_output"] = active_guidance is not None
        if not uses_variance:
            output = output[:, :channels]
        sample = scheduler.step(output, t, sample, **step_kwargs).prev_sample
    return sample


def _class_condition(unet: ModelMixin, class_labels: Sequence[int | str] | None) -> dict[str, torch.Tensor]:
    count = count_classes(unet)
    if count is None and unet.config.get("class_embed_type"):
        raise InputError(
            f"This network is conditioned on vectors or numbers instead of classes (class_embed_type: "
            f"{unet.config.class_embed_type}), which is not supported."
        )
    if count is None:
        if class_labels is not None:
            raise InputError("This network is not conditioned on a class: do not pass class labels.")
        return {}
    if class_labels is None or not all(label in range(count) for label in class_labels):
        received = "none" if class_labels is None else list(dict.fromkeys(class_labels))
        raise InputError(
            f"This network is conditioned on one of {count} classes, so each image needs a class label from 0 to "
            f"{count - 1}, but got {received}."
        )
    return {"class_labels": torch.tensor(class_labels, device=unet.device)}
