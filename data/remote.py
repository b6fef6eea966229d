"""Files on remote storage, named by URLs that fsspec understands: https://, s3://, gs://, hf:// and so on."""

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from huggingface_hub import hf_hub_download

from ..core.errors import InputError
from ..core.files import link_or_copy, replace_file
from ..core.locations import is_url, url_name

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")  # as in URLs of WebDataset shards
_HUB_FILE = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?/(.+)")
_WHOLE_FILES = {".npz", ".zip", ".safetensors"}  # read from a local copy


def url_suffix(url: str) -> str:
    """Return the suffix of the file that a URL names, without the query of https:// URLs."""
    return PurePosixPath(url_name(url)).suffix


def expand_ranges(url: str) -> list[str]:
    """Return the URLs for which a URL with ranges stands: `shard-{000..063}.tar` for 64 files."""
    return list(_expand(url))


def _expand(url: str) -> Iterator[str]:
    match = _RANGE.search(url)
    if not match:
        yield url
        return
    first, last = match[1], match[2]
    if int(last) < int(first):
        raise InputError(f"The range {match[0]} in {url} is empty: write the lower number first.")
    for number in range(int(first), int(last) + 1):
        yield from _expand(f"{url[: match.start()]}{number:0{len(first)}d}{url[match.end() :]}")


@lru_cache
def local_copy(location: str) -> str:
    """Download a file that cannot be read by rows (.npz, .zip, .safetensors), or take it from the cache.

    Returns:
        its path; any other location unchanged.

    Raises:
        InputError: if it cannot be downloaded.
    """
    if not is_url(location) or url_suffix(location) not in _WHOLE_FILES:
        return location
    try:
        if match := _HUB_FILE.fullmatch(location):
            kind, repo_id, revision, path = match.groups()
            revision = revision and unquote(revision)  # a slash in it may be written as %2F
            return hf_hub_download(repo_id, path, repo_type=kind and kind.removesuffix("s"), revision=revision)
        from datasets import DownloadManager

        downloaded = Path(str(DownloadManager().download(location)))
    except Exception as error:  # of fsspec, its drivers, or the Hub client
        raise InputError(f"{location} cannot be downloaded ({type(error).__name__}: {error}).") from error
    # the cache of `datasets` names files by a hash, without a suffix
    named = downloaded.with_name(f"{downloaded.name}-{url_name(location)}")
    if not named.exists():
        replace_file(named, partial(link_or_copy, downloaded))
    return str(named)
