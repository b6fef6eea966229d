"""File names that identify a run folder, shared by the training loop and the image sources."""

from pathlib import Path

from .errors import InputError

CONFIG_FILE = "config.yaml"
PIPELINE_FILE = "model_index.json"
MODEL_FILE = "config.json"  # of a run that saves a model instead of a pipeline
SAMPLES_FOLDER = "samples"


def check_starts_no_second_run(folder: Path, resuming: bool) -> None:
    """Check that a folder holds no run, or that this one is being resumed.

    Raises:
        InputError: if not.
    """
    if (folder / CONFIG_FILE).exists() and not resuming:
        raise InputError(
            f"{folder} already contains a run. Resume it with --resume_from_checkpoint latest, or choose another "
            "folder with --output_dir."
        )


def is_run_folder(folder: Path) -> bool:
    """Return whether a training run wrote this folder, so that its sample grids are not images to train on."""
    return (folder / CONFIG_FILE).is_file() and any(
        (folder / name).exists() for name in (SAMPLES_FOLDER, PIPELINE_FILE, MODEL_FILE)
    )
