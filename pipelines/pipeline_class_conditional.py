"""Class-conditional image generation with any scheduler, with classifier-free guidance and autoguidance."""

import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
MAX_LISTED_CLASSES = 20  # in an error message

logger = logging.getLogger(__name__)


class ClassConditionalPipeline(DiffusionPipeline):
    """Pipeline for class-conditional image generation.

    With [classifier-free guidance](https://arxiv.org/abs/2207.12598) the prediction is unconditional + guidance_scale
    (conditional - unconditional). Both come from one batch of twice the size, whose first half has the null class.

    With [autoguidance](https://arxiv.org/abs/2406.02507) it is guide + guidance_scale (conditional - guide), where the
    guide is the prediction of a worse model, such as an earlier checkpoint. Both together add up: conditional +
    (class_guidance_scale - 1) (conditional - unconditional) + (guidance_scale - 1) (conditional - guide).

    This pipeline inherits from [`DiffusionPipeline`].

    Args:
        unet (`ClassConditionedUnet`, `ContextUnet` or `UNet2DModel` with `num_class_embeds`):
            The network. Its config holds the number of classes (`num_classes`, `n_cfeat` or `num_class_embeds`) and,
            optionally, their names (`id2label`). If `class_dropout` is above 0, there is a null class, whose label is
            the number of classes.
        scheduler (`SchedulerMixin`): A scheduler for the noise process that the network was trained with.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar = ["latents", "class_labels"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def class_guidance_scale(self) -> float:
        """The scale of classifier-free guidance; without a guide, this is `guidance_scale`."""
        return self._guidance_scale if self._class_guidance_scale is None else self._class_guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.class_guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def num_classes(self) -> int:
        """The number of classes, excluding the null class."""
        if count := count_classes(self.unet):
            return count
        raise ValueError(
            f"This {type(self.unet).__name__} is not conditioned on a class: its config has none of `num_classes`, "
            "`n_cfeat` and `num_class_embeds`."
        )

    @property
    def has_null_class(self) -> bool:
        """`True` if the network was trained with a null class, whose label is `num_classes`."""
        return bool(self.unet.config.get("class_dropout"))

    @property
    def labels(self) -> dict[str, int]:
        """The label of each class name; empty if the config has no `id2label`."""
        id2label = self.unet.config.get("id2label") or {}
        pairs = id2label.items() if isinstance(id2label, dict) else enumerate(id2label)
        return {name: int(label) for label, name in pairs}

    def get_label_ids(self, names: Sequence[str]) -> list[int]:
        """Return the labels of class names.

        Args:
            names (`Sequence[str]`): Names of classes.

        Returns:
            `list[int]`: The label of each name.

        Raises:
            `ValueError`: If a name is unknown; the message lists the classes or, if there are many, the nearest ones.
        """
        labels = self.labels
        if not labels:
            raise ValueError(
                f"Class names {list(names)} were passed, but this network has none (its config has no `id2label`): "
                f"pass labels from 0 to {self.num_classes - 1}."
            )
        for name in names:
            if name not in labels:
                known, listed = "The classes are", list(labels)
                if len(labels) > MAX_LISTED_CLASSES:
                    known, listed = "The nearest names are", difflib.get_close_matches(name, labels, cutoff=0)
                raise ValueError(
                    f"There is no class {name!r} among the {len(labels)} classes of this network. {known} "
                    f"{', '.join(map(repr, listed))}."
                )
        return [labels[name] for name in names]

    def encode_class_labels(self, class_labels, batch_size: int | None = None) -> torch.Tensor:
        """Encode the `class_labels` of `__call__` as the network's conditioning.

        Args:
            class_labels: Class labels as in `__call__`.
            batch_size (`int`, *optional*): Number of images as in `__call__`.

        Returns:
            `torch.Tensor`: Integer labels of shape `(batch_size,)`, or float contexts of shape
            `(batch_size, n_cfeat)`.

        Raises:
            `ValueError`: If a label is out of range, a name is unknown, contexts have the wrong width or the network
                takes none, or the number of labels is not `batch_size`.
        """
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids([class_labels])[0]
        elif isinstance(class_labels, list | tuple):
            names = [label for label in class_labels if isinstance(label, str)]
            ids = iter(self.get_label_ids(names) if names else [])
            class_labels = [next(ids) if isinstance(label, str) else label for label in class_labels]
        encoded = torch.as_tensor(class_labels)

        num_classes, width = self.num_classes, self.unet.config.get("n_cfeat")
        if encoded.is_floating_point() or encoded.ndim > 1:
            if width is None:
                raise ValueError(
                    f"`class_labels` is {encoded.dtype} of shape {tuple(encoded.shape)}, but a "
                    f"{type(self.unet).__name__} takes no contexts: pass one integer label per image."
                )
            if encoded.ndim not in (1, 2) or encoded.shape[-1] != width:
                raise ValueError(
                    f"`class_labels` is a context of shape {tuple(encoded.shape)}, but must have one column for each "
                    f"of the {width} classes: (batch_size, {width}), or ({width},) to use the same context for all "
                    "images."
                )
            encoded = encoded.to(torch.promote_types(self.unet.dtype, torch.float32))
            is_single = encoded.ndim == 1
        else:
            encoded = encoded.long()
            is_single = encoded.ndim == 0
            valid = range(num_classes + self.has_null_class)
            invalid = sorted({label for label in encoded.flatten().tolist() if label not in valid})
            if invalid:
                null_class = f", and {num_classes} for the null class" if self.has_null_class else ""
                raise ValueError(
                    f"`class_labels` holds {', '.join(map(str, invalid))}, but this network has {num_classes} "
                    f"classes, whose labels are 0 to {num_classes - 1}{null_class}."
                )

        if is_single:
            encoded = encoded.expand(1 if batch_size is None else batch_size, *encoded.shape)
        elif batch_size not in (None, len(encoded)):
            raise ValueError(
                f"`class_labels` has {len(encoded)} entries, but `batch_size` is {batch_size}: pass one label per "
                "image, or a single one for all images."
            )
        return encoded

    def check_inputs(
        self,
        batch_size: int | None,
        guidance_scale: float,
        class_guidance_scale: float | None,
        guide: DiffusionPipeline | None,
        guidance_interval: tuple[float, float] | None,
        num_inference_steps: int | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ):
        if not hasattr(self.scheduler, "init_noise_sigma"):
            raise ValueError(
                f"A {type(self.scheduler).__name__} cannot be used here: like other flow-matching schedulers, it does "
                "not define the scale of the initial noise (`init_noise_sigma`). Use DDPM, DDIM, DPM-Solver++, UniPC "
                "or Euler."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be at least 1.")
        if class_guidance_scale is not None and guide is None:
            raise ValueError(
                f"`class_guidance_scale` is {class_guidance_scale}, but there is no `guide`. It is the scale of "
                "classifier-free guidance in addition to that of a guide; without one, pass it as `guidance_scale`."
            )
        name, scale = "guidance_scale", guidance_scale
        if guide is not None:
            name, scale = "class_guidance_scale", class_guidance_scale
        if (scale or 1) > 1 and not self.has_null_class:
            raise ValueError(
                f"`{name}` is {scale}, but this {type(self.unet).__name__} was not trained with a "
                "null class (its config has no `class_dropout` above 0), which classifier-free guidance needs. Sample "
                f"with `{name}=1`, or train the network with class dropout."
            )
        check_interval(guidance_interval, self.scheduler)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs}, but only "
                f"{self._callback_tensor_inputs} are available."
            )

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Generate the initial noise, or check the one that was passed, and scale it for the scheduler."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have one for each of the {batch_size} images."
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but must have shape {shape}.")
        return latents.to(self._execution_device, dtype) * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int] | Sequence[str] | np.ndarray | torch.Tensor,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        guide: DiffusionPipeline | None = None,
        class_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | torch.Tensor]:
        """The call function to the pipeline for generation. It generates one image for each class label.

        Noise is generated, and the sample kept, in float32; only the network runs in its own dtype.

        Args:
            class_labels (`int`, `str`, `list[int]`, `list[str]`, `np.ndarray` or `torch.Tensor`):
                Class labels, or class names if the network's config has `id2label`. A `ContextUnet` also takes a float
                matrix `(batch_size, n_cfeat)` of contexts, where zeros mean no context. A single label, name or
                context is used for all images.
            batch_size (`int`, *optional*):
                Number of images. It is only needed with a single label, where it defaults to 1.
            guidance_scale (`float`, defaults to 1.0):
                Scale of classifier-free guidance, which is enabled above 1 and needs a null class; with a `guide`,
                that of autoguidance, which is also enabled above 1.
            guide (`DiffusionPipeline`, *optional*):
                A pipeline with a worse version of the network for autoguidance: an earlier checkpoint, or a network
                that is smaller or was trained for less time. It must have been trained on images of the same size and
                channels, with the same classes or none, and with the same noise schedule. Each step evaluates its
                `unet` once; its scheduler only tells what that predicts.
            class_guidance_scale (`float`, *optional*):
                With a `guide`, scale of classifier-free guidance in addition to autoguidance. Defaults to 1 (none).
            guidance_interval (`tuple[float, float]`, *optional*):
                The noise levels (low, high] at which there is guidance of either kind
                ([arXiv 2404.07724](https://arxiv.org/abs/2404.07724)): standard deviations of the noise relative to
                images in [-1, 1], sigma = sqrt((1 - alpha_bar) / alpha_bar). Defaults to all. Other steps evaluate
                the network alone.
            num_inference_steps (`int`, *optional*):
                Number of denoising steps, as the scheduler counts them. Defaults to the number that a few-step
                pipeline was trained for (the first of `_num_inference_steps` in the scheduler's config), otherwise to
                50, or to the scheduler's `num_train_timesteps` if it has fewer.
            eta (`float`, defaults to 0.0):
                Noise added at each step, relative to DDPM, by [`DDIMScheduler`] and others whose `step` takes it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Generators for all noise; with a list of one per image, image i depends on generator i only.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to start from instead of generating it.
            output_type (`str`, defaults to `"pil"`):
                The output format: `"pil"` for PIL images (mode L for one channel), `"np"` for an array `(batch_size,
                height, width, channels)` in [0, 1], `"pt"` for a tensor `(batch_size, channels, height, width)` in
                [0, 1], or `"latent"` for that tensor as sampling leaves it, in about [-1, 1].
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                A function called at the end of each step as `callback(pipe, step, timestep, callback_kwargs)`. Tensors
                in the dictionary that it returns replace those of the pipeline; `pipe._interrupt = True` ends
                sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors to include in `callback_kwargs`: `"latents"`, and `"class_labels"` as passed to the
                network, which with guidance start with the null class.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The generated images.

        Raises:
            `ValueError`: If a label is out of range, a name is unknown (the message lists the classes or the nearest
                ones), contexts have the wrong width, guidance is enabled without a null class, the guide is for other
                images, the numbers of images contradict one another, `num_inference_steps` is below 1, or the
                scheduler is a flow-matching one.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            batch_size,
            guidance_scale,
            class_guidance_scale,
            guide,
            guidance_interval,
            num_inference_steps,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = guidance_scale
        self._class_guidance_scale = class_guidance_scale if guide is None else class_guidance_scale or 1.0
        guidance = None if guide is None else Autoguidance(guide, self, guidance_scale, guidance_interval)
        self._interrupt = False

        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        class_labels = self.encode_class_labels(class_labels, batch_size).to(device)
        if guidance is not None:
            guidance.check_class_labels(class_labels)
        self.scheduler.set_timesteps(self._choose_steps(num_inference_steps), device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        sample = self.prepare_latents(len(class_labels), generator, latents, dtype)
        if self.do_classifier_free_guidance:
            null_class = 0 if class_labels.is_floating_point() else self.num_classes
            class_labels = torch.cat([torch.full_like(class_labels, null_class), class_labels])
        channels = self.unet.config.in_channels
        uses_variance = takes_learned_variance(self.scheduler)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"eta": eta, "generator": generator}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in accepted}

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # pyright: ignore[reportArgumentType, reportCallIssue]
            if self.interrupt:
                continue
            use_null_class = self.do_classifier_free_guidance and is_in_interval(guidance_interval, self.scheduler, t)
            active_guidance = guidance if guidance is not None and guidance.is_active(t) else None
            conditional_labels: torch.Tensor = class_labels[-len(sample) :]  # pyright: ignore
            scaled = self.scheduler.scale_model_input(sample, t)
            model_input = (torch.cat([scaled, scaled]) if use_null_class else scaled).to(self.unet.dtype)
            labels = class_labels if use_null_class else conditional_labels
            predictions = self.unet(model_input, t, class_labels=labels, return_dict=False)[0].to(dtype)
            conditional = predictions[-len(sample) :]
            output = conditional.clone()  # with a learned variance in further channels, which is not guided
            if use_null_class:
                unconditional = predictions[: len(sample)]
                guided = unconditional + self.class_guidance_scale * (conditional - unconditional)
                output[:, :channels] = guided[:, :channels]
            if active_guidance is not None:
                output += active_guidance.update(conditional, scaled, t, conditional_labels)
            if "use_clipped_model_output" in accepted:
                # Guided predictions leave the range of images. Where DDIM clips the predicted image, the noise must be
                # recomputed from the clipped one; otherwise the two are inconsistent and lead away from the training
                # data.
                step_kwargs["use_clipped_model_output"] = use_null_class or active_guidance is not None
            if not uses_variance:
                output = output[:, :channels]
            sample = self.scheduler.step(output, t, sample, **step_kwargs).prev_sample

            if callback_on_step_end is not None:
                available = {"latents": sample, "class_labels": class_labels}
                callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                sample = callback_outputs.get("latents", sample)
                class_labels = callback_outputs.get("class_labels", class_labels)

        self.maybe_free_model_hooks()

        images = sample
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)  # pyright: ignore[reportArgumentType]

    def _choose_steps(self, num_inference_steps: int | None) -> int:
        """Return the number of steps, and warn once if a few-step pipeline was not trained for it."""
        config = self.scheduler.config
        trained = config.get("_num_inference_steps")
        steps = num_inference_steps or (trained[0] if trained else min(50, config.num_train_timesteps))
        if trained and not (steps in trained and isinstance(self.scheduler, DDPMScheduler)):
            _warn_once(
                f"This pipeline was trained for num_inference_steps={' or '.join(map(str, trained))} with "
                f"DDPMScheduler (posterior steps); num_inference_steps={steps} with {type(self.scheduler).__name__} "
                "may give worse images."
            )
        return steps


class Autoguidance:
    """Guidance of a network by a worse version of itself ([arXiv 2406.02507](https://arxiv.org/abs/2406.02507)).

    The guided prediction is guide + scale (prediction - guide) = prediction + (scale - 1) (prediction - guide). It is
    the same in terms of the noise, the clean image or v, so a guide that predicts another of these is converted at the
    same noise level.

    Args:
        guide (`DiffusionPipeline`): The worse model, a pipeline with a `unet` and a `scheduler`.
        pipe (`DiffusionPipeline`): The pipeline that it guides.
        scale (`float`): The scale, at least 1 (no guidance).
        interval (`tuple[float, float]`, *optional*): The noise levels with guidance, as in `__call__` above.

    Raises:
        `ValueError`: If the guide was trained for other images, classes or noise levels, one of the two networks is
            that of a Denoising Diffusion GAN, or the scale or interval is invalid.
    """

    def __init__(
        self,
        guide: DiffusionPipeline,
        pipe: DiffusionPipeline,
        scale: float,
        interval: Sequence[float] | None = None,
    ):
        if not scale >= 1:
            raise ValueError(
                f"The scale of autoguidance is {scale}, but must be at least 1: 1 means no guidance, and with a "
                "smaller scale the samples would become more like those of the worse model."
            )
        check_interval(interval, pipe.scheduler)
        networks = [name for name, part in guide.components.items() if isinstance(part, torch.nn.Module)]
        if networks != ["unet"] or "scheduler" not in guide.components:
            raise ValueError(
                f"A {type(guide).__name__} with the components {', '.join(sorted(guide.components))} cannot guide "
                "another pipeline: a guide needs a `scheduler` and, as the only network, a `unet`."
            )
        for part in (pipe, guide):
            if part.unet.config.get("latent_dim"):
                raise ValueError(
                    f"Autoguidance does not work with the {type(part.unet).__name__} of a Denoising Diffusion GAN, "
                    "which generates an image from a latent z instead of predicting the mean of all possible ones."
                )
        _check_has_noise_levels(pipe.scheduler)
        self.unet, self.scheduler, self.scale, self.interval = guide.unet, pipe.scheduler, scale, interval
        self.channels = pipe.unet.config.in_channels
        self.prediction_types = [_prediction_type(part.scheduler) for part in (guide, pipe)]
        theirs, ours = _image_facts(guide.unet), _image_facts(pipe.unet)
        if count_classes(guide.unet) is None:  # like the null class, it guides away from images of any class
            theirs["classes"] = ours["classes"]
        if not (guide.unet.config.get("id2label") and pipe.unet.config.get("id2label")):
            theirs["class names"] = ours["class names"]
        if differing := [name for name in ours if ours[name] != theirs[name]]:
            raise ValueError(
                "The guide was trained for something else than the pipeline that it should guide: "
                + "; ".join(f"its {name}: {theirs[name]} instead of {ours[name]}" for name in differing)
                + ". Use an earlier checkpoint of the same run, or a smaller network trained on the same images with "
                "the same noise schedule."
            )
        alphas = [getattr(part.scheduler, "alphas_cumprod", torch.empty(0)).cpu().double() for part in (guide, pipe)]
        if alphas[0].shape != alphas[1].shape or not torch.allclose(*alphas, rtol=1e-3, atol=1e-6):
            theirs, ours = (
                f"{len(alpha)} timesteps, beta_schedule {part.scheduler.config.get('beta_schedule')}"
                for alpha, part in zip(alphas, (guide, pipe), strict=True)
            )
            raise ValueError(
                f"The guide was trained with another noise schedule ({theirs}) than the pipeline that it should guide "
                f"({ours}), so that a timestep is another noise level. Use a guide with the same noise schedule."
            )

    def check_class_labels(self, class_labels: torch.Tensor) -> None:
        """Check that the guide takes the encoded labels of the pipeline.

        Raises:
            `ValueError`: If it does not take contexts, or has no null class although there is one among the labels.
        """
        count = count_classes(self.unet)
        if count is None:
            return
        if class_labels.is_floating_point() and not self.unet.config.get("n_cfeat"):
            raise ValueError(f"The guide is a {type(self.unet).__name__}, which takes no contexts: pass class labels.")
        if not class_labels.is_floating_point() and (class_labels == count).any() and not self._has_null_class:
            raise ValueError(
                f"`class_labels` holds {count}, the null class, which the guide does not have: it was trained without "
                "class dropout."
            )

    @property
    def _has_null_class(self) -> bool:
        return bool(self.unet.config.get("class_dropout"))

    def is_active(self, t: torch.Tensor | float) -> bool:
        """Return whether there is guidance at a timestep."""
        return self.scale > 1 and is_in_interval(self.interval, self.scheduler, t)

    def update(
        self,
        prediction: torch.Tensor,
        model_input: torch.Tensor,
        t: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return (scale - 1) (prediction - guide); zero for further channels of the prediction, the learned variance.

        Args:
            prediction (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Output of the guided network.
            model_input (`torch.Tensor`): Its input, noisy images at the scale of the network.
            t (`torch.Tensor`): The timestep.
            class_labels (`torch.Tensor`, *optional*): Its class labels.
        """
        condition = {} if count_classes(self.unet) is None else {"class_labels": class_labels}
        output = self.unet(model_input.to(self.unet.dtype), t, **condition, return_dict=False)[0]
        output = self._convert(output[:, : self.channels].to(prediction.dtype), model_input, t)
        difference = torch.zeros_like(prediction)
        difference[:, : self.channels] = prediction[:, : self.channels] - output
        return (self.scale - 1) * difference

    def _convert(self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Convert a prediction at x = signal x_0 + noise epsilon to what the guided network predicts."""
        source, target = self.prediction_types
        if source == target:
            return output
        sigma = noise_level(self.scheduler, t)
        signal, noise = 1 / math.hypot(1, sigma), math.sin(math.atan(sigma))  # 0 and 1 for an infinite sigma
        x_0 = output
        if source == "epsilon":
            x_0 = (x - noise * output) / signal
        elif source == "v_prediction":
            x_0 = signal * x - noise * output
        if target == "epsilon":
            return (x - signal * x_0) / noise
        return (signal * x - x_0) / noise if target == "v_prediction" else x_0


def takes_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler takes a learned variance in further channels of the prediction."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in ("learned", "learned_range")


def noise_level(scheduler: SchedulerMixin, t: torch.Tensor | float) -> float:
    """Return the standard deviation of the noise at a timestep, relative to images in [-1, 1].

    It is sigma = sqrt((1 - alpha_bar) / alpha_bar), interpolated between timesteps like the sigmas of schedulers.
    """
    alphas = scheduler.alphas_cumprod.cpu().double().numpy()
    with np.errstate(divide="ignore"):  # pure noise, whose sigma is infinite
        log_sigmas = (np.log1p(-alphas) - np.log(alphas)) / 2
    return math.exp(np.interp(float(t), range(len(alphas)), log_sigmas))


def check_interval(interval: Sequence[float] | None, scheduler: SchedulerMixin) -> None:
    """Check a `guidance_interval`.

    Raises:
        `ValueError`: If it is not a pair of noise levels 0 <= low < high, or the scheduler does not define them.
    """
    if interval is None:
        return
    if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
        raise ValueError(
            f"`guidance_interval` is {tuple(interval)}, but must be two noise levels (low, high), 0 <= low < high: "
            "standard deviations of the noise relative to images in [-1, 1], such as (0.2, 5)."
        )
    _check_has_noise_levels(scheduler)


def is_in_interval(interval: Sequence[float] | None, scheduler: SchedulerMixin, t: torch.Tensor | float) -> bool:
    """Return whether the noise level of a timestep is in an interval (low, high]; None means all."""
    return interval is None or interval[0] < noise_level(scheduler, t) <= interval[1]


def _check_has_noise_levels(scheduler: SchedulerMixin) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"A {type(scheduler).__name__} does not define its noise levels by `alphas_cumprod`, which a guide and a "
            "`guidance_interval` need. Use DDPM, DDIM, DPM-Solver++, UniPC or Euler."
        )


def _image_facts(unet: ModelMixin) -> dict[str, object]:
    """Return what two networks must agree on, by its name in errors."""
    size, id2label = unet.config.sample_size, unet.config.get("id2label") or {}
    pairs = id2label.items() if isinstance(id2label, dict) else enumerate(id2label)
    return {
        "image size (height, width)": (size, size) if isinstance(size, int) else tuple(size),
        "channels": unet.config.in_channels,
        "classes": count_classes(unet),
        "class names": [name for _, name in sorted((int(label), name) for label, name in pairs)],
    }


def count_classes(unet: ModelMixin) -> int | None:
    """Return the number of classes, excluding the null class; None if the network is not class-conditional."""
    sizes = (unet.config.get(name) for name in ("num_classes", "n_cfeat", "num_class_embeds"))
    return next(filter(None, sizes), None)


def _prediction_type(scheduler: SchedulerMixin) -> str:
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"A {type(scheduler).__name__} with the prediction type {prediction_type!r} does not support "
            f"autoguidance, which needs one of {', '.join(map(repr, PREDICTION_TYPES))}."
        )
    return prediction_type


@functools.cache
def _warn_once(message: str):
    logger.warning(message)
