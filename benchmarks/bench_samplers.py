"""DDPM beside DDIM by number of steps: time, distance to real digits, and digits that are read as what was asked for.

    python benchmarks/bench_samplers.py --data_dir path/to/data
    python benchmarks/bench_samplers.py --data_dir path/to/data --pictures docs/images

On the embedded class-conditional model, with the classifier of the tests. In the grid a column starts from the same
noise throughout. The last rows leave out the noise that DDPM adds back after each step.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.logging import disable_progress_bar
from PIL import Image
from torchvision.datasets import MNIST
from torchvision.transforms.v2.functional import pil_to_tensor

from ddgan import ClassConditionalPipeline
from ddgan.evaluation.extractors import FeatureExtractor, load_extractor
from ddgan.evaluation.metrics import Gaussian, frechet_distance, reference_baseline
from ddgan.sampling.grids import image_grid, steps_strip
from ddgan.sampling.pipelines import intermediates, load_pipeline, sample, sample_in_full_batches, with_scheduler

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "models" / "mnist-28"
CLASSIFIER = ROOT / "tests" / "fixtures" / "classifiers" / "mnist"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = (10, 20, 50, 100, 250, 1000)
BATCH = 50


class DDPMWithoutNoise(DDPMScheduler):
    """DDPM whose every step goes to the mean of the posterior: a variance of zero."""

    def _get_variance(self, t, predicted_variance=None, variance_type=None):
        return torch.zeros(())


SAMPLERS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler, "DDPM, variance zero": DDPMWithoutNoise}


def draw(pipe: ClassConditionalPipeline, count: int, steps: int, **options) -> list[Image.Image]:
    """Pictures of the classes in turn, picture i from seed i."""
    return sample_in_full_batches(
        lambda seeds: sample(pipe, seeds, steps, [seed % pipe.num_classes for seed in seeds], **options),
        range(count),
        BATCH,
    )


def judge(pictures: list[Image.Image], extractor: FeatureExtractor, num_classes: int) -> tuple[torch.Tensor, float]:
    """Features of pictures of the classes in turn, and the share that is read as what was asked for."""
    found = extractor(torch.stack([pil_to_tensor(picture) for picture in pictures]))
    right = found["logits"].argmax(1) == torch.arange(len(pictures)) % num_classes
    return found["features"], right.double().mean().item()


def compare(model: str, data_dir: str, count: int, folder: Path | None) -> None:
    extractor = load_extractor(str(CLASSIFIER), device=DEVICE)
    real = torch.cat([extractor(batch)["features"] for batch in MNIST(data_dir).data[:, None].split(500)])
    gaussian = Gaussian.of(real)
    pipe = load_pipeline(model, device=DEVICE)
    print(
        f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, torch {torch.__version__}, {count} pictures"
    )
    least = reference_baseline(real, count)["fid"].value
    print(f"Frechet distance of {count} real images to {len(real) // 2:,} others: {least:.2f}\n")
    print(
        "| sampler | steps | seconds a picture | Frechet distance | read as asked |\n|---|--:|--:|--:|--:|", flush=True
    )
    shown, labels = [], []
    for name, scheduler in SAMPLERS.items():
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        for steps in STEPS if scheduler is not DDPMWithoutNoise else STEPS[-2:]:
            started = time.perf_counter()
            pictures = draw(pipe, count, steps)
            seconds = (time.perf_counter() - started) / count
            features, right = judge(pictures, extractor, pipe.num_classes)
            distance = frechet_distance(Gaussian.of(features), gaussian)
            print(f"| {name} | {steps} | {seconds:.3f} | {distance:.2f} | {right:.1%} |", flush=True)
            shown += pictures[: pipe.num_classes]
            labels.append(f"{name}, {steps}")
    if folder:
        image_grid(shown, pipe.num_classes, row_labels=labels).save(folder / "samplers.png", optimize=True)
        strip = intermediates(with_scheduler(pipe, "ddpm"), 3, 10, 1000, class_label=3)
        steps_strip(*strip).save(folder / "digit_from_noise.png", optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder with torchvision's MNIST/raw")
    parser.add_argument("--model", default=str(MODEL), help="class-conditional pipeline of digits")
    parser.add_argument("--num_images", type=int, default=500, help="pictures of each row")
    parser.add_argument("--pictures", type=Path, help="folder for grids of the pictures")
    args = parser.parse_args()
    disable_progress_bar()
    if not (Path(args.data_dir) / "MNIST" / "raw").is_dir():
        print(f"There is no MNIST in {args.data_dir}: nothing to measure. Name its folder with --data_dir.")
        raise SystemExit
    compare(args.model, args.data_dir, args.num_images, args.pictures)
