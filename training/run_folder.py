"""The run folder: the name of every file that a training run writes."""

import shutil
from pathlib import Path

from ..core.errors import InputError
from ..core.run_files import (
    CONFIG_FILE,
    MODEL_FILE,
    PIPELINE_FILE,
    SAMPLES_FOLDER,
    check_starts_no_second_run,
)
from ..hub.publication import SNAPSHOT, remove_abandoned_snapshots


class RunFolder:
    """The folder of a training run (`--output_dir`).

    Attributes:
        path: the folder; the pipeline or model is saved at its top level.
        card: the model card.
        config: all arguments; its presence marks the folder as a run.
        metrics: one row for each optimizer step.
        loss_plot, eval_plot: the curves of the losses and of the evaluations.
        before_after: grids of samples before and after training, side by side.
        best: folder of the pipeline with the best evaluation.
        checkpoints: folder of the checkpoints.
        ema_snapshots: with `--posthoc_ema`, folder of the EMA snapshots.
        posthoc: folder of the pipeline with the EMA that `ddgan choose-ema` has chosen.
        teacher: samples of the start model that few-step fine-tuning learns from, while it runs.
        logs: folder of the trackers that write local files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.card = self.path / "README.md"
        self.config = self.path / CONFIG_FILE
        self.metrics = self.path / "metrics.csv"
        self.loss_plot = self.path / "loss.png"
        self.eval_plot = self.path / "eval.png"
        self.before_after = self.path / "before_after.png"
        self.best = self.path / "best"
        self.checkpoints = self.path / "checkpoints"
        self.ema_snapshots = self.path / "ema_snapshots"
        self.posthoc = self.path / "posthoc"
        self.teacher = self.path / "teacher.safetensors"
        self.logs = self.path / "logs"

    def grid(self, step: int, name: str = "") -> Path:
        """Return the path of the sample grid of a step, or of a further grid of that step."""
        return self.path / SAMPLES_FOLDER / f"step-{step:08d}{name and f'-{name}'}.png"

    def ema_snapshot(self, step: int) -> Path:
        """Return the path of the EMA snapshot of a step."""
        return self.ema_snapshots / f"step-{step:08d}.safetensors"

    def newest_grid(self, step: int) -> Path | None:
        """Return the newest existing sample grid up to a step."""
        grids = (self.path / SAMPLES_FOLDER).glob(f"step-{'[0-9]' * 8}.png")
        return max((path for path in grids if step_of_grid(path) <= step), key=step_of_grid, default=None)

    def check_usable(self, resuming: bool) -> None:
        """Check that a run can start or resume here without overwriting anything else.

        Raises:
            InputError: if the path is a file, or the folder holds another run or files that no run wrote.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output_dir {self.path} is a file. Name a folder; it is created if it does not exist.")
        check_starts_no_second_run(self.path, resuming)
        if self.config.exists():
            return
        own_files = [self.path / PIPELINE_FILE, self.path / MODEL_FILE, self.card, self.metrics]
        own_files += [self.loss_plot, self.eval_plot, self.before_after]
        if existing := [path.name for path in own_files if path.exists()]:
            raise InputError(
                f"{self.path} contains {' and '.join(existing)}, which no run wrote. This run would "
                "overwrite them or mix with them. Choose another folder with --output_dir."
            )

    def remove_leftovers(self) -> None:
        """Remove the temporary files of interrupted writes and uploads, but not those of an upload in progress."""
        remove_abandoned_snapshots(self.path)
        folders = (self.path, self.path / SAMPLES_FOLDER, self.checkpoints, self.ema_snapshots)
        for path in [path for folder in folders for path in folder.glob(".tmp-*")]:
            if not path.name.startswith(SNAPSHOT):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def step_of_grid(grid: Path) -> int:
    """Return the optimizer step of a sample grid from its file name."""
    return int(grid.stem.removeprefix("step-"))
