"""What guidance does and what it costs: distance to a colour by scale; time and memory of the two kinds of gradient.

    python benchmarks/bench_guidance.py
    python benchmarks/bench_guidance.py --pictures docs/images

On the embedded models, with DDIM. Time and memory are taken in a process of its own for each variant, and all variants
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
from ddgan.data.images import to_bytes
from ddgan.evaluation.extractors import ClassifierFeatures, load_extractor
from ddgan.pipelines.pipeline_guided import SCALE_SCHEDULES
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples" / "models"
EMOJI, CLASSES, DIGITS = MODELS / "noto-emoji-32", MODELS / "noto-emoji-classes-32", MODELS / "mnist-28"
CLASSIFIER = ROOT / "tests" / "fixtures" / "classifiers" / "mnist"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GREEN = ColorLoss((0.1, 0.9, 0.5))
SCALES = (5, 20, 40, 100)
STEPS = 40
IMAGES = 32
COLUMNS = 6  # pictures of a row that are shown
VARIANTS = ("unguided", "sample", "model", "model, checkpointing")


def load(scheduler: str = "ddim", model: Path = EMOJI) -> GuidedPipeline:
    pipe = GuidedPipeline.from_pipe(with_scheduler(load_pipeline(str(model), device=DEVICE), scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: GuidedPipeline,
    loss: GuidanceLoss,
    scale: float,
    count: int = IMAGES,
    judge: ClassifierFeatures | None = None,
    **options,
) -> list[Image.Image]:
    """
    Draw `count` pictures, of the classes in turn, and print their losses and how many `judge` reads as asked.

    Returns:
        the first of them, as many as there are classes, or `COLUMNS`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    options = {"batch_size": count, "num_inference_steps": STEPS, "generator": generators, **options}
    if classes := pipe.unet.config.get("num_classes"):
        options["class_labels"] = [i % classes for i in range(count)]
    images = pipe(loss, scale, output_type="pt", **options).images
    losses = loss(images * 2 - 1)
    print(f"{losses.mean():.3f} ± {losses.std():.3f}", end="\n" if judge is None else ", ", flush=True)
    if judge:
        seen = judge(to_bytes(images * 2 - 1))["logits"].argmax(1)
        right = seen == torch.tensor(options["class_labels"])
        print(f"read as asked: {right.double().mean():.0%}", flush=True)
    return pipe.numpy_to_pil(images[: classes or COLUMNS].permute(0, 2, 3, 1).cpu().numpy())


def by_scale(
    model: Path, loss: GuidanceLoss, folder: Path | None, name: str, judge: ClassifierFeatures | None = None
) -> None:
    """Print the mean and standard deviation of the loss over the images, for each scale and kind of gradient."""
    pipe = load(model=model)
    print(f"{model.name}, unguided", end=": ")
    rows, labels = draw(pipe, loss, 0.0, judge=judge), ["unguided"]
    for gradient in ("sample", "model"):
        for scale in SCALES:
            print(f"{model.name}, gradient {gradient}, scale {scale}", end=": ")
            rows += draw(pipe, loss, scale, judge=judge, gradient=gradient)
            labels.append(f"{gradient} {scale}")
    save(rows, labels, folder, name)


def distances(folder: Path | None) -> None:
    """Print what guidance does to the losses: of colour from 0 to 2, as all differences of pixels."""
    by_scale(EMOJI, GREEN, folder, "guidance_scales.png")
    by_scale(CLASSES, GREEN, folder, "guidance_classes.png")
    by_scale(DIGITS, SymmetryLoss(), folder, "guidance_digits.png", load_extractor(str(CLASSIFIER)))

    pipe = load()
    for schedule in SCALE_SCHEDULES:
        print(f"gradient sample, scale 100, {schedule}", end=": ")
        draw(pipe, GREEN, 100, scale_schedule=schedule)
    for scheduler in SCHEDULERS:
        print(f"gradient sample, scale 40, {scheduler}", end=": ")
        draw(load(scheduler), GREEN, 40)

    reference = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    rows, labels = [], []
    for label, loss, scale in (
        ("unguided", GREEN, 0),
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
        image_grid(pictures, len(pictures) // len(labels), row_labels=labels).save(folder / name, optimize=True)


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
