"""Modes that a Denoising Diffusion GAN covers with different losses.

    python benchmarks/bench_mode_coverage.py
    python benchmarks/bench_mode_coverage.py --stacked_mnist path/to/MNIST

The data are 25 Gaussians in the plane (arXiv 1705.07761), or StackedMNIST (arXiv 1611.02163): images whose three
channels are three random digits, here at 16x16 pixels, with 1,000 modes that a classifier recognizes. All settings
have the same networks, data, optimizer and number of steps. Points in the plane are images with two channels and one
pixel, so that all code but the two networks is that for images.
"""

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from common import CLASSIFIER
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.training_utils import EMAModel
from torch import nn
from torchvision.datasets.mnist import read_image_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ddgan import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.data.images import to_bytes
from ddgan.evaluation.coverage import (
    ModeCoverage,
    gaussian_coverage,
    gaussian_grid,
    stacked_mnist_coverage,
)
from ddgan.evaluation.extractors import load_extractor
from ddgan.training.objectives.adversarial import (
    DiscriminatorObjective,
    GANLoss,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ddgan.training.objectives.micro_batch import MicroBatch

CENTERS, STD = gaussian_grid(), 0.1
TIMESTEPS, WAVES, WIDTH = 4, 32, 128
SIZE, WIDTHS, DISCRIMINATOR_WIDTH = 16, (24, 48, 48), 12  # of StackedMNIST, and the networks of ddgan_mnist_16.yaml


@dataclass
class Setting:
    """A loss with its penalties, and the noise process."""

    loss: GANLoss = "non_saturating"
    penalties: GradientPenalties = field(default_factory=GradientPenalties)
    reconstruction_weight: float = 0.0
    energy_weight: float = 0.0
    variance_schedule: str = "vp"
    d_steps: int = 1


def settings(gamma: float) -> dict[str, Setting]:
    """Return the compared settings; lazy R1 has the weight and the interval of the DDGAN paper for CIFAR-10."""
    exact = GradientPenalties(gamma, gamma)
    estimated = GradientPenalties(gamma, gamma, finite_differences=True)
    return {
        "GAN, R1 every 15 steps": Setting(penalties=GradientPenalties(0.05, interval=15)),
        "GAN, R1": Setting(penalties=GradientPenalties(gamma)),
        "GAN, R1, G updated every second step": Setting(penalties=GradientPenalties(gamma), d_steps=2),
        "GAN, R1 and R2": Setting(penalties=exact),
        "relativistic, R1 and R2": Setting("relativistic", exact),
        "relativistic, R1 and R2, finite differences": Setting("relativistic", estimated),
        "the last and squared error, cosine schedule": Setting("relativistic", estimated, 20, 0, "cosine"),
        "the last and squared error, energy score": Setting("relativistic", estimated, 20, 20),
        "the last and squared error, energy score, cosine schedule": Setting(
            "relativistic", estimated, 20, 20, "cosine"
        ),
    }


class BatchRNG:
    """`PerSampleRNG` with one generator per batch: one per point would take longer than the networks."""

    device = torch.device("cpu")

    def __init__(self, seed: int, batch_size: int):
        self.generator, self.batch_size = torch.Generator().manual_seed(seed), batch_size

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch_size, *shape, generator=self.generator)

    def integers(self, high: int) -> torch.Tensor:
        return torch.randint(high, (self.batch_size,), generator=self.generator)


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


class Gaussians:
    """25 Gaussians on a grid."""

    batch_size, num_samples, learning_rates, betas, ema_decay = 256, 2500, (1e-3, 1e-3), (0.5, 0.9), 0.99

    def networks(self) -> tuple[nn.Module, ModelMixin]:
        """Return a new discriminator and a new generator."""
        return PointDiscriminator(), PointGenerator()

    def images(self, rng: torch.Generator) -> torch.Tensor:
        """Return a batch of random images."""
        modes = torch.randint(len(CENTERS), (self.batch_size,), generator=rng)
        points = CENTERS[modes].float() + STD * torch.randn(self.batch_size, 2, generator=rng)
        return points.view(self.batch_size, 2, 1, 1)

    def coverage(self, batches: Iterable[torch.Tensor]) -> tuple[ModeCoverage, float]:
        """Return the modes of samples, and the fraction of samples that lie at a mode."""
        return gaussian_coverage(torch.cat(list(batches)).flatten(1), CENTERS, STD)


class StackedMNIST:
    """Three digits of MNIST as the channels of an image."""

    batch_size, num_samples, learning_rates, betas, ema_decay = 32, 25_600, (5e-4, 3e-4), (0.0, 0.99), 0.999

    def __init__(self, folder: Path):
        digits = read_image_file(str(folder / "raw" / "train-images-idx3-ubyte"))[:, None]
        size = [SIZE, SIZE]
        self.digits = torch.cat(
            [resize(part, size, InterpolationMode.BICUBIC, antialias=True) for part in digits.split(1000)]
        )
        self.classifier = load_extractor(str(CLASSIFIER))

    def networks(self) -> tuple[nn.Module, ModelMixin]:
        """Return a new discriminator and a new generator."""
        generator = NCSNpp(
            SIZE,
            block_out_channels=WIDTHS,
            layers_per_block=1,
            attention_resolutions=(8,),
            latent_dim=50,
            latent_embed_dim=128,
            latent_mapping_layers=3,
        )
        discriminator = DDGANDiscriminator(
            SIZE,
            base_channels=2 * DISCRIMINATOR_WIDTH,
            block_out_channels=[multiple * DISCRIMINATOR_WIDTH for multiple in (2, 4, 8, 8)],
        )
        return discriminator, generator

    def images(self, rng: torch.Generator) -> torch.Tensor:
        """Return a batch of random images."""
        indices = torch.randint(len(self.digits), (self.batch_size, 3), generator=rng)
        return self.digits[indices].flatten(1, 2) / 127.5 - 1

    def coverage(self, batches: Iterable[torch.Tensor]) -> tuple[ModeCoverage, float]:
        """Return the modes of samples, and the classifier's mean confidence."""
        digits, confidences = [], []
        for batch in batches:
            probabilities = self.classifier(to_bytes(batch).flatten(0, 1)[:, None])["logits"].softmax(1)
            confidence, digit = probabilities.max(1)
            digits.append(digit.view(-1, 3))
            confidences.append(confidence)
        return stacked_mnist_coverage(torch.cat(digits)), torch.cat(confidences).mean().item()


def train(problem: Gaussians | StackedMNIST, setting: Setting, seed: int, steps: int) -> DDGANPipeline:
    """Train both networks and return a pipeline with the EMA weights."""
    torch.manual_seed(seed)
    discriminator, generator = problem.networks()
    scheduler = DDGANScheduler(TIMESTEPS, variance_schedule=setting.variance_schedule)  # pyright: ignore
    gan = GANSetup(
        generator,  # pyright: ignore[reportArgumentType]
        discriminator,  # pyright: ignore[reportArgumentType]
        scheduler,
        loss=setting.loss,
        reconstruction_weight=setting.reconstruction_weight,
        energy_weight=setting.energy_weight,
    )
    objectives = DiscriminatorObjective(gan, setting.penalties), GeneratorObjective(gan)
    networks = (discriminator, generator)
    optimizers = [
        torch.optim.Adam(network.parameters(), rate, problem.betas)
        for network, rate in zip(networks, problem.learning_rates, strict=True)
    ]
    ema = EMAModel(generator.parameters(), decay=problem.ema_decay)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        images = problem.images(rng)
        for stream, (network, optimizer, objective) in enumerate(zip(networks, optimizers, objectives, strict=True)):
            if network is generator and step % setting.d_steps:
                continue
            batch_rng = BatchRNG((seed * steps + step) * 2 + stream, problem.batch_size)
            batch = MicroBatch(images, None, batch_rng, step)  # pyright: ignore[reportArgumentType]
            optimizer.zero_grad()
            objective(network, batch)["loss"].mean().backward(inputs=list(network.parameters()))
            optimizer.step()
        ema.step(generator.parameters())
    ema.copy_to(generator.parameters())
    pipeline = DDGANPipeline(generator.eval(), scheduler)  # pyright: ignore[reportArgumentType]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(pipeline: DDGANPipeline, count: int, batch_size: int = 100, eta: float = 1.0) -> Iterable[torch.Tensor]:
    """Yield batches of samples."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count // batch_size):
        yield pipeline(batch_size=batch_size, generator=generator, eta=eta, output_type="latent").images  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacked_mnist", type=Path, metavar="MNIST", help="folder with torchvision's MNIST raw/")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, and 0 for StackedMNIST")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--gamma", type=float, help="weight of the penalties in every step (default: 0.005, and 0.1 for StackedMNIST)"
    )
    parser.add_argument(
        "--eta", type=float, nargs="+", default=[1.0], help="scales of the noise of the sampling steps, a row for each"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=settings(0),
        metavar="NAME",
        help="names of the compared settings (default: all)",
    )
    args = parser.parse_args()
    stacked = args.stacked_mnist is not None
    problem = StackedMNIST(args.stacked_mnist) if stacked else Gaussians()
    gamma = args.gamma if args.gamma is not None else 0.1 if stacked else 0.005
    seeds = args.seeds or ([0] if stacked else [0, 1, 2])
    print(f"{args.steps} steps, gamma {gamma:g}, seeds {' '.join(map(str, seeds))}, {problem.num_samples} samples\n")
    print(
        f"| | eta | modes | KL | mean KL | {'confidence' if stacked else 'at a mode'} | minutes |\n"
        "|---|--:|---|---|--:|--:|--:|"
    )
    compared = settings(gamma)
    for name in args.settings or compared:
        start = time.perf_counter()
        pipelines = [train(problem, compared[name], seed, args.steps) for seed in seeds]
        minutes = (time.perf_counter() - start) / 60 / len(seeds)
        for eta in args.eta:
            results = [problem.coverage(samples(pipe, problem.num_samples, eta=eta)) for pipe in pipelines]
            coverages, fractions = zip(*results, strict=True)
            modes = ", ".join(str(coverage.modes) for coverage in coverages)
            divergences = ", ".join(f"{coverage.kl:.2f}" for coverage in coverages)
            mean, fraction = fmean(coverage.kl for coverage in coverages), fmean(fractions)
            print(
                f"| {name} | {eta:g} | {modes} | {divergences} | {mean:.2f} | {fraction:.0%} | {minutes:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
