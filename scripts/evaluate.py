"""Evaluate a pipeline, or existing images, against reference images, and report the protocol of every metric.

    python scripts/evaluate.py --pipeline my-run --reference path/to/MNIST --feature_extractor mnist-classifier
    accelerate launch scripts/evaluate.py --pipeline google/ddpm-cifar10-32 --scheduler ddim \
        --reference uoft-cs/cifar10 --num_images 50000 --output cifar10.json
    python scripts/evaluate.py --images generated/images --reference path/to/MNIST --held_out path/to/MNIST

Samples of a pipeline are measured as they are generated, sample i only from the seed `--seed` + i as in
scripts/generate.py, and are not kept without `--save_images`. A CPU is used with all its cores. The results depend
neither on their number nor on that of the processes, an interrupted command resumes when it is run again, and the
features of a reference are cached.
From Python, call `ddgan.api.evaluate`.
"""

from ddgan.commands.arguments import EvaluateArguments
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(EvaluateArguments, *more, argv=argv)


def run(args: EvaluateArguments) -> None:
    from ddgan.commands.evaluate import evaluate  # imports PyTorch and Diffusers, which takes seconds

    evaluate(args)


if __name__ == "__main__":
    run_command(main)
