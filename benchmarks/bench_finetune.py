"""Speed and memory of the training loop, relative to a minimal loop over the same UNet and images.

    python benchmarks/bench_finetune.py

Each variant runs in a fresh process, and the variants alternate in each round. In that process a step of the plain
loop follows each step of the variant, so that other load on the machine affects both and the ratio of their times is
robust. Peak memory is measured in separate runs without the plain loop.
"""

import argparse
import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from common import DEVICE, hardware, peak_memory, run_in_subprocess, synchronized_time
from datasets import load_dataset

from ddgan import finetune_model
from ddgan.core.locations import EXAMPLES
from ddgan.data.sources import EMBEDDED_DATASET
from ddgan.sampling.loading import load_pipeline
from ddgan.training import session
from ddgan.training.loop import Trainer

UNTRAINED = EXAMPLES / "models" / "noto-emoji-32" / "recipe" / "untrained.py"
BATCH_SIZE = 16
WARM_UP = 50  # untimed steps: more than an epoch, since its short last batch is compiled again
PLAIN, LOOP, NO_EMA = "plain loop", "this loop", "--ema_decay 0"
FLAGS = {
    LOOP: "",
    NO_EMA: "--ema_decay 0",
    "--cache_images": "--cache_images",
    "--channels_last": "--channels_last",
}
if DEVICE == "cuda":  # too slow on a CPU: compiling, and bfloat16 where it is emulated
    FLAGS |= {
        "--mixed_precision bf16": "--mixed_precision bf16",
        "--compile": "--compile",
        "all four": "--cache_images --channels_last --mixed_precision bf16 --compile",
    }


class Stopwatch:
    """Sum the times between `start` and `stop`, except during the warm-up."""

    def __init__(self):
        self.steps, self.seconds = 0, 0.0

    def start(self) -> None:
        self.started = synchronized_time()

    def stop(self) -> None:
        self.steps += 1
        if self.steps > WARM_UP:
            self.seconds += synchronized_time() - self.started


def plain_loop(model: Path) -> Iterator[None]:
    """Train with a DataLoader, AdamW and the mean squared error; each `next` takes one step."""
    pipeline = load_pipeline(str(model), device=DEVICE)
    unet, scheduler = pipeline.unet.train(), pipeline.scheduler

    def pixels(rows):
        arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in rows["image"]]
        return {"image": [torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1 for array in arrays]}

    dataset = load_dataset(str(EMBEDDED_DATASET), split="train").with_transform(pixels)
    loader = torch.utils.data.DataLoader(
        dataset,  # pyright: ignore[reportArgumentType]
        BATCH_SIZE,
        shuffle=True,
        pin_memory=DEVICE == "cuda",
    )
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    while True:
        for batch in loader:
            clean = batch["image"].to(DEVICE)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), device=DEVICE)
            prediction = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def this_loop(model: Path, steps: int, flags: str, beside: Iterator[None] | None) -> dict[str, float]:
    """Run finetune_model.py with `flags` and time its steps; it samples and saves only before and after them.

    Args:
        beside: another loop, which takes a step after each step of this one and is timed separately.
    """
    ours, plain, waited = Stopwatch(), Stopwatch(), {}

    class TimedTrainer(Trainer):
        def _train_step(self, batches):
            if self.progress.step:
                ours.stop()  # includes the work between two steps: progress, logging
                waited[self.progress.step] = self.progress.clock.waited
            if beside:
                plain.start()
                next(beside)
                plain.stop()
            ours.start()
            super()._train_step(batches)

    session.Trainer = TimedTrainer
    never = "--log_samples_every 0 --save_model_every 0 --checkpointing_steps 0 --report_to none"
    small = f"--num_samples 1 --sample_steps 1 --batch_size {BATCH_SIZE} --max_train_steps {WARM_UP + steps + 1}"
    with TemporaryDirectory() as folder:
        start = ["--start_model", str(model), "--output_dir", f"{folder}/run"]
        finetune_model.main([*start, *never.split(), *small.split(), *flags.split()])
    share = (waited[WARM_UP + steps] - waited[WARM_UP]) / ours.seconds
    return {"ours": ours.seconds / steps, "plain": plain.seconds / (steps + 1), "waited": share, "peak": peak_memory()}


def measure(variant: str, model: Path, steps: int, beside: bool) -> dict[str, float]:
    """Measure a variant in a fresh process."""
    flags = ["--steps", str(steps), f"--variant={variant}", "--model", str(model), *["--beside"] * beside]
    return run_in_subprocess(__file__, *flags)


def compare(steps: int, rounds: int) -> None:
    results = {variant: [] for variant in FLAGS}
    with TemporaryDirectory() as folder:
        model = Path(folder) / "untrained"
        sys.argv = [str(UNTRAINED), str(model)]
        runpy.run_path(str(UNTRAINED))
        for _ in range(rounds):
            for variant, runs in results.items():
                runs.append(measure(variant, model, steps, beside=True))
        peaks = {variant: measure(variant, model, 1, beside=False)["peak"] for variant in (PLAIN, *FLAGS)}

    def ratios(variant: str) -> list[float]:
        return [result["ours"] / result["plain"] for result in results[variant]]

    def speed(runs: list[dict[str, float]], loop: str) -> str:
        return f"{BATCH_SIZE / median(result[loop] for result in runs):.1f}"

    print(f"{hardware()}; {rounds} rounds of {steps} steps, batch {BATCH_SIZE}\n")
    memory = "GPU memory" if DEVICE == "cuda" else "memory"
    print(f"| | images/s | step time relative to the plain loop | waiting for data | peak {memory}, MiB |")
    print("|---|--:|--:|--:|--:|")
    print(f"| {PLAIN} | {speed(results[LOOP], 'plain')} | | | {peaks[PLAIN] / 2**20:.0f} |")
    for variant in results:
        step_times = ", ".join(f"{ratio:.3f}" for ratio in ratios(variant))
        waited = median(result["waited"] for result in results[variant])
        images = speed(results[variant], "ours")
        print(f"| {variant} | {images} | {step_times} | {waited:.1%} | {peaks[variant] / 2**20:.0f} |")
    overhead, without = median(ratios(LOOP)) - 1, median(ratios(NO_EMA)) - 1
    print(f"\nThe loop takes {overhead:.1%} longer than the plain loop, {without:.1%} without EMA (target: under 3%).")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="timed optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--variant", choices=[PLAIN, *FLAGS], help="measure only this variant, in this process")
    parser.add_argument("--model", type=Path, help="pipeline folder for --variant")
    parser.add_argument(
        "--beside", action="store_true", help="take a step of the plain loop after each step of the variant"
    )
    args = parser.parse_args()
    if not args.variant:
        compare(args.steps, args.rounds)
    elif args.variant == PLAIN:
        loop = plain_loop(args.model)
        for _ in range(WARM_UP + args.steps):
            next(loop)
        print(json.dumps({"peak": peak_memory()}))
    else:
        beside = plain_loop(args.model) if args.beside else None
        print(json.dumps(this_loop(args.model, args.steps, FLAGS[args.variant], beside)))
