"""User-facing errors, which commands print as one paragraph instead of a traceback."""

import errno
import logging
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile

from .extras import missing_import

# file-system errors that only the user can resolve: no space, no permission, a path that is taken or too long
USER_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
USER_ERRNOS |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG}
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# what torch.save and safetensors report instead of an OSError; their errors are of other kinds
_FULL_TEXT = re.compile(
    r"inline_container|PytorchStreamWriter|No space left on device|Disk quota exceeded|File too large"
)
# what the backends of torch.distributed report when another process has ended; their errors are RuntimeErrors
_LOST_PROCESS = re.compile(
    r"Connection (closed by peer|reset by peer|refused|was likely closed)|Broken pipe|Socket closed"
    r"|connectFullMesh failed|Application timeout caused pair closure|remote process exited",
    re.IGNORECASE,
)
_REPORT_SECONDS = 10  # time for the first process to report an error that all have


class InputError(ValueError):
    """Invalid user input; the message states what was found, what was expected and what to do."""


class RunError(RuntimeError):
    """A run that cannot continue; the message gives the reason and the last good state."""


def is_disk_full(error: BaseException) -> bool:
    """Return whether a file could not be written because the disk is full, or a limit for its size is reached."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_ERRNOS
    return not isinstance(error, (InputError, RunError)) and bool(_FULL_TEXT.search(str(error)))


def write_problem(error: BaseException) -> str:
    """Return why a file could not be written, without the terms of the library that wrote it."""
    name = getattr(error, "filename", None)
    where = f" ({os.fsdecode(name)})" if isinstance(name, (str, bytes)) else ""
    if is_disk_full(error):
        return f"the disk is full, or a quota or limit of the file size is reached{where}"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{reason}{where}"


@contextmanager
def naming_file(path: str | Path, *more_errors: type[Exception]) -> Iterator[None]:
    """Convert library errors about a damaged or mislabeled file or folder to an error that names it.

    Args:
        more_errors: exceptions to convert besides OSError, ValueError and those of damaged archives.

    Raises:
        InputError: instead of these exceptions.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, BadZipFile, zlib.error, *more_errors) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        as_kind = f" as a {Path(path).suffix} file" if Path(path).suffix else ""
        raise InputError(f"{path} cannot be read{as_kind}; is it complete? ({reason[0]})") from error


@contextmanager
def _naming_missing_packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if message := missing_import(error):
            raise InputError(f"This command needs a package: {message}") from error
        raise


def is_lost_connection(error: BaseException) -> bool:
    """Return whether PyTorch has raised an error because another process has ended, or does not answer."""
    names = {kind.__name__ for kind in type(error).__mro__}  # PyTorch may not be imported
    return isinstance(error, RuntimeError) and ("DistError" in names or bool(_LOST_PROCESS.search(str(error))))


def run_command(main: Callable[[], None]) -> None:
    """Run the `main` of a script and print its user-facing errors as one paragraph.

    The exit code is 2 after an `InputError` and when a package of an extra is not installed, 1 after a `RunError`,
    when the file system rejects a file or folder, and when another process of the command has ended, and 130 after
    Ctrl-C, which prints one line.
    """
    logging.basicConfig(format="%(message)s")
    rank = os.environ.get("RANK", "0")
    logging.getLogger("ddgan").setLevel(logging.INFO if rank == "0" else logging.ERROR)
    if "RANK" in os.environ:  # with warnings, PyTorch prints a C++ stack trace when another process has ended
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _naming_missing_packages():
            main()
    except KeyboardInterrupt:
        if rank == "0":
            print("\nStopped by Ctrl-C.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        is_expected = isinstance(error, (InputError, RunError)) or is_disk_full(error)
        if is_expected or (isinstance(error, OSError) and error.errno in USER_ERRNOS):
            _report(error, rank)
            sys.exit(2 if isinstance(error, InputError) else 1)
        if "RANK" not in os.environ or not is_lost_connection(error):
            raise
        print(
            f"\nerror in process {rank}: the connection to another process was lost. If that process has printed no "
            "error, it was killed, often because memory ran out. Resume a training run with --resume_from_checkpoint "
            "latest.",
            file=sys.stderr,
        )
        sys.exit(1)


def _report(error: Exception, rank: str) -> None:
    """Print an error of the user or the file system as one paragraph."""
    message = str(error)
    if not isinstance(error, (InputError, RunError)):
        message = f"A file or folder cannot be written or read: {write_problem(error)}."
        if is_disk_full(error):
            message += " Free some space, then repeat the command."
    if rank == "0":
        print(f"\nerror: {message}", file=sys.stderr)
        return
    if isinstance(error, InputError):  # all processes have the same input, and one report is enough:
        time.sleep(_REPORT_SECONDS)  # the launcher ends this process when the first one has reported it
    print(f"\nerror in process {rank}: {message}", file=sys.stderr)
