"""Speed and memory of training and sampling a Denoising Diffusion GAN, relative to a Diffusers UNet of the same size.

    python benchmarks/bench_ddgan.py

The reference is a UNet2DModel: one forward and backward pass for training, four forward passes for sampling. DDGAN and
reference alternate, and each ratio is taken between neighboring measurements, so that other load on the machine
affects both. Peak memory is measured in a separate process for each variant. Utilization is the rate of
floating-point operations of an iteration, as a fraction of that of one large matrix product at the same precision.
"""

import argparse
import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median

import torch
from common import DEVICE, hardware, peak_memory, run_in_subprocess, synchronized_time
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddgan import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.training.objectives.adversarial import (
    DiscriminatorObjective,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG

# channels, widths of the reference and the generator, batch size, width of the discriminator
CONFIGURATIONS = {
    "cifar10": (3, (128, 256, 256, 256), 4 if DEVICE == "cpu" else 64, 64),
    "small": (1, (32, 64, 64), 32, 32),
}
# upper limits of the ratios on a CPU: iteration, iteration with R1, sampling in four steps
TARGETS = {"cifar10": (2.3, 2.9, 1.15), "small": (3.0, 4.2, 1.2)}

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
    ):
        channels, widths, self.batch_size, width = CONFIGURATIONS[name]
        torch.manual_seed(0)
        generator = NCSNpp(in_channels=channels, out_channels=channels, block_out_channels=widths)
        discriminator = DDGANDiscriminator(
            in_channels=channels,
            base_channels=2 * width,
            block_out_channels=[multiple * width for multiple in (2, 4, 8, 8)],
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
        images = torch.rand(self.batch_size, channels, 32, 32, device=DEVICE) * 2 - 1
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
        channels, widths, batch_size, _ = CONFIGURATIONS[name]
        levels = len(widths)
        torch.manual_seed(0)
        self.unet = UNet2DModel(
            sample_size=32,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * (levels - 2)),
            up_block_types=(*["UpBlock2D"] * (levels - 2), "AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            attention_head_dim=None,
        ).to(DEVICE)  # pyright: ignore[reportArgumentType]
        self.x = torch.randn(batch_size, channels, 32, 32, device=DEVICE)
        self.t = torch.randint(0, 1000, (batch_size,), device=DEVICE)

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


def measure(name: str, variant: str, rounds: int) -> dict[str, float]:
    """Return ratios to the reference (medians over neighboring pairs), and absolute times and memory of the DDGAN."""
    set_float32_precision("ieee")
    ddgan = DDGAN(name, **VARIANTS[variant])
    ddgan.sample()
    sampling_peak = peak_memory() / 2**30
    for _ in range(2):  # from the second iteration on, optimizer states and gradients exist
        ddgan.iteration(True)
        ddgan.iteration(False)
    training_peak = peak_memory() / 2**30
    reference = ReferenceUNet(name)
    pairs = {
        "iteration": (lambda: ddgan.iteration(False), reference.forward_backward),
        "iteration with R1": (lambda: ddgan.iteration(True), reference.forward_backward),
        "sample": (ddgan.sample, reference.four_forwards),
    }
    result = {"training GiB": training_peak, "sampling GiB": sampling_peak}
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
    for name, (_, _, batch_size, _) in CONFIGURATIONS.items():
        for variant in COMPARED:
            flags = ["--rounds", str(rounds), "--threads", str(torch.get_num_threads())]
            result = run_in_subprocess(__file__, "--variant", name, variant, *flags)
            ratios = " | ".join(f"{result[task]:.2f}" for task in ("iteration", "iteration with R1", "sample"))
            memory = f"{result['training GiB']:.2f} | {result['sampling GiB']:.2f}"
            speed = f"{1 / result['iteration, s']:.2f} | {result['utilization']:.0%}"
            speed += f" | {batch_size / result['sample, s']:.1f}"
            print(f"| {name}, batch {batch_size}, {variant} | {ratios} | {memory} | {speed} |", flush=True)
        if DEVICE == "cpu":
            print(f"| *target, at most* | {' | '.join(f'*{limit}*' for limit in TARGETS[name])} | *2.1* | | | | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="pairs of measurements per variant")
    parser.add_argument(
        "--variant", nargs=2, metavar=("CONFIGURATION", "VARIANT"), help="measure only this variant, in this process"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.variant:
        name, variant = args.variant
        print(json.dumps(measure(name, variant, args.rounds)))
    else:
        compare(args.rounds)
