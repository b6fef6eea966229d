"""Serve the web demo of examples/space on this machine.

    python scripts/space.py --pipeline my-model

Without --pipeline it offers the embedded models. Other settings of Gradio are environment variables, such as
GRADIO_SHARE=True for a public link.
"""

import os
import runpy
import sys

from ddgan.commands.arguments import SpaceArguments
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command
from ddgan.core.locations import EXAMPLES


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(SpaceArguments, *more, argv=argv)


def run(args: SpaceArguments) -> None:
    from ddgan.hub.upload import SPACE_VARIABLE

    if args.pipeline:
        os.environ[SPACE_VARIABLE] = ",".join(args.pipeline)
    if args.clip_model:
        os.environ["DDGAN_CLIP"] = args.clip_model
    if args.autoguidance:
        os.environ["DDGAN_AUTOGUIDANCE"] = args.autoguidance
    app = EXAMPLES / "space" / "app.py"
    sys.path.insert(0, str(app.parent))  # as if the app had been started
    flags = {"--host": args.host, "--port": args.port}
    sys.argv[1:] = [str(part) for flag, value in flags.items() if value is not None for part in (flag, value)]
    runpy.run_path(str(app), run_name="__main__")


if __name__ == "__main__":
    run_command(main)
