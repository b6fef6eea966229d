"""An output folder is written by one command at a time, and a killed command does not block the next one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState

from ddgan.core import locks
from ddgan.core.errors import InputError, RunError
from ddgan.core.locks import check_unlocked, locked


def refused(folder, message):
    with pytest.raises(InputError, match=message):
        check_unlocked(folder, Accelerator())
    with pytest.raises(InputError, match=message), locked(folder, Accelerator()):
        pass


def test_a_folder_is_locked_once_and_nothing_is_left_in_it(tmp_path):
    folder = tmp_path / "new"
    with locked(folder, Accelerator()):
        refused(folder, rf"new is in use: .* since 20.* \(process {os.getpid()} on {socket.gethostname()}\)\. Wait")
        (folder / "file").write_text("")
    assert [path.name for path in folder.iterdir()] == ["file"]
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "other", Accelerator()):
        raise ZeroDivisionError
    assert not (tmp_path / "other").exists(), "nothing was written"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ddgan.core.locks import _acquire\n"
        "lock = _acquire(Path(sys.argv[1])); print('locked', flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    refused(tmp_path, f"process {process.pid} on {socket.gethostname()}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    check_unlocked(tmp_path, Accelerator())
    with locked(tmp_path, Accelerator()):
        assert json.loads((tmp_path / ".lock-owner.json").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_host_can_be_removed(tmp_path):
    with locked(tmp_path, Accelerator()):
        owner = json.loads((tmp_path / ".lock-owner.json").read_text())
        (tmp_path / ".lock-owner.json").write_text(json.dumps({**owner, "host": "gone"}))
        refused(tmp_path, r"on gone\)\..* If that process no longer exists, remove .*/\.lock\.")
        (tmp_path / ".lock").unlink()
        check_unlocked(tmp_path, Accelerator())


def test_a_folder_that_cannot_be_created_is_reported_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/nowhere")):
        with (
            pytest.raises(InputError, match=rf"The folder {folder} cannot be created: .* with --save_images"),
            locked(folder, flag="--save_images"),
        ):
            pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which no file can be created")
def test_a_folder_in_which_no_file_can_be_created_is_not_taken_for_a_locked_one():
    with (
        pytest.raises(InputError, match=r"The folder /proc/self cannot be written to: .* with --output_dir"),
        locked(Path("/proc/self")),
    ):
        pass


def test_a_disk_that_becomes_full_is_reported_with_the_folder(tmp_path):
    message = f"The files in {tmp_path} cannot be written: the disk is full, .* Free some space"
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc]"),
    ):
        with pytest.raises(RunError, match=message), locked(tmp_path):
            raise error
    with pytest.raises(OSError, match="broken"), locked(tmp_path):
        raise OSError(errno.EIO, "broken")
    assert not list(tmp_path.iterdir())


def write_outcome(folder, output):
    accelerator = Accelerator()
    try:
        with locked(folder, accelerator):
            outcome = "locked"
    except InputError as error:
        outcome = str(error)
    (output / str(accelerator.process_index)).write_text(outcome)


def test_only_the_main_process_locks_and_all_are_refused(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    folder, free, refused = (tmp_path / name for name in ("folder", "free", "refused"))
    for output in (free, refused):
        output.mkdir()
    debug_launcher(write_outcome, (folder, free))
    assert {path.name: path.read_text() for path in free.iterdir()} == {"0": "locked", "1": "locked"}
    with locked(folder, Accelerator()):
        AcceleratorState._reset_state(reset_partial_state=True)
        debug_launcher(write_outcome, (folder, refused))
    assert [f"process {os.getpid()} on" in (refused / rank).read_text() for rank in "01"] == [True, True]


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_can_be_used(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, Accelerator()):
        if number == errno.ENOSYS:  # replaced by a file with the host and process
            refused(tmp_path, f"process {os.getpid()} on")
        else:
            assert "is on a file system without locks (" in caplog.text


def lock_own_folder(folders: Path) -> None:
    """Lock a folder that has the same name on two machines."""
    os.chdir(folders / str(torch.distributed.get_rank()))
    message = "run is not the same folder on .* with --output_dir, on a file system that all machines share"
    with pytest.raises(InputError, match=message), locked(Path("run"), Accelerator()):
        raise AssertionError("not reached")


def test_machines_that_do_not_share_the_folder_are_reported(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(locks, "_VISIBLE_SECONDS", 0.1)
    (tmp_path / "0").mkdir()
    (tmp_path / "1" / "run").mkdir(parents=True)
    debug_launcher(lock_own_folder, (tmp_path,), num_processes=2)
    assert not list((tmp_path / "0").iterdir()) and not list((tmp_path / "1" / "run").iterdir())
