"""Atomic writes, links and hashes."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from ddgan.core.errors import InputError
from ddgan.core.files import (
    check_can_write,
    copy_folder,
    fingerprint,
    fingerprint_bytes,
    location_name,
    remove_temporary_files,
    replace_file,
    replace_folder,
    replace_tree,
)


def interrupted(path):
    """Write half of a file, or a folder with such a file, and stop."""
    target = path if path.suffix else path / "file.txt"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("ha")
    raise KeyboardInterrupt


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_written_files_can_be_read_as_the_umask_allows(tmp_path):
    def write(path):
        save_file({"weight": torch.zeros(1)}, path if path.suffix else path / "model.safetensors")

    def write_folder(path):
        path.mkdir()
        write(path)

    replace_file(tmp_path / "file.safetensors", write)
    replace_folder(tmp_path / "folder", write_folder)
    replace_tree(tmp_path / "tree", lambda path: (path.mkdir(parents=True), write(path)))
    (tmp_path / "new").write_text("")
    expected = (tmp_path / "new").stat().st_mode
    written = [*tmp_path.rglob("*.safetensors")]
    assert len(written) == 3 and {path.stat().st_mode for path in written} == {expected}


def test_an_interrupted_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    replace_file(path, lambda temporary: temporary.write_text("whole"))
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, interrupted)
    assert path.read_text() == "whole"
    replace_file(path, lambda temporary: temporary.write_text("again"))
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]
    assert path.read_text() == "again"


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        replace_file(tmp_path / "pipe", lambda path: path.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("replace", [replace_folder, replace_tree])
def test_an_interrupted_write_leaves_the_previous_folder(tmp_path, replace):
    def write(folder):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "config.json").write_text("whole")
        (folder / "index.json").write_text("whole")

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("of a person")
    replace(folder, write)
    with pytest.raises(KeyboardInterrupt):
        replace(folder, interrupted)
    assert (folder / "index.json").read_text() == (folder / "unet" / "config.json").read_text() == "whole"
    replace(folder, write)
    assert (folder / "notes.txt").exists() == (replace is replace_tree)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".tmp")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_can_be_written_to(tmp_path, monkeypatch, number):
    def fsync(descriptor):
        raise OSError(number if stat.S_ISDIR(os.fstat(descriptor).st_mode) else error, "")

    error = number
    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(tmp_path / "file.txt", lambda path: path.write_text("whole"))
    replace_folder(tmp_path / "folder", lambda path: (path.mkdir(), (path / "file.txt").write_text("whole")))
    assert (tmp_path / "file.txt").read_text() == (tmp_path / "folder" / "file.txt").read_text() == "whole"
    error = errno.EIO
    with pytest.raises(OSError):
        replace_file(tmp_path / "file.txt", lambda path: path.write_text("other"))
    assert (tmp_path / "file.txt").read_text() == "whole"


def test_a_copied_folder_keeps_its_contents_when_the_original_is_replaced(tmp_path):
    for name in ("README.md", "unet.safetensors"):
        replace_file(tmp_path / "first" / name, lambda path: path.write_text("old"))
    copy_folder(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "second" / "unet.safetensors").samefile(tmp_path / "first" / "unet.safetensors")
    replace_file(tmp_path / "first" / "unet.safetensors", lambda path: path.write_text("new"))
    with open(tmp_path / "first" / "README.md", "a") as card:  # as an editor does
        card.write(" and edited")
    assert {path.read_text() for path in (tmp_path / "second").iterdir()} == {"old"}


def test_hashes_do_not_change_between_versions():
    """They name cached features and identify runs."""
    assert (
        fingerprint({"b": [1, 2.5, None], "a": "x"})
        == fingerprint({"a": "x", "b": [1, 2.5, None]})
        == "eb9f9445c996562490f96112"
    )
    assert fingerprint_bytes(b"") == "b8e1dda3ac0aa3820ad2990b"


def test_a_local_folder_goes_by_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    monkeypatch.chdir(tmp_path / "cats")
    assert location_name(".") == location_name(str(tmp_path / "cats")) == "cats"
    assert location_name("user/cats") == "user/cats"


def test_files_written_twice_at_the_same_time_are_whole(tmp_path):
    path = tmp_path / "file.txt"

    def write(temporary):
        temporary.write_text("first")
        replace_file(path, lambda other: other.write_text("second"))  # another command writes the same file

    replace_file(path, write)
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    for name in (".tmp-0123abcd-a.png", ".tmp-0123abcd-b.png", "c.png"):
        (tmp_path / name).touch()
    (tmp_path / ".tmp-folder").mkdir()
    (tmp_path / ".tmp-0123abcd-train[:9].npz").touch()
    remove_temporary_files(tmp_path, "-a.png")
    remove_temporary_files(tmp_path, "train[:9].npz")
    assert not (tmp_path / ".tmp-0123abcd-train[:9].npz").exists()
    assert not (tmp_path / ".tmp-0123abcd-a.png").exists() and (tmp_path / ".tmp-0123abcd-b.png").exists()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-folder", "c.png"]


def test_a_folder_or_file_that_cannot_be_written_is_reported_with_its_flag_and_not_created(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir()
    (tmp_path / "read-only" / "file").touch()
    can_write = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "read-only" and can_write(path, mode))
    for path in ("new/folder", "file"):
        check_can_write(tmp_path / path, "--output", is_folder=False)
    check_can_write(tmp_path / "new" / "folder", "--output_dir")
    for path, is_folder, problem in (
        (tmp_path / "file", True, "cannot be written to: .*file is not a folder. Choose another folder"),
        (tmp_path / "file" / "new", False, "cannot be created: Not a directory. Choose another file"),
        (tmp_path / ("x" * 300), True, "cannot be created: File name too long"),
        ("/dev/null", False, "cannot be written to: /dev/null is not a regular file"),
        (tmp_path / "read-only" / "file", False, "cannot be written to: .*/read-only is read-only, or belongs to"),
    ):
        with pytest.raises(InputError, match=f"^--output_dir {path} {problem}"):
            check_can_write(path, "--output_dir", is_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "read-only"]
