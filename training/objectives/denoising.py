"""Denoising objectives: one loss per sample, from clean images and random numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from ..randomness import PerSampleRNG
from .micro_batch import MicroBatch


class DenoisingObjective:
    """The simple loss of DDPM (Ho et al. 2020, arXiv 2006.11239, eq. 14) for each prediction type.

    Args:
        scheduler: the noise process; its `prediction_type` is what the network predicts: `epsilon`, `sample`, or
            `v_prediction` (Salimans & Ho 2022, arXiv 2202.00512, sec. 4).
        min_snr_gamma: weight each sample by min(SNR, gamma), as a loss on the clean image (Hang et al. 2023,
            arXiv 2303.09556, sec. 3.4); None leaves the loss on the network's own target unweighted.
        timestep_sampling: `uniform`, or `logit_normal`, which favors timesteps in the middle: the logit of t / T is
            standard normal (Esser et al. 2024, arXiv 2403.03206, eq. 19).
    """

    def __init__(
        self,
        scheduler: DDPMScheduler,
        min_snr_gamma: float | None = None,
        timestep_sampling: Literal["uniform", "logit_normal"] = "uniform",
    ):
        self.scheduler = scheduler
        self.min_snr_gamma = min_snr_gamma
        self.timestep_sampling = timestep_sampling

    def __call__(self, network: Callable[..., Any], batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the mean squared error of each sample: `loss`, (B,)."""
        images = batch.images
        timesteps = self._timesteps(batch.rng)
        noise = batch.rng.normal(*images.shape[1:])
        noisy = self.scheduler.add_noise(images, noise, timesteps)  # pyright: ignore[reportArgumentType]
        prediction = network(noisy, timesteps, return_dict=False)[0]
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "epsilon":
            target = noise
        elif prediction_type == "sample":
            target = images
        else:
            target = self.scheduler.get_velocity(images, noise, timesteps)  # pyright: ignore[reportArgumentType]
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        if self.min_snr_gamma is None:
            return {"loss": loss}
        alphas_cumprod = self.scheduler.alphas_cumprod.to(images.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        weight = snr.clamp(max=self.min_snr_gamma)
        # a loss on the clean image equals one on epsilon times 1 / SNR, and one on v times 1 / (SNR + 1)
        if prediction_type == "epsilon":
            weight = torch.where(snr > 0, weight / snr, 1.0)  # SNR is 0 at the end of some noise schedules
        elif prediction_type == "v_prediction":
            weight = weight / (snr + 1)
        return {"loss": loss * weight}

    def _timesteps(self, rng: PerSampleRNG) -> torch.Tensor:
        num_timesteps = self.scheduler.config.num_train_timesteps
        if self.timestep_sampling == "uniform":
            return rng.integers(num_timesteps)
        # clamped because a sigmoid can round to 1 in float32
        return (rng.normal().sigmoid() * num_timesteps).long().clamp(max=num_timesteps - 1)


class ClassConditionalObjective(DenoisingObjective):
    """The denoising loss of a class-conditional network, which sees the null class instead with some probability.

    Training with both is what classifier-free guidance needs (Ho & Salimans 2022, arXiv 2207.12598, alg. 1).

    Args:
        scheduler: see `DenoisingObjective`.
        num_classes: number of classes, and the label of the null class.
        class_dropout: probability of the null class.
        options: further arguments of `DenoisingObjective`.
    """

    def __init__(self, scheduler: DDPMScheduler, num_classes: int, class_dropout: float = 0.0, **options: Any):
        super().__init__(scheduler, **options)
        self.num_classes = num_classes
        self.class_dropout = class_dropout

    def __call__(self, network: Callable[..., Any], batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the mean squared error of each sample: `loss`, (B,)."""
        assert batch.labels is not None
        labels = batch.labels.masked_fill(batch.rng.uniform() < self.class_dropout, self.num_classes)
        return super().__call__(partial(network, class_labels=labels), batch)
