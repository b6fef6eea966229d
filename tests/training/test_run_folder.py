"""Claims about the run folder and its checkpoints: nothing is written too early, and damage is noticed."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from tiny import largest_difference, weights

from ddgan.core.errors import InputError
from ddgan.core.locks import locked
from ddgan.core.run_files import is_run_folder
from ddgan.training.checkpoints import Checkpoints, load_state
from ddgan.training.loop import Trainer
from ddgan.training.run_folder import RunFolder


def test_creating_a_trainer_touches_no_file(finetune, monkeypatch, tmp_path):
    run = finetune("run", "--checkpointing_steps", 2)
    (run / ".tmp-leftover").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    monkeypatch.setattr("ddgan.training.model_card.print_summary", lambda run: None)
    checkpoint = run / "checkpoints" / "step-00000002"
    finetune("run", "--resume_from_checkpoint", checkpoint)
    finetune("other")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_newest_grid_is_the_last_one_up_to_a_step(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.newest_grid(10) is None
    folder.grid(0).parent.mkdir()
    for step in (0, 9, 100):
        folder.grid(step).touch()
    folder.grid(40, "further").touch()
    assert [folder.newest_grid(step) for step in (0, 50, 100)] == [folder.grid(step) for step in (0, 9, 100)]


def test_a_folder_with_a_config_alone_is_not_taken_for_a_run_by_image_sources(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert not is_run_folder(tmp_path)
    (tmp_path / "samples").mkdir()
    assert is_run_folder(tmp_path)
    with pytest.raises(InputError, match="already contains a run"):
        RunFolder(tmp_path).check_usable(resuming=False)
    RunFolder(tmp_path).check_usable(resuming=True)


def test_a_checkpoint_of_an_earlier_version_resumes_bit_identical(finetune):
    """One whose state.json has only the keys that the first version wrote."""
    flags = ("--num_epochs", 4, "--checkpointing_steps", 4)
    straight, run = finetune("straight", *flags), finetune("run", *flags, "--max_train_steps", 8)
    old = run / "checkpoints" / "step-00000004"
    state = load_state(old)
    assert list(state) == [
        *("step", "seconds", "broken", "evaluations", "images", "images_per_step", "seed"),
        *("averaged weights", "post-hoc EMA", "shards", "trained parameters", "prediction type"),
        *("scaled gradients", "8-bit optimizer"),
        *("files", "checksum"),
    ]
    kept = ("step", "seconds", "broken", "images", "images_per_step", "seed", "averaged weights")
    (old / "state.json").write_text(json.dumps({key: state[key] for key in kept}))
    finetune("run", *flags, "--resume_from_checkpoint", old)
    assert largest_difference(weights(straight), weights(run)) == 0
    assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_two_runs_do_not_write_to_one_folder(finetune, tmp_path, monkeypatch):
    run = finetune("run", "--max_train_steps", 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with (
        locked(run, Accelerator()),
        pytest.raises(InputError, match=r"run is in use: .* has been writing to it since"),
    ):
        finetune("run", "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    monkeypatch.setattr("ddgan.training.session.check_unlocked", lambda *_: None)  # the other run starts later
    with locked(tmp_path / "new", Accelerator()), pytest.raises(InputError, match="new is in use: "):
        finetune("new")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


def test_latest_skips_a_checkpoint_in_which_any_file_is_damaged(finetune, tmp_path):
    run = finetune("run", "--max_train_steps", 2, "--checkpointing_steps", 1)
    good, newest = (run / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    checkpoints, original = Checkpoints(run / "checkpoints", 0, Accelerator(), [], {}), tmp_path / "original"
    assert checkpoints.find("latest") == newest and not checkpoints.damaged
    checkpoints.invariants = {"shards": 2}
    with pytest.raises(InputError, match=r"FSDP shards = 1, but this run has 2, .* the same number of processes"):
        checkpoints.check(newest, 2)
    newest.rename(original)
    names = {path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()}
    assert {"state.json", "model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl"} < names
    for name in names:
        for how in ("missing", "empty", "truncated", "changed"):
            shutil.copytree(original, newest)
            damage(newest / name, how)
            assert checkpoints.find("latest") == good, (name, how)
            assert name in checkpoints.damaged[newest], (name, how)
            with pytest.raises(InputError, match=r"is damaged|is not a complete checkpoint"):
                checkpoints.find(str(newest))
            shutil.rmtree(newest)
    shutil.copytree(original, newest)
    state = load_state(newest)
    (newest / "state.json").write_text(json.dumps({**state, "step": 1}))
    assert (
        checkpoints.find("latest") == good and checkpoints.damaged[newest] == "state.json does not match its checksum"
    )


def test_a_run_with_a_damaged_checkpoint_ends_the_same_and_keeps_it_aside(finetune, tmp_path, caplog):
    flags = ("--checkpointing_steps", 2)
    straight = finetune("straight", *flags)
    run = Path(shutil.copytree(straight, tmp_path / "run"))
    damage(run / "checkpoints" / "step-00000004" / "ema.safetensors", "changed")
    finetune("run", *flags, "--resume_from_checkpoint", "latest")
    names = ["damaged-step-00000004", "step-00000002", "step-00000004"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    assert "step-00000004 is damaged: the contents of ema.safetensors have changed" in caplog.text
    assert largest_difference(weights(straight), weights(run)) == 0
    assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_a_run_without_an_intact_checkpoint_is_not_started_again(finetune, tmp_path):
    run = finetune("run", "--checkpointing_steps", 2)
    for step in (2, 4):
        damage(run / "checkpoints" / f"step-0000000{step}" / "optimizer.bin", "truncated")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"All checkpoints in .* are damaged .*step-00000004: optimizer\.bin has \d+"):
        finetune("run", "--resume_from_checkpoint", "latest")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["ema.safetensors", "optimizer.bin"])
def test_a_damaged_checkpoint_of_an_earlier_version_is_named(finetune, name):
    run = finetune("run", "--max_train_steps", 1)
    checkpoint = run / "checkpoints" / "step-00000001"
    state = load_state(checkpoint)
    del state["files"], state["checksum"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    damage(checkpoint / name, "truncated")
    with pytest.raises(
        InputError, match=r"step-00000001 cannot be loaded: .*\. If it is damaged, resume from an earl"
    ):
        finetune("run", "--max_train_steps", 2, "--resume_from_checkpoint", "latest")


def test_a_checkpoint_of_another_run_changes_nothing(finetune, tmp_path):
    run = finetune("run", "--checkpointing_steps", 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="seed = 0, but this run has 1"):
        finetune("run", "--seed", 1, "--resume_from_checkpoint", run / "checkpoints" / "step-00000002")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
