"""Generate images with a pipeline from a folder or the Hub, one PNG file per seed.

    python scripts/generate.py --pipeline google/ddpm-cifar10-32 --num_images 64 --scheduler ddim --grid
    accelerate launch scripts/generate.py --pipeline google/ddpm-cifar10-32 --num_images 50000 --output_dir cifar
    python scripts/generate.py --pipeline examples/models/noto-emoji-32 --color "#BB2266" --output_dir emoji --grid

Image i depends only on the seed `--seed` + i, so any number of processes writes the same files, and running an
interrupted command again resumes it. The batch size and the number of threads change the order in which floating-point
numbers are summed, so images are generated in fixed groups of consecutive seeds: on a CPU 16 at 32x32 and fewer if
they are larger, on an accelerator `--batch_size`. A group is computed as a whole even if only some of its images are
missing. On a CPU each group takes one thread, and all cores work on different groups; `OMP_NUM_THREADS` limits their
number. On an accelerator guided images are reproducible only up to rounding, because some kernels sum gradients in a
nondeterministic order.
From Python, call `ddgan.api.generate`.
"""

from ddgan.commands.arguments import GenerateArguments
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(GenerateArguments, *more, argv=argv)


def run(args: GenerateArguments) -> None:
    from ddgan.commands.generate import generate  # imports PyTorch and Diffusers, which takes seconds

    generate(args)


if __name__ == "__main__":
    run_command(main)
