"""CPU time of scripts/generate.py's groups of seeds, relative to the plain pipeline in large batches.

    python benchmarks/bench_generation.py

It measures CPU time, not elapsed time, and the variants alternate in each round, so that the ratios are robust to
other load on the machine. The first lines show why larger images have smaller groups: by image size, the time per
image of one evaluation of a network like that of the embedded model, in batches of several sizes.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median

import torch
from common import MODELS, hardware
from diffusers import UNet2DModel
from diffusers.utils.logging import disable_progress_bar

from ddgan.core.threads import one_thread_per_operation, run_in_threads
from ddgan.sampling.generation import sample
from ddgan.sampling.groups import GroupSampler, group_size, split_into_groups
from ddgan.sampling.loading import load_pipeline, with_scheduler

CPU = torch.device("cpu")
IMAGES = 64
STEPS = 10
PLAIN_BATCH = 32
BATCHES = {32: (1, 2, 4, 8, 16, 32), 64: (1, 2, 4, 8, 16), 128: (1, 2, 4)}  # batch sizes by image size


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(variants: Mapping[str, Callable[[], object]], rounds: int) -> Iterator[tuple[str, float]]:
    """Yield the median CPU seconds of each variant, run once per round after a warm-up."""
    for function in variants.values():
        function()
    times = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            times[name].append(cpu_seconds(function))
    yield from ((name, median(values)) for name, values in times.items())


@torch.no_grad()
def compare_batch_sizes(rounds: int) -> None:
    """Print the time per image of a network evaluation, relative to that in the largest batch."""
    config = load_pipeline(str(MODELS / "noto-emoji-32")).unet.config
    for size, batches in BATCHES.items():
        unet: UNet2DModel = UNet2DModel.from_config({**config, "sample_size": size}).eval()  # pyright: ignore[reportAssignmentType]
        inputs = {f"batch of {count}": torch.randn(count, 3, size, size) for count in batches}
        calls = {name: partial(unet, x, 500) for name, x in inputs.items()}
        seconds = {name: value / len(inputs[name]) for name, value in in_turn(calls, rounds)}
        *_, largest = seconds.values()
        ratios = ", ".join(f"{name} {value / largest:.2f}" for name, value in seconds.items())
        print(f"{size}x{size}: {ratios}", flush=True)


def compare_sampling(threads: int, rounds: int) -> None:
    """Print the CPU time per image of each way to sample, relative to the plain pipeline."""
    pipe = with_scheduler(load_pipeline(str(MODELS / "noto-emoji-32")), "ddim")

    def plain() -> None:
        for start in range(0, IMAGES, PLAIN_BATCH):
            generator = [torch.Generator().manual_seed(start + i) for i in range(PLAIN_BATCH)]
            pipe(batch_size=PLAIN_BATCH, generator=generator, num_inference_steps=STEPS)  # pyright: ignore[reportCallIssue]

    def one_by_one() -> None:
        for seed in range(IMAGES // 4):
            sample(pipe, [seed], STEPS)

    def in_groups(size: int, threads: int) -> None:
        groups = split_into_groups(IMAGES, size)
        run_in_threads(GroupSampler(pipe, size, num_inference_steps=STEPS), groups, threads, lambda images: None)

    size = group_size(pipe, 1)
    variants = {
        f"plain pipeline, batches of {PLAIN_BATCH}": plain,
        "one image at a time": one_by_one,
        f"groups of {size // 2}": lambda: in_groups(size // 2, 1),
        f"groups of {size}": lambda: in_groups(size, 1),
        f"groups of {size}, {threads} threads": lambda: in_groups(size, threads),
    }
    seconds = dict(in_turn(variants, rounds))
    seconds["one image at a time"] *= 4
    first, *_ = seconds.values()
    for name, value in seconds.items():
        print(f"{name}: {1000 * value / IMAGES / STEPS:.2f} ms per image and step ({value / first:.2f})", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each variant")
    args = parser.parse_args()
    disable_progress_bar()
    print(hardware())
    with one_thread_per_operation(CPU) as threads:
        compare_batch_sizes(args.rounds)
        compare_sampling(max(2, threads), args.rounds)
