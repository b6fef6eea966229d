"""Command-line arguments: dataclasses read from flags and YAML files."""

import argparse
import copy
import dataclasses
import difflib
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import InputError
from .locations import InMemory, find
from .run_files import check_starts_no_second_run

_BOOLEANS: dict[str, bool] = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}

_RANGE, _OBJECTS = "range", "objects"  # keys in the metadata of a field
_LARGEST_INT = 2**31 - 1
_EMPTY = "Pass a value, or omit the flag (is a shell variable unset?)."
_NOT_SAVED = ("resume_from_checkpoint", "dry_run")  # a repeated run starts from step 0
_MAX_CONFIG_SIZE = 1_000_000  # bytes


@dataclass(frozen=True)
class _Range:
    """The finite numbers that an argument may have; None is no bound."""

    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None

    def violation(self, value: float) -> str | None:
        """Return what a number must be, or None if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if self.minimum is not None and value < self.minimum:
            return f"at least {self.minimum}"
        if self.above is not None and value <= self.above:
            return f"greater than {self.above}"
        maximum = _LARGEST_INT if self.maximum is None and isinstance(value, int) else self.maximum
        if maximum is not None and value > maximum:
            return f"at most {maximum}"
        if self.below is not None and value >= self.below:
            return f"less than {self.below}"
        return None


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    objects: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Return a dataclass field with a default, a `--help` text and, optionally, its allowed values.

    Args:
        choices: the allowed texts.
        objects: description of the objects that Python may pass instead of a text, such as "a DiffusionPipeline".
        minimum, above, maximum, below: the range of a number, or of each number in a list; `Arguments` checks it.
            Numbers must be finite in any case, and integers at most 2^31 - 1.
    """
    metadata: dict[str, Any] = {"help": help, _OBJECTS: objects, _RANGE: _Range(minimum, above, maximum, below)}
    if choices is not None:
        metadata["choices"] = choices
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Arguments:
    """Base class of dataclasses of arguments, built from the command line or in Python.

    Raises:
        InputError: if a value has another type than the field or is not one of its choices, a number is outside its
            range (see `option`), or a text or a list without default is empty; the message names its flag.
    """

    def __post_init__(self):
        """Check all values, and expand `~` at the start of paths."""
        annotations = get_type_hints(type(self))
        for argument in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, argument.name)
            if value is None and argument.default is None:
                continue
            value = _of_type(argument, annotations[argument.name], value)
            if isinstance(value, list) and not value and argument.default is None:
                raise InputError(f"--{argument.name} is empty. {_EMPTY}")
            checked = [_checked(argument, item) for item in (value if isinstance(value, list) else [value])]
            setattr(self, argument.name, checked if isinstance(value, list) else checked[0])


def _of_type(argument: dataclasses.Field, annotation: Any, value: Any) -> Any:
    """Return a value, or list of values, converted to the type of its field; see `Arguments`.

    Where a text is expected, paths are left to `_checked`, and the objects that `option` allows to the dataclass.
    """
    kind, is_list = _value_type(annotation)
    takes_integers = kind == str | int
    kind = str if takes_integers else kind
    choices = argument.metadata.get("choices")
    if get_origin(kind) is Literal:
        choices, kind = get_args(kind), type(get_args(kind)[0])
    if is_list and not isinstance(value, (list, tuple)):
        raise InputError(f"--{argument.name} is {value!r}; it must be a list.")
    for item in value if is_list else [value]:
        if takes_integers and _is_integer(item):
            continue
        if kind is str:
            _check_text(argument, item, "an integer" if takes_integers else None)
        if choices is not None and item not in choices:
            raise InputError(f"--{argument.name} is {item!r}; choose from {', '.join(map(str, choices))}.")
        expected = {int: Integral, float: Real}.get(kind, kind)
        if kind is not str and (not isinstance(item, expected) or isinstance(item, bool) is not (kind is bool)):
            names = {int: "an integer", float: "a number", bool: "True or False"}
            raise InputError(f"--{argument.name} is {item!r}; it must be {names[kind]}.")
    if takes_integers:
        return [int(item) if _is_integer(item) else item for item in value]
    if kind is str:
        return list(value) if is_list else value
    return [kind(item) for item in value] if is_list else kind(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_text(argument: dataclasses.Field, value: Any, alternative: str | None = None) -> None:
    """Check that a value is a text or path, or may be one of the objects that the argument takes instead.

    Args:
        alternative: what else it could be, for the message.
    """
    objects = argument.metadata.get(_OBJECTS)
    never = value is None or type(value) in (dict, set) or isinstance(value, (bytes, Real))
    never = never or hasattr(value, "__array__")
    if not isinstance(value, (str, os.PathLike)) and (never or not objects):
        others = objects or alternative
        kinds = f"a string, a path or {others}" if others else "a string or a path"
        raise InputError(f"--{argument.name} has the type {type(value).__name__}; it must be {kinds}.")
    if isinstance(value, Sized) and not isinstance(value, (str, os.PathLike)) and not len(value):
        raise InputError(f"--{argument.name} is an empty {type(value).__name__}; it must be {objects}, or omitted.")


def _value_type(annotation: Any) -> tuple[Any, bool]:
    """Return the type of a field's value without `None`, or of the items of a list, and whether it is a list."""
    if get_origin(annotation) in (UnionType, Union):
        (annotation,) = [kind for kind in get_args(annotation) if kind is not type(None)]
    is_list = get_origin(annotation) is list
    return (get_args(annotation)[0] if is_list else annotation), is_list


def _checked(argument: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if violation := argument.metadata.get(_RANGE, _Range()).violation(value):
            raise InputError(f"--{argument.name} is {value}; it must be {violation}.")
    elif isinstance(value, (str, os.PathLike)):
        value = os.fspath(value)
        if not value.strip():
            raise InputError(f"--{argument.name} is empty. {_EMPTY}")
        if "\0" in value:
            raise InputError(f"--{argument.name} contains a zero byte, which no path or name can have.")
        return expand_user(value)
    return value


def expand_user(path: str) -> str:
    """Expand `~/` and `~user/` at the start of a path, as the shell does only in some places."""
    return os.path.expanduser(path) if re.match(r"~[^/\s]*/|~$", path) else path


def parse_arguments(
    *dataclass_types: type, argv: list[str] | None = None, recipes: dict[str, Path] | None = None
) -> tuple:
    """Parse the command line into one instance of each dataclass.

    `--config file.yaml` sets values, which flags override. The file is flat: its keys are the names of the flags.

    A dataclass may have a class attribute `_alternatives`, sets of mutually exclusive flags: a flag on the command
    line then also overrides its alternatives in the file. `_overrides` lists flags that override others in the file,
    but not the reverse.

    Args:
        recipes: YAML files of the script by name. `--recipe NAME` reads one; `--config` and flags override it.

    Raises:
        InputError: for an unknown flag or key (the message suggests the closest one), a value of the wrong type, or
            an `--output_dir` that Python would import instead of this package.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(dataclass_types, recipes)
    known_flags = {flag for action in parser._actions for flag in action.option_strings}
    overrides = _overrides(dataclass_types)

    files, _ = parser.parse_known_args([token for token in argv if token not in ("-h", "--help")])
    defaults: list[str] = []
    if files.config is not None:
        defaults = _read_config(files.config, parser, overrides, argv)
    if recipes and files.recipe:
        defaults = _read_config(str(recipes[files.recipe]), parser, overrides, defaults + argv) + defaults
    values, unknown = parser.parse_known_args(defaults + argv)
    if unknown:
        raise InputError(f"{_unknown_flag(unknown[0].split('=')[0], known_flags)} --help lists the flags.")
    parsed = [
        kind(**{argument.name: getattr(values, argument.name) for argument in dataclasses.fields(kind)})
        for kind in dataclass_types
    ]
    for arguments in parsed:
        if getattr(arguments, "output_dir", None):
            folder = Path(arguments.output_dir)
            _check_output_dir(folder)
            if hasattr(arguments, "resume_from_checkpoint"):
                check_starts_no_second_run(folder, bool(arguments.resume_from_checkpoint))
    return tuple(parsed)


def read_config(path: str, *dataclass_types: type, overriding: Iterable[str] = ()) -> dict[str, Any]:
    """Return the values in a YAML file for `--config`, by argument, converted to the types of the dataclass fields.

    Args:
        overriding: names of arguments that are set elsewhere; their alternatives in the file are left out.

    Raises:
        InputError: see `parse_arguments`.
    """
    parser = _parser(dataclass_types, None)
    tokens = _read_config(path, parser, _overrides(dataclass_types), [f"--{name}" for name in overriding])
    values = parser.parse_args(tokens)
    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    named = [actions[flag].dest for token in tokens if (flag := token.split("=")[0]) in actions]
    return {name: getattr(values, name) for name in named}


def flag_names(tokens: Iterable[str]) -> set[str]:
    """Return the names of the flags among command-line tokens, spelled with underscores and without values."""
    return {token.split("=")[0].lstrip("-").replace("-", "_") for token in tokens if token.startswith("--")}


def default_of(argument: dataclasses.Field) -> Any:
    """Return the default of a dataclass field; `dataclasses.MISSING` if it has none."""
    factory = argument.default_factory
    return argument.default if factory is dataclasses.MISSING else factory()


def _overrides(dataclass_types: Iterable[type]) -> dict[str, set[str]]:
    """Return the flags that a flag on the command line overrides in a file, by its name; see `parse_arguments`."""
    overrides: dict[str, set[str]] = defaultdict(set)
    for kind in dataclass_types:
        for group in getattr(kind, "_alternatives", ()):
            for name in group:
                overrides[name] |= group - {name}
        for name, others in getattr(kind, "_overrides", {}).items():
            overrides[name] |= set(others)
    return overrides


def write_config(path: Path, *arguments: Any) -> None:
    """Write all arguments, including defaults, to a YAML file that `--config` reads."""
    path.write_text(
        "# every argument of this run: pass this file back with --config to repeat it\n"
        + yaml.safe_dump(_plain_values(*arguments), sort_keys=False),
        encoding="utf-8",
    )


def changed_values(path: Path, *arguments: Any) -> list[str]:
    """Return the flags whose values differ from those in a file of `write_config`; none if it cannot be read."""
    try:
        earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    if not isinstance(earlier, dict):
        return []
    fields = {field.name: field for part in arguments for field in dataclasses.fields(part)}
    defaults = {name: default_of(field) for name, field in fields.items()}
    earlier, values = defaults | earlier, _plain_values(*arguments)  # a file of an earlier version lacks new flags
    return [
        f"--{name} {earlier.get(name)} -> {values.get(name)}"
        for name in fields
        if name not in _NOT_SAVED and earlier.get(name) != values.get(name)
    ]


def _plain_values(*arguments: Any) -> dict[str, Any]:
    """Return the values of a run by flag, without those that are None or do not make another run."""
    values = {name: value for part in arguments for name, value in dataclasses.asdict(part).items()}
    values = {name: value for name, value in values.items() if name not in _NOT_SAVED}
    plain = {name: str(value) if isinstance(value, InMemory) else value for name, value in values.items()}
    return {name: value for name, value in plain.items() if value is not None}


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
    A list of strings or integers has only strings here. Lists may be empty. A bool that is True by default can be
    turned off with --no_NAME.
    """
    annotation, is_list = _value_type(annotation)
    if annotation == str | int:
        annotation = str
    default = default_of(argument)
    options = {name: argument.metadata[name] for name in ("help", "choices") if name in argument.metadata}
    options |= {"default": default, "dest": argument.name}
    if is_list:
        options["nargs"] = "*"
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
    path: str, parser: argparse.ArgumentParser, overrides: Mapping[str, set[str]], overriding: list[str]
) -> list[str]:
    """Convert a YAML file to command-line tokens, without those that flags among the tokens `overriding` override."""
    file = Path(find(expand_user(path)) or path)
    if path and os.path.isdir(file):
        raise InputError(f"--config {path} is a folder: name a YAML file, such as the config.yaml of a run folder.")
    if not os.path.isfile(file):
        raise InputError(f"--config {path} does not exist." if path else f"--config is empty. {_EMPTY}")
    if file.stat().st_size > _MAX_CONFIG_SIZE:
        raise InputError(f"--config {path} is too large for a list of flags.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise InputError(f"--config {path} is not valid YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must contain one `flag: value` per line, like a run folder's config.yaml.")

    actions = {flag: action for action in parser._actions for flag in action.option_strings}
    named = flag_names(overriding)
    overridden = {other for name in named for other in overrides.get(name, ())} - named
    tokens = []
    for name, value in values.items():
        action = actions.get(f"--{name}")
        if action is None:
            raise InputError(f"--config {path}: {_unknown_flag(f'--{name}', set(actions))}")
        if value is False and "no" in (action.choices or ()):  # YAML reads an unquoted no as false
            value = "no"
        if value is not None and action.dest not in overridden:
            tokens += _tokens(f"--config {path}: {name}", action, f"--{name}", value)
    return tokens


def _looks_like_flag(text: str) -> bool:
    """Return whether argparse would read a text as a flag, not as a value."""
    is_number = bool(re.fullmatch(r"-(\d+|\d*\.\d+)", text))
    return text.startswith("--") or (text.startswith("-") and " " not in text and not is_number)


def _tokens(location: str, action: argparse.Action, flag: str, value: Any) -> list[str]:
    """Convert a value in a YAML file to command-line tokens of its flag.

    Args:
        location: the file and the name of the flag, for messages.
    """
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, (dict, list, set, tuple)) or item is None for item in items):
        raise InputError(f"{location} must be a single value or a list of values.")
    if action.nargs == "*":
        if text := next((item for item in items if isinstance(item, str) and _looks_like_flag(item)), None):
            raise InputError(f"{location} contains {text!r}; the texts in a list must not begin with a hyphen.")
        return [flag, *map(str, items)]
    if isinstance(value, list):
        raise InputError(f"{location} takes a single value, not the list {value}.")
    if isinstance(action, argparse._StoreFalseAction):
        if not isinstance(value, bool):
            raise InputError(f"{location} is {value!r}; it must be true or false.")
        return [flag] if value else []
    return [f"{flag}={value}"]  # a text may begin with a hyphen


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
