"""What a denoising network is trained to do: one loss a sample, from clean images and random draws."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from ..randomness import PerSampleRNG


@dataclass
class MicroBatch:
    """A micro-batch as an objective sees it.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        labels: their classes, (B,), where the run has them.
        draws: the source of all that is random about them.
        step: the optimizer step that they belong to, from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    draws: PerSampleRNG
    step: int


class DenoisingObjective:
    """The simple loss of DDPM (Ho et al. 2020, arXiv 2006.11239, eq. 14) for each prediction type.

    Args:
        scheduler: its `prediction_type` says what the network predicts: `epsilon`, `sample`, or `v_prediction`
            (Salimans & Ho 2022, arXiv 2202.00512, sec. 4).
        min_snr_gamma: weigh each sample by min(SNR, gamma), as a loss on the clean image (Hang et al. 2023,
            arXiv 2303.09556, sec. 3.4); None leaves the network's own target unweighted.
        timestep_sampling: `uniform`, or `logit_normal`, which favours the middle ones: the logit of t / T is standard
            normal (Esser et al. 2024, arXiv 2403.03206, eq. 19).
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

    def __call__(self, network: torch.nn.Module, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """Mean squared error of each sample: `loss`, (B,)."""
        images, draws = samples.images, samples.draws
        timesteps = self._timesteps(draws)
        noise = draws.normal(*images.shape[1:])
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        prediction = network(noisy, timesteps, return_dict=False)[0]
        if prediction.shape[1] == 2 * images.shape[1]:  # a learned variance rides along
            prediction = prediction.chunk(2, dim=1)[0]
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            target = noise
        elif kind == "sample":
            target = images
        else:
            target = self.scheduler.get_velocity(images, noise, timesteps)
        loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        if self.min_snr_gamma is None:
            return {"loss": loss}
        signal = self.scheduler.alphas_cumprod.to(images.device)[timesteps]
        snr = signal / (1 - signal)
        # a loss on the clean image equals one on epsilon times 1 / SNR, and one on v times 1 / (SNR + 1)
        divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[kind]
        return {"loss": loss * snr.clamp(max=self.min_snr_gamma) / divisor}

    def _timesteps(self, draws: PerSampleRNG) -> torch.Tensor:
        count = self.scheduler.config.num_train_timesteps
        if self.timestep_sampling == "uniform":
            return draws.integers(count)
        # in float32 a sigmoid can be 1
        return (draws.normal().sigmoid() * count).long().clamp(max=count - 1)


class ClassConditionalObjective(DenoisingObjective):
    """The denoising loss of a network that is told the class, or now and then the null class.

    Training with both is what classifier-free guidance needs (Ho & Salimans 2022, arXiv 2207.12598, alg. 1).

    Args:
        scheduler, options: as of `DenoisingObjective`.
        num_classes: the label of the null class.
        class_dropout: the probability of the null class.
    """

    def __init__(self, scheduler: DDPMScheduler, num_classes: int, class_dropout: float = 0.0, **options):
        super().__init__(scheduler, **options)
        self.num_classes = num_classes
        self.class_dropout = class_dropout

    def __call__(self, network: torch.nn.Module, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """Mean squared error of each sample: `loss`, (B,)."""
        labels = samples.labels.masked_fill(samples.draws.uniform() < self.class_dropout, self.num_classes)
        return super().__call__(partial(network, class_labels=labels), samples)
