"""The noise process of Denoising Diffusion GANs (Xiao, Kreis, Vahdat, ICLR 2022) and its Gaussian posterior."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class DDGANSchedulerOutput(BaseOutput):
    """Output class for the scheduler's `step` function.

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The less noisy sample x_s: the network's input at the next timestep, or the final image.
        pred_original_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            The clean image x_0 predicted at this timestep.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class DDGANScheduler(SchedulerMixin, ConfigMixin):
    """The scheduler of [Denoising Diffusion GANs](https://arxiv.org/abs/2112.07804): few, large denoising steps.

    A step samples from the posterior q(x_{t-1} | x_t, x_0), where a generator predicts x_0.

    With u_k = eps + (1 - eps) k / T for k = 0 .. T, the forward process has the variance

    - `"vp"`: 1 - exp(-u^2 (beta_max - beta_min) / 2 - u beta_min), the variance-preserving SDE of
      [Song et al. 2021](https://arxiv.org/abs/2011.13456), discretized as in the appendix of
      [Denoising Diffusion GANs](https://arxiv.org/abs/2112.07804);
    - `"geometric"`: beta_min (beta_max / beta_min)^u;
    - `"cosine"`: sin(u pi / 2)^2, which leaves more of the image at the upper noise levels
      ([Nichol and Dhariwal 2021](https://arxiv.org/abs/2102.09672));

    and `betas[t] = 1 - (1 - variance(u_{t+1})) / (1 - variance(u_t))` for timesteps t = 0 .. T-1; `alphas_cumprod` is
    the cumulative product of 1 - betas. At timestep t the network sees a sample with noise level `alphas_cumprod[t]`;
    the level below t = 0 is the clean image. The last beta of `"cosine"` is 0.999. The schedule is computed and stored
    in float64.

    Args:
        num_train_timesteps (`int`, defaults to 4):
            T, the number of denoising steps; with `trained_betas`, their number.
        beta_min (`float`, defaults to 0.1): Start of the variance schedule, see above; ignored by `"cosine"`.
        beta_max (`float`, defaults to 20.0): End of the variance schedule, see above; ignored by `"cosine"`.
        variance_schedule (`"vp"`, `"geometric"` or `"cosine"`, defaults to `"vp"`): The variance schedule, see above.
        eps (`float`, defaults to 1e-3): Diffusion time at which the process starts, in [0, 1).
        prediction_type (`"sample"`, `"epsilon"` or `"v_prediction"`, defaults to `"sample"`):
            Whether the network predicts x_0, the noise, or sqrt(alphas_cumprod) noise - sqrt(1 - alphas_cumprod) x_0.
        clip_sample (`bool`, defaults to `False`): Whether to clip the predicted x_0 to [-1, 1].
        trained_betas (`list[float]` or `np.ndarray`, *optional*):
            The T values of `betas`, each in (0, 1); the last may be 1, unless `prediction_type` is `"epsilon"`. They
            replace the variance schedule, so that `beta_min`, `beta_max`, `variance_schedule` and `eps` are ignored.

    Raises:
        `ValueError`: If the variance leaves (0, 1) or does not increase, if `trained_betas` are not T such values, or
            if an option has an unknown value.
    """

    # a generator predicts samples of x_0, at a few noise levels: other schedulers would need their mean, at theirs
    _compatibles: ClassVar = []
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 4,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        variance_schedule: Literal["vp", "geometric", "cosine"] = "vp",
        eps: float = 1e-3,
        prediction_type: Literal["sample", "epsilon", "v_prediction"] = "sample",
        clip_sample: bool = False,
        trained_betas: list[float] | np.ndarray | None = None,
    ):
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` is {num_train_timesteps}, but must be at least 1.")
        if prediction_type not in ("sample", "epsilon", "v_prediction"):
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}, but must be 'sample', 'epsilon' or 'v_prediction'."
            )
        if trained_betas is None:
            self.betas = _variance_schedule_betas(num_train_timesteps, beta_min, beta_max, variance_schedule, eps)
        else:
            self.betas = torch.as_tensor(trained_betas, dtype=torch.float64)
            if self.betas.shape != (num_train_timesteps,):
                raise ValueError(
                    f"`trained_betas` has shape {tuple(self.betas.shape)}, but must have a value for each of the "
                    f"{num_train_timesteps} `num_train_timesteps`."
                )
            is_valid = (self.betas > 0) & (self.betas < 1)
            is_valid[-1] |= self.betas[-1] == 1 and prediction_type != "epsilon"
            if not is_valid.all():
                raise ValueError(
                    f"`trained_betas` has the values {self.betas[~is_valid].tolist()}, but must be in (0, 1); the "
                    "last may be 1 unless `prediction_type` is 'epsilon'."
                )

        self.alphas_cumprod = (1 - self.betas).cumprod(0)
        self.init_noise_sigma = 1.0
        self.set_timesteps()

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Create a scheduler from its config, or from that of [`DDPMScheduler`] or a scheduler compatible with it.

        Of the other scheduler's process it has the T trailing levels, at which DDPM samples in T steps with
        `timestep_spacing="trailing"`; they become `trained_betas`. `prediction_type` and `clip_sample` (to [-1, 1])
        are those of the config. The network sees the timesteps 0 .. T-1, not those of the longer process.

        Args:
            config (`dict[str, Any]`): The config.
            return_unused_kwargs (`bool`, defaults to `False`): Whether to return unused keyword arguments as well.
            kwargs (*optional*):
                Arguments that replace those of the config. With another scheduler's config, `num_train_timesteps` is
                T, by default the number of timesteps of its process.

        Raises:
            `ValueError`: If it is the config of a scheduler that is not compatible with [`DDPMScheduler`], if T is
                greater than its number of timesteps, or if an argument is invalid.
        """
        if isinstance(config, dict):
            own_names = [base.__name__ for base in cls.__mro__]
            if config.get("_class_name", cls.__name__) not in own_names or (
                "_class_name" not in config and not _argument_names(config) <= set(inspect.signature(cls).parameters)
            ):
                config = _trailing_levels(config, kwargs.pop("num_train_timesteps", None))
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ):
        """Set the timesteps of `step`, the exact posterior between neighboring levels, and of `add_noise_pair`.

        Args:
            num_inference_steps (`int`, *optional*, defaults to T):
                Number of steps, evenly spaced and starting at T-1, where the sample is noise.
            device (`str` or `torch.device`, *optional*): Device of `self.timesteps`.
            timesteps (`list[int]`, *optional*): Custom timesteps in descending order, instead of a number of steps.

        Raises:
            `ValueError`: If both are passed, `num_inference_steps` is outside 1 .. T, or `timesteps` are not in
                descending order within T-1 .. 0.
        """
        T = self.config.num_train_timesteps
        if num_inference_steps is not None and timesteps is not None:
            raise ValueError("Pass only one of `num_inference_steps` and `timesteps`.")
        if timesteps is None:
            n = T if num_inference_steps is None else num_inference_steps
            if not 1 <= n <= T:
                raise ValueError(f"`num_inference_steps` is {n}, but the process has {T} timesteps: use 1 to {T}.")
            timesteps = [round(T * (n - i) / n) - 1 for i in range(n)]
        timesteps = [int(t) for t in timesteps]
        if not timesteps or timesteps != sorted(set(timesteps) & set(range(T)), reverse=True):
            raise ValueError(f"`timesteps` is {timesteps}, but must descend within {T - 1} .. 0.")

        self.num_inference_steps = len(timesteps)
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)

        # A step leads to the level of the next lower selected timestep, and from the lowest one to the clean image.
        level = self.alphas_cumprod
        target = torch.ones_like(level)
        for s in reversed(timesteps):
            target[s + 1 :] = level[s]
        alpha = level / target
        self._tables = {
            "signal": level.sqrt(),
            "noise": (1 - level).sqrt(),
            # q(x_s | x_0) and q(x_t | x_s)
            "target_signal": target.sqrt(),
            "target_noise": (1 - target).sqrt(),
            "step_signal": alpha.sqrt(),
            "step_noise": (1 - alpha).sqrt(),
            # q(x_s | x_t, x_0) = N(original_coef x_0 + sample_coef x_t, std^2): equation (7) of arXiv 2006.11239
            "original_coef": target.sqrt() * (1 - alpha) / (1 - level),
            "sample_coef": alpha.sqrt() * (1 - target) / (1 - level),
            "std": ((1 - target) / (1 - level) * (1 - alpha)).sqrt(),
        }
        self._device_tables = {}  # copies of the tables by (device, dtype)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample` unchanged: the network sees the noisy sample itself at every timestep."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: torch.Tensor | None = None,
        eta: float = 1.0,
    ) -> DDGANSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Sample x_s from the posterior q(x_s | x_t, x_0), where s is the next lower of `self.timesteps`.

        This is the denoising distribution of arXiv 2112.07804, section 3.2, with x_0 predicted by the network.

        Args:
            model_output (`torch.Tensor`): The network's output, of the same shape as `sample`.
            timestep (`int` or `torch.Tensor`):
                t, either one value or an integer tensor of shape `(batch_size,)` with one value per sample.
            sample (`torch.Tensor`): x_t. With half precision, x_s is computed in float32 and rounded at the end.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Generators for the noise; with a list, the noise of sample i comes from generator i only. No random
                numbers are used by the step to the clean image (`timestep` is one value, the last of
                `self.timesteps`), nor with `eta` 0.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`DDGANSchedulerOutput`] instead of a plain tuple.
            variance_noise (`torch.Tensor`, *optional*):
                Standard normal noise to use instead of generating it, of the same shape as `sample`.
            eta (`float`, defaults to 1.0):
                Factor of the posterior's standard deviation, at least 0; with 0, x_s is the posterior's mean.

        Returns:
            [`DDGANSchedulerOutput`] or `tuple`: x_s and the predicted x_0.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x_t, output = sample.to(dtype), model_output.to(dtype)

        def at_t(name):
            return self._at(name, timestep, x_t)

        if self.config.prediction_type == "sample":
            x_0 = output
        elif self.config.prediction_type == "epsilon":
            x_0 = (x_t - at_t("noise") * output) / at_t("signal")
        else:
            x_0 = at_t("signal") * x_t - at_t("noise") * output
        if self.config.clip_sample:
            x_0 = x_0.clamp(-1, 1)

        x_s = at_t("original_coef") * x_0 + at_t("sample_coef") * x_t
        if eta > 0 and (not _is_single(timestep) or at_t("std") > 0):
            if variance_noise is None:
                variance_noise = randn_tensor(x_t.shape, generator=generator, device=x_t.device, dtype=dtype)
            x_s = x_s + eta * at_t("std") * variance_noise.to(dtype)

        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        if not return_dict:
            return x_s, x_0
        return DDGANSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise, the network's input at t.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): x_0.
            noise (`torch.Tensor`): Standard normal noise, of the same shape as `original_samples`.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): t, integers within 0 .. T-1.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        x_0 = original_samples.to(dtype)
        x_t = self._at("signal", timesteps, x_0) * x_0 + self._at("noise", timesteps, x_0) * noise.to(dtype)
        return x_t.to(original_samples.dtype)

    def add_noise_pair(
        self,
        original_samples: torch.Tensor,
        timesteps: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample neighbors (x_s, x_t) of the Markov chain: the real pair of arXiv 2112.07804, section 3.2.

        As in `step`, s is the next lower of `self.timesteps`: t - 1, unless fewer timesteps were set. The first noise
        turns x_0 into x_s, the second one is added on top of that: x_t = sqrt(a) x_s + sqrt(1 - a) noise with
        a = alphas_cumprod[t] / alphas_cumprod[s]. At the last of `self.timesteps` the less noisy sample is x_0 itself.

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): x_0.
            timesteps (`torch.Tensor` of shape `(batch_size,)`): t, integers within 0 .. T-1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Generators for the noise; with a list, pair i comes from generator i only.
            noise (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                The first and the second noise to use instead of generating them.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: x_s and x_t, both of the same shape as `original_samples`.
        """
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        x_0 = original_samples.to(dtype)
        if noise is None:
            first_noise, second_noise = (
                randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=dtype) for _ in range(2)
            )
        else:
            first_noise, second_noise = (n.to(dtype) for n in noise)
        less_noisy = self._at("target_signal", timesteps, x_0) * x_0
        less_noisy = less_noisy + self._at("target_noise", timesteps, x_0) * first_noise
        noisier = (
            self._at("step_signal", timesteps, x_0) * less_noisy
            + self._at("step_noise", timesteps, x_0) * second_noise
        )
        return less_noisy.to(original_samples.dtype), noisier.to(original_samples.dtype)

    def _at(self, name: str, timestep: int | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
        """Look up a table at `timestep`: a number, or a tensor that broadcasts over the samples of `like`."""
        if _is_single(timestep):
            return self._tables[name][int(timestep)].item()
        key = like.device, like.dtype
        if key not in self._device_tables:  # cached, because a copy to a GPU waits for running kernels
            self._device_tables[key] = {k: table.to(like.dtype).to(like.device) for k, table in self._tables.items()}
        entries = self._device_tables[key][name][timestep.to(like.device)]
        return entries.view(-1, *[1] * (like.ndim - 1))

    def __len__(self) -> int:
        return self.config.num_train_timesteps


_MAX_COSINE_BETA = 0.999  # as in the paper and in Diffusers: pure noise has no posterior in float32


def _variance_schedule_betas(
    num_train_timesteps: int, beta_min: float, beta_max: float, variance_schedule: str, eps: float
) -> torch.Tensor:
    """Return the betas of a variance schedule, in float64, for the arguments of [`DDGANScheduler`]."""
    if variance_schedule not in ("vp", "geometric", "cosine"):
        raise ValueError(f"`variance_schedule` is {variance_schedule!r}, but must be 'vp', 'geometric' or 'cosine'.")
    valid_values = {
        "vp": "0 < eps < 1, beta_min >= 0, beta_max >= 0 and 0 < beta_min + beta_max < 60",
        "geometric": "0 <= eps < 1 and 0 < beta_min < beta_max < 1",
        "cosine": "0 < eps < 1",
    }[variance_schedule]
    message = (
        f"The {variance_schedule!r} schedule with beta_min={beta_min}, beta_max={beta_max} and eps={eps} is "
        f"invalid: its variance must increase within (0, 1). Possible values: {valid_values}."
    )
    if not 0 <= eps < 1 or (variance_schedule == "geometric" and not (beta_min > 0 and beta_max > 0)):
        raise ValueError(message)

    u = eps + (1 - eps) * torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    if variance_schedule == "cosine":
        variance = (torch.pi / 2 * u).sin() ** 2
        variance[-1] = 1 - (1 - _MAX_COSINE_BETA) * (1 - variance[-2])
    elif variance_schedule == "vp":
        variance = 1 - torch.exp(-0.5 * u**2 * (beta_max - beta_min) - u * beta_min)
    else:
        variance = beta_min * (beta_max / beta_min) ** u
    if not ((variance > 0) & (variance < 1)).all() or not (variance.diff() > 0).all():
        raise ValueError(message)

    return 1 - (1 - variance[1:]) / (1 - variance[:-1])


def _is_single(timestep: int | torch.Tensor) -> bool:
    return not torch.is_tensor(timestep) or timestep.ndim == 0


def _argument_names(config: dict[str, Any]) -> set[str]:
    return {name for name in config if not name.startswith("_")}


def _trailing_levels(config: dict[str, Any], num_train_timesteps: int | None) -> dict[str, Any]:
    """Return the config of the trailing levels of another scheduler's process, see `DDGANScheduler.from_config`."""
    compatible = {name for kind in DDPMScheduler().compatibles for name in inspect.signature(kind).parameters}
    if "beta_schedule" not in config or not _argument_names(config) <= compatible:
        raise ValueError(
            f"The config{' of ' + config['_class_name'] if '_class_name' in config else ''} with "
            f"{', '.join(sorted(_argument_names(config)))} is neither that of a DDGANScheduler nor of a scheduler "
            "that is compatible with DDPMScheduler."
        )
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    process = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if name in config}
    levels = (1 - DDPMScheduler(**process).betas.double()).cumprod(0)
    total = len(levels)
    T = total if num_train_timesteps is None else num_train_timesteps
    if not 1 <= T <= total:
        raise ValueError(f"`num_train_timesteps` is {T}, but the process has {total} timesteps: use 1 to {total}.")
    levels = levels[[round(total * (k + 1) / T) - 1 for k in range(T)]]
    betas = 1 - levels / torch.cat([torch.ones(1), levels[:-1]])
    return {
        "num_train_timesteps": T,
        "trained_betas": betas.tolist(),
        "prediction_type": config.get("prediction_type", "epsilon"),
        "clip_sample": config.get("clip_sample", False),
    }
