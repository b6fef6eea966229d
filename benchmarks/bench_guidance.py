"""What guidance does and what it costs: distance to a colour by scale; time and memory of the two kinds of gradient.

    python benchmarks/bench_guidance.py
    python benchmarks/bench_guidance.py --pictures docs/images

On the embedded model, with DDIM. Time and memory are taken in a process of its own for each variant, and all variants
take turns in each round: the ratios hold while the machine does other things, too.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from diffusers.utils.logging import disable_progress_bar
from PIL import Image

from ddgan import (
    ColorLoss,
    GuidanceLoss,
    GuidedPipeline,
    ReferenceLoss,
    SaturationLoss,
    SymmetryLoss,
    TotalVariationLoss,
)
from ddgan.pipelines.pipeline_guided import SCALE_SCHEDULES
from ddgan.sampling.pictures import image_grid
from ddgan.sampling.pipelines import SCHEDULERS, load_pipeline, with_scheduler

MODEL = Path(__file__).parents[1] / "examples" / "models" / "noto-emoji-32"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEN = ColorLoss((0.1, 0.9, 0.5))
SCALES = (5, 20, 40, 100)
STEPS = 40
IMAGES = 32
COLUMNS = 6  # pictures of a cell that are shown
VARIANTS = ("unguided", "sample", "model", "model, checkpointing")


def load(scheduler: str = "ddim") -> GuidedPipeline:
    pipe = GuidedPipeline.from_pipe(with_scheduler(load_pipeline(str(MODEL), device=DEVICE), scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: GuidedPipeline, loss: GuidanceLoss, scale: float, count: int = IMAGES, **options) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    options = {"batch_size": count, "num_inference_steps": STEPS, "generator": generators, **options}
    images = pipe(loss, scale, output_type="pt", **options).images
    losses = loss(images * 2 - 1)
    print(f"{losses.mean():.3f} ± {losses.std():.3f}", flush=True)
    return pipe.numpy_to_pil(images[:COLUMNS].permute(0, 2, 3, 1).cpu().numpy())


def distances(folder: Path | None) -> None:
    """Print the mean and standard deviation, over the images, of the distance to green, 0 to 2."""
    pipe = load()
    print("unguided", end=": ")
    free = draw(pipe, GREEN, 0.0)
    rows, labels = list(free), ["unguided"]
    for gradient in ("sample", "model"):
        for scale in SCALES:
            print(f"gradient {gradient}, scale {scale}", end=": ")
            rows += draw(pipe, GREEN, scale, gradient=gradient)
            labels.append(f"{gradient} {scale}")
    save(rows, labels, folder, "guidance_scales.png")

    for schedule in SCALE_SCHEDULES:
        print(f"gradient sample, scale 100, {schedule}", end=": ")
        draw(pipe, GREEN, 100, scale_schedule=schedule)
    for scheduler in SCHEDULERS:
        print(f"gradient sample, scale 40, {scheduler}", end=": ")
        draw(load(scheduler), GREEN, 40)

    reference = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    rows, labels = list(free), ["unguided"]
    for label, loss, scale in (
        ("grey", SaturationLoss(0.0), 100),
        ("saturated", SaturationLoss(1.0), 100),
        ("smooth", TotalVariationLoss(), 40),
        ("symmetric", SymmetryLoss(), 100),
        ("reference", ReferenceLoss(reference, 4), 100),
        ("green, symmetric", GREEN + 2 * SymmetryLoss(), 40),
    ):
        print(f"{label}, scale {scale}", end=": ")
        rows += draw(pipe, loss, scale, COLUMNS)
        labels.append(label)
    save(rows, labels, folder, "guidance_losses.png")


def save(pictures: list[Image.Image], labels: list[str], folder: Path | None, name: str) -> None:
    if folder:
        image_grid(pictures, COLUMNS, row_labels=labels).save(folder / name, optimize=True)


def measure(variant: str, steps: int = 3) -> tuple[float, float]:
    """Seconds a step, and MB above those of the loaded model, at the peak of some steps with `IMAGES` images."""
    torch.set_num_threads(1)
    pipe = load()
    if variant == "model, checkpointing":
        pipe.unet.enable_gradient_checkpointing()
    marks = []

    def callback(pipe, i, t, tensors):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    options = {"guidance_end": 0.0} if variant == "unguided" else {"gradient": variant.split(",")[0]}
    options |= {"num_inference_steps": 1 + steps, "callback_on_step_end": callback, "output_type": "latent"}
    before = memory(reset=True)
    pipe(GREEN, 40.0, batch_size=IMAGES, **options)
    return (marks[-1] - marks[0]) / steps, memory() - before


def memory(reset: bool = False) -> float:
    """The peak in MB since it was last reset, on a CPU by what Linux counts for the process."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def costs(rounds: int) -> None:
    """Print seconds a step, ratios to the unguided, and peak memory."""
    found = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--variant", variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
    for variant, runs in found.items():
        seconds, peaks = zip(*runs, strict=True)
        ratio = median(s / free for s, (free, _) in zip(seconds, found["unguided"], strict=True))
        growth = median(peaks) / median(peak for _, peak in found["unguided"])
        print(f"{variant}: {median(seconds):.3f} s a step ({ratio:.2f}), peak {median(peaks):.0f} MB ({growth:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder for grids of the pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", choices=VARIANTS, help="measure this one alone, in this process")
    args = parser.parse_args()
    disable_progress_bar()
    if args.variant:
        print(json.dumps(measure(args.variant)))
    else:
        print(f"on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'a CPU'}, torch {torch.__version__}")
        costs(args.rounds)
        distances(args.pictures)
