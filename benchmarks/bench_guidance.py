"""Effect and cost of guidance: loss by guidance scale, and time and memory of the two kinds of gradient.

    python benchmarks/bench_guidance.py
    python benchmarks/bench_guidance.py --grid_dir docs/images

It uses the embedded models with DDIM. Time and memory are measured on one CPU thread, or the GPU, in a separate
process for each variant, and the variants alternate in each round, so that the ratios are robust to other load on the
machine.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from common import CLASSIFIER, DEVICE, MODELS, class_accuracy, hardware, run_in_subprocess, synchronized_time
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
from ddgan.guidance.arguments import default_guidance_scale
from ddgan.pipelines.pipeline_guided import SCALE_SCHEDULES
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler

EMOJI, CLASSES, DIGITS = MODELS / "noto-emoji-32", MODELS / "noto-emoji-classes-32", MODELS / "mnist-28"
FEW_STEPS = MODELS / "twemoji-few-steps"
GREEN = ColorLoss((0.1, 0.9, 0.5))
SCALES = (5, 20, 40, 100)
STEPS = 40
IMAGES = 32
COLUMNS = 6  # images in a row of a grid
VARIANTS = ("unguided", "sample", "model", "model, checkpointing")


def load(scheduler: str = "ddim", model: Path = EMOJI) -> GuidedPipeline:
    pipe = GuidedPipeline.from_pipe(with_scheduler(load_pipeline(str(model), device=DEVICE), scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: GuidedPipeline,
    loss: GuidanceLoss,
    scale: float,
    count: int = IMAGES,
    classifier: ClassifierFeatures | None = None,
    **options,
) -> list[Image.Image]:
    """Sample `count` images, cycling through the classes, and print the mean and standard deviation of their losses.

    With a classifier, the class accuracy is printed too.

    Returns:
        The first images for a grid: one of each class, or `COLUMNS` of an unconditional model.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    options = {"batch_size": count, "num_inference_steps": STEPS, "generator": generators, **options}
    if classes := pipe.unet.config.get("num_classes"):
        options["class_labels"] = [i % classes for i in range(count)]
    images = pipe(loss, scale, output_type="pt", **options).images
    losses = loss(images * 2 - 1)
    print(f"{losses.mean():.3f} ± {losses.std():.3f}", end="\n" if classifier is None else ", ", flush=True)
    if classifier:
        accuracy = class_accuracy(classifier(to_bytes(images * 2 - 1))["logits"], classes)
        print(f"class accuracy: {accuracy:.0%}", flush=True)
    return pipe.numpy_to_pil(images[: classes or COLUMNS].permute(0, 2, 3, 1).cpu().numpy())


def compare_scales(
    model: Path, loss: GuidanceLoss, folder: Path | None, name: str, classifier: ClassifierFeatures | None = None
) -> None:
    """Print and save the results of each guidance scale and kind of gradient."""
    pipe = load(model=model)
    print(f"{model.name}, unguided", end=": ")
    rows, labels = sample(pipe, loss, 0.0, classifier=classifier), ["unguided"]
    for gradient in ("sample", "model"):
        for scale in SCALES:
            print(f"{model.name}, gradient {gradient}, scale {scale}", end=": ")
            rows += sample(pipe, loss, scale, classifier=classifier, gradient=gradient)
            labels.append(f"{gradient}, scale {scale}")
    save(rows, labels, folder, name)


def compare_steps(folder: Path | None) -> None:
    """Print losses at the default scale in fewer steps, also of a few-step model, and save images of the latter."""
    for model, scheduler, counts in ((EMOJI, "ddim", (10, 20)), (FEW_STEPS, "as-saved", (4, 2, 1))):
        pipe = load(scheduler, model)
        for steps in counts:
            rows, labels = [], []
            default = default_guidance_scale(steps)
            for gradient, scale in (("sample", 0.0), ("sample", default), ("model", default)):
                print(f"{model.name}, {steps} steps, gradient {gradient}, scale {scale:g}", end=": ")
                rows += sample(pipe, GREEN, scale, num_inference_steps=steps, gradient=gradient)
                labels.append(f"{gradient}, scale {scale:g}" if scale else "unguided")
            if steps == 4:
                save(rows, labels, folder, "guidance_few_steps.png")


def compare_losses(folder: Path | None) -> None:
    """Print losses with and without guidance; a color loss is at most 2, since pixel values are in [-1, 1]."""
    compare_scales(EMOJI, GREEN, folder, "guidance_scales.png")
    compare_scales(CLASSES, GREEN, folder, "guidance_classes.png")
    classifier = load_extractor(str(CLASSIFIER))
    assert isinstance(classifier, ClassifierFeatures)
    compare_scales(DIGITS, SymmetryLoss(), folder, "guidance_digits.png", classifier)

    pipe = load()
    for schedule in SCALE_SCHEDULES:
        print(f"gradient sample, scale 100, {schedule}", end=": ")
        sample(pipe, GREEN, 100, scale_schedule=schedule)
    for scheduler in SCHEDULERS:
        print(f"gradient sample, scale 40, {scheduler}", end=": ")
        sample(load(scheduler), GREEN, 40)

    reference = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
    rows, labels = [], []
    for label, loss, scale in (
        ("unguided", GREEN, 0),
        ("gray", SaturationLoss(0.0), 100),
        ("saturated", SaturationLoss(1.0), 100),
        ("smooth", TotalVariationLoss(), 40),
        ("symmetric", SymmetryLoss(), 100),
        ("reference", ReferenceLoss(reference, 4), 100),
        ("green, symmetric", GREEN + 2 * SymmetryLoss(), 40),
    ):
        print(f"{label}, scale {scale}", end=": ")
        rows += sample(pipe, loss, scale, COLUMNS)
        labels.append(label)
    save(rows, labels, folder, "guidance_losses.png")


def save(images: list[Image.Image], labels: list[str], folder: Path | None, name: str) -> None:
    if folder:
        image_grid(images, len(images) // len(labels), row_labels=labels).save(folder / name, optimize=True)


def measure(variant: str, steps: int = 3) -> tuple[float, float]:
    """Return seconds per step with `IMAGES` images, and the peak memory in MB above that of the loaded model."""
    torch.set_num_threads(1)
    pipe = load()
    if variant == "model, checkpointing":
        pipe.unet.enable_gradient_checkpointing()
    times = []

    def callback(pipe, i, t, tensors):
        times.append(synchronized_time())
        return {}

    options = {"guidance_end": 0.0} if variant == "unguided" else {"gradient": variant.split(",")[0]}
    options |= {"num_inference_steps": 1 + steps, "callback_on_step_end": callback, "output_type": "latent"}
    start = peak_memory_mb(reset=True)
    pipe(GREEN, 40.0, batch_size=IMAGES, **options)
    return (times[-1] - times[0]) / steps, peak_memory_mb() - start


def peak_memory_mb(reset: bool = False) -> float:
    """Return the peak memory in MB since the last reset: of the GPU, or (Linux only) of this process."""
    if DEVICE == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def compare_costs(rounds: int) -> None:
    """Print seconds per step and peak memory of each variant, with their ratios to unguided sampling."""
    results = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            results[variant].append(run_in_subprocess(__file__, "--variant", variant))
    unguided_seconds, unguided_peaks = zip(*results["unguided"], strict=True)
    for variant, runs in results.items():
        seconds, peaks = zip(*runs, strict=True)
        ratio = median(a / b for a, b in zip(seconds, unguided_seconds, strict=True))
        growth = median(peaks) / median(unguided_peaks)
        print(f"{variant}: {median(seconds):.3f} s per step ({ratio:.2f}), peak {median(peaks):.0f} MB ({growth:.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid_dir", type=Path, help="existing folder to save image grids in")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of time and memory per variant")
    parser.add_argument("--variant", choices=VARIANTS, help="measure only this variant, in this process")
    args = parser.parse_args()
    disable_progress_bar()
    if args.variant:
        print(json.dumps(measure(args.variant)))
    else:
        print(hardware())
        compare_costs(args.rounds)
        compare_losses(args.grid_dir)
        compare_steps(args.grid_dir)
