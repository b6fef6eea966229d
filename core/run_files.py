"""File names that identify a run folder, shared by the training loop and the image sources."""

from pathlib import Path

CONFIG_FILE = "config.yaml"
PIPELINE_FILE = "model_index.json"
MODEL_FILE = "config.json"  # of a run that saves a model instead of a pipeline
SAMPLES_FOLDER = "samples"


def is_run_folder(folder: Path) -> bool:
    """Return whether a training run wrote this folder, so that its sample grids are not images to train on."""
    return (folder / CONFIG_FILE).is_file() and any(
        (folder / name).exists() for name in (SAMPLES_FOLDER, PIPELINE_FILE, MODEL_FILE)
    )
