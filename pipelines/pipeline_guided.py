"""Guided sampling: any pixel diffusion model, pulled at each step towards what a loss on its pictures asks for."""

import inspect
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


@dataclass
class GuidedPipelineOutput(BaseOutput):
    """
    Pictures, and how their losses went.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): by `output_type`, one for each sample.
        guidance_losses (`torch.Tensor` of shape `(num_inference_steps, batch_size)`):
            The loss of each image's predicted x_0 at each step, before it was moved; not a number where a step was
            not guided.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    guidance_losses: torch.Tensor

    def plot_losses(self) -> "Figure":
        """Draws the loss of each image over the steps (thin lines) and their mean; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axes = figure.subplots()
        axes.plot(self.guidance_losses, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(self.guidance_losses.mean(1), color="tab:blue", linewidth=2, label="mean")
        axes.set(xlabel="step", ylabel="loss of the predicted picture")
        axes.legend()
        return figure


class GuidedPipeline(DiffusionPipeline):
    """
    Samples from a diffusion model of pictures while a loss pulls the sample.

    At each step the network's prediction of the clean picture x_0 goes into the loss, the sample is moved by minus
    the loss's gradient times a scale, and then stepped as ever: guidance by the gradient of a function of x_0
    ([Universal Guidance](https://arxiv.org/abs/2302.07121)), without a classifier trained on noisy
    pictures. With a scale of zero it samples as the scheduler alone does.

    The gradient is taken, and the sample moved, at the scale at which the network sees it, sqrt(alpha_bar) x_0 +
    sqrt(1 - alpha_bar) noise. So a scale means the same for schedulers that keep their samples at another one (Euler).
    Where the scheduler clips or thresholds x_0, the loss sees the clipped picture, and its gradient passes through
    the clip as if there were none: it can bring a pixel back.

    Args:
        unet (`ModelMixin`):
            Called with the sample, the timestep, and what else its `forward` takes of: `class_labels`, and the latent
            `z` of length `config.latent_dim` of a Denoising Diffusion GAN, which is drawn anew at each step.
        scheduler (`SchedulerMixin`):
            One that steps once for each evaluation of the network and knows its prediction of x_0: it has
            `alphas_cumprod`, and a `prediction_type` of `"epsilon"`, `"sample"` or `"v_prediction"`. Tested are
            DDIM, DDPM, DPM-Solver++ (multistep), UniPC, DEIS, Euler, Euler ancestral and DDGAN.

    Raises:
        `ValueError`: for a network that needs other inputs, and for a scheduler that does not know its x_0.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin):
        super().__init__()
        needed = [name for name, parameter in _inputs(unet).items() if parameter.default is inspect.Parameter.empty]
        others = set(needed) - {"sample", "timestep", "z", "class_labels", "args", "kwargs"}
        if others:
            raise ValueError(
                f"A {type(unet).__name__} needs {', '.join(sorted(others))}. Guided here are networks that take a "
                "sample, a timestep and at most class labels."
            )
        self.register_modules(unet=unet, scheduler=scheduler)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline) -> "GuidedPipeline":
        """
        Makes a guided pipeline of any unconditional or class-conditional one; they share network and scheduler.

        Raises:
            `ValueError`: for a pipeline without `unet` and `scheduler`, or with other networks beside them, and for a
                scheduler that does not know its x_0.
        """
        components = pipeline.components
        networks = [name for name, part in components.items() if isinstance(part, torch.nn.Module)]
        if networks != ["unet"] or "scheduler" not in components:
            raise ValueError(
                f"A {type(pipeline).__name__} of {', '.join(sorted(components))} cannot be guided: it takes a "
                "`scheduler` and one network, a `unet`, whose samples are the pictures themselves."
            )
        guided = cls(components["unet"], components["scheduler"])
        guided._check_scheduler()
        return guided

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
        class_labels: int | str | list | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
    ) -> GuidedPipelineOutput | tuple:
        """
        Draws pictures.

        Args:
            loss (callable):
                From images of shape `(batch_size, channels, height, width)` to one number for each, or to one for
                all; the latter is then called image by image. Images are in [-1, 1] where the scheduler clips its
                prediction, else about there. If it has a parameter `step`, it is told the step, from 0 on: what it
                draws at random should depend on that alone, so that an image does not depend on its neighbours.
            guidance_scale (`float`, defaults to 1.0):
                The sample moves by minus this times the gradient of its own loss.
            batch_size (`int`, defaults to 1): how many pictures.
            num_inference_steps (`int`, *optional*): defaults to 40, or all of a process that has fewer.
            gradient (`"sample"` or `"model"`, defaults to `"sample"`):
                `"sample"` runs the network without gradients and takes its output for a constant: x_0 depends on the
                sample through the formula that gives x_0 from both. (A network that predicts x_0 itself is taken for
                the v-prediction that it amounts to.) `"model"` differentiates through the network too: more exact,
                for the memory and time of a backward pass; less memory after `unet.enable_gradient_checkpointing()`.
            scale_schedule (`str` or callable, defaults to `"constant"`):
                What the scale is multiplied with, a function of alpha_bar, the noise level at the current timestep
                (1: no noise, 0: noise alone): `"constant"`, `"alpha_bar"`, `"sqrt_alpha_bar"`,
                `"sqrt_one_minus_alpha_bar"`, or one of your own. See `plot_scale_schedules`.
            guidance_start (`float`, defaults to 0.0): the share of the steps before which none is guided.
            guidance_end (`float`, defaults to 1.0): the share of the steps after which none is guided.
            max_grad_norm (`float`, *optional*): each image's gradient is scaled down to this norm.
            class_labels (`int`, `str`, `list` or `torch.Tensor`, *optional*):
                For a class-conditional network: a class for all or one for each, by label or, where its config has
                `id2label`, by name; or contexts: a float vector for all or a matrix.
            generator (`torch.Generator` or a list of them, *optional*): with a list, image i depends on generator i.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Standard normal noise to begin with, in place of drawn noise.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` (batch, height, width, channels), `"pt"` (batch, channels, height, width), both in
                [0, 1], or `"latent"`: the last sample as it is.
            return_dict (`bool`, defaults to `True`): a [`GuidedPipelineOutput`] or the tuple of its two fields.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipe, step, timestep, callback_kwargs)`; what the dictionary that
                it returns has under `"latents"` takes the place of the sample. `pipe._interrupt = True` ends sampling.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): what `callback_kwargs` holds.

        Raises:
            `ValueError`: for a scheduler that does not know its x_0, and for arguments or a loss that do not fit.
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
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        scale_at = scale_schedule if callable(scale_schedule) else SCALE_SCHEDULES[scale_schedule]

        # 1. the levels of the way, what the network is told, and the noise to begin with
        device = self._execution_device
        # the sample stays float32 beside a network in half precision, so that small moves are not rounded away
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        alpha_bars = self._set_timesteps(num_inference_steps, device)
        condition = self._class_condition(class_labels, batch_size, device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        takes_z = "z" in _inputs(self.unet)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_options = {"generator": generator} if takes_generator else {}

        loss_of_each = _LossOfEach(loss)
        guidance_losses = torch.full((len(alpha_bars), batch_size), torch.nan)
        first, end = round(guidance_start * len(alpha_bars)), round(guidance_end * len(alpha_bars))

        with _frozen(self.unet), self.progress_bar(total=len(alpha_bars)) as progress_bar:
            for i, (t, alpha_bar) in enumerate(zip(self.scheduler.timesteps, alpha_bars, strict=True)):
                if self.interrupt:
                    continue
                guided = first <= i < end

                # 2. what the network predicts from the sample at the scale at which it sees it
                if takes_z:
                    z = randn_tensor((batch_size, self.unet.config.latent_dim), generator, device, torch.float32)
                    condition["z"] = z.to(self.unet.dtype)
                seen = self.scheduler.scale_model_input(latents, t).detach().requires_grad_(guided)
                with torch.set_grad_enabled(guided and gradient == "model"):
                    output = self.unet(seen.to(self.unet.dtype), t, **condition).sample.to(dtype)

                # 3. the pull of the loss
                if guided:
                    with torch.enable_grad():
                        x_0 = self._predict_x_0(seen, output[:, :channels], alpha_bar, gradient)
                        losses = loss_of_each(x_0, i)
                        (grad,) = torch.autograd.grad(losses.sum(), seen)
                    if max_grad_norm is not None:
                        norm = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True)
                        grad = grad * max_grad_norm / norm.clamp(min=max_grad_norm)
                    move = -guidance_scale * scale_at(alpha_bar) * grad
                    # x_0 moves with the sample: the scheduler sees to that unless the output is x_0 itself
                    if self.scheduler.config.prediction_type == "sample":
                        output = output.detach().clone()
                        output[:, :channels] += alpha_bar**0.5 * move
                    unit = self.scheduler.scale_model_input(torch.ones_like(latents), t)
                    latents = latents + move / unit
                    guidance_losses[i] = losses.detach()
                    progress_bar.set_postfix(loss=f"{guidance_losses[i].mean():.4g}")

                # 4. the step, which of a learned variance DDPM alone makes use
                output = output.detach()
                if not isinstance(self.scheduler, DDPMScheduler):
                    output = output[:, :channels]
                latents = self.scheduler.step(output, t, latents, **step_options).prev_sample

                if callback_on_step_end is not None:
                    available = {"latents": latents}
                    chosen = {name: available[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, chosen).get("latents", latents)
                progress_bar.update()

        self.maybe_free_model_hooks()

        images = latents
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
        """
        Draws what each named `scale_schedule` multiplies the scale with, over the steps of this pipeline's scheduler.

        Args:
            num_inference_steps (`int`, *optional*): as in the call.

        Returns:
            A `matplotlib.figure.Figure`: `.savefig("schedules.png")`.
        """
        from matplotlib.figure import Figure

        self._check_scheduler()
        alpha_bars = self._set_timesteps(num_inference_steps, "cpu")
        figure = Figure(layout="constrained")
        axes = figure.subplots()
        for name, schedule in SCALE_SCHEDULES.items():
            axes.plot([schedule(alpha_bar) for alpha_bar in alpha_bars], label=name)
        axes.set(xlabel="step, from noise to picture", ylabel="factor of the guidance scale")
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
                f"`guidance_start` is {guidance_start} and `guidance_end` {guidance_end}, but they must be shares of "
                "the steps: 0 <= start <= end <= 1."
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"`max_grad_norm` is {max_grad_norm}, but must be greater than 0, or None for no bound.")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but must have one for each of the {shape[0]} images that "
                "`batch_size` asks for."
            )
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has the shape {tuple(latents.shape)}, but must have {shape}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` is {output_type!r}, but must be 'pil', 'np', 'pt' or 'latent'.")
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` is {callback_on_step_end_tensor_inputs}, but a callback can be "
                f"given only {self._callback_tensor_inputs}."
            )

    def _check_scheduler(self):
        scheduler = self.scheduler
        # `from_config` keeps what other schedulers were configured with, so that the config alone says nothing
        prediction_type = scheduler.config.prediction_type if "prediction_type" in _settings(scheduler) else None
        # PNDM begins with several evaluations a step, whatever its order says; the single-step solver goes on from a
        # sample that it kept, without what moved since; inverse ones lead to the noise
        others = PNDMScheduler | DPMSolverSinglestepScheduler
        others |= DDIMInverseScheduler | DPMSolverMultistepInverseScheduler
        inputs = [*_inputs(scheduler.step)][:3] if hasattr(scheduler, "step") else []
        steps_once = inputs == ["model_output", "timestep", "sample"] and not isinstance(scheduler, others)
        steps_once = steps_once and getattr(scheduler, "order", None) == 1
        knows_x_0 = prediction_type in PREDICTION_TYPES and hasattr(scheduler, "alphas_cumprod")
        if not knows_x_0 or not steps_once or getattr(scheduler.config, "use_flow_sigmas", False):
            raise ValueError(
                f"A {type(scheduler).__name__} cannot guide: it must know the clean picture that the network predicts "
                "(by `alphas_cumprod` and a `prediction_type` of 'epsilon', 'sample' or 'v_prediction') and step once "
                "for each evaluation of the network, without flow sigmas. DDIM, DDPM, DPM-Solver++ (multistep), "
                "UniPC, Euler and DDGAN do."
            )

    def _set_timesteps(self, num_inference_steps: int | None, device: str | torch.device) -> list[float]:
        """alpha_bar at each of the timesteps that it sets."""
        scheduler = self.scheduler
        if num_inference_steps is None:
            num_inference_steps = min(DEFAULT_STEPS, scheduler.config.num_train_timesteps)
        scheduler.set_timesteps(num_inference_steps, device=device)
        if not hasattr(scheduler, "sigmas"):
            return scheduler.alphas_cumprod[scheduler.timesteps.cpu()].tolist()
        scheduler.set_begin_index(0)
        return [1 / (1 + sigma**2) for sigma in scheduler.sigmas[:-1].tolist()]

    def _class_condition(self, class_labels, batch_size: int, device) -> dict[str, torch.Tensor]:
        parameter, config = _inputs(self.unet).get("class_labels"), self.unet.config
        if class_labels is None:
            if parameter is not None and parameter.default is inspect.Parameter.empty:
                raise ValueError(f"A {type(self.unet).__name__} draws what `class_labels` say: pass them.")
            return {}
        if parameter is None:
            raise ValueError(f"A {type(self.unet).__name__} takes no `class_labels`: leave them out.")
        if isinstance(class_labels, str):
            class_labels = self._label_of(class_labels)
        elif isinstance(class_labels, list | tuple):
            class_labels = [self._label_of(label) if isinstance(label, str) else label for label in class_labels]
        labels = torch.as_tensor(class_labels, device=device)
        if labels.ndim == int(labels.is_floating_point()):
            labels = labels.expand(batch_size, *labels.shape)
        if len(labels) != batch_size:
            raise ValueError(f"`class_labels` are {len(labels)}, but `batch_size` asks for {batch_size} images.")
        table = (config.get("num_class_embeds") or config.get("num_classes")) and not config.get("class_embed_type")
        if table if labels.is_floating_point() else labels.ndim != 1:
            raise ValueError(f"`class_labels` is {class_labels}, but must be one integer an image.")
        if labels.is_floating_point():
            if (width := config.get("n_cfeat")) and labels.shape[1:] != (width,):
                raise ValueError(
                    f"`class_labels` is a context of shape {tuple(labels.shape)}, but this takes {width}."
                )
            return {"class_labels": labels.to(self.unet.dtype)}
        classes = next(filter(None, map(config.get, ("num_class_embeds", "num_classes", "n_cfeat"))), None)
        if classes is not None:
            classes += bool(config.get("class_dropout"))  # the null class
            if not ((labels >= 0) & (labels < classes)).all():
                raise ValueError(f"`class_labels` is {class_labels}, but this network knows 0 to {classes - 1}.")
        return {"class_labels": labels.long()}

    def _label_of(self, name: str) -> int:
        names = self.unet.config.get("id2label") or {}
        labels = {each: int(label) for label, each in (names.items() if isinstance(names, dict) else enumerate(names))}
        if name not in labels:
            known = f"Its names are {', '.join(map(repr, labels))}." if labels else "Its config has no `id2label`."
            raise ValueError(f"This {type(self.unet).__name__} knows no class {name!r}. {known}")
        return labels[name]

    def _predict_x_0(self, seen: torch.Tensor, output: torch.Tensor, alpha_bar: float, gradient: str) -> torch.Tensor:
        """x_0 from x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise, as the scheduler's step takes it to be."""
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            x_0 = (seen - noise * output) / signal
        elif kind == "v_prediction":
            x_0 = signal * seen - noise * output
        elif gradient == "sample":  # as if v were constant, of which x_0 would be made as above
            x_0 = output + signal * (seen - seen.detach())
        else:
            x_0 = output
        return self._clip(x_0.detach()) + (x_0 - x_0.detach())

    def _clip(self, x_0: torch.Tensor) -> torch.Tensor:
        config, settings = self.scheduler.config, _settings(self.scheduler)
        if "thresholding" in settings and config.thresholding:  # section 2.3 of arXiv 2205.11487
            bound = x_0.abs().flatten(1).quantile(config.dynamic_thresholding_ratio, dim=1)
            bound = bound.clamp(min=1, max=config.sample_max_value).view(-1, 1, 1, 1)
            return x_0.clamp(-bound, bound) / bound
        if "clip_sample" in settings and config.clip_sample:
            bound = config.clip_sample_range if "clip_sample_range" in settings else 1.0
            return x_0.clamp(-bound, bound)
        return x_0


class _LossOfEach:
    """A loss as a function to one number for each image, whatever it gives itself."""

    def __init__(self, loss: Callable[..., torch.Tensor]):
        self.loss, self.image_by_image = loss, False
        try:
            self.takes_step = "step" in _inputs(loss)
        except ValueError:  # a function of torch's own, without a signature
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
            found = f"of shape {tuple(losses.shape)}" if torch.is_tensor(losses) else f"a {type(losses).__name__}"
            raise ValueError(
                f"`loss` gave {found}, but must give a tensor: one number for each of the {len(images)} images, or "
                "one for all."
            )
        if not losses.requires_grad:
            raise ValueError(
                "`loss` has no gradient: it must be computed from the images by differentiable functions."
            )


@contextmanager
def _frozen(network: torch.nn.Module) -> Iterator[None]:
    """Without gradients of the parameters, which nobody asks for."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _inputs(function: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, or of the forward of a network, compiled or not."""
    function = getattr(function, "_orig_mod", function)
    return inspect.signature(getattr(function, "forward", function)).parameters


def _settings(scheduler: SchedulerMixin) -> Mapping[str, inspect.Parameter]:
    """The settings that a scheduler itself has."""
    return inspect.signature(type(scheduler).__init__).parameters
