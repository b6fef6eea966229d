"""Helpers shared by the benchmarks: device, timing, peak memory, subprocesses, and samples of the digit models."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ddgan.evaluation.extractors import FeatureExtractor
from ddgan.sampling.generation import sample, sample_in_full_batches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "examples" / "models"
CLASSIFIER = ROOT / "examples" / "classifiers" / "mnist"
BATCH_SIZE = 50  # images per batch when sampling digits


def hardware() -> str:
    """Return the device and the version of torch, for the header of a table."""
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}, torch {torch.__version__}"


def synchronized_time() -> float:
    """Return the time in seconds, after all work on the GPU is finished."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory() -> int:
    """Return the peak memory in bytes: allocated on the GPU, or resident in this process with all loaded libraries."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_in_subprocess(script: str, *flags: str) -> Any:
    """Run a benchmark in a fresh process and return the JSON value on its last line of output."""
    process = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{Path(script).name} {' '.join(flags)} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def require_mnist(data_dir: str) -> None:
    """End the program with exit code 0 if `data_dir` has no MNIST, so that `make bench` continues."""
    if not (Path(data_dir) / "MNIST" / "raw").is_dir():
        print(f"No MNIST in {data_dir}, skipping this benchmark. Pass the folder of MNIST/raw with --data_dir.")
        raise SystemExit


def sample_classes(pipe: DiffusionPipeline, count: int, steps: int, **options: Any) -> list[Image.Image]:
    """Sample `count` images, image i from seed i and conditioned on class i modulo the number of classes."""
    return sample_in_full_batches(
        lambda seeds: sample(pipe, seeds, steps, [seed % pipe.num_classes for seed in seeds], **options),
        range(count),
        BATCH_SIZE,
    )


def class_accuracy(logits: torch.Tensor, num_classes: int) -> float:
    """Return the fraction of images i that a classifier recognizes as the requested class, i modulo `num_classes`."""
    requested = torch.arange(len(logits)) % num_classes
    return (logits.argmax(1) == requested).double().mean().item()


def classify(images: list[Image.Image], classifier: FeatureExtractor, num_classes: int) -> tuple[torch.Tensor, float]:
    """Return the features of images from `sample_classes`, and their class accuracy."""
    outputs = classifier(torch.stack([pil_to_tensor(image) for image in images]))
    return outputs["features"], class_accuracy(outputs["logits"], num_classes)
