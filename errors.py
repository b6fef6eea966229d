"""The two ways in which a command of this project ends early, each with one paragraph for the user."""

import errno
import os
import sys
from collections.abc import Callable

# what keeps files from being written that no part of a command can do anything about
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found, what was expected and what to do."""


class RunError(RuntimeError):
    """A run could not go on; the message says why and where its last good state lies."""


def run_command(main: Callable[[], None]) -> None:
    """
    Run a command line's `main`; an `InputError` (exit code 2) or `RunError` (1) ends as one paragraph, and so does a
    place where nothing can be written (1).
    """
    try:
        main()
    except (InputError, RunError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_PLACE:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"\nerror: {error}", file=sys.stderr)
        elif not isinstance(error, InputError):  # bad input is the same in every process, a run's end may not be
            print(f"\nerror in process {rank}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
