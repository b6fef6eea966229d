"""Modes that a Denoising Diffusion GAN covers with different losses: 25 Gaussians in the plane (arXiv 1705.07761).

    python benchmarks/bench_mode_coverage.py

All settings have the same networks, data and number of steps. Points in the plane are images with two channels and one
pixel, so that all code but the two networks is that for images.
"""

import argparse
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import EMAModel
from torch import nn

from ddgan import DDGANPipeline, DDGANScheduler
from ddgan.evaluation.coverage import ModeCoverage, gaussian_coverage, gaussian_grid
from ddgan.training.objectives.adversarial import (
    DiscriminatorObjective,
    GANLoss,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ddgan.training.objectives.micro_batch import MicroBatch

CENTERS, STD = gaussian_grid(), 0.1
TIMESTEPS, WAVES, WIDTH, BATCH = 4, 32, 128, 256
NUM_SAMPLES = 2500


@dataclass
class Setting:
    """A loss with its penalties."""

    loss: GANLoss = "non_saturating"
    penalties: GradientPenalties = field(default_factory=GradientPenalties)


def settings(gamma: float) -> dict[str, Setting]:
    """Return the compared settings; lazy R1 has the weight and the interval of the DDGAN paper for CIFAR-10."""
    return {
        "GAN, R1 every 15 steps": Setting(penalties=GradientPenalties(0.05, interval=15)),
        "GAN, R1": Setting(penalties=GradientPenalties(gamma)),
        "GAN, R1 and R2": Setting(penalties=GradientPenalties(gamma, gamma)),
        "relativistic, R1 and R2": Setting("relativistic", GradientPenalties(gamma, gamma)),
        "relativistic, R1 and R2, finite differences": Setting(
            "relativistic", GradientPenalties(gamma, gamma, finite_differences=True)
        ),
    }


class BatchRNG:
    """`PerSampleRNG` with one generator per batch: one per point would take longer than the networks."""

    device = torch.device("cpu")

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=self.generator)

    def integers(self, high: int) -> torch.Tensor:
        return torch.randint(high, (BATCH,), generator=self.generator)


class Perceptron(nn.Module):
    """Three hidden layers on points, their random Fourier features (arXiv 2006.10739), t and other inputs."""

    def __init__(self, points: int, others: int, outputs: int):
        super().__init__()
        self.register_buffer("waves", 2 * torch.randn(2, WAVES))
        widths = [points * 2 * (1 + WAVES) + TIMESTEPS + others, WIDTH, WIDTH, WIDTH]
        layers = [(nn.Linear(a, b), nn.LeakyReLU(0.2)) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer), nn.Linear(WIDTH, outputs))

    def forward(self, points, t, *others):
        points = [point.flatten(1) for point in points]
        waves = [wave for point in points for wave in ((point @ self.waves).sin(), (point @ self.waves).cos())]
        t = F.one_hot(torch.as_tensor(t).expand(len(points[0])), TIMESTEPS)
        return self.layers(torch.cat([*points, *waves, t, *others], 1))


class PointGenerator(ModelMixin, ConfigMixin):
    """Generator of points, with the interface of `NCSNpp`."""

    @register_to_config
    def __init__(self, sample_size=1, in_channels=2, out_channels=2, latent_dim=2, num_class_embeds=None):
        super().__init__()
        self.network = Perceptron(1, latent_dim, 2)

    def forward(self, sample, timestep, z, class_labels=None, return_dict=True):
        points = self.network([sample], timestep, z).view_as(sample)
        return UNet2DOutput(points) if return_dict else (points,)


class PointDiscriminator(nn.Module):
    """Discriminator of pairs of points, with the interface of `DDGANDiscriminator`."""

    def __init__(self):
        super().__init__()
        self.network = Perceptron(2, 0, 1)

    def forward(self, less_noisy, timestep, noisier, class_labels=None):
        return self.network([less_noisy, noisier], timestep)[:, 0]


def train(setting: Setting, seed: int, steps: int) -> tuple[ModeCoverage, float]:
    """Train on the Gaussians and return the modes of samples, and the fraction of samples that lie at a mode."""
    torch.manual_seed(seed)
    generator, discriminator, scheduler = PointGenerator(), PointDiscriminator(), DDGANScheduler(TIMESTEPS)
    gan = GANSetup(generator, discriminator, scheduler, loss=setting.loss)  # pyright: ignore[reportArgumentType]
    objectives = DiscriminatorObjective(gan, setting.penalties), GeneratorObjective(gan)
    networks = (discriminator, generator)
    optimizers = [torch.optim.Adam(network.parameters(), 1e-3, (0.5, 0.9)) for network in networks]
    ema = EMAModel(generator.parameters(), decay=0.99)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        modes = torch.randint(len(CENTERS), (BATCH,), generator=rng)
        points = CENTERS[modes].float() + STD * torch.randn(BATCH, 2, generator=rng)
        for stream, (network, optimizer, objective) in enumerate(zip(networks, optimizers, objectives, strict=True)):
            batch_rng = BatchRNG((seed * steps + step) * 2 + stream)
            batch = MicroBatch(points.view(BATCH, 2, 1, 1), None, batch_rng, step)  # pyright: ignore[reportArgumentType]
            optimizer.zero_grad()
            objective(network, batch)["loss"].mean().backward(inputs=list(network.parameters()))
            optimizer.step()
        ema.step(generator.parameters())
    ema.copy_to(generator.parameters())

    pipeline = DDGANPipeline(generator, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    samples = pipeline(batch_size=NUM_SAMPLES, generator=torch.Generator().manual_seed(0), output_type="latent").images
    return gaussian_coverage(samples.flatten(1), CENTERS, STD)  # pyright: ignore[reportAttributeAccessIssue]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--gamma", type=float, default=0.005, help="weight of the penalties in every step")
    args = parser.parse_args()
    print(f"{args.steps} steps, gamma {args.gamma:g}, seeds {' '.join(map(str, args.seeds))}, {NUM_SAMPLES} samples\n")
    print("| | modes of 25 | KL | mean KL | samples at a mode |\n|---|---|---|--:|--:|")
    for name, setting in settings(args.gamma).items():
        coverages, fractions = zip(*(train(setting, seed, args.steps) for seed in args.seeds), strict=True)
        modes = ", ".join(str(coverage.modes) for coverage in coverages)
        divergences = ", ".join(f"{coverage.kl:.2f}" for coverage in coverages)
        mean = fmean(coverage.kl for coverage in coverages)
        print(f"| {name} | {modes} | {divergences} | {mean:.2f} | {fmean(fractions):.0%} |", flush=True)


if __name__ == "__main__":
    main()
