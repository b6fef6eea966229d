"""Sampling from a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022): a few steps of a generator and a draw."""

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
    """
    Draws pictures with a [Denoising Diffusion GAN](https://arxiv.org/abs/2112.07804).

    At each of a few timesteps the generator makes a clean picture of the noisy one and a fresh latent z, and the less
    noisy one is drawn from the posterior q(x_{t-1} | x_t, x_0) (section 3.2 of the paper).

    Args:
        unet (`NCSNpp`): the generator G(x_t, t, z), which predicts x_0.
        scheduler (`DDGANScheduler`): the noise process that it was trained with.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def check_inputs(
        self, batch_size, class_labels, generator, latents, output_type, callback_on_step_end_tensor_inputs
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}, but must be at least 1.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have one for each of the {batch_size} images "
                "that `batch_size` asks for."
            )
        shape = self._latents_shape(batch_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has the shape {tuple(latents.shape)}, but must have {shape}.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs}, but a callback can be "
                f"given only {self._callback_tensor_inputs}."
            )

        classes = self.unet.config.num_class_embeds
        if classes is None:
            if class_labels is not None:
                raise ValueError("This network is not conditioned on a class: leave `class_labels` out.")
            return
        try:
            labels = torch.as_tensor(class_labels)
            fit = labels.shape == (batch_size,) and torch.can_cast(labels.dtype, torch.int64)
            fit = fit and labels.min() >= 0 and labels.max() < classes
        except (TypeError, ValueError, RuntimeError):  # no numbers at all
            fit = False
        if not fit:
            raise ValueError(
                f"`class_labels` is {class_labels}, but must have one integer from 0 to {classes - 1} for each of the "
                f"{batch_size} images that `batch_size` asks for."
            )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: list[int] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray | torch.Tensor]:
        """
        Draws `batch_size` pictures.

        Noise is drawn in float32 in this order: x_T, then for each step z and, except at the last, the posterior's.
        The sample is kept in float32; the network alone runs in its own dtype.

        Args:
            batch_size (`int`, defaults to 1): number of pictures.
            class_labels (`list[int]` or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                A class for each picture; needed exactly if the network is conditioned on a class.
            num_inference_steps (`int`, *optional*, defaults to all that were trained): number of steps.
            timesteps (`list[int]`, *optional*): instead of a number, the timesteps themselves, descending.
            generator (`torch.Generator` or a list of `batch_size` of them, *optional*):
                Source of all noise; with a list, picture i depends on generator i alone.
            latents (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`, *optional*):
                x_T, standard normal, in place of that drawn first.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`: PIL images; `"np"`: an array `(batch_size, height, width, channels)` in [0, 1]; `"pt"`: a
                tensor `(batch_size, channels, height, width)` in [0, 1]; `"latent"`: that tensor as the network
                makes it, in [-1, 1].
            return_dict (`bool`, defaults to `True`): an [`ImagePipelineOutput`] or a tuple of its images.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; what the dictionary that
                it returns has under `"latents"` takes the place of the sample.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): what `callback_kwargs` holds.

        Raises:
            `ValueError`: if an argument does not fit the network, the scheduler or `batch_size`.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            batch_size, class_labels, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        self.scheduler.set_timesteps(num_inference_steps, timesteps=timesteps)

        device, dtype = self._execution_device, self.unet.dtype
        if class_labels is not None:
            class_labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device)
        if latents is None:
            shape = self._latents_shape(batch_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32)
        z_shape = (batch_size, self.unet.config.latent_dim)
        on_device = self.scheduler.timesteps.to(device)  # all at once: a copy waits for what the device has to do

        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            z = randn_tensor(z_shape, generator=generator, device=device, dtype=torch.float32)
            x_0 = self.unet(latents.to(dtype), on_device[i], z.to(dtype), class_labels=class_labels).sample
            latents = self.scheduler.step(x_0, t, latents, generator=generator).prev_sample

            if callback_on_step_end is not None:
                available = {"latents": latents}
                chosen = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                latents = callback_on_step_end(self, i, t, chosen).get("latents", latents)

        self.maybe_free_model_hooks()

        images = latents
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _latents_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (batch_size, self.unet.config.in_channels, height, width)
