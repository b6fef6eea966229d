"""What a run shows: metrics.csv and its picture, and Accelerate's trackers."""

import csv
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..core.errors import InputError
from ..core.files import replace_file
from ..evaluation import report
from .arguments import RunArguments
from .evaluator import EvaluationHistory

SHARES = ("precision", "recall", "coverage", "class_accuracy")  # measures that are parts of a whole
_TRACKERS = ("tensorboard", "wandb", "trackio")


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `--report_to` means.

    Raises:
        InputError: if the package of one that is asked for is not installed.
    """
    if report_to == "none":
        return []
    if report_to == "all":
        return [name for name in _TRACKERS if find_spec(name)]
    if not find_spec(report_to):
        extra = "wandb" if report_to == "wandb" else "train"
        command = "pip install trackio" if report_to == "trackio" else f"pip install 'diffusers-ddgan[{extra}]'"
        raise InputError(
            f"--report_to {report_to} needs a package that is not installed: {command}. Or choose another: "
            f"--report_to none writes metrics.csv and pictures to the run folder alone."
        )
    return [report_to]


def start_trackers(accelerator: Accelerator, args: RunArguments, config: dict) -> None:
    """Start the trackers with the run's settings.

    Raises:
        InputError: if one does not start.
    """
    plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items() if v is not None}
    try:
        accelerator.init_trackers(
            args.wandb_project or args.model_save_name,
            config=plain,
            init_kwargs={"wandb": {"name": args.model_save_name, "dir": args.output_dir}},
        )
    except Exception as error:  # each tracker has errors of its own, most often that nobody is logged in
        raise InputError(
            f"--report_to {args.report_to}: the tracker did not start: {error}. Log in to it, or set "
            "WANDB_MODE=offline, or choose --report_to tensorboard or none."
        ) from error


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to every tracker that takes pictures."""
    array = np.asarray(picture.convert("RGB"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: array[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [picture]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(array)}, step=step)


class Metrics:
    """metrics.csv: one row an optimizer step, numbers in full precision, nothing where there is none."""

    def __init__(self, path: Path, resumed_step: int):
        """Open the file of a run; rows past the step at which it is taken up are dropped."""
        self.path = path
        rows = read_metrics(path) if path.exists() else []
        self._replace([row for row in rows if row["step"] <= resumed_step])

    def append(self, rows: list[dict[str, float]]) -> None:
        """Add rows; what they do not have of the columns there stays empty."""
        if self.columns and not any(row.keys() - set(self.columns) for row in rows):
            _write(self.path, self.columns, rows, "a")
        else:
            self._replace([*self._rows(), *rows])

    def amend(self, values: dict[str, float]) -> None:
        """Add values to the newest row."""
        *rows, newest = self._rows()
        self._replace([*rows, newest | values])

    def _rows(self) -> list[dict[str, float]]:
        return read_metrics(self.path) if self.columns else []

    def _replace(self, rows: list[dict[str, float]]) -> None:
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        if rows:
            replace_file(self.path, lambda temporary: _write(temporary, self.columns, rows, "w"))
        else:
            self.path.unlink(missing_ok=True)


def _write(path: Path, columns: list[str], rows: list[dict[str, float]], mode: str) -> None:
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if mode == "w":
            writer.writeheader()
        writer.writerows({name: "" if isnan(value) else value for name, value in row.items()} for row in rows)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The complete rows of a metrics.csv."""
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{k: int(v) if k in ("step", "images") else float(v or "nan") for k, v in row.items()} for row in rows]


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draw every column whose name ends in `loss`, as logged and smoothed, and the learning rates below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics)
    steps = [row["step"] for row in rows]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for color, name in enumerate(name for name in rows[0] if name.endswith("loss")):
        values = np.array([row[name] for row in rows])
        above.plot(steps, values, color=f"C{color}", alpha=0.25, linewidth=0.8)
        width = min(len(values), max(1, len(values) // 20))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        above.plot(steps[width - 1 :], smooth, color=f"C{color}", label=f"{name}, mean of the last {width} steps")
    above.set_yscale("log")
    above.set_ylabel("loss")
    above.grid(alpha=0.3, which="both")
    above.legend()
    for color, name in enumerate(name for name in rows[0] if name.endswith("learning_rate")):
        below.plot(steps, [row[name] for row in rows], color=f"C{color}")
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    below.grid(alpha=0.3)
    replace_file(picture, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def plot_evaluations(metrics: Path, picture: Path, evaluations: EvaluationHistory) -> None:
    """Draw what was measured like the newest evaluation, the best step marked, and dashed the floors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    newest, best = evaluations.last, evaluations.best
    images = next(iter(newest.measures)).partition("@")[2]
    rows = [row for row in read_metrics(metrics) if row["step"] >= evaluations.since]
    rows = [row for row in rows if not isnan(row.get(f"fid@{images}", nan))]
    steps = [row["step"] for row in rows]
    shares = [name for name in SHARES if f"{name}@{images}" in newest.measures]
    figure, panels = plt.subplots(3, 1, figsize=(8, 7.5), sharex=True, height_ratios=(3, 2, 3), layout="constrained")
    for panel, names in zip(panels, (["fid"], ["kid"], shares), strict=True):
        for color, name in enumerate(names):
            values = [row[f"{name}@{images}"] for row in rows]
            panel.plot(steps, values, "o-", color=f"C{color}", markersize=4, label=report.title(f"{name}@{images}"))
            if name in newest.floors:
                panel.axhline(newest.floors[name].value, color=f"C{color}", linestyle="--", linewidth=0.9, alpha=0.7)
        panel.axvline(best.step, color="0.6", linewidth=0.9)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_yscale("log")
    panels[0].set_title(f"dashed: halves of the training images; line: best FID, step {best.step}", fontsize=9)
    panels[-1].set_ylim(-0.05, 1.05)
    panels[-1].set_xlabel("optimizer step")
    replace_file(picture, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
