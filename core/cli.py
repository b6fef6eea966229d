"""Command-line arguments: dataclasses read from flags and YAML files."""

import argparse
import copy
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError
from .locations import find

_BOOLEANS: dict[str, bool] = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}


def option(default: Any, help: str, choices: Iterable[str] | None = None) -> Any:
    """Return a dataclass field with a default, a `--help` text and, optionally, its allowed values."""
    return field(default=default, metadata={"help": help} if choices is None else {"help": help, "choices": choices})


def require_at_least(minimum: float, arguments: Any, *names: str) -> None:
    """Check that the named arguments, numbers or lists of numbers, are at least `minimum`; None is ignored.

    Raises:
        InputError: if one is smaller; the message names its flag.
    """
    for name, value in _numbers(arguments, names):
        if not value >= minimum:
            raise InputError(f"--{name} is {value}; it must be at least {minimum}.")


def require_above(bound: float, arguments: Any, *names: str) -> None:
    """Check that the named arguments are greater than `bound`; see `require_at_least`."""
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
    """Parse the command line into one instance of each dataclass.

    `--config file.yaml` sets values, which flags override. The file is flat: its keys are the names of the flags.

    A dataclass may have a class attribute `_alternatives`, sets of mutually exclusive flags. A flag on the
    command line then also overrides its alternatives in the file.

    Args:
        recipes: YAML files of the script by name. `--recipe NAME` reads one; `--config` and flags override it.

    Raises:
        InputError: for an unknown flag or key (the message suggests the closest one), a value of the wrong type, or
            an `--output_dir` that Python would import instead of this package.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(dataclass_types, recipes)
    known_flags = {flag for action in parser._actions for flag in action.option_strings}
    alternatives = [group for kind in dataclass_types for group in getattr(kind, "_alternatives", ())]

    files, _ = parser.parse_known_args([token for token in argv if token not in ("-h", "--help")])
    defaults: list[str] = []
    if files.config:
        defaults = _read_config(files.config, parser, alternatives, argv)
    if recipes and files.recipe:
        defaults = _read_config(str(recipes[files.recipe]), parser, alternatives, defaults + argv) + defaults
    values, unknown = parser.parse_known_args(defaults + argv)
    if unknown:
        raise InputError(f"{_unknown_flag(unknown[0].split('=')[0], known_flags)} --help lists the flags.")
    parsed = [
        kind(**{argument.name: getattr(values, argument.name) for argument in dataclasses.fields(kind)})
        for kind in dataclass_types
    ]
    for arguments in parsed:
        if getattr(arguments, "output_dir", None):
            _check_output_dir(Path(arguments.output_dir))
    return tuple(parsed)


def write_config(path: Path, *arguments: Any) -> None:
    """Write all arguments, including defaults, to a YAML file that `--config` reads."""
    values = {name: value for part in arguments for name, value in dataclasses.asdict(part).items()}
    values.pop("resume_from_checkpoint")  # a repeated run starts from step 0
    path.write_text(
        "# every argument of this run: pass this file back with --config to repeat it\n"
        + yaml.safe_dump({name: value for name, value in values.items() if value is not None}, sort_keys=False),
        encoding="utf-8",
    )


def _parser(dataclass_types: tuple[Any, ...], recipes: dict[str, Path] | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="%(prog)s [flags]", formatter_class=_HelpFormatter)
    for kind in dataclass_types:
        title = getattr(kind, "_argument_group_name", None)
        group = parser.add_argument_group(title) if title else parser
        annotations = get_type_hints(kind)
        for argument in dataclasses.fields(kind):
            _add_flag(group, argument, annotations[argument.name])
    parser.add_argument("--config", help="YAML file with values for any of these flags; flags override it")
    if recipes:
        parser.add_argument("--recipe", choices=recipes, help="predefined values; --config and flags override them")

    def fail(message: str) -> NoReturn:
        raise InputError(f"{message[0].upper()}{message[1:]}. --help lists the flags.")

    parser.error = fail
    return parser


def _add_flag(group: Any, argument: dataclasses.Field, annotation: Any) -> None:
    """Add the flag of a dataclass field, spelled with underscores or hyphens.

    Its type is str, int, float, bool, a Literal of strings or integers, or a list of one of these; or this or None.
    Lists may be empty. A bool that is True by default can be turned off with --no_NAME.
    """
    if get_origin(annotation) in (UnionType, Union):
        (annotation,) = [kind for kind in get_args(annotation) if kind is not type(None)]
    default = argument.default
    if argument.default_factory is not dataclasses.MISSING:
        default = argument.default_factory()
    options = {name: argument.metadata[name] for name in ("help", "choices") if name in argument.metadata}
    options |= {"default": default, "dest": argument.name}
    if get_origin(annotation) is list:
        options["nargs"] = "*"
        (annotation,) = get_args(annotation)
    if get_origin(annotation) is Literal:
        options["choices"] = get_args(annotation)
        annotation = type(options["choices"][0])
    if annotation is bool:
        options |= {"type": _parse_bool, "nargs": "?", "const": True}
    else:
        options["type"] = annotation
    group.add_argument(*_spellings(argument.name), **options)
    if default is True:
        help = f"turn off --{argument.name}"
        group.add_argument(
            *_spellings(f"no_{argument.name}"), dest=argument.name, action="store_false", default=True, help=help
        )


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _parse_bool(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false") from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Name each flag once, and add its default unless it has none or the help states it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        # without the spelling with hyphens
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.removeprefix("--")[1:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_off_switch = isinstance(action, argparse._StoreFalseAction)
        if is_off_switch or action.default in (None, []) or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _read_config(
    path: str, parser: argparse.ArgumentParser, alternatives: list[set[str]], overriding: list[str]
) -> list[str]:
    """Convert a YAML file to command-line tokens, leaving out flags whose alternatives are among `overriding`."""
    file = Path(find(path) or path)
    if not file.is_file():
        raise InputError(f"--config {path} does not exist.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must contain one `flag: value` per line, like a run folder's config.yaml.")

    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    named = {token.split("=")[0].lstrip("-").replace("-", "_") for token in overriding if token.startswith("--")}
    overridden = {name for group in alternatives if group & named for name in group - named}
    tokens = []
    for name, value in values.items():
        action = actions.get(f"--{name}")
        if action is None:
            raise InputError(f"--config {path}: {_unknown_flag(f'--{name}', set(actions))}")
        if value is False and "no" in (action.choices or ()):  # YAML reads an unquoted no as false
            value = "no"
        if value is not None and name not in overridden:
            tokens += [f"--{name}", *(str(v) for v in (value if isinstance(value, list) else [value]))]
    return tokens


def _unknown_flag(flag: str, known_flags: set[str]) -> str:
    closest = difflib.get_close_matches(flag, known_flags, n=1)
    return f"Unknown flag {flag}." + (f" Did you mean {closest[0]}?" if closest else "")


def _check_output_dir(folder: Path) -> None:
    """Reject a folder named `ddgan` on the import path: Python would find it before an editable install."""
    folder = folder.resolve()
    if folder.name == "ddgan" and str(folder.parent) in (os.getcwd(), *sys.path):
        raise InputError(
            f"--output_dir {folder}: Python would import a folder of that name here instead of this package. "
            "Choose another name."
        )
