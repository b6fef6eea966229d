"""Train a class-conditional diffusion model on handwritten digits or any images with class labels.

    accelerate launch train_class_conditional.py --recipe fast --dataset mnist --data_dir data

Without --recipe or --config it uses `--recipe tutorial`, and without data it trains on MNIST.
From Python, call `ddgan.api.train_class_conditional`.
"""

import sys

from ddgan.commands.arguments import CLASS_CONDITIONAL_ARGUMENTS
from ddgan.core.cli import flag_names, parse_arguments
from ddgan.core.errors import run_command
from ddgan.core.locations import EXAMPLES

RECIPES = {name: EXAMPLES / "recipes" / f"class_conditional_{name}.yaml" for name in ("tutorial", "fast", "emoji_32")}


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    argv = sys.argv[1:] if argv is None else argv
    if not {"config", "recipe"} & flag_names(argv):
        argv = ["--recipe", "tutorial", *argv]
    return parse_arguments(*CLASS_CONDITIONAL_ARGUMENTS, *more, argv=argv, recipes=RECIPES)


def run(*arguments) -> None:
    # these import PyTorch and Diffusers, which takes seconds
    from ddgan.commands.train_class_conditional import train_class_conditional
    from ddgan.training.model_card import print_summary

    print_summary(train_class_conditional(*arguments))


if __name__ == "__main__":
    run_command(main)
