"""The command `ddgan`."""

import difflib
import sys
from argparse import ArgumentParser
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from ddgan import __version__
from ddgan.core.errors import InputError, run_command
from ddgan.core.launch import LaunchArguments, launch
from ddgan.core.locations import EXAMPLES


class Command(NamedTuple):
    """A command of `ddgan`.

    Attributes:
        module: the script, with the functions `parse` and `run`.
        summary: its line in the list of commands.
        flags: its flags in front of those of the user.
        resumes: whether it resumes its earlier run if there is one in its output folder, which has its own name.
        launchable: whether it can run in several processes.
    """

    module: str
    summary: str
    flags: tuple[str, ...] = ()
    resumes: bool = False
    launchable: bool = True


COMMANDS = {
    "demo": Command(
        "finetune_model",
        "fine-tune the embedded model on the embedded images, into the folder demo",
        ("--config", str(EXAMPLES / "demo.yaml")),
        resumes=True,
    ),
    "finetune": Command("finetune_model", "fine-tune an unconditional pipeline on images"),
    "few-step": Command("finetune_few_step", "fine-tune a pipeline into one that samples in a few steps"),
    "train-ddgan": Command("train_ddgan", "train a Denoising Diffusion GAN"),
    "train-class-conditional": Command("train_class_conditional", "train a class-conditional diffusion model"),
    "generate": Command("scripts.generate", "generate images with a pipeline"),
    "evaluate": Command("scripts.evaluate", "measure a pipeline or images against reference images"),
    "choose-ema": Command("scripts.choose_ema", "choose the length of a run's EMA after training"),
    "train-classifier": Command("scripts.train_classifier", "train a classifier for evaluation"),
    "convert": Command(
        "scripts.convert_ddgan_checkpoint", "convert a published checkpoint of DDGANs to a pipeline", launchable=False
    ),
    "push": Command("scripts.push_to_hub", "publish a pipeline on the Hugging Face Hub", launchable=False),
    "space": Command("scripts.space", "serve the web demo on this machine", launchable=False),
}


def main(argv: list[str] | None = None) -> None:
    run_command(lambda: dispatch(sys.argv[1:] if argv is None else argv))


def dispatch(argv: list[str]) -> None:
    """Run the command that is the first argument, with the flags that follow.

    Raises:
        InputError: if there is no such command, or it rejects its flags.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print("usage: ddgan <command> [flags]\n\ncommands:")
        print("\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()))
        print("\nddgan <command> --help lists the flags of a command; ddgan --version prints the version.")
        return
    if argv[0] == "--version":
        print(f"diffusers-ddgan {__version__}")
        return
    name, *flags = argv
    if name not in COMMANDS:
        closest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {closest[0]}?" if closest else ""
        raise InputError(f"There is no command {name}.{hint} ddgan --help lists the commands.")
    command = COMMANDS[name]
    sys.argv[0] = f"ddgan {name}"  # in help and messages
    script = import_module(f"ddgan.{command.module}")
    if command.resumes and _output_dir(flags, default=name).exists():
        flags = ["--resume_from_checkpoint", "latest", *flags]
    flags = [*command.flags, *flags]
    if command.launchable:
        *arguments, processes = script.parse(flags, LaunchArguments)
        launch(processes, argv, lambda: script.run(*arguments))
    else:
        script.run(*script.parse(flags))


def _output_dir(flags: list[str], default: str) -> Path:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default=default)
    return Path(parser.parse_known_args(flags)[0].output_dir).expanduser()


if __name__ == "__main__":
    main()
