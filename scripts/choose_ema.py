"""Choose the length of a run's EMA after training.

    python finetune_model.py --train_data_dir path/to/images --output_dir my-model --posthoc_ema
    python scripts/choose_ema.py --run my-model --reference path/to/images --scheduler ddim --num_inference_steps 50

For each length, the EMA is computed from the snapshots of the run, and its samples, from the same seeds, are measured
like those of scripts/evaluate.py. The pipeline with the best one is saved in the folder posthoc/ of the run, with its
card, the curve and all metrics; the run itself is not changed. Features of samples are cached, so that an interrupted
command resumes when it is run again, and lengths can be added.
From Python, call `ddgan.api.choose_ema`.
"""

from ddgan.commands.arguments import ChooseEMAArguments
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(ChooseEMAArguments, *more, argv=argv)


def run(args: ChooseEMAArguments) -> None:
    from ddgan.commands.choose_ema import choose_ema  # imports PyTorch and Diffusers, which takes seconds

    choose_ema(args)


if __name__ == "__main__":
    run_command(main)
