"""Tests of the messages and exit codes with which commands end."""

import errno
import logging
import multiprocessing
import os
import re
import signal
import sys

import pytest
from safetensors import SafetensorError
from torch import distributed

from ddgan.core.errors import InputError, RunError, naming_file, run_command


@pytest.fixture(autouse=True)
def restored_log_level():
    yield
    logging.getLogger("ddgan").setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("bad"), 2), (RunError("bad"), 1)],
)
def test_an_error_for_the_user_ends_a_command_with_one_paragraph(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == f"\nerror: {error}\n"


FULL = "the disk is full, or a quota or limit of the file size is reached"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), f"{FULL} (a/b). Free some space"),
        (OSError(errno.EFBIG, "File too large"), f"{FULL}. Free some space"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), f"{FULL}. Free"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            f"{FULL}. Free",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "Permission denied (a/b)."),
    ],
)
def test_an_error_of_the_file_system_is_told_in_words(error, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit, match="1"):
        run_command(main)
    assert f"\nerror: A file or folder cannot be written or read: {message}" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    def main():
        raise error

    for error in (ValueError("a bug"), OSError(errno.EIO, "broken disk")):
        with pytest.raises(type(error)):
            run_command(main)


@pytest.mark.parametrize(
    ("error", "message"), [(InputError("bad"), ""), (RunError("bad"), "\nerror in process 1: bad\n")]
)
def test_only_the_first_process_reports_bad_input_and_warnings(error, message, capsys, caplog, monkeypatch):
    def main():
        logging.getLogger("ddgan.part").warning("unusual")
        raise error

    def end(seconds):  # as the launcher does when the first process has failed
        raise SystemExit

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", end)
    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == message and not caplog.messages


def test_bad_input_of_another_process_alone_is_reported(capsys, monkeypatch):
    def main():
        raise InputError("bad")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert capsys.readouterr().err == "\nerror in process 1: bad\n"


def run_rank(rank, folder):
    os.environ["RANK"] = str(rank)
    distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stderr = (folder / "stderr").open("w")
    run_command(distributed.barrier)


def test_a_killed_process_of_several_is_reported_by_the_others(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=run_rank, args=(r, tmp_path)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, -signal.SIGKILL]
    assert re.fullmatch("\nerror in process 0: the connection .* was killed.*\n", (tmp_path / "stderr").read_text())


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (
            "a/b.npz",
            ValueError("no magic\nand more"),
            "a/b.npz cannot be read as a .npz file; is it complete? (no magic)",
        ),
        ("a/b", KeyError("x"), "a/b cannot be read; is it complete? ('x')"),
        ("a/b", InputError("already explained"), "already explained"),
    ],
)
def test_a_library_error_names_the_file(path, error, message):
    with pytest.raises(InputError, match=re.escape(message) + "$"), naming_file(path, KeyError):
        raise error


def test_an_unexpected_library_error_keeps_its_type():
    with pytest.raises(KeyError), naming_file("a/b"):
        raise KeyError("x")
