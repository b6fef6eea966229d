"""Files, folders and Hub repositories in arguments, and the files that come with the package."""

import re
from pathlib import Path
from typing import Any

from .errors import InputError

EXAMPLES = Path(__file__).parents[1] / "examples"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CANONICAL_DATASET = re.compile(r"\w[\w-]*")  # without a user, such as `mnist`
_FILE_SUFFIXES = {".arrow", ".npz", ".parquet", ".safetensors", ".tar", ".zip"}


def resolve_paths(arguments: Any, *names: str) -> None:
    """Check that the files or folders that these arguments name exist; None is ignored.

    In every working directory, `examples/...` stands for the file of this name in the package.

    Raises:
        InputError: if one does not exist; the message names its flag.
    """
    for name in names:
        if (text := getattr(arguments, name)) and (path := find(text)) is None:
            raise InputError(f"--{name} {text} does not exist{_looked_in(text)}.")
        setattr(arguments, name, text and path)


def resolve_locations(arguments: Any, *names: str, datasets: bool = False) -> None:
    """Check arguments that name files, folders or repositories on the Hub, one each or a list; see `resolve_paths`.

    Whether the repository exists is not checked.

    Args:
        datasets: whether the repositories are datasets, some of which have no user in their name.

    Raises:
        InputError: if one neither exists nor has the form of a repository's name; the message names its flag.
    """
    for name in names:
        value = getattr(arguments, name)
        texts = value if isinstance(value, list) else [value] if value else []
        for text in texts:
            if not find(text) and not _may_be_repository(text, datasets):
                raise InputError(
                    f"--{name} {text}: there is no such file or folder{_looked_in(text)}, and the name of a "
                    "repository on the Hugging Face Hub has the form user/name."
                )
        found = [find(text) or text for text in texts]
        setattr(arguments, name, found if isinstance(value, list) else found[0] if found else value)


def find(text: str) -> str | None:
    """Return the path that a text names, in the package for `examples/...`; None if it does not exist."""
    embedded = EXAMPLES.parent / text
    if not Path(text).exists() and Path(text).parts[:1] == (EXAMPLES.name,) and embedded.exists():
        return str(embedded)
    return text if Path(text).exists() else None


def _may_be_repository(text: str, datasets: bool) -> bool:
    if Path(text).suffix in _FILE_SUFFIXES:
        return False
    return bool(_REPOSITORY.fullmatch(text) or (datasets and _CANONICAL_DATASET.fullmatch(text)))


def _looked_in(text: str) -> str:
    return "" if Path(text).is_absolute() else f" in {Path.cwd()}"
