"""What a denoising network is trained to do: one loss a sample, from clean images and random draws."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from .randomness import Draws


@dataclass
class Samples:
    """A micro-batch as an objective sees it.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        labels: their classes, (B,), where the run has them.
        draws: the source of all that is random about them.
        step: the optimizer step that they belong to, from 0.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    draws: Draws
    step: int


class DenoisingObjective:
    """The simple loss of DDPM (Ho et al. 2020, arXiv 2006.11239, eq. 14) for each prediction type.

    Args:
        scheduler: its `prediction_type` says what the network predicts: `epsilon`, `sample`, or `v_prediction`
            (Salimans & Ho 2022, arXiv 2202.00512, sec. 4).
        min_snr_gamma: weigh each sample by min(SNR, gamma), as a loss on the clean image (Hang et al. 2023,
            arXiv 2303.09556, sec. 3.4); None leaves the network's own target unweighted.
    """

    def __init__(self, scheduler: DDPMScheduler, min_snr_gamma: float | None = None):
        self.scheduler = scheduler
        self.min_snr_gamma = min_snr_gamma

    def __call__(self, network: torch.nn.Module, samples: Samples) -> dict[str, torch.Tensor]:
        """Mean squared error of each sample: `loss`, (B,)."""
        images, draws = samples.images, samples.draws
        timesteps = draws.integers(self.scheduler.config.num_train_timesteps)
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
