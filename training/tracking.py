"""Metrics of a run: metrics.csv, its plots, and Accelerate's trackers."""

import csv
import logging
import os
import shutil
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..core.errors import InputError
from ..core.extras import missing_extra
from ..core.files import replace_file, unused_path
from ..core.locations import is_url, url_name
from ..evaluation.metrics import METRICS
from ..evaluation.reporting import metric_title
from .arguments import RunArguments
from .evaluator import EvaluationHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

VALIDATION_LOSS = "validation_loss"  # column of metrics.csv

_TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True)
class _PanelStyle:
    """Axes of a panel of the evaluation plot; the panel of each metric is in `METRICS`."""

    height: int = 2
    log_scale: bool = False
    limits: tuple[float, float] | None = None


_PANEL_STYLES = {
    "fid": _PanelStyle(height=3, log_scale=True),
    "fractions": _PanelStyle(height=3, limits=(-0.05, 1.05)),
}


def tracker_names(report_to: str) -> list[str]:
    """Return the trackers that `--report_to` selects.

    Raises:
        InputError: if the package of a requested tracker is not installed.
    """
    if report_to == "none":
        return []
    if report_to == "all":
        return [name for name in _TRACKERS if find_spec(name)]
    if not find_spec(report_to):
        extra = {"wandb": "wandb", "tensorboard": "train"}.get(report_to)
        raise InputError(
            f"--report_to {report_to} needs a package: {missing_extra(report_to, extra)}. Or choose another tracker; "
            "--report_to none writes metrics.csv and images to the run folder only."
        )
    return [report_to]


def start_trackers(accelerator: Accelerator, args: RunArguments, config: dict) -> None:
    """Start the trackers with the run's settings.

    Raises:
        InputError: if a tracker does not start.
    """
    texts = {name: str(value) for name, value in config.items() if value is not None}
    texts = {name: url_name(text) if is_url(text) else text for name, text in texts.items()}  # queries may be secret
    plain = {k: config[k] if isinstance(config[k], (int, float, bool)) else text for k, text in texts.items()}
    try:
        accelerator.init_trackers(
            args.wandb_project or args.model_save_name,
            config=plain,
            init_kwargs={"wandb": {"name": args.model_save_name, "dir": args.output_dir}},
        )
    except Exception as error:  # each tracker has its own errors, most often a missing login
        raise InputError(
            f"--report_to {args.report_to}: the tracker did not start: {error}. Log in to it, or set "
            "WANDB_MODE=offline, or choose --report_to tensorboard or none."
        ) from error


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Log an image to every tracker that supports images."""
    array = np.asarray(image.convert("RGB"))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: array[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({name: trackio.Image(array)}, step=step)


class MetricsFile:
    """The metrics.csv of a run: one row per optimizer step, numbers in full precision, missing values empty.

    Before them there may be a row of step 0, with the validation loss before training.

    Rows that are lost because somebody damaged or removed the file are reported, and the run continues.
    """

    def __init__(self, path: Path, resumed_step: int):
        """Open the file of a run and drop the rows after the step from which the run resumes."""
        self.path, self.newest = path, {"step": resumed_step}
        rows, is_damaged = _read(path)
        rows = [row for row in rows if row["step"] <= resumed_step]
        if lost := resumed_step - sum(row["step"] > 0 for row in rows):
            kept = ""
            if is_damaged:
                damaged = unused_path(path.with_stem(f"{path.stem}-damaged"))
                shutil.copyfile(path, damaged)
                kept = f" The damaged file is kept as {damaged.name}."
            logger.warning(f"{path} lacks the rows of {lost} of the {resumed_step} steps so far.{kept}")
        self._replace(rows)
        if self.newest["step"] != resumed_step:
            self.newest, self.newest_line = {"step": resumed_step}, 0

    def append(self, rows: list[dict[str, float]]) -> None:
        """Append rows; columns that a row lacks stay empty in it."""
        if self._is_unchanged() and not any(row.keys() - set(self.columns) for row in rows):
            self._write(self.path, rows, "a")
            self.newest, self.size = rows[-1], self.path.stat().st_size
        else:
            self._replace([*self._rows(), *rows])

    def amend(self, values: dict[str, float]) -> None:
        """Add values to the newest row."""
        row = self.newest | values
        if self.newest_line and self._is_unchanged() and not values.keys() - set(self.columns):
            os.truncate(self.path, self.size - self.newest_line)  # only the last line, for runs of many steps
            self.size -= self.newest_line
            self.append([row])
            return
        rows = [row for row in self._rows() if row["step"] != self.newest["step"]]
        self._replace([*rows, row])

    def _is_unchanged(self) -> bool:
        """Return whether the file is as this object has written it."""
        return self.path.exists() and self.path.stat().st_size == self.size

    def _rows(self) -> list[dict[str, float]]:
        if not self._is_unchanged() and self.size:
            logger.warning(f"{self.path} was changed or removed during the run; rows may be missing.")
        return read_metrics(self.path)

    def _replace(self, rows: list[dict[str, float]]) -> None:
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        self.size = self.newest_line = 0
        if rows:
            replace_file(self.path, lambda temporary: self._write(temporary, rows, "w"))
            self.newest, self.size = rows[-1], self.path.stat().st_size
        else:
            self.path.unlink(missing_ok=True)

    def _write(self, path: Path, rows: list[dict[str, float]], mode: str) -> None:
        """Write rows, and remember the length of the last line in bytes."""
        with open(path, mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            for row in rows:
                self.newest_line = writer.writerow({k: "" if isnan(value) else value for k, value in row.items()})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the complete rows of a metrics.csv, none if it does not exist; damaged rows are left out."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, float]], bool]:
    """Return the rows of a metrics.csv, and whether it contains anything else; its last line may be cut off."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
    rows = []
    for line in lines:
        with suppress(ValueError, KeyError, csv.Error):
            columns, values = csv.reader([header, line])
            row: dict[str, float] = {
                name: int(value) if name in ("step", "images") else float(value or "nan")
                for name, value in zip(columns, values, strict=True)
            }
            if row["step"] > (rows[-1]["step"] if rows else -1):
                rows.append(row)
    return rows, len(rows) < len(lines) or bool(text and not header)


def lowest_validation_loss(rows: list[dict[str, float]]) -> tuple[float, int] | None:
    """Return the lowest validation loss in rows of metrics.csv and its step, None if there is none."""
    values = [(value, int(row["step"])) for row in rows if not isnan(value := row.get(VALIDATION_LOSS, nan))]
    return min(values, default=None)


def plot_losses(metrics_path: Path, plot_path: Path, last_stage: int = 0) -> None:
    """Plot every column whose name ends in `loss`, as logged and smoothed, and the learning rates below.

    The validation loss, which few steps have, is plotted as it is. A vertical line marks the step `last_stage` (see
    `TrainingJob`), across which nothing is smoothed.
    """
    all_rows = read_metrics(metrics_path)
    rows = [row for row in all_rows if row["step"] > 0]
    if not rows:  # somebody has removed the file
        return
    figure = _new_figure(height=5.5)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    names = [name for name in rows[0] if name.endswith("loss") and name != VALIDATION_LOSS]
    for color, name in enumerate(names):
        steps, values = _series(rows, name)
        losses.plot(steps, values, color=f"C{color}", alpha=0.25, linewidth=0.8)
        width = max(1, len(values) // 20)
        label = f"{name}, mean of the last {width} steps" if width > 1 else name
        first = bisect_right(steps, last_stage)  # of the last stage
        for stage in (slice(first), slice(first, None)):
            if len(steps[stage]) >= width:
                smooth = np.convolve(values[stage], np.ones(width) / width, mode="valid")
                losses.plot(steps[stage][width - 1 :], smooth, color=f"C{color}", label=label)
                label = None
    steps, values = _series(all_rows, VALIDATION_LOSS)
    if steps:
        losses.plot(steps, values, "ko-", markersize=3, label=VALIDATION_LOSS)
    if 0 < last_stage < rows[-1]["step"]:
        for axes in (losses, rates):
            axes.axvline(last_stage, color="0.4", linewidth=0.9, linestyle="--")
        losses.plot([], [], color="0.4", linewidth=0.9, linestyle="--", label=f"stage 2 begins at step {last_stage:,}")
    _use_log_scale(losses)
    losses.set_ylabel("loss")
    losses.grid(alpha=0.3, which="both")
    losses.legend()
    for color, name in enumerate(name for name in rows[0] if name.endswith("learning_rate")):
        rates.plot(*_series(rows, name), color=f"C{color}")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimizer step")
    rates.grid(alpha=0.3)
    replace_file(plot_path, lambda temporary: figure.savefig(temporary, dpi=110))


def _series(rows: list[dict[str, float]], name: str) -> tuple[list[float], np.ndarray]:
    """Return the steps that have a value in a column, and the values."""
    present = [row for row in rows if not isnan(row.get(name, nan))]
    return [row["step"] for row in present], np.array([row[name] for row in present])


def plot_evaluations(metrics_path: Path, plot_path: Path, history: EvaluationHistory) -> None:
    """Plot the evaluations that are comparable with the newest, their best step and, dashed, the floors."""
    newest, best = history.last, history.best
    assert newest is not None and best is not None
    panels: dict[str, list[str]] = {}  # keys of metrics
    for key in newest.metrics:
        name = key.partition("@")[0]
        panel = METRICS[name].panel or (name if name == best.best_metric else None)
        if panel:
            panels.setdefault(panel, []).append(key)
    styles = [_PANEL_STYLES.get(panel, _PanelStyle()) for panel in panels]
    rows = [row for row in read_metrics(metrics_path) if row["step"] >= history.since]
    rows = [row for row in rows if not isnan(row.get(next(iter(newest.metrics)), nan))]
    steps = [row["step"] for row in rows]
    figure = _new_figure(height=1 + 0.8 * sum(style.height for style in styles))
    all_axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, height_ratios=[style.height for style in styles]
    )[:, 0]
    for axes, keys, style in zip(all_axes, panels.values(), styles, strict=True):
        for color, key in enumerate(keys):
            values = [row.get(key, nan) for row in rows]  # earlier versions measured fewer metrics
            axes.plot(steps, values, "o-", color=f"C{color}", markersize=4, label=metric_title(key, newest.extractor))
            if floor := newest.floors.get(key.partition("@")[0]):
                axes.axhline(floor.value, color=f"C{color}", linestyle="--", linewidth=0.9, alpha=0.7)
        axes.axvline(best.step, color="0.6", linewidth=0.9)
        axes.grid(alpha=0.3)
        axes.legend()
        if style.log_scale:
            _use_log_scale(axes)
        if style.limits:
            axes.set_ylim(*style.limits)
    title = metric_title(best.by_name()[best.best_metric][0], best.extractor).partition("@")[0]
    all_axes[0].set_title(
        f"dashed: floor (halves of the training images); line: best {title}, step {best.step}", fontsize=9
    )
    all_axes[-1].set_xlabel("optimizer step")
    replace_file(plot_path, lambda temporary: figure.savefig(temporary, dpi=110))


def _use_log_scale(axes: "Axes") -> None:
    """Label 1, 2 and 5 in each decade as plain numbers, which stay readable if the values span less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _new_figure(height: float) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    return Figure(figsize=(8, height), layout="constrained")
