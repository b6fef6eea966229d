"""Fine-tune a pretrained unconditional diffusion pipeline on your own images.

    accelerate launch finetune_model.py --start_model google/ddpm-celebahq-256 --dataset_name \
        Norod78/Vintage-Faces-FFHQAligned --image_size 128 --batch_size 8 --grad_accumulation_steps 2 --num_epochs 16

Without a model, data or --config it runs the demo: examples/demo.yaml, with the embedded model and images.
From Python, call `ddgan.api.finetune`.
"""

import sys

from ddgan.commands.arguments import FINETUNE_ARGUMENTS
from ddgan.core.cli import flag_names, parse_arguments
from ddgan.core.errors import run_command
from ddgan.core.locations import EXAMPLES

# flags that name a model, data or settings; a command without any of them runs the demo
NOT_THE_DEMO = {"config", "start_model", "model_config", "dataset_name", "train_data_dir"}


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    argv = sys.argv[1:] if argv is None else argv
    if not NOT_THE_DEMO & flag_names(argv):
        argv = ["--config", str(EXAMPLES / "demo.yaml"), *argv]
    return parse_arguments(*FINETUNE_ARGUMENTS, *more, argv=argv)


def run(*arguments) -> None:
    from ddgan.commands.finetune import finetune  # imports PyTorch and Diffusers, which takes seconds
    from ddgan.training.model_card import print_summary

    print_summary(finetune(*arguments))


if __name__ == "__main__":
    run_command(main)
