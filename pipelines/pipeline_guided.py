"""Guided sampling from any pixel-space diffusion model, by the gradient of a loss on the predicted image."""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepInverseScheduler,
    DPMSolverSinglestepScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda alpha_bar: 1.0,
    "alpha_bar": lambda alpha_bar: alpha_bar,
    "sqrt_alpha_bar": lambda alpha_bar: alpha_bar**0.5,
    "sqrt_one_minus_alpha_bar": lambda alpha_bar: (1 - alpha_bar) ** 0.5,
}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
DEFAULT_STEPS = 40

logger = logging.getLogger(__name__)


@dataclass
class GuidedPipelineOutput(BaseOutput):
    """Output class for guided pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The generated images, in the format of `output_type`.
        guidance_losses (`torch.Tensor` of shape `(num_inference_steps, batch_size)`):
            The loss of each image's predicted x_0 at each step, before the guidance update; NaN at unguided steps.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    guidance_losses: torch.Tensor

    def plot_losses(self) -> "Figure":
        """Plot the loss of each image over the steps (thin lines) and their mean. Requires matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axes = figure.subplots()
        axes.plot(self.guidance_losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(self.guidance_losses.mean(1), color="tab:blue", linewidth=2, label="mean")
        axes.set(xlabel="step", ylabel="loss of the predicted image")
        axes.legend()
        return figure


class GuidedPipeline(DiffusionPipeline):
    """Pipeline for sampling from a pixel-space diffusion model with guidance by a loss on the predicted image.

    At each step the loss is computed on the network's prediction of the clean image x_0, the sample is updated by
    minus the loss gradient times a scale, and the scheduler steps as usual. This guidance by a function of x_0
    ([Universal Guidance](https://arxiv.org/abs/2302.07121)) needs no classifier trained on noisy images. With a scale
    of zero the samples are the same as without guidance.

    The gradient is taken, and the sample updated, at the scale of the network's input, sqrt(alpha_bar) x_0 +
    sqrt(1 - alpha_bar) noise, so that a guidance scale means the same for schedulers that scale their samples
    differently (Euler). Where the scheduler clips or thresholds x_0, the loss sees the clipped image and the gradient
    passes straight through the clipping, so that it can bring a clipped pixel back.

    With a `guide`, a worse version of the network, there is also
    [autoguidance](https://arxiv.org/abs/2406.02507): the prediction is guide + autoguidance_scale (prediction -
    guide), and the loss sees the predicted image that follows from it.

    This pipeline inherits from [`DiffusionPipeline`].

    Args:
        unet (`ModelMixin`):
            A network that takes a sample and a timestep, and optionally `class_labels` and the latent `z` of a
            Denoising Diffusion GAN (of length `config.latent_dim`), which is generated at each step.
        scheduler (`SchedulerMixin`):
            A scheduler that evaluates the network once per step and knows its prediction of x_0: it has
            `alphas_cumprod` and a `prediction_type` of `"epsilon"`, `"sample"` or `"v_prediction"`. Tested with DDIM,
            DDPM, DPM-Solver++ (multistep), UniPC, DEIS, Euler, Euler ancestral and DDGAN.

    Raises:
        `ValueError`: If the network requires other inputs.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar = ["latents"]
    # `Autoguidance` of pipeline_class_conditional.py where the package ddgan is installed: this file travels alone
    _autoguidance: ClassVar[Any] = None

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        parameters = _forward_parameters(unet).items()
        required = {name for name, parameter in parameters if parameter.default is inspect.Parameter.empty}
        unsupported = required - {"sample", "timestep", "z", "class_labels", "args", "kwargs"}
        if unsupported:
            raise ValueError(
                f"A {type(unet).__name__} requires {', '.join(sorted(unsupported))}, which this pipeline does not "
                "pass. Use a network that takes a sample, a timestep and optionally class labels."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline) -> "GuidedPipeline":
        """Create a guided pipeline from an unconditional or class-conditional one, sharing network and scheduler.

        Args:
            pipeline (`DiffusionPipeline`): A pipeline with a `scheduler` and a `unet` as its only network.

        Returns:
            [`GuidedPipeline`]: The guided pipeline.

        Raises:
            `ValueError`: If the pipeline lacks `unet` or `scheduler` or has other networks, or if its scheduler does
                not support guidance.
        """
        components = pipeline.components
        networks = [name for name, part in components.items() if isinstance(part, torch.nn.Module)]
        if networks != ["unet"] or "scheduler" not in components:
            raise ValueError(
                f"A {type(pipeline).__name__} with the components {', '.join(sorted(components))} cannot be guided: "
                "guidance needs a `scheduler` and, as the only network, a `unet` that generates the images themselves."
            )
        guided = cls(components["unet"], components["scheduler"])
        guided._check_scheduler()
        return guided

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        loss: Callable[..., torch.Tensor],
        guidance_scale: float = 1.0,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        gradient: Literal["sample", "model"] = "sample",
        scale_schedule: str | Callable[[float], float] = "constant",
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        max_grad_norm: float | None = None,
        guide: DiffusionPipeline | None = None,
        autoguidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        class_labels: int | str | list | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> GuidedPipelineOutput | tuple:
        """The call function to the pipeline for generation.

        Args:
            loss (`Callable`):
                A function from images of shape `(batch_size, channels, height, width)` to one number per image, or to
                a single number; in the latter case it is called image by image. Images are in [-1, 1] if the scheduler
                clips its prediction, otherwise approximately. If the function has a parameter `step`, it receives the
                index of the step; its random numbers should depend only on that, so that an image does not depend on
                the rest of the batch.
            guidance_scale (`float`, defaults to 1.0):
                Scale of the guidance: each sample is updated by minus this times the gradient of its own loss.
            batch_size (`int`, defaults to 1): Number of images to generate.
            num_inference_steps (`int`, *optional*):
                Number of denoising steps. Defaults to the number that a few-step pipeline was trained for (the first
                of `_num_inference_steps` in the scheduler's config), otherwise to 40, or to the scheduler's
                `num_train_timesteps` if it has fewer.
            gradient (`"sample"` or `"model"`, defaults to `"sample"`):
                `"sample"` treats the network's output as a constant and differentiates only the formula that computes
                x_0 from it and the sample. (If the network predicts x_0, the equivalent v-prediction is the constant.)
                `"model"` also differentiates through the network, which is more accurate but takes the time and memory
                of a backward pass; `unet.enable_gradient_checkpointing()` reduces the memory.
            scale_schedule (`str` or `Callable`, defaults to `"constant"`):
                Factor of the guidance scale as a function of alpha_bar, the noise level at the current timestep (1 for
                no noise, 0 for pure noise): `"constant"`, `"alpha_bar"`, `"sqrt_alpha_bar"`,
                `"sqrt_one_minus_alpha_bar"`, or a custom function. See `plot_scale_schedules`.
            guidance_start (`float`, defaults to 0.0): Fraction of the steps at which guidance by the loss starts.
            guidance_end (`float`, defaults to 1.0): Fraction of the steps at which guidance by the loss ends.
            max_grad_norm (`float`, *optional*): Maximum norm of each image's gradient, which is clipped to it.
            guide (`DiffusionPipeline`, *optional*):
                A pipeline with a worse version of the network for autoguidance, as in [`ClassConditionalPipeline`].
                With `gradient="model"` the gradient also passes through its network. Needs the package ddgan.
            autoguidance_scale (`float`, defaults to 1.0):
                Scale of autoguidance, which is enabled above 1 and needs a `guide`.
            guidance_interval (`tuple[float, float]`, *optional*):
                The noise levels (low, high] at which there is autoguidance
                ([arXiv 2404.07724](https://arxiv.org/abs/2404.07724)): standard deviations of the noise relative to
                images in [-1, 1], sigma = sqrt((1 - alpha_bar) / alpha_bar). Defaults to all. The
                steps with guidance by the loss are those from `guidance_start` to `guidance_end`.
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*):
                For a class-conditional network, a class for all images or one per image: labels, names if the
                network's config has `id2label`, or contexts (a float vector for all images, or a matrix).
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Generators for all noise; with a list of one per image, image i depends on generator i only.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Standard normal noise to start from instead of generating it.
            output_type (`str`, defaults to `"pil"`):
                The output format: `"pil"` for PIL images, `"np"` for an array `(batch_size, height, width, channels)`
                in [0, 1], `"pt"` for a tensor `(batch_size, channels, height, width)` in [0, 1], or `"latent"` for the
                last sample unchanged.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`GuidedPipelineOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                A function called at the end of each step as `callback(pipe, step, timestep, callback_kwargs)`. If the
                dictionary that it returns has `"latents"`, they replace the sample; `pipe._interrupt = True` ends
                sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                The tensors to include in `callback_kwargs`.

        Returns:
            [`GuidedPipelineOutput`] or `tuple`: The generated images and their guidance losses.

        Raises:
            `ValueError`: If the scheduler does not support guidance, the guide is for other images, or an argument or
                the loss is invalid.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        size = self.unet.config.sample_size
        channels, (height, width) = self.unet.config.in_channels, (size, size) if isinstance(size, int) else size
        shape = (batch_size, channels, height, width)
        self._interrupt = False
        self.check_inputs(
            shape,
            num_inference_steps,
            gradient,
            scale_schedule,
            guidance_start,
            guidance_end,
            max_grad_norm,
            guide,
            autoguidance_scale,
            guidance_interval,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        guidance = None
        if guide is not None:
            guidance = self._autoguidance(guide, self, autoguidance_scale, guidance_interval)
        scale_at = scale_schedule if callable(scale_schedule) else SCALE_SCHEDULES[scale_schedule]

        # 1. noise levels, conditioning and initial noise
        device = self._execution_device
        # the sample stays float32 with a half-precision network, so that small updates are not rounded away
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        alpha_bars = self._set_timesteps(num_inference_steps, device)
        self._num_timesteps = len(alpha_bars)
        condition = self._encode_class_labels(class_labels, batch_size, device)
        if guidance is not None and condition:
            guidance.check_class_labels(condition["class_labels"])
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        sample = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        takes_z = "z" in _forward_parameters(self.unet)
        uses_variance = _takes_learned_variance(self.scheduler)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}

        per_image_loss = _PerImageLoss(loss)
        guidance_losses = torch.full((len(alpha_bars), batch_size), torch.nan)
        guided_steps = range(round(guidance_start * len(alpha_bars)), round(guidance_end * len(alpha_bars)))

        networks = [self.unet] if guidance is None else [self.unet, guidance.unet]
        with _frozen(*networks), self.progress_bar(total=len(alpha_bars)) as progress_bar:  # pyright: ignore[reportCallIssue]
            for i, (t, alpha_bar) in enumerate(zip(self.scheduler.timesteps, alpha_bars, strict=True)):
                if self.interrupt:
                    continue
                guided = i in guided_steps

                # 2. prediction of the network, from the sample at the scale of its input
                if takes_z:
                    z = randn_tensor((batch_size, self.unet.config.latent_dim), generator, device, torch.float32)
                    condition["z"] = z.to(self.unet.dtype)
                model_input = self.scheduler.scale_model_input(sample, t).detach().requires_grad_(guided)
                with torch.set_grad_enabled(guided and gradient == "model"):
                    output = self.unet(model_input.to(self.unet.dtype), t, **condition).sample.to(dtype)
                    active_guidance = guidance if guidance is not None and guidance.is_active(t) else None
                    if active_guidance is not None:
                        output = output + active_guidance.update(output, model_input, t, **condition)

                # 3. guidance
                if guided:
                    with torch.enable_grad():
                        x_0 = self._predict_x_0(model_input, output[:, :channels], alpha_bar, gradient)
                        losses = per_image_loss(x_0, i)
                        (grad,) = torch.autograd.grad(losses.sum(), model_input)
                    if max_grad_norm is not None:
                        norm = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True)
                        grad = grad * max_grad_norm / norm.clamp(min=max_grad_norm)
                    update = -guidance_scale * scale_at(alpha_bar) * grad
                    # x_0 must change with the sample; the scheduler does that unless the output is x_0 itself
                    if self.scheduler.config.prediction_type == "sample":
                        output = output.detach().clone()
                        output[:, :channels] += alpha_bar**0.5 * update
                    input_scale = self.scheduler.scale_model_input(torch.ones_like(sample), t)
                    sample = sample + update / input_scale
                    guidance_losses[i] = losses.detach()
                    progress_bar.set_postfix(loss=f"{guidance_losses[i].mean():.4g}")

                # 4. step
                output = output.detach()
                if not uses_variance:
                    output = output[:, :channels]
                if "use_clipped_model_output" in accepted:  # for the reason given in ClassConditionalPipeline
                    step_kwargs["use_clipped_model_output"] = active_guidance is not None
                sample = self.scheduler.step(output, t, sample, **step_kwargs).prev_sample

                if callback_on_step_end is not None:
                    available = {"latents": sample}
                    callback_kwargs = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    sample = callback_on_step_end(self, i, t, callback_kwargs).get("latents", sample)
                progress_bar.update()

        self.maybe_free_model_hooks()

        images = sample
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).float().cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        if not return_dict:
            return (images, guidance_losses)
        return GuidedPipelineOutput(images=images, guidance_losses=guidance_losses)

    def plot_scale_schedules(self, num_inference_steps: int | None = None) -> "Figure":
        """Plot the factor of each named `scale_schedule` over the steps of this pipeline's scheduler.

        Args:
            num_inference_steps (`int`, *optional*): Number of denoising steps, as in `__call__`.

        Returns:
            `matplotlib.figure.Figure`: The plot, which can be saved with `.savefig("schedules.png")`.
        """
        from matplotlib.figure import Figure

        self._check_scheduler()
        alpha_bars = self._set_timesteps(num_inference_steps, "cpu")
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        for name, schedule in SCALE_SCHEDULES.items():
            axes.plot([schedule(alpha_bar) for alpha_bar in alpha_bars], label=name)
        axes.set(xlabel="step, from noise to image", ylabel="factor of the guidance scale")
        axes.legend()
        return figure

    def check_inputs(
        self,
        shape,
        num_inference_steps,
        gradient,
        scale_schedule,
        guidance_start,
        guidance_end,
        max_grad_norm,
        guide,
        autoguidance_scale,
        guidance_interval,
        generator,
        latents,
        output_type,
        callback_on_step_end_tensor_inputs,
    ):
        self._check_scheduler()
        if torch.is_inference_mode_enabled():
            raise ValueError("Guidance needs gradients: call this pipeline outside of `torch.inference_mode`.")
        if shape[0] < 1:
            raise ValueError(f"`batch_size` is {shape[0]}, but must be at least 1.")
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but must be at least 1.")
        if gradient not in ("sample", "model"):
            raise ValueError(f"`gradient` is {gradient!r}, but must be 'sample' or 'model'.")
        if not callable(scale_schedule) and scale_schedule not in SCALE_SCHEDULES:
            raise ValueError(
                f"`scale_schedule` is {scale_schedule!r}, but must be one of {', '.join(map(repr, SCALE_SCHEDULES))} "
                "or a function of alpha_bar."
            )
        if not 0 <= guidance_start <= guidance_end <= 1:
            raise ValueError(
                f"`guidance_start` is {guidance_start} and `guidance_end` is {guidance_end}, but they must be "
                "fractions of the steps: 0 <= start <= end <= 1."
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(
                f"`max_grad_norm` is {max_grad_norm}, but must be greater than 0, or None for no clipping."
            )
        if guide is not None and self._autoguidance is None:
            raise ValueError(
                "A `guide` of a GuidedPipeline needs the package ddgan (diffusers-ddgan). Install it and load the "
                "pipeline with `ddgan.GuidedPipeline.from_pretrained`."
            )
        if guide is None and (autoguidance_scale != 1 or guidance_interval is not None):
            raise ValueError(
                "`autoguidance_scale` and `guidance_interval` are for autoguidance, which needs a `guide`: a worse "
                "version of the pipeline. Guidance by the loss is limited by `guidance_start` and `guidance_end`."
            )
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have one for each of the {shape[0]} images."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, but must have shape {shape}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs}, but only "
                f"{self._callback_tensor_inputs} are available."
            )

    def _check_scheduler(self):
        scheduler = self.scheduler
        # `from_config` keeps settings of other schedulers, so the config alone does not show which ones this one uses
        prediction_type = (
            scheduler.config.prediction_type if "prediction_type" in _init_parameters(scheduler) else None
        )
        # PNDM starts with several evaluations per step, whatever its order; the single-step solver continues from a
        # stored sample and would lose the guidance updates; inverse schedulers go from image to noise
        unsupported = PNDMScheduler | DPMSolverSinglestepScheduler
        unsupported |= DDIMInverseScheduler | DPMSolverMultistepInverseScheduler
        step_inputs = [*_forward_parameters(scheduler.step)][:3] if hasattr(scheduler, "step") else []
        steps_once = step_inputs == ["model_output", "timestep", "sample"] and not isinstance(scheduler, unsupported)
        steps_once = steps_once and getattr(scheduler, "order", None) == 1
        knows_x_0 = prediction_type in PREDICTION_TYPES and hasattr(scheduler, "alphas_cumprod")
        if not knows_x_0 or not steps_once or getattr(scheduler.config, "use_flow_sigmas", False):
            raise ValueError(
                f"A {type(scheduler).__name__} does not support guidance, which needs a scheduler that knows the "
                "predicted clean image (by `alphas_cumprod` and a `prediction_type` of 'epsilon', 'sample' or "
                "'v_prediction') and evaluates the network once per step, without flow sigmas. Use DDIM, DDPM, "
                "DPM-Solver++ (multistep), UniPC, Euler or DDGAN."
            )

    def _set_timesteps(self, num_inference_steps: int | None, device: str | torch.device) -> list[float]:
        """Set the scheduler's timesteps and return alpha_bar at each of them."""
        scheduler = self.scheduler
        scheduler.set_timesteps(self._choose_steps(num_inference_steps), device=device)
        if not hasattr(scheduler, "sigmas"):
            return scheduler.alphas_cumprod[scheduler.timesteps.cpu()].tolist()
        scheduler.set_begin_index(0)
        return [1 / (1 + sigma**2) for sigma in scheduler.sigmas[:-1].tolist()]

    def _choose_steps(self, num_inference_steps: int | None) -> int:
        """Return the number of steps, and warn once if a few-step pipeline was not trained for it."""
        config = self.scheduler.config
        trained = config.get("_num_inference_steps")
        steps = num_inference_steps or (trained[0] if trained else min(DEFAULT_STEPS, config.num_train_timesteps))
        if trained and not (steps in trained and isinstance(self.scheduler, DDPMScheduler)):
            _warn_once(
                f"This pipeline was trained for num_inference_steps={' or '.join(map(str, trained))} with "
                f"DDPMScheduler (posterior steps); num_inference_steps={steps} with {type(self.scheduler).__name__} "
                "may give worse images."
            )
        return steps

    def _encode_class_labels(self, class_labels, batch_size: int, device) -> dict[str, torch.Tensor]:
        """Return the keyword arguments that condition the network: none, integer labels or float contexts."""
        parameter, config = _forward_parameters(self.unet).get("class_labels"), self.unet.config
        if class_labels is None:
            if parameter is not None and parameter.default is inspect.Parameter.empty:
                raise ValueError(f"A {type(self.unet).__name__} is class-conditional: pass `class_labels`.")
            return {}
        if parameter is None:
            raise ValueError(f"A {type(self.unet).__name__} takes no `class_labels`: do not pass them.")
        if isinstance(class_labels, str):
            class_labels = self._get_label_id(class_labels)
        elif isinstance(class_labels, list | tuple):
            class_labels = [self._get_label_id(label) if isinstance(label, str) else label for label in class_labels]
        labels = torch.as_tensor(class_labels, device=device)
        if labels.ndim == int(labels.is_floating_point()):  # a single label or context
            labels = labels.expand(batch_size, *labels.shape)
        if len(labels) != batch_size:
            raise ValueError(f"`class_labels` has {len(labels)} entries, but `batch_size` is {batch_size}.")
        has_label_table = config.get("num_class_embeds") or config.get("num_classes")
        has_label_table = has_label_table and not config.get("class_embed_type")
        if has_label_table if labels.is_floating_point() else labels.ndim != 1:
            raise ValueError(f"`class_labels` is {class_labels}, but must be one integer per image.")
        if labels.is_floating_point():
            if (width := config.get("n_cfeat")) and labels.shape[1:] != (width,):
                raise ValueError(
                    f"`class_labels` is a context of shape {tuple(labels.shape)}, but must have {width} columns."
                )
            return {"class_labels": labels.to(self.unet.dtype)}
        num_labels = next(filter(None, map(config.get, ("num_class_embeds", "num_classes", "n_cfeat"))), None)
        if num_labels is not None:
            num_labels += bool(config.get("class_dropout"))  # the null class
            if not ((labels >= 0) & (labels < num_labels)).all():
                raise ValueError(
                    f"`class_labels` is {class_labels}, but the labels of this network are 0 to {num_labels - 1}."
                )
        return {"class_labels": labels.long()}

    def _get_label_id(self, name: str) -> int:
        id2label = self.unet.config.get("id2label") or {}
        pairs = id2label.items() if isinstance(id2label, dict) else enumerate(id2label)
        labels = {class_name: int(label) for label, class_name in pairs}
        if name not in labels:
            hint = f"Its classes are {', '.join(map(repr, labels))}." if labels else "Its config has no `id2label`."
            raise ValueError(f"This {type(self.unet).__name__} has no class {name!r}. {hint}")
        return labels[name]

    def _predict_x_0(
        self, model_input: torch.Tensor, output: torch.Tensor, alpha_bar: float, gradient: str
    ) -> torch.Tensor:
        """Solve x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise for x_0, as the scheduler's `step` does."""
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            x_0 = (model_input - noise * output) / signal
        elif prediction_type == "v_prediction":
            x_0 = signal * model_input - noise * output
        elif gradient == "sample":  # same value, with the gradient of the formula above for a constant v
            x_0 = output + signal * (model_input - model_input.detach())
        else:
            x_0 = output
        return self._clip(x_0.detach()) + (x_0 - x_0.detach())

    def _clip(self, x_0: torch.Tensor) -> torch.Tensor:
        config, parameters = self.scheduler.config, _init_parameters(self.scheduler)
        if "thresholding" in parameters and config.thresholding:  # section 2.3 of arXiv 2205.11487
            bound = x_0.abs().flatten(1).quantile(config.dynamic_thresholding_ratio, dim=1)
            bound = bound.clamp(min=1, max=config.sample_max_value).view(-1, 1, 1, 1)
            return x_0.clamp(-bound, bound) / bound
        if "clip_sample" in parameters and config.clip_sample:
            bound = config.clip_sample_range if "clip_sample_range" in parameters else 1.0
            return x_0.clamp(-bound, bound)
        return x_0


class _PerImageLoss:
    """Wrap a loss to return one number per image, even if the loss itself returns a single number."""

    def __init__(self, loss: Callable[..., torch.Tensor]):
        self.loss, self.image_by_image = loss, False
        try:
            self.takes_step = "step" in _forward_parameters(loss)
        except ValueError:  # builtins of torch have no signature
            self.takes_step = False

    def __call__(self, images: torch.Tensor, step: int) -> torch.Tensor:
        options = {"step": step} if self.takes_step else {}
        if not self.image_by_image:
            losses = self.loss(images, **options)
            self._check(losses, images)
            if losses.shape == images.shape[:1]:
                return losses
            self.image_by_image = True
        return torch.stack([self.loss(image, **options).reshape(()) for image in images.split(1)])

    @staticmethod
    def _check(losses: Any, images: torch.Tensor):
        if not torch.is_tensor(losses) or (losses.shape != images.shape[:1] and losses.numel() != 1):
            result = f"shape {tuple(losses.shape)}" if torch.is_tensor(losses) else f"a {type(losses).__name__}"
            raise ValueError(
                f"`loss` returned {result}, but must return a tensor with one number for each of the {len(images)} "
                "images, or a single number."
            )
        if not losses.requires_grad:
            raise ValueError(
                "`loss` has no gradient: it must be computed from the images by differentiable operations."
            )


@functools.cache
def _warn_once(message: str):
    logger.warning(message)


@contextmanager
def _frozen(*networks: torch.nn.Module) -> Iterator[None]:
    """Disable gradients of the parameters, which guidance does not need."""
    parameters = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _takes_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Return whether a scheduler takes a learned variance in further channels of the prediction."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in ("learned", "learned_range")


def _forward_parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function, or of the `forward` of a network, compiled or not."""
    function = getattr(function, "_orig_mod", function)
    return inspect.signature(getattr(function, "forward", function)).parameters


def _init_parameters(scheduler: SchedulerMixin) -> Mapping[str, inspect.Parameter]:
    """Return the settings that a scheduler class itself defines."""
    return inspect.signature(type(scheduler).__init__).parameters
