"""Command-line arguments: dataclasses read from flags and YAML files."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .errors import InputError

# of each group a flag that is given takes the place of those that a file names
ALTERNATIVES = (
    {"image_size", "resolution"},
    {"dataset", "dataset_name", "train_data_dir"},
    {"num_epochs", "max_train_steps"},
)


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def require_at_least(least: int, arguments: Any, *names: str) -> None:
    """Refuse numbers that are too small, alone or in a list.

    Raises:
        InputError: which one, and what it may be.
    """
    for name, value in _numbers(arguments, names):
        if not value >= least:
            raise InputError(f"--{name} is {value}; it must be at least {least}.")


def require_above(bound: int, arguments: Any, *names: str) -> None:
    """`require_at_least`, without the bound itself."""
    for name, value in _numbers(arguments, names):
        if not value > bound:
            raise InputError(f"--{name} is {value}; it must be greater than {bound}.")


def _numbers(arguments: Any, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for name in names:
        values = getattr(arguments, name)
        yield from ((name, value) for value in (values if isinstance(values, list) else [values]) if value is not None)


def parse_arguments(
    *dataclass_types: type, argv: list[str] | None = None, recipes: dict[str, Path] | None = None
) -> tuple:
    """Read the command line into one instance of each dataclass.

    `--config file.yaml` gives values that flags override; the file is flat, its keys are the flags' names. A flag also
    overrides what a file says of its `ALTERNATIVES`.

    Args:
        recipes: such files that come with a script, by the names with which `--recipe` asks for them; `--config`
            overrides their values.

    Raises:
        InputError: for an unknown flag or key (the nearest one is named), a value of the wrong kind, or an
            `--output_dir` that Python would import in place of this package.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    for action in parser._actions:
        if action.nargs == "+":
            action.nargs = "*"  # a list may be empty, on the command line and in a file
    parser.add_argument("--config", help="YAML file with values for any of these flags; flags override it")
    if recipes:
        parser.add_argument("--recipe", choices=recipes, help="values that belong together; the others override them")

    def fail(message):
        raise InputError(f"{message[0].upper()}{message[1:]}. --help lists the flags.")

    parser.error = fail
    known = {option for action in parser._actions for option in action.option_strings}
    config, _ = parser.parse_known_args([token for token in argv if token not in ("-h", "--help")])
    defaults = _read_config(config.config, known, argv) if config.config else []
    if recipes and config.recipe:
        defaults = _read_config(str(recipes[config.recipe]), known, defaults + argv) + defaults
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        defaults + argv, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(f"{_unknown(unknown[0].split('=')[0], known)} --help lists the flags.")
    for folder in (Path(part.output_dir).resolve() for part in parsed if getattr(part, "output_dir", None)):
        # an editable installation is found after all folders
        if folder.name == "ddgan" and str(folder.parent) in (os.getcwd(), *sys.path):
            raise InputError(
                f"--output_dir {folder}: Python would import a folder of that name here in place of this package. "
                "Give it another name."
            )
    return tuple(parsed)


def write_config(path: Path, *arguments: Any) -> None:
    """Write every argument in force to a YAML file that `--config` reads back."""
    values = {name: value for part in arguments for name, value in dataclasses.asdict(part).items()}
    values.pop("resume_from_checkpoint")  # a run that is repeated starts anew
    path.write_text(
        "# every argument of this run: pass this file back with --config to repeat it\n"
        + yaml.safe_dump({name: value for name, value in values.items() if value is not None}, sort_keys=False),
        encoding="utf-8",
    )


def _read_config(path: str, known: set[str], overriding: list[str]) -> list[str]:
    given = {token.split("=")[0].lstrip("-").replace("-", "_") for token in overriding if token.startswith("--")}
    overridden = {name for group in ALTERNATIVES if group & given for name in group - given}
    if not Path(path).is_file():
        raise InputError(f"--config {path}: there is no such file.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must hold one `flag: value` a line, like the config.yaml of a run folder.")
    tokens = []
    for name, value in values.items():
        if f"--{name}" not in known:
            raise InputError(f"--config {path}: {_unknown(f'--{name}', known)}")
        if name == "mixed_precision" and value is False:  # as YAML reads a plain no
            value = "no"
        if value is not None and name not in overridden:
            tokens += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return tokens


def _unknown(flag: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(flag, known, n=1)
    return f"There is no flag {flag}." + (f" Did you mean {nearest[0]}?" if nearest else "")
