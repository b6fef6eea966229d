"""Locks that keep two commands from writing to the same folder, and that tell which temporary folders are in use."""

import json
import logging
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from .errors import USER_ERRNOS, InputError, RunError, is_disk_full, write_problem
from .files import LOCK, TEMPORARY

_OWNER = f"{LOCK}-owner.json"
_ID_LENGTH = 8  # characters that tell temporary directories apart
_VISIBLE_SECONDS = 60  # time within which a new file is visible on all machines that share a folder
_ORPHAN_SECONDS = 15  # time within which the worker processes of a killed command end; until then they hold its lock

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, accelerator: Any = None, flag: str = "--output_dir") -> Iterator[None]:
    """Hold the lock of an output folder in the main process; every process must call this.

    The operating system releases the lock when the process ends, however it ends, so a killed command does not block
    the next one. Where the file system has no locks, a warning is logged.

    Args:
        folder: the folder; it is created if it does not exist.
        accelerator: the Accelerate setup of the command; None for a command that runs in one process.
        flag: the flag that names another folder.

    Raises:
        InputError: in every process, if another command holds the lock; the message names its host and process. Also
            if the folder cannot be created or written to, or a process on another machine does not share it.
        RunError: if the disk is full when the block writes a file.
    """
    is_new = not folder.exists()
    lock = _in_main_process(accelerator, lambda: _acquire(folder, flag))
    try:
        if accelerator and accelerator.num_processes > 1:
            _check_shared(folder, flag)
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise RunError(
            f"The files in {folder} cannot be written: {write_problem(error)}. Free some space, then repeat the "
            "command."
        ) from error
    finally:
        if lock:
            (folder / _OWNER).unlink(missing_ok=True)
            _remove_and_release(lock)
            if is_new:
                with suppress(OSError):
                    folder.rmdir()  # succeeds only if the command has written nothing


class LockedTemporaryDirectory(TemporaryDirectory):
    """A temporary directory inside another folder; `remove_abandoned` removes those of killed processes.

    Args:
        folder: the folder.
        prefix: first characters of the directory's name.
    """

    def __init__(self, folder: Path, prefix: str):
        name = f"{prefix}{secrets.token_hex(_ID_LENGTH // 2)}"
        self.lock = FileLock(folder / f"{name}{LOCK}", thread_local=False)
        with suppress(OSError, NotImplementedError):  # without locks, no other command removes the directory
            self.lock.acquire(timeout=0)
        super().__init__(prefix=f"{name}-", dir=folder)

    def cleanup(self) -> None:
        super().cleanup()
        _remove_and_release(self.lock)

    @staticmethod
    def remove_abandoned(folder: Path, prefix: str) -> None:
        """Remove the directories that processes have left behind in a folder, for example when they were killed."""
        for name in {path.name[: len(prefix) + _ID_LENGTH] for path in folder.glob(f"{prefix}*")}:
            lock = FileLock(folder / f"{name}{LOCK}", thread_local=False)
            try:
                lock.acquire(timeout=0)
            except (Timeout, OSError, NotImplementedError):  # it is in use, or that cannot be known
                continue
            for directory in filter(Path.is_dir, folder.glob(f"{name}*")):
                shutil.rmtree(directory, ignore_errors=True)
            _remove_and_release(lock)


def check_unlocked(folder: Path, accelerator: Any) -> None:
    """Check that no other command writes to an output folder, without holding its lock; every process must call this.

    Raises:
        InputError: see `locked`.
    """

    def check() -> None:
        if (folder / LOCK).exists() and (lock := _acquire(folder, record_owner=False)):
            lock.release()

    _in_main_process(accelerator, check)


def _remove_and_release(lock: FileLock) -> None:
    if lock.is_locked:
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # before the release: afterwards another process may hold it
        lock.release()


def _acquire(folder: Path, flag: str = "--output_dir", record_owner: bool = True) -> FileLock | None:
    verb = "created"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        verb = "written to"
        with NamedTemporaryFile(prefix=TEMPORARY, dir=folder):  # a lock that cannot be created would seem to be held
            pass
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be {verb}: {error.strerror}. Choose another folder with {flag}."
        ) from error
    lock = FileLock(folder / LOCK, thread_local=False)
    owner = _read_owner(folder)
    try:
        lock.acquire(timeout=_ORPHAN_SECONDS if owner and _is_dead(owner) else 0)
    except Timeout:
        described, if_gone = "another command is writing to it", ""
        if owner:
            described = "{command} has been writing to it since {since} (process {pid} on {host})".format(**owner)
            if owner["host"] != socket.gethostname():  # a file server may not know that the host is down
                if_gone = f" If that process no longer exists, remove {folder / LOCK}."
        raise InputError(
            f"{folder} is in use: {described}. Wait until it has finished, stop it, or choose another folder with "
            f"{flag}.{if_gone}"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in USER_ERRNOS:
            raise
        logger.warning(
            "%s is on a file system without locks (%s): do not run two commands that write to it.", folder, error
        )
        return None
    if record_owner:
        owner = {
            "command": Path(sys.argv[0]).name or "Python",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}",
        }
        with suppress(OSError):  # the first file of the command will report the reason
            (folder / _OWNER).write_text(json.dumps(owner), encoding="utf-8")
    return lock


def _read_owner(folder: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and {"command", "pid", "host", "since"} <= owner.keys() else None


def _check_shared(folder: Path, flag: str) -> None:
    """Check that all processes see the lock of the main process, that is, the same folder."""
    from accelerate.utils import broadcast_object_list, gather_object

    owner = broadcast_object_list([_read_owner(folder)])[0]  # None on a file system without locks
    if owner is None:
        return
    end = time.monotonic() + _VISIBLE_SECONDS
    while not (is_shared := _read_owner(folder) == owner) and time.monotonic() < end:
        time.sleep(0.2)
    if hosts := sorted({host for host in gather_object([None if is_shared else socket.gethostname()]) if host}):
        raise InputError(
            f"{folder} is not the same folder on {' and '.join(hosts)} as on {owner['host']}, where the main process "
            f"runs. Choose another folder with {flag}, on a file system that all machines share."
        )


def _is_dead(owner: dict[str, Any]) -> bool:
    """Return whether the process of an owner has ended; False if that is unknown."""
    if owner["host"] != socket.gethostname() or os.name == "nt":
        return False
    try:
        os.kill(owner["pid"], 0)  # sends no signal
    except ProcessLookupError:
        return True
    except (OSError, TypeError, OverflowError):
        return False
    return False


def _in_main_process(accelerator: Any, function: Callable[[], _Result]) -> _Result | None:
    """Call a function in the main process, and raise its errors in every process."""
    if accelerator is None:
        return function()
    from accelerate.utils import broadcast_object_list

    result, errors = None, [None]
    if accelerator.is_main_process:
        try:
            result = function()
        except (InputError, OSError) as error:
            errors = [error]
    if error := broadcast_object_list(errors)[0]:
        raise error
    return result
