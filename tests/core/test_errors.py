"""Tests of the messages and exit codes with which commands end."""

import errno
import logging
import multiprocessing
import os
import re
import signal
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from tiny import free_port, wait_until
from torch import distributed

from ddgan.core.errors import InputError, RunError, naming_file, run_command
from ddgan.training.checkpoints import Checkpoints


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


def run_rank(rank, folder, port, killed, operation):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo")
    printed = folder / "stderr"
    if rank == killed:
        wait_until(printed.exists)  # the other process may still be connecting
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stderr = printed.open("w")

    def main():
        operation(folder)
        raise AssertionError("the other process was not needed")

    run_command(main)


def save_checkpoint(folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    Checkpoints(folder, 0, Accelerator(cpu=True), [], {}).save(1)


def connect_again(_folder):
    """Use the store of the first process, which is gone."""
    while True:
        distributed.new_group(backend="gloo")


@pytest.mark.parametrize(
    ("killed", "operation"),
    [
        (1, lambda _: distributed.barrier()),
        (0, lambda _: distributed.barrier()),
        (0, connect_again),
        (1, save_checkpoint),
    ],
    ids=["second", "first", "store", "checkpoint"],
)
def test_a_killed_process_of_several_is_reported_by_the_others(tmp_path, killed, operation):
    context, port = multiprocessing.get_context("fork"), free_port()
    arguments = [(rank, tmp_path, port, killed, operation) for rank in (0, 1)]
    processes = [context.Process(target=run_rank, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL if rank == killed else 1 for rank in (0, 1)]
    printed = (tmp_path / "stderr").read_text()
    assert re.fullmatch(f"\nerror in process {1 - killed}: the connection .* was killed.*\n", printed)


def test_several_processes_print_no_stack_traces_of_pytorch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    run_command(lambda: None)
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("RANK", "0")
    run_command(lambda: None)
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


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
