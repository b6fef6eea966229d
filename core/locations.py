"""Files, folders and Hub repositories in arguments, and the files that come with the package."""

import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from .errors import InputError

EXAMPLES = Path(__file__).parents[1] / "examples"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_CANONICAL_DATASET = re.compile(r"\w[\w-]*")  # without a user, such as `mnist`
_REACHABLE_SECONDS = 10  # to wait for an answer of the Hub
_FILE_SUFFIXES = {".arrow", ".npz", ".parquet", ".safetensors", ".tar", ".zip"}


class InMemory:
    """A Python object where the command line has a path or name: a pipeline, a dataset, or a list of images.

    Attributes:
        value: the object.
        name: the name of a dataset or of the model that a pipeline was loaded from, if known, or a description.
    """

    def __init__(self, value: Any):
        self.value = value
        self.name = _name_of(value)

    def __str__(self) -> str:
        return f"{self.name} (in memory)"

    def __deepcopy__(self, memo: dict) -> "InMemory":
        return self  # `dataclasses.asdict` copies values


def _name_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "a list of images"
    for part, attribute in (("config", "_name_or_path"), ("info", "dataset_name")):  # of pipelines, of datasets
        if name := getattr(getattr(value, part, None), attribute, None):
            return str(name)
    return f"a {type(value).__name__}"


def resolve_paths(arguments: Any, *names: str) -> None:
    """Check that the files or folders that these arguments name exist; None is ignored.

    In every working directory, `examples/...` stands for the file of this name in the package. Objects from Python are
    wrapped as `InMemory`.

    Raises:
        InputError: if one does not exist; the message names its flag.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not isinstance(value, str):
            setattr(arguments, name, _in_memory(value))
            continue
        if value and is_url(value):
            raise InputError(f"--{name} {value} is a URL, but this argument takes a path: download the files first.")
        if value and (path := find(value)) is None:
            raise InputError(f"--{name} {value} does not exist{_looked_in(value)}.")
        setattr(arguments, name, value and path)


def resolve_locations(arguments: Any, *names: str, datasets: bool = False) -> None:
    """Check arguments that name files, folders or repositories on the Hub, one each or a list; see `resolve_paths`.

    Whether a repository exists is only checked in offline mode, in which it must be in the local cache. Datasets may
    also be URLs.

    Args:
        datasets: whether the repositories are datasets, some of which have no user in their name.

    Raises:
        InputError: if one neither exists nor has the form of a repository's name, cannot be looked up on the Hub, or
            is a URL that cannot be read; the message names its flag.
    """
    for name in names:
        value = getattr(arguments, name)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in texts):
            setattr(arguments, name, _in_memory(value))
            continue
        for text in texts:
            if datasets and is_url(text):
                _check_protocol(name, text)
                continue
            if not find(text) and not _may_be_repository(text, datasets):
                raise InputError(
                    f"--{name} {text}: there is no such file or folder{_looked_in(text)}, and the name of a "
                    "repository on the Hugging Face Hub has the form user/name."
                )
            if not find(text) and (problem := _offline_problem(text, "dataset" if datasets else "model")):
                raise InputError(f"--{name} {text}: there is no such file or folder{_looked_in(text)}, and {problem}")
        found = [find(text) or text for text in texts]
        setattr(arguments, name, found if isinstance(value, list) else found[0] if found else value)


def is_url(text: str) -> bool:
    """Return whether a text is a URL, such as `s3://bucket/train.parquet`, and not a path."""
    return "://" in text


def url_name(url: str) -> str:
    """Return the name of the file at a URL, without the query, which may contain secrets."""
    path = urlsplit(url).path if url.startswith(("http://", "https://")) else url
    return path.rstrip("/").rpartition("/")[2]


def _check_protocol(name: str, url: str) -> None:
    """Check that fsspec has a driver for a URL.

    Raises:
        InputError: if it does not know the protocol, or the driver is not installed.
    """
    from fsspec import get_filesystem_class

    protocol = url.partition("://")[0]
    try:
        get_filesystem_class(protocol)
    except ValueError:
        raise InputError(
            f"--{name} {url}: there is no storage {protocol}://. URLs are those that fsspec reads, such as https://, "
            "s3://, gs:// and hf://."
        ) from None
    except ImportError as error:
        package = "fsspec[http]" if protocol in ("http", "https") else "the package that it names"
        raise InputError(
            f"--{name} {url}: reading {protocol}:// needs a package that is not installed. fsspec reports: {error}. "
            f"Install {package} with pip."
        ) from None


def find(text: str) -> str | None:
    """Return the path that a text names, in the package for `examples/...`; None if it does not exist."""
    embedded = EXAMPLES.parent / text
    exists = os.path.exists(text)  # False for a name that is too long, too
    if not exists and Path(text).parts[:1] == (EXAMPLES.name,) and os.path.exists(embedded):
        return str(embedded)
    return text if exists else None


def hub_problem(repo_id: str, repo_type: Literal["model", "dataset"] = "model") -> str | None:
    """Return why a repository cannot be looked up on the Hub.

    None if it answers, if the repository is cached, or if the name is not that of a repository.

    The Hub gets one request, without the retries of its client, which take half a minute.
    """
    if problem := _offline_problem(repo_id, repo_type):
        return problem
    if not _may_be_repository(repo_id, datasets=True) or _is_cached(repo_id, repo_type):
        return None
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_REACHABLE_SECONDS)
    except HTTPError as error:
        return (
            f"the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached ({error}), and the repository is not in "
            "the local cache. Pass the path of a folder, or try again later."
        )
    return None


def _offline_problem(repo_id: str, repo_type: str) -> str | None:
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE or not _may_be_repository(repo_id, datasets=True):
        return None
    if _is_cached(repo_id, repo_type):
        return None
    return (
        "the Hugging Face Hub is not contacted because HF_HUB_OFFLINE is set, and the repository is not in the local "
        "cache. Pass the path of a folder, or unset HF_HUB_OFFLINE."
    )


def _is_cached(repo_id: str, repo_type: str) -> bool:
    """Return whether the cache of the Hub or of `datasets` has files of a repository."""
    from huggingface_hub import constants

    folders = [Path(constants.HF_HUB_CACHE) / "--".join([f"{repo_type}s", *repo_id.split("/")])]
    if repo_type == "dataset":
        cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
        from datasets.naming import camelcase_to_snakecase

        *user, name = repo_id.split("/")
        folders.append(Path(cache) / "___".join([*user, camelcase_to_snakecase(name)]))
    return any(folder.is_dir() for folder in folders)


def _in_memory(value: Any) -> InMemory:
    return value if isinstance(value, InMemory) else InMemory(value)


def _may_be_repository(text: str, datasets: bool) -> bool:
    if Path(text).suffix in _FILE_SUFFIXES:
        return False
    return bool(_REPOSITORY.fullmatch(text) or (datasets and _CANONICAL_DATASET.fullmatch(text)))


def _looked_in(text: str) -> str:
    return "" if Path(text).is_absolute() else f" in {Path.cwd()}"
