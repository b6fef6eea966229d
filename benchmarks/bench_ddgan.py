"""Speed and memory of training and sampling a Denoising Diffusion GAN, beside fixed work of Diffusers' own UNet.

    python benchmarks/bench_ddgan.py

The yardstick is a UNet2DModel of about the same size: one forward and backward pass, and four forward passes. It and
the DDGAN take turns, and ratios are taken between neighbours, so that what else the machine does weighs on both.
Memory is that of a process of its own for each configuration. The matrix rate, of which an iteration's multiplications
and additions are a share, is that of one large matrix product in the same arithmetic.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median

import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode

from ddgan import DDGANDiscriminator, DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.training.objectives.adversarial import DiscriminatorObjective, GANSetup, GeneratorObjective
from ddgan.training.objectives.denoising import MicroBatch
from ddgan.training.randomness import PerSampleRNG

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# channels, widths of yardstick and generator, batch size, width of the discriminator
CONFIGURATIONS = {
    "cifar10": (3, (128, 256, 256, 256), 4 if DEVICE == "cpu" else 64, 64),
    "small": (1, (32, 64, 64), 32, 32),
}
# at most these, in the yardstick's units: an iteration without and with R1, and a sample in four steps
WANTED = {"cifar10": (2.3, 2.9, 1.15), "small": (3.0, 4.2, 1.2)}

VARIANTS = {
    "float32": {},
    "tf32": {"tf32": True},
    "channels_last": {"channels_last": True},
    "bf16": {"autocast": True},
    "bf16, channels_last": {"autocast": True, "channels_last": True},
    "compiled": {"compiled": True},
    "bf16, channels_last, compiled": {"autocast": True, "channels_last": True, "compiled": True},
}
MATRIX = 1024 if DEVICE == "cpu" else 8192  # rows and columns
# on a CPU without bfloat16 arithmetic the others take longer than all the rest, and so does compiling: name them
COMPARED = ("float32", "channels_last") if DEVICE == "cpu" else tuple(VARIANTS)


class DDGAN:
    """A configuration with its networks and optimizers, as train_ddgan.py has them."""

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
        adversaries = GANSetup(generator, discriminator, DDGANScheduler())
        self.objectives = DiscriminatorObjective(adversaries, 0.05, lazy_reg=2), GeneratorObjective(adversaries)
        self.optimizers = [torch.optim.Adam(n.parameters(), 1e-4, (0.5, 0.9), fused=True) for n in self.networks]
        images = torch.rand(self.batch_size, channels, 32, 32, device=DEVICE) * 2 - 1
        self.images = images.contiguous(memory_format=self.memory_format)
        self.pipeline = DDGANPipeline(generator, DDGANScheduler())
        self.pipeline.set_progress_bar_config(disable=True)

    @contextmanager
    def arithmetic(self):
        """Inside, a GPU multiplies as this variant does; outside as the first one."""
        round_inputs("tf32" if self.tf32 else "ieee")
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
            yield
        round_inputs("ieee")

    def iteration(self, penalized: bool) -> None:
        """One update of the discriminator, with or without R1, and one of the generator."""
        step = 0 if penalized else 1
        for i, (objective, optimizer) in enumerate(zip(self.objectives, self.optimizers, strict=True)):
            for parameter in self.networks[1 - i].parameters():
                parameter.requires_grad_(False)
            samples = MicroBatch(self.images, None, PerSampleRNG(range(self.batch_size), self.images.device, i), step)
            with self.arithmetic():
                objective(self.networks[i], samples)["loss"].mean().backward()
            for parameter in self.networks[1 - i].parameters():
                parameter.requires_grad_(True)
            optimizer.step()
            optimizer.zero_grad()

    def sample(self) -> None:
        """A batch of pictures in four steps."""
        with self.arithmetic():
            self.pipeline(self.batch_size, output_type="pt")

    def matrix_rate(self, rounds: int) -> float:
        """Multiplications and additions a second of a product of two large matrices."""
        a, b = torch.randn(2, MATRIX, MATRIX, device=DEVICE)
        with self.arithmetic():
            a @ b
            return 2 * MATRIX**3 / median(seconds(lambda: a @ b) for _ in range(rounds))


class Yardstick:
    """Fixed work at the same batch size."""

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
            down_block_types=["DownBlock2D", "AttnDownBlock2D"] + ["DownBlock2D"] * (levels - 2),
            up_block_types=["UpBlock2D"] * (levels - 2) + ["AttnUpBlock2D", "UpBlock2D"],
            downsample_padding=0,
            attention_head_dim=None,
        ).to(DEVICE)
        self.x = torch.randn(batch_size, channels, 32, 32, device=DEVICE)
        self.t = torch.randint(0, 1000, (batch_size,), device=DEVICE)

    def forward_backward(self) -> None:
        self.unet(self.x, self.t).sample.pow(2).mean().backward()
        self.unet.zero_grad()

    @torch.no_grad()
    def four_forwards(self) -> None:
        for _ in range(4):
            self.unet(self.x, self.t)


def round_inputs(precision: str) -> None:
    """To `tf32` before a GPU multiplies float32 numbers, or not (`ieee`); PyTorch does in convolutions by default."""
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory() -> float:
    """Of the GPU, or of this process with all that it has loaded, in GiB."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def measure(name: str, variant: str, rounds: int) -> dict[str, float]:
    """Ratios to the yardstick, medians over neighbouring pairs, and what the DDGAN took in absolute terms."""
    round_inputs("ieee")
    ddgan = DDGAN(name, **VARIANTS[variant])
    ddgan.sample()
    after_sampling = peak_memory()
    for _ in range(2):  # the second one after the first gradients are there
        ddgan.iteration(True)
        ddgan.iteration(False)
    after_training = peak_memory()
    yardstick = Yardstick(name)
    pairs = {
        "iteration": (lambda: ddgan.iteration(False), yardstick.forward_backward),
        "iteration with R1": (lambda: ddgan.iteration(True), yardstick.forward_backward),
        "sample": (ddgan.sample, yardstick.four_forwards),
    }
    result = {"training GiB": after_training, "sampling GiB": after_sampling}
    plain = DDGAN(name)  # what is compiled is not counted
    with FlopCounterMode(display=False) as counter:
        plain.iteration(False)
    del plain
    for what, (ours, theirs) in pairs.items():
        theirs()
        taken = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
        result[what] = median(a / b for a, b in taken)
        result[f"{what}, s"] = median(a for a, _ in taken)
    rate = ddgan.matrix_rate(rounds)
    result["of the matrix rate"] = counter.get_total_flops() / result["iteration, s"] / rate
    return result


def compare(rounds: int) -> None:
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}; medians of {rounds} rounds\n")
    print(
        "| | iteration | with R1 | sample | peak GiB, training | sampling | iterations/s | of the matrix rate "
        "| images/s sampled |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, (_, _, batch_size, _) in CONFIGURATIONS.items():
        for variant in COMPARED:
            command = [sys.executable, __file__, "--variant", name, variant, "--rounds", str(rounds)]
            command += ["--threads", str(torch.get_num_threads())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}, {variant} failed:\n{done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            ratios = " | ".join(f"{found[what]:.2f}" for what in ("iteration", "iteration with R1", "sample"))
            memory = f"{found['training GiB']:.2f} | {found['sampling GiB']:.2f}"
            speed = f"{1 / found['iteration, s']:.2f} | {found['of the matrix rate']:.0%}"
            speed += f" | {batch_size / found['sample, s']:.1f}"
            print(f"| {name}, batch {batch_size}, {variant} | {ratios} | {memory} | {speed} |", flush=True)
        if DEVICE == "cpu":
            print(f"| *wanted at most* | {' | '.join(f'*{limit}*' for limit in WANTED[name])} | *2.1* | | | | |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="neighbouring pairs of each measurement")
    parser.add_argument("--variant", nargs=2, metavar=("CONFIGURATION", "VARIANT"), help="measure this one alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.variant:
        print(json.dumps(measure(*args.variant, args.rounds)))
    else:
        compare(args.rounds)
