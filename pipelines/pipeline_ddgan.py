"""Few-step image generation with Denoising Diffusion GANs (Xiao, Kreis, Vahdat, ICLR 2022)."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class DDGANPipeline(DiffusionPipeline):
    """Pipeline for image generation with a [Denoising Diffusion GAN](https://arxiv.org/abs/2112.07804).

    At each of a few timesteps the generator predicts the clean image x_0 from the noisy image x_t and a new latent z,
    and the less noisy image is sampled from the posterior q(x_{t-1} | x_t, x_0) (section 3.2 of the paper).

    This pipeline inherits from [`DiffusionPipeline`].

    Args:
        unet (`NCSNpp`): The generator G(x_t, t, z), which predicts x_0.
        scheduler (`DDGANScheduler`): The noise process that the generator was trained with.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def labels(self) -> dict[str, int]:
        """The label of each class name; empty if the network's config has no `id2label`."""
        id2label = self.unet.config.get("id2label") or {}
        pairs = id2label.items() if isinstance(id2label, dict) else enumerate(id2label)
        return {name: int(label) for label, name in pairs}

    def check_inputs(
        self,
        batch_size,
        class_labels,
        eta,
        generator,
        z_generator,
        latents,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
        if eta < 0:
            raise ValueError(f"`eta` is {eta}, but must be at least 0.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        for name, value in (("generator", generator), ("z_generator", z_generator)):
            if isinstance(value, list) and len(value) != batch_size:
                raise ValueError(
                    f"`{name}` is a list of {len(value)}, but must have one for each of the {batch_size} images."
                )
        shape = self._latents_shape(batch_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but must have shape {shape}.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs}, but only "
                f"{self._callback_tensor_inputs} are available."
            )

        num_classes = self.unet.config.num_class_embeds
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("This network is not conditioned on a class: do not pass `class_labels`.")
            return
        try:
            labels = torch.as_tensor(class_labels)
            valid = labels.shape == (batch_size,) and torch.can_cast(labels.dtype, torch.int64)
            valid = valid and labels.min() >= 0 and labels.max() < num_classes
        except (TypeError, ValueError, RuntimeError):  # not numbers
            valid = False
        if not valid:
            raise ValueError(
                f"`class_labels` is {class_labels}, but must have one integer from 0 to {num_classes - 1}"
                + (f", or one of the names {', '.join(self.labels)}," if self.labels else "")
                + f" for each of the {batch_size} images."
            )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | str | list[int] | list[str] | list[int | str] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        z_generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | torch.Tensor]:
        """The call function to the pipeline for generation.

        Noise is generated in float32 in this order: x_T, then for each step z and, except at the last step or with
        `eta` 0, the noise of the posterior. The sample stays in float32; only the network runs in its own dtype.

        Args:
            batch_size (`int`, *optional*):
                Number of images to generate; defaults to the number of `class_labels`, or 1.
            class_labels (`int`, `str`, `list[int]`, `list[str]` or `torch.Tensor`, *optional*):
                The class of each image, as a label or, if the network's config has `id2label`, as a name; a single one
                is used for all images. Required if and only if the network is class-conditional.
            num_inference_steps (`int`, *optional*, defaults to the scheduler's `num_train_timesteps`):
                Number of denoising steps.
            timesteps (`list[int]`, *optional*): Custom timesteps in descending order, instead of a number of steps.
            eta (`float`, defaults to 1.0):
                Factor of the posterior's standard deviation, at least 0; with 0, each step takes the posterior's mean,
                and only x_T and z are random. Values above 1 give samples with more variety, of which fewer are good.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Generators for all noise; with a list of one per image, image i depends on generator i only.
            z_generator (`torch.Generator` or `list[torch.Generator]`, *optional*, defaults to `generator`):
                Generators for z instead, which leave x_T and the noise of the posterior to `generator`: with the same
                `generator`, images then differ in z only, and with the same `z_generator`, in all other noise only.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                Standard normal noise to use as x_T instead of generating it.
            output_type (`str`, defaults to `"pil"`):
                The output format: `"pil"` for PIL images, `"np"` for an array `(batch_size, height, width, channels)`
                in [0, 1], `"pt"` for a tensor `(batch_size, channels, height, width)` in [0, 1], or `"latent"` for
                that tensor as the network returns it, in [-1, 1].
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                A function called at the end of each step as `callback(pipe, step, timestep, callback_kwargs)`. If the
                dictionary that it returns has `"latents"`, they replace the sample; `pipe._interrupt = True` ends
                sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors to include in `callback_kwargs`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`: The generated images.

        Raises:
            `ValueError`: If an argument is not compatible with the network, the scheduler or `batch_size`.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if isinstance(class_labels, int | str) or (torch.is_tensor(class_labels) and class_labels.ndim == 0):
            class_labels = [class_labels] * (1 if batch_size is None else batch_size)  # pyright: ignore[reportAssignmentType]
        if batch_size is None:
            batch_size = 1 if class_labels is None else len(class_labels)  # pyright: ignore[reportArgumentType]
        if isinstance(class_labels, list):
            class_labels = [
                self.labels.get(label, label) if isinstance(label, str) else label for label in class_labels
            ]
        self.check_inputs(
            batch_size,
            class_labels,
            eta,
            generator,
            z_generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._interrupt = False
        self.scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)
        self._num_timesteps = len(self.scheduler.timesteps)

        device, dtype = self._execution_device, self.unet.dtype
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device)
        if latents is None:
            shape = self._latents_shape(batch_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        sample = latents.to(device, torch.float32)
        z_generator = generator if z_generator is None else z_generator
        z_shape = (batch_size, self.unet.config.latent_dim)
        device_timesteps = self.scheduler.timesteps.to(device)  # one copy, because each one waits for the device

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):  # pyright: ignore[reportArgumentType, reportCallIssue]
            if self.interrupt:
                continue
            z = randn_tensor(z_shape, generator=z_generator, device=device, dtype=torch.float32)
            x_0 = self.unet(sample.to(dtype), device_timesteps[i], z.to(dtype), class_labels=class_labels).sample
            sample = self.scheduler.step(x_0, t, sample, generator=generator, eta=eta).prev_sample

            if callback_on_step_end is not None:
                available = {"latents": sample}
                callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                sample = callback_on_step_end(self, i, t, callback_kwargs).get("latents", sample)

        self.maybe_free_model_hooks()

        images = sample
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)  # pyright: ignore[reportArgumentType]

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (batch_size, self.unet.config.in_channels, height, width)
