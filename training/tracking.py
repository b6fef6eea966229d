"""What a run shows: metrics.csv and its picture, and Accelerate's trackers."""

import csv
from importlib.util import find_spec
from math import isnan
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from ..errors import InputError
from .arguments import RunArguments
from .checkpoints import replace_file

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
        kept = [row for row in rows if row["step"] <= resumed_step]
        if kept:
            replace_file(path, lambda temporary: _write(temporary, kept, "w"))
        else:
            path.unlink(missing_ok=True)

    def append(self, rows: list[dict[str, float]]) -> None:
        _write(self.path, rows, "a" if self.path.exists() else "w")


def _write(path: Path, rows: list[dict[str, float]], mode: str) -> None:
    with open(path, mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
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
