"""Cost of the optimizer steps of few-step fine-tuning, relative to those of plain fine-tuning, and of its samples.

    python benchmarks/bench_few_step.py

The network is the UNet of `examples/models/noto-emoji-32`, in float32. All kinds of steps alternate, and each ratio is
taken between neighboring measurements, so that other load on the machine affects them alike. The time of an image does
not depend on the weights: the network of a start model and that of its few-step model take the same time per step.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from common import DEVICE, MODELS, hardware, synchronized_time
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from ddgan import UNetDiscriminator
from ddgan.training.objectives.denoising import DenoisingObjective
from ddgan.training.objectives.few_step import (
    DiscriminatorObjective,
    FewStepProcess,
    FewStepSetup,
    GeneratorObjective,
    TeacherSamples,
)
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG
from ddgan.training.teacher import Teacher

STEPS = 4  # sampling steps to train for
DDIM_STEPS = 40
TEACHER_STEPS = 20


class Networks:
    """A generator, its discriminator, and the optimizer steps that are compared."""

    def __init__(self, batch_size: int):
        pipeline = DDPMPipeline.from_pretrained(MODELS / "noto-emoji-32").to(DEVICE)
        self.generator, self.batch_size = pipeline.unet.train(), batch_size
        self.discriminator = UNetDiscriminator.from_unet(self.generator).train()
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        process = FewStepProcess(scheduler, [STEPS])  # pyright: ignore[reportArgumentType]
        setup = FewStepSetup(self.generator, self.discriminator, process)
        channels, size = self.generator.config.in_channels, self.generator.config.sample_size
        self.images = torch.rand(batch_size, channels, size, size, device=DEVICE) * 2 - 1
        self.teacher = Teacher(pipeline, process, TEACHER_STEPS)
        self.start = DDIMPipeline(pipeline.unet, DDIMScheduler.from_config(scheduler.config))  # pyright: ignore
        self.few_step = DDPMPipeline(pipeline.unet, scheduler)  # pyright: ignore[reportArgumentType]
        self.start.set_progress_bar_config(disable=True)
        self.few_step.set_progress_bar_config(disable=True)
        self.plain = DenoisingObjective(scheduler)  # pyright: ignore[reportArgumentType]
        self.distillation = GeneratorObjective(setup, distillation_steps=1, distillation_weight=0)
        self.adversarial = GeneratorObjective(setup, distillation_steps=0, distillation_weight=1)
        self.discrimination = DiscriminatorObjective(setup, gamma=0.1)
        noisy = torch.rand(batch_size, STEPS, channels, size, size)
        samples = TeacherSamples(process.timesteps, noisy, noisy[:, 0])
        self.distillation.teacher = self.adversarial.teacher = samples
        self.optimizers = {
            network: torch.optim.AdamW(network.parameters(), 1e-9, fused=True)
            for network in (self.generator, self.discriminator)
        }

    def step(self, network: torch.nn.Module, objective: Callable) -> None:
        """Update one network."""
        for other in self.optimizers:
            other.requires_grad_(other is network)
        rng = PerSampleRNG(range(self.batch_size), self.images.device)
        objective(network, MicroBatch(self.images, None, rng, 0))["loss"].mean().backward()
        self.optimizers[network].step()
        self.optimizers[network].zero_grad()

    def works(self) -> dict[str, Callable[[], object]]:
        """Return the work of a step of each kind."""
        return {
            "plain fine-tuning": lambda: self.step(self.generator, self.plain),
            "distillation": lambda: self.step(self.generator, self.distillation),
            "adversarial (both networks)": self.adversarial_step,
            "teacher samples, a batch": lambda: self.teacher.sample(range(self.batch_size), 0, self.images.device),
            f"one image in {DDIM_STEPS} DDIM steps": lambda: self.start(num_inference_steps=DDIM_STEPS),
            f"one image in {STEPS} posterior steps": lambda: self.few_step(num_inference_steps=STEPS),
        }

    def adversarial_step(self) -> None:
        self.step(self.discriminator, self.discrimination)
        self.step(self.generator, self.adversarial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    works = Networks(args.batch_size).works()
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            start = synchronized_time()
            work()
            times[name].append(synchronized_time() - start)
    reference = times["plain fine-tuning"]
    print(f"{hardware()}; batch size {args.batch_size}, medians of {args.rounds} rounds\n")
    print("| | seconds | relative to a step of plain fine-tuning |\n|---|--:|--:|")
    for name, measured in times.items():
        ratio = median(a / b for a, b in zip(measured, reference, strict=True))
        print(f"| {name} | {median(measured):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
