"""Speed and memory of training and sampling a Denoising Diffusion GAN, relative to a Diffusers UNet of the same size.

    python benchmarks/bench_ddgan.py

The reference is a UNet2DModel: one forward and backward pass for training, four forward passes for sampling. DDGAN and
reference alternate, and each ratio is taken between neighboring measurements, so that other load on the machine
affects both. Peak memory is measured in a separate process for each variant. Utilization is the rate of
floating-point operations of an iteration, as a fraction of that of one large matrix product at the same precision.
A second table compares networks on wavelet sub-bands with those on pixels.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from common import DEVICE, hardware, peak_memory, run_in_subprocess, synchronized_time
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddgan import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.commands.arguments import DISCRIMINATORS
from ddgan.commands.train_ddgan import default_attention_resolutions
from ddgan.training.objectives.adversarial import (
    DiscriminatorObjective,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG


@dataclass
class Configuration:
    """The networks and their batch size; the paper's for CIFAR-10 by default.

    Attributes:
        size: height and width of the images.
        channels: of the images.
        widths: channels of the levels of the generator, and of the reference.
        batch_size: images per iteration.
        peak_batch_size: images per iteration when the peak memory of wavelet networks is measured, enough for
            activations to outweigh libraries, weights and optimizer states.
        discriminator_width: width that the blocks of the discriminator multiply.
        large: use the paper's discriminator for 256x256 instead of that for 32x32.
        limits: upper limits of the ratios on a CPU: iteration, iteration with R1, sampling in four steps.
    """

    size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (128, 256, 256, 256)
    batch_size: int = 4 if DEVICE == "cpu" else 64
    peak_batch_size: int = 32 if DEVICE == "cpu" else 64
    discriminator_width: int = 64
    large: bool = False
    limits: tuple[float, float, float] | None = None


CONFIGURATIONS = {
    "cifar10": Configuration(limits=(2.3, 2.9, 1.15)),
    "small": Configuration(
        channels=1, widths=(32, 64, 64), batch_size=32, discriminator_width=32, limits=(3.0, 4.2, 1.2)
    ),
    "64x64": Configuration(64, widths=(64, 128, 128, 128), batch_size=4 if DEVICE == "cpu" else 64),
    "celebahq_256": Configuration(
        256,
        widths=(64, 64, 128, 128, 256, 256),
        batch_size=1 if DEVICE == "cpu" else 8,
        peak_batch_size=4 if DEVICE == "cpu" else 8,
        large=True,
    ),
}
COMPARED_TO_UNET = ("cifar10", "small")
COMPARED_WITH_WAVELETS = ("cifar10", "64x64", "celebahq_256")
WAVELET_TARGETS = (0.5, 0.4, 0.6)  # upper limits of the ratios: iteration, sampling, peak memory in training

VARIANTS = {
    "float32": {},
    "tf32": {"tf32": True},
    "channels_last": {"channels_last": True},
    "bf16": {"autocast": True},
    "bf16, channels_last": {"autocast": True, "channels_last": True},
    "compiled": {"compiled": True},
    "bf16, channels_last, compiled": {"autocast": True, "channels_last": True, "compiled": True},
}
MATRIX_SIZE = 1024 if DEVICE == "cpu" else 8192
# bfloat16 (on CPUs that emulate it) and compiling are too slow for the default run on a CPU; --variant measures them
COMPARED = ("float32", "channels_last") if DEVICE == "cpu" else tuple(VARIANTS)


class DDGAN:
    """The networks, objectives and optimizers of train_ddgan.py in one configuration."""

    def __init__(
        self,
        name: str,
        tf32: bool = False,
        channels_last: bool = False,
        autocast: bool = False,
        compiled: bool = False,
        wavelet_levels: int = 0,
        batch_size: int | None = None,
    ):
        configuration = CONFIGURATIONS[name]
        size, channels = configuration.size, configuration.channels
        self.batch_size = batch_size or configuration.batch_size
        multiples, down_blocks = DISCRIMINATORS["large" if configuration.large else "small"]
        torch.manual_seed(0)
        heights = [size >> wavelet_levels + level for level in range(len(configuration.widths))]
        generator = NCSNpp(
            size,
            channels,
            channels,
            configuration.widths,
            attention_resolutions=default_attention_resolutions(heights),
            wavelet_levels=wavelet_levels,
        )
        discriminator = DDGANDiscriminator(
            size,
            channels,
            base_channels=2 * configuration.discriminator_width,
            block_out_channels=[multiple * configuration.discriminator_width for multiple in multiples],
            down_blocks=down_blocks,
            near_zero_conv_out=not configuration.large,
            wavelet_levels=wavelet_levels,
        )
        self.tf32, self.autocast = tf32, autocast
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for network in (generator, discriminator):
            network.to(DEVICE, memory_format=self.memory_format)
            if compiled:
                network.compile()
        self.networks = discriminator, generator
        gan = GANSetup(generator, discriminator, DDGANScheduler())
        self.objectives = DiscriminatorObjective(gan, GradientPenalties(0.05, interval=2)), GeneratorObjective(gan)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), 1e-4, (0.5, 0.9), fused=True) for network in self.networks
        ]
        images = torch.rand(self.batch_size, channels, size, size, device=DEVICE) * 2 - 1
        self.images = images.contiguous(memory_format=self.memory_format)
        self.pipeline = DDGANPipeline(generator, DDGANScheduler())
        self.pipeline.set_progress_bar_config(disable=True)

    @contextmanager
    def precision(self):
        """Use the precision of this variant, and restore float32 afterwards."""
        set_float32_precision("tf32" if self.tf32 else "ieee")
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
            yield
        set_float32_precision("ieee")

    def iteration(self, penalized: bool) -> None:
        """Update the discriminator, with or without R1, and then the generator."""
        step = 0 if penalized else 1
        for i, (objective, optimizer) in enumerate(zip(self.objectives, self.optimizers, strict=True)):
            for parameter in self.networks[1 - i].parameters():
                parameter.requires_grad_(False)
            batch = MicroBatch(self.images, None, PerSampleRNG(range(self.batch_size), self.images.device, i), step)
            with self.precision():
                objective(self.networks[i], batch)["loss"].mean().backward()
            for parameter in self.networks[1 - i].parameters():
                parameter.requires_grad_(True)
            optimizer.step()
            optimizer.zero_grad()

    def sample(self) -> None:
        """Sample a batch of images in four steps."""
        with self.precision():
            self.pipeline(self.batch_size, output_type="pt")

    def matrix_rate(self, rounds: int) -> float:
        """Return the floating-point operations per second of one large matrix product."""
        a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=DEVICE)
        with self.precision():
            a @ b  # pyright: ignore[reportUnusedExpression]
            return 2 * MATRIX_SIZE**3 / median(seconds(lambda: a @ b) for _ in range(rounds))


class ReferenceUNet:
    """A fixed workload to compare with, at the same batch size."""

    def __init__(self, name: str):
        configuration = CONFIGURATIONS[name]
        channels, widths, size = configuration.channels, configuration.widths, configuration.size
        levels = len(widths)
        torch.manual_seed(0)
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (levels - 2)),
            up_block_types=(*["UpBlock2D"] * (levels - 2), "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            attention_head_dim=None,
        ).to(DEVICE)  # pyright: ignore[reportArgumentType]
        self.x = torch.randn(configuration.batch_size, channels, size, size, device=DEVICE)
        self.t = torch.randint(0, 1000, (configuration.batch_size,), device=DEVICE)

    def forward_backward(self) -> None:
        self.unet(self.x, self.t).sample.pow(2).mean().backward()
        self.unet.zero_grad()

    @torch.no_grad()
    def four_forwards(self) -> None:
        for _ in range(4):
            self.unet(self.x, self.t)


def set_float32_precision(precision: str) -> None:
    """Set the float32 precision of a GPU to `tf32` or `ieee`; by default PyTorch uses TF32 in convolutions."""
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def seconds(work: Callable[[], object]) -> float:
    start = synchronized_time()
    work()
    return synchronized_time() - start


def peaks(ddgan: DDGAN) -> dict[str, float]:
    """Return the peak memory of sampling and of training, in a process that has not done more than that."""
    ddgan.sample()
    result = {"sampling GiB": peak_memory() / 2**30}
    for _ in range(2):  # from the second iteration on, optimizer states and gradients exist
        ddgan.iteration(True)
    return result | {"training GiB": peak_memory() / 2**30}


def measure(name: str, variant: str, rounds: int) -> dict[str, float]:
    """Return ratios to the reference (medians over neighboring pairs), and absolute times and memory of the DDGAN."""
    set_float32_precision("ieee")
    ddgan = DDGAN(name, **VARIANTS[variant])
    result = peaks(ddgan)
    reference = ReferenceUNet(name)
    pairs = {
        "iteration": (lambda: ddgan.iteration(False), reference.forward_backward),
        "iteration with R1": (lambda: ddgan.iteration(True), reference.forward_backward),
        "sample": (ddgan.sample, reference.four_forwards),
    }
    plain = DDGAN(name)  # FlopCounterMode does not see compiled modules
    with FlopCounterMode(display=False) as counter:
        plain.iteration(False)
    del plain
    for task, (ddgan_work, reference_work) in pairs.items():
        reference_work()
        times = [(seconds(ddgan_work), seconds(reference_work)) for _ in range(rounds)]
        result[task] = median(a / b for a, b in times)
        result[f"{task}, s"] = median(a for a, _ in times)
    rate = ddgan.matrix_rate(rounds)
    result["utilization"] = counter.get_total_flops() / result["iteration, s"] / rate
    return result


def compare(rounds: int) -> None:
    print(f"{hardware()}; medians of {rounds} rounds\n")
    print(
        "| | iteration | with R1 | sample | peak GiB, training | sampling | iterations/s | utilization "
        "| images/s, sampling |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in COMPARED_TO_UNET:
        batch_size, limits = CONFIGURATIONS[name].batch_size, CONFIGURATIONS[name].limits
        for variant in COMPARED:
            flags = ["--rounds", str(rounds), "--threads", str(torch.get_num_threads())]
            result = run_in_subprocess(__file__, "--variant", name, variant, *flags)
            ratios = " | ".join(f"{result[task]:.2f}" for task in ("iteration", "iteration with R1", "sample"))
            memory = f"{result['training GiB']:.2f} | {result['sampling GiB']:.2f}"
            speed = f"{1 / result['iteration, s']:.2f} | {result['utilization']:.0%}"
            speed += f" | {batch_size / result['sample, s']:.1f}"
            print(f"| {name}, batch {batch_size}, {variant} | {ratios} | {memory} | {speed} |", flush=True)
        if DEVICE == "cpu" and limits:
            print(f"| *target, at most* | {' | '.join(f'*{limit}*' for limit in limits)} | *2.1* | | | | |")


def compare_wavelets(names: Sequence[str], rounds: int) -> None:
    """Print the time and memory of networks on sub-bands, relative to the same networks on pixels."""
    print(f"\n{hardware()}; sub-bands relative to pixels, float32, medians of {rounds} rounds\n")
    print("| | levels | iteration | with R1 | sample | peak GiB, training |\n|---|--:|--:|--:|--:|---|")
    set_float32_precision("ieee")
    # first of all, since the peak of a subprocess is at least the memory of this process when it starts
    peak_gib = {
        (name, levels): run_in_subprocess(__file__, "--peaks", name, str(levels))["training GiB"]
        for name in names
        for levels in (0, 1, 2)
    }
    works = (lambda ddgan: ddgan.iteration(False), lambda ddgan: ddgan.iteration(True), DDGAN.sample)
    for name in names:
        configuration, size = CONFIGURATIONS[name], CONFIGURATIONS[name].size
        on_pixels = DDGAN(name)
        for levels in (1, 2):
            on_bands = DDGAN(name, wavelet_levels=levels)
            ratios = []
            for work in works:
                for ddgan in (on_bands, on_pixels):
                    work(ddgan)
                pairs = [[seconds(partial(work, ddgan)) for ddgan in (on_bands, on_pixels)] for _ in range(rounds)]
                ratios.append(f"{median(bands / pixels for bands, pixels in pairs):.2f}")
            bands, pixels = peak_gib[name, levels], peak_gib[name, 0]
            peak = f"{bands / pixels:.2f}: {bands:.1f} instead of {pixels:.1f} (batch {configuration.peak_batch_size})"
            label = f"{name}, {size}x{size}, batch {configuration.batch_size}"
            print(f"| {label} | {levels} | {' | '.join(ratios)} | {peak} |", flush=True)
    iteration, sample, peak = WAVELET_TARGETS
    print(f"| *target, at most* | 1 | *{iteration}* | | *{sample}* | *{peak}* |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="pairs of measurements per variant")
    parser.add_argument(
        "--variant", nargs=2, metavar=("CONFIGURATION", "VARIANT"), help="measure only this variant, in this process"
    )
    parser.add_argument(
        "--wavelets", nargs="*", metavar="CONFIGURATION", help="compare only wavelet networks with those on pixels"
    )
    parser.add_argument("--peaks", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peaks:
        name, levels = args.peaks
        ddgan = DDGAN(name, wavelet_levels=int(levels), batch_size=CONFIGURATIONS[name].peak_batch_size)
        print(json.dumps(peaks(ddgan)))
    elif args.variant:
        name, variant = args.variant
        print(json.dumps(measure(name, variant, args.rounds)))
    else:
        if args.wavelets is None:
            compare(args.rounds)
        compare_wavelets(args.wavelets or COMPARED_WITH_WAVELETS, args.rounds)
