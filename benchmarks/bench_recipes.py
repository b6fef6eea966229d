"""Ablation of `--recipe fast`: train for the same time with one setting changed, and compare the denoising error.

    python benchmarks/bench_recipes.py --data_dir path/to/data
    python benchmarks/bench_recipes.py --data_dir path/to/data --pipelines examples/models/mnist-28

The error is the mean squared error of the predicted noise on MNIST's test images, converted from the network's
prediction type and with the same timesteps and noise for all. --pipelines measures trained pipelines instead, and adds
their class accuracy.
"""

import argparse
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from common import BATCH_SIZE, CLASSIFIER, classify, require_mnist, sample_classes
from diffusers.utils.logging import disable_progress_bar
from torchvision.datasets import MNIST

from ddgan import ClassConditionalPipeline, train_class_conditional
from ddgan.evaluation.extractors import load_extractor
from ddgan.sampling.loading import load_pipeline, with_scheduler

NETWORK = "--block_out_channels 32 64 64 --layers_per_block 2 --attention_levels 1 2"
# by name: flags, and the time of a step relative to that of the recipe
VARIANTS = {
    "fast": ("", 1),
    "epsilon prediction": ("--prediction_type epsilon", 1),
    "constant learning rate": ("--lr_scheduler constant --lr_warmup_steps 0", 1),
    "no EMA": ("--ema_decay 0", 1),
    "16 norm groups": ("--norm_num_groups 16", 1),
    "class embedding of size 4": ("--class_emb_size 4", 1),
    "min-SNR weights": ("--min_snr_gamma 5", 1),
    "logit-normal timesteps": ("--timestep_sampling logit_normal", 1),
    "tutorial network": (NETWORK, 4),
    "batch size 128": ("--batch_size 128", 4),
    "tutorial": ("--recipe tutorial", 16),
}
TEST_IMAGES, DIGITS = 5000, 200


def train(flags: str, steps: int, data_dir: str, folder: str) -> float:
    """Train for `steps` steps and return the CPU time in seconds."""
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = [] if "--recipe" in flags else ["--recipe", "fast"]
    required = ["--data_dir", data_dir, "--output_dir", folder, "--max_train_steps", str(steps), "--report_to", "none"]
    short = ["--log_samples_every", "0", "--save_model_every", "0", "--num_samples", "10", "--sample_steps", "2"]
    warm_up = [] if "--lr_warmup_steps" in flags or not recipe else ["--lr_warmup_steps", str(steps // 20)]
    start = time.process_time()
    with redirect_stdout(sys.stderr):
        train_class_conditional.main([*recipe, *required, *short, *warm_up, *flags.split()])
    return time.process_time() - start


@torch.no_grad()
def noise_error(pipe: ClassConditionalPipeline, data_dir: str) -> float:
    """Return the mean squared error of the noise that the network predicts on test images."""
    data, generator = MNIST(data_dir, train=False), torch.Generator().manual_seed(0)
    images = (data.data[:TEST_IMAGES].float() / 127.5 - 1)[:, None]
    timesteps = torch.randint(1000, (TEST_IMAGES,), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = pipe.scheduler.add_noise(images, noise, timesteps)
    alpha_bar = pipe.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    errors = []
    for batch in torch.arange(TEST_IMAGES).split(BATCH_SIZE):
        prediction = pipe.unet(noisy[batch], timesteps[batch], data.targets[batch]).sample
        if pipe.scheduler.config.prediction_type == "v_prediction":
            prediction = alpha_bar[batch].sqrt() * prediction + (1 - alpha_bar[batch]).sqrt() * noisy[batch]
        errors.append((prediction - noise[batch]).square().mean((1, 2, 3)))
    return torch.cat(errors).mean().item()


def digit_accuracy(pipe: ClassConditionalPipeline, guidance_scale: float) -> float:
    """Return the class accuracy of `DIGITS` samples, cycling through the classes."""
    images = sample_classes(with_scheduler(pipe, "ddim"), DIGITS, 20, guidance_scale=guidance_scale)
    return classify(images, load_extractor(str(CLASSIFIER)), pipe.num_classes)[1]


def compare(steps: int, data_dir: str) -> None:
    print("| | steps | CPU time | noise error |\n|---|--:|--:|--:|", flush=True)
    for name, (flags, cost) in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds = train(flags, steps // cost, data_dir, folder)
            error = noise_error(load_pipeline(folder), data_dir)
        print(f"| {name} | {steps // cost} | {seconds / 60:.1f} min | {error:.4f} |", flush=True)


def measure(folders: list[str], data_dir: str) -> None:
    print("| | noise error | class accuracy | with guidance scale 1.5 |\n|---|--:|--:|--:|", flush=True)
    for folder in folders:
        pipe = load_pipeline(folder)
        guided = f"{digit_accuracy(pipe, 1.5):.1%}" if pipe.has_null_class else ""
        row = f"{noise_error(pipe, data_dir):.4f} | {digit_accuracy(pipe, 1):.1%} | {guided}"
        print(f"| {Path(folder).resolve().name} | {row} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder that contains torchvision's MNIST/raw")
    parser.add_argument(
        "--steps", type=int, default=200, help="steps of the recipe; other variants take the same time"
    )
    parser.add_argument("--pipelines", nargs="+", help="trained pipelines to measure instead of training")
    args = parser.parse_args()
    disable_progress_bar()
    require_mnist(args.data_dir)
    if args.pipelines:
        measure(args.pipelines, args.data_dir)
    else:
        compare(args.steps, args.data_dir)
