"""Atomic writes, links, names and content hashes."""

import errno
import glob
import hashlib
import itertools
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .errors import InputError
from .locations import InMemory, is_url, url_name

LOCK = ".lock"  # name of the lock of a folder; that of the file with its owner starts with it
TEMPORARY = ".tmp-"  # first characters of the names of temporary files and folders

_UMASK = os.umask(0)  # it can only be read by setting it
os.umask(_UMASK)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name of its own, sync it and rename it to `path`.

    Several commands can do this at the same time: the last one wins. Only a killed process leaves its temporary file
    behind; see `remove_temporary_files`.

    Raises:
        OSError: if it cannot be written, or `path` is not a regular file but a device, for example.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "This is not a regular file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # keeps the suffix, from which writers infer the format
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        write(temporary)
        _apply_umask(temporary)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def check_can_write(path: str | Path, flag: str, is_folder: bool = True) -> None:
    """Check that a folder or file can be written, or created, as far as possible without writing anything.

    Args:
        path: the folder or file.
        flag: the flag that names it, for messages.
        is_folder: whether it is a folder.

    Raises:
        InputError: if not.
    """
    path = Path(path)
    problem, existing = None, None
    for candidate in (path, *path.absolute().parents):
        try:
            mode = candidate.stat().st_mode
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = error.strerror
            break
        existing = candidate
        is_directory = stat.S_ISDIR(mode)
        if not is_directory and (is_folder or candidate != path):
            problem = f"{candidate} is not a folder"
        elif not is_directory and not stat.S_ISREG(mode):
            problem = f"{candidate} is not a regular file"
        elif not os.access(candidate, os.W_OK | os.X_OK if is_directory else os.W_OK):
            problem = f"{candidate} is read-only, or belongs to another user"
        elif not is_directory and not os.access(candidate.absolute().parent, os.W_OK | os.X_OK):
            problem = f"{candidate.absolute().parent} is read-only, or belongs to another user"
        break
    if problem:
        verb = "written to" if existing == path else "created"
        raise InputError(
            f"{flag} {path} cannot be {verb}: {problem}. Choose another {'folder' if is_folder else 'file'}."
        )


def remove_temporary_files(folder: Path, name: str = "") -> None:
    """Remove the temporary files that killed processes have left in a folder, while no other process writes there.

    Args:
        name: name of the file that was written, or how its name ends; by default any.
    """
    for path in folder.glob(f"{TEMPORARY}*{glob.escape(name)}"):
        if path.is_file():
            path.unlink(missing_ok=True)


def contains_files(folder: Path) -> bool:
    """Return whether a folder contains anything but what a killed process has left: its lock and temporary files."""
    return any(not path.name.startswith((LOCK, TEMPORARY)) for path in folder.iterdir())


def replace_tree(folder: Path, write: Callable[[Path], object]) -> None:
    """Write files into a temporary folder, then rename each of them into `folder`; other files there are kept.

    Top-level files are renamed last, and JSON files after the other files of their folder, which they may refer to.
    """
    temporary = folder / ".tmp-files"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    files = [path for path in temporary.rglob("*") if path.is_file()]
    files.sort(key=lambda path: (-len(path.parts), path.suffix == ".json"))
    for path in files:
        _apply_umask(path)
        sync(path)
    for path in files:
        target = folder / path.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(temporary)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under a temporary name, sync it and rename it to `folder`, replacing any previous one."""
    temporary, replaced = (folder.with_name(f".tmp-{prefix}{folder.name}") for prefix in ("", "old-"))
    for path in (temporary, replaced):
        shutil.rmtree(path, ignore_errors=True)
    write(temporary)
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_file():
            _apply_umask(path)
        sync(path)
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _apply_umask(path: Path) -> None:
    """Let others read a file as the umask allows; safetensors writes files that only their owner can read."""
    if path.stat().st_mode & 0o777 == 0o600:
        path.chmod(0o666 & ~_UMASK)


def copy_folder(folder: Path, target: Path) -> None:
    """Copy a pipeline folder, with hard links to its weights. Users edit its other files in place."""

    def copy(file: str, copied: str) -> None:
        (link_or_copy if file.endswith(".safetensors") else shutil.copyfile)(Path(file), Path(copied))

    shutil.copytree(folder, target, copy_function=copy)


def link_or_copy(file: Path, target: Path) -> None:
    """Create a hard link to a file, or a copy if the file system does not support hard links.

    The link keeps its contents when another file is renamed to `file`.
    """
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def unused_path(path: Path) -> Path:
    """Return a path, with a number added to its name if something of that name exists."""
    candidates = (path.with_stem(f"{path.stem}-{number}") if number else path for number in itertools.count())
    return next(candidate for candidate in candidates if not candidate.exists())


def location_name(location: str | InMemory) -> str:
    """Return the base name of a local file or folder or of a URL, or a Hub name unchanged.

    Bytes that are not UTF-8 become `?`.
    """
    location = location.name if isinstance(location, InMemory) else location
    if is_url(location):
        return url_name(location)
    name = Path(location).resolve().name if Path(location).exists() else location
    return name.encode(errors="replace").decode()


def format_size(count: float) -> str:
    """Return a number of bytes in the largest suitable unit."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 1000:
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def fingerprint(facts: Any) -> str:
    """Return a short hash of JSON-serializable facts."""
    return fingerprint_bytes(json.dumps(facts, sort_keys=True).encode())


def fingerprint_bytes(content: bytes) -> str:
    """Return a short hash of bytes: 24 hexadecimal digits of BLAKE2b."""
    return fingerprint_parts([content])


def fingerprint_parts(parts: Iterable[bytes | memoryview]) -> str:
    """Return the `fingerprint_bytes` of parts that follow each other."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def digest_tensors(tensors: Mapping[str, Any]) -> str:
    """Return the BLAKE2b of the contents of contiguous tensors on the CPU, and of their names."""
    parts = ((name.encode(), tensor.numpy().data) for name, tensor in sorted(tensors.items()))
    return fingerprint_parts(itertools.chain.from_iterable(parts))


def digest_files(paths: Iterable[Path]) -> list[tuple[int, str]]:
    """Return the size in bytes and the BLAKE2b of the contents of each file; files are read in blocks, in parallel."""

    def digest(path: Path) -> tuple[int, str]:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
            return file.tell(), content.hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, paths))


def sync(path: Path) -> None:
    """Flush a file or folder to disk, where the file system supports it."""
    if os.name == "nt":  # Windows can only sync files that are open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and FUSE file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
