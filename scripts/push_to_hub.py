"""Publish a pipeline folder on the Hugging Face Hub.

    hf auth login
    python scripts/push_to_hub.py --folder my-model --repo_id user/my-model --private

It uploads the pipeline, its code, its model card and the images that the card shows in one commit, and nothing else
from the folder. It then downloads what it has uploaded, loads it as a user would, in a process without this package,
and samples an image. The pipeline is reported as published only if that image equals the one from the folder.
A failed command can be repeated: nothing is uploaded twice.
"""

from ddgan.commands.arguments import PushArguments
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(PushArguments, *more, argv=argv)


def run(args: PushArguments) -> None:
    from ddgan.commands.push import push  # imports PyTorch and Diffusers, which takes seconds

    push(args)


if __name__ == "__main__":
    run_command(main)
