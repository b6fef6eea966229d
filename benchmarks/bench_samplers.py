"""Compare DDPM and DDIM by number of steps: sampling time, Frechet distance to real digits, and class accuracy.

    python benchmarks/bench_samplers.py --data_dir path/to/data
    python benchmarks/bench_samplers.py --data_dir path/to/data --grid_dir docs/images

It uses the embedded class-conditional model and classifier. All images in a column of the grid start from the same
noise. The last rows leave out the noise that DDPM adds after each step.
"""

import argparse
import time
from pathlib import Path

import torch
from common import CLASSIFIER, DEVICE, MODELS, classify, hardware, require_mnist, sample_classes
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.logging import disable_progress_bar
from torchvision.datasets import MNIST

from ddgan.evaluation.extractors import load_extractor
from ddgan.evaluation.metrics import Gaussian, frechet_distance, reference_baseline
from ddgan.sampling.grids import image_grid, steps_strip
from ddgan.sampling.loading import load_pipeline, with_scheduler
from ddgan.sampling.traces import intermediates

STEPS = (10, 20, 50, 100, 250, 1000)


class DDPMWithoutNoise(DDPMScheduler):
    """DDPM with zero variance: each step returns the mean of the posterior."""

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        return torch.zeros(())


SAMPLERS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler, "DDPM, zero variance": DDPMWithoutNoise}


def compare(model: str, data_dir: str, count: int, folder: Path | None) -> None:
    extractor = load_extractor(str(CLASSIFIER), device=DEVICE)
    real = torch.cat([extractor(batch)["features"] for batch in MNIST(data_dir).data[:, None].split(500)])
    gaussian = Gaussian.of(real)
    pipe = load_pipeline(model, device=DEVICE)
    print(f"{hardware()}, {count} images")
    baseline = reference_baseline(real, count)["fid"].value
    print(f"Frechet distance of {count} real images to {len(real) // 2:,} others (baseline): {baseline:.2f}\n")
    print(
        "| sampler | steps | seconds per image | Frechet distance | class accuracy |\n|---|--:|--:|--:|--:|",
        flush=True,
    )
    rows, labels = [], []
    for name, scheduler in SAMPLERS.items():
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        for steps in STEPS if scheduler is not DDPMWithoutNoise else STEPS[-2:]:
            start = time.perf_counter()
            images = sample_classes(pipe, count, steps)
            seconds = (time.perf_counter() - start) / count
            features, accuracy = classify(images, extractor, pipe.num_classes)
            distance = frechet_distance(Gaussian.of(features), gaussian)
            print(f"| {name} | {steps} | {seconds:.3f} | {distance:.2f} | {accuracy:.1%} |", flush=True)
            rows += images[: pipe.num_classes]
            labels.append(f"{name}, {steps}")
    if folder:
        image_grid(rows, pipe.num_classes, row_labels=labels).save(folder / "samplers.png", optimize=True)
        strip = intermediates(with_scheduler(pipe, "ddpm"), 3, 10, 1000, class_label=3)
        steps_strip(*strip).save(folder / "digit_from_noise.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder that contains torchvision's MNIST/raw")
    parser.add_argument("--model", default=str(MODELS / "mnist-28"), help="class-conditional pipeline of digits")
    parser.add_argument("--num_images", type=int, default=500, help="images per row of the table")
    parser.add_argument("--grid_dir", type=Path, help="existing folder to save image grids in")
    args = parser.parse_args()
    disable_progress_bar()
    require_mnist(args.data_dir)
    compare(args.model, args.data_dir, args.num_images, args.grid_dir)
