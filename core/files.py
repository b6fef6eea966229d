"""Atomic writes, links and content hashes."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, sync it and rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")  # the suffix stays: writers go by it
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def replace_tree(folder: Path, write: Callable[[Path], object]) -> None:
    """Write files into a temporary folder, then rename each over its place in `folder`, those at its top last.

    JSON files come after those beside them, which they may name. Other files that are there stay.
    """
    temporary = folder / ".tmp-files"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    files = [path for path in temporary.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (-len(path.parts), path.suffix == ".json"))
    for path in files:
        sync(path)
    for path in files:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(temporary)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name, sync it and rename it into the place of `folder`, which leaves whole."""
    temporary, leaving = (folder.with_name(f".tmp-{kind}{folder.name}") for kind in ("", "old-"))
    for path in (temporary, leaving):
        shutil.rmtree(path, ignore_errors=True)
    write(temporary)
    for path in temporary.rglob("*"):
        sync(path)
    if folder.exists():
        os.replace(folder, leaving)
    os.replace(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(leaving, ignore_errors=True)


def copy_folder(folder: Path, target: Path) -> None:
    """A folder once more: hard links, or copies where the filesystem has none."""
    shutil.copytree(folder, target, copy_function=lambda file, copy: link_or_copy(Path(file), Path(copy)))


def link_or_copy(file: Path, target: Path) -> None:
    """A hard link, which a file that is renamed over `file` does not touch, or a copy where there are no links."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def fingerprint(facts: Any) -> str:
    """A short name for facts that JSON can hold."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def sync(path: Path) -> None:
    if os.name == "nt":  # which syncs only what is open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
