"""Claims about the run folder and its checkpoints: nothing is written too early, and old ones still resume."""

import json

import pytest
from tiny import largest_difference, weights

from ddgan.core.errors import InputError
from ddgan.core.run_files import is_run_folder
from ddgan.training.checkpoints import load_state
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
        *("averaged weights", "shards", "trained parameters", "prediction type", "scaled gradients"),
    ]
    kept = ("step", "seconds", "broken", "images", "images_per_step", "seed", "averaged weights")
    (old / "state.json").write_text(json.dumps({key: state[key] for key in kept}))
    finetune("run", *flags, "--resume_from_checkpoint", old)
    assert largest_difference(weights(straight), weights(run)) == 0
    assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_a_checkpoint_of_another_run_changes_nothing(finetune, tmp_path):
    run = finetune("run", "--checkpointing_steps", 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="seed = 0, but this run has 1"):
        finetune("run", "--seed", 1, "--resume_from_checkpoint", run / "checkpoints" / "step-00000002")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
