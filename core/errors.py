"""The two ways in which a command of this project ends early, each with one paragraph for the user."""

import errno
import logging
import os
import sys
from collections.abc import Callable

# what the file system refuses, which no part of a command can do anything about
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_REFUSED |= {errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found, what was expected and what to do."""


class RunError(RuntimeError):
    """A run could not go on; the message says why and where its last good state lies."""


def run_command(main: Callable[[], None]) -> None:
    """
    Run a command line's `main`; an `InputError` (exit code 2) or `RunError` (1) ends as one paragraph, and so does a
    file or a folder that the file system refuses (1).
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ddgan").setLevel(logging.INFO)
    try:
        main()
    except (InputError, RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _REFUSED:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"\nerror: {error}", file=sys.stderr)
        elif not isinstance(error, InputError):  # bad input is the same in every process, a run's end may not be
            print(f"\nerror in process {rank}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
