"""Train a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022) on your own images.

    accelerate launch train_ddgan.py --config examples/recipes/ddgan_mnist_16.yaml --train_data_dir path/to/MNIST

Without data or --config it uses examples/recipes/ddgan_emoji_32.yaml and the embedded images.
From Python, call `ddgan.api.train_ddgan`.
"""

import sys

from ddgan.commands.arguments import DDGAN_ARGUMENTS
from ddgan.core.cli import flag_names, parse_arguments
from ddgan.core.errors import run_command
from ddgan.core.locations import EXAMPLES

DEFAULT_RECIPE = EXAMPLES / "recipes" / "ddgan_emoji_32.yaml"


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    argv = sys.argv[1:] if argv is None else argv
    if not {"config", "dataset_name", "train_data_dir"} & flag_names(argv):
        argv = ["--config", str(DEFAULT_RECIPE), *argv]
    return parse_arguments(*DDGAN_ARGUMENTS, *more, argv=argv)


def run(*arguments) -> None:
    from ddgan.commands.train_ddgan import train_ddgan  # imports PyTorch and Diffusers, which takes seconds
    from ddgan.training.model_card import print_summary

    print_summary(train_ddgan(*arguments))


if __name__ == "__main__":
    run_command(main)
