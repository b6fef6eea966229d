"""Speed and memory of the training loop, beside the plainest loop over the same UNet and images.

    python benchmarks/bench_finetune.py

Every variant runs in a process of its own, one after the other, and all of them again in each round; ratios are taken
within a round, so that what else the machine does weighs on both sides of them.
"""

import argparse
import json
import os
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from datasets import load_dataset

from ddgan import finetune_model
from ddgan.sampling.pipelines import load_pipeline
from ddgan.training.data import EMBEDDED_DATASET
from ddgan.training.loop import Trainer

UNTRAINED = finetune_model.EMBEDDED_MODEL / "recipe" / "untrained.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_SIZE = 16
WARM_UP = 50  # steps before the timed ones: more than an epoch, whose short last batch is compiled anew
PLAIN, LOOP, NO_EMA = "plain loop", "this loop", "--ema_decay 0"
FLAGS = {
    LOOP: "",
    NO_EMA: "--ema_decay 0",
    "--cache_images": "--cache_images",
    "--channels_last": "--channels_last",
}
if DEVICE == "cuda":  # on a CPU without bfloat16 arithmetic, either takes longer than the rest together
    FLAGS |= {
        "--mixed_precision bf16": "--mixed_precision bf16",
        "--compile": "--compile",
        "all four": "--cache_images --channels_last --mixed_precision bf16 --compile",
    }


class Stopwatch:
    """Times the steps that follow the warm-up."""

    def __init__(self, steps: int):
        self.marks = {WARM_UP: None, WARM_UP + steps: None}

    def after_step(self, step: int, images: int, waited: float = 0.0) -> None:
        """To be told after each step how many images were trained on and how long data were waited for until now."""
        if step in self.marks:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self.marks[step] = (time.perf_counter(), images, waited)
            self.peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else _peak_resident()

    def result(self) -> dict[str, float]:
        (start, first, before), (end, last, after) = self.marks.values()
        seconds = end - start
        return {"speed": (last - first) / seconds, "peak": self.peak, "waited": (after - before) / seconds}


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plain_loop(model: Path, steps: int) -> dict[str, float]:
    """What one would write down first: a DataLoader, AdamW and the mean squared error."""
    pipeline = load_pipeline(str(model), device=DEVICE)
    unet, scheduler = pipeline.unet.train(), pipeline.scheduler

    def pixels(rows):
        arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in rows["image"]]
        return {"image": [torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1 for array in arrays]}

    dataset = load_dataset(str(EMBEDDED_DATASET), split="train").with_transform(pixels)
    loader = torch.utils.data.DataLoader(dataset, BATCH_SIZE, shuffle=True, pin_memory=DEVICE == "cuda")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    stopwatch, step, images = Stopwatch(steps), 0, 0
    while step < WARM_UP + steps:
        for batch in loader:
            clean = batch["image"].to(DEVICE)
            noise = torch.randn_like(clean)
            timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), device=DEVICE)
            prediction = unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = F.mse_loss(prediction, scheduler.get_velocity(clean, noise, timesteps))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step, images = step + 1, images + len(clean)
            stopwatch.after_step(step, images)
    return stopwatch.result()


def this_loop(model: Path, steps: int, flags: str) -> dict[str, float]:
    """finetune_model.py with those flags; its samples and saves lie before and after the timed steps."""
    stopwatch = Stopwatch(steps)

    class TimedTrainer(Trainer):
        def _train_step(self, batches):
            super()._train_step(batches)
            stopwatch.after_step(self.step, self.plan.images_seen(self.step), self.clock.waited)

    finetune_model.Trainer = TimedTrainer
    never = "--log_samples_every 0 --save_model_every 0 --checkpointing_steps 0 --report_to none"
    small = f"--num_samples 1 --sample_steps 1 --batch_size {BATCH_SIZE} --max_train_steps {WARM_UP + steps}"
    with TemporaryDirectory() as folder:
        start = ["--start_model", str(model), "--output_dir", f"{folder}/run"]
        finetune_model.main([*start, *never.split(), *small.split(), *flags.split()])
    return stopwatch.result()


def measure(variant: str, model: Path, steps: int) -> dict[str, float]:
    """The result of a variant, from a fresh process."""
    command = [sys.executable, __file__, "--steps", str(steps), f"--variant={variant}", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{variant} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(steps: int, rounds: int) -> None:
    results = {variant: [] for variant in (PLAIN, *FLAGS)}
    with TemporaryDirectory() as folder:
        model = Path(folder) / "untrained"
        sys.argv = [str(UNTRAINED), str(model)]
        runpy.run_path(str(UNTRAINED))
        for _ in range(rounds):
            for variant, measured in results.items():
                measured.append(measure(variant, model, steps))

    def middle(variant: str, name: str) -> float:
        return median(result[name] for result in results[variant])

    def ratio(variant: str) -> float:
        return median(a["speed"] / b["speed"] for a, b in zip(results[variant], results[PLAIN], strict=True))

    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(f"{hardware}, torch {torch.__version__}; medians of {rounds} rounds of {steps} steps, batch {BATCH_SIZE}\n")
    memory = "GPU memory" if DEVICE == "cuda" else "memory"
    print(f"| | images/s | beside the plain loop | peak {memory}, MiB | waiting for data |\n|---|--:|--:|--:|--:|")
    for variant in results:
        waited = "" if variant == PLAIN else f"{middle(variant, 'waited'):.1%}"
        numbers = f"{middle(variant, 'speed'):.1f} | {ratio(variant):.3f} | {middle(variant, 'peak') / 2**20:.0f}"
        print(f"| {variant} | {numbers} | {waited} |")
    print(
        f"\nThe loop takes {1 / ratio(LOOP) - 1:.1%} longer than the plain one, {1 / ratio(NO_EMA) - 1:.1%} without "
        f"EMA (wanted: under 3 %), and waits for data {middle(LOOP, 'waited'):.1%} of the time (wanted: under 2 %)."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="timed optimizer steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant")
    parser.add_argument("--variant", choices=[PLAIN, *FLAGS], help="measure this one alone, in this process")
    parser.add_argument("--model", type=Path, help="the pipeline folder for --variant")
    args = parser.parse_args()
    if not args.variant:
        compare(args.steps, args.rounds)
    elif args.variant == PLAIN:
        print(json.dumps(plain_loop(args.model, args.steps)))
    else:
        print(json.dumps(this_loop(args.model, args.steps, FLAGS[args.variant])))
