"""Claims about metrics.csv and the plots of a run."""

import shutil
from math import isnan
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ddgan.core.errors import InputError
from ddgan.evaluation import metrics
from ddgan.evaluation.metrics import METRICS, MetricValue
from ddgan.training import tracking
from ddgan.training.evaluator import Evaluation, EvaluationHistory
from ddgan.training.tracking import MetricsFile, plot_evaluations, plot_losses, read_metrics, tracker_names


def evaluation(step: int, best_metric: str = "fid", **values: float) -> Evaluation:
    metrics = {f"{name}@13": MetricValue(value) for name, value in values.items()}
    return Evaluation(step, metrics, {"fid": MetricValue(0.1)}, {}, "key", "images", "all", [], best_metric)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that are plotted."""
    plotted, new_figure = [], tracking._new_figure
    monkeypatch.setattr(tracking, "_new_figure", lambda **size: plotted.append(new_figure(**size)) or plotted[-1])
    return plotted


@pytest.fixture
def titles(monkeypatch) -> list[list[str]]:
    """The legends of each panel of plotted figures."""
    panels, new_figure = [], tracking._new_figure

    def figure(height: float):
        figure = new_figure(height)
        save = figure.savefig

        def savefig(*args, **options):
            legends = [axes.get_legend() for axes in figure.axes]
            panels.extend([text.get_text() for text in legend.get_texts()] for legend in legends if legend)
            save(*args, **options)

        figure.savefig = savefig
        return figure

    monkeypatch.setattr(tracking, "_new_figure", figure)
    return panels


def test_rows_are_appended_and_missing_values_are_empty(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv", resumed_step=0)
    file.append([{"step": 1, "loss": 0.1}, {"step": 2, "loss": float("nan")}])
    file.amend({"fid@13": 3.5})
    file.append([{"step": 3, "loss": 1 / 3}])
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,fid@13",
        "1,0.1,",
        "2,,3.5",
        "3,0.3333333333333333,",
    ]
    assert isnan(read_metrics(tmp_path / "metrics.csv")[1]["loss"])


def test_rows_after_the_resumed_step_and_cut_off_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.1")
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    MetricsFile(path, resumed_step=1)
    assert path.read_text().splitlines() == ["step,loss", "1,0.5"]
    MetricsFile(path, resumed_step=0)
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", [3, 4]),
        (None, [3, 4]),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), [3, 4]),
        (b"garbage", [3, 4]),
        (b"step,loss\n1,0.5\n2,0.2,7\n", [1, 3, 4]),
        (b"step,loss\n1,0.5\nx,0.2\n", [1, 3, 4]),
        (b"step,loss\n7,0.5\n2,0.2\n", [3, 4]),
        (b"step,loss\n1,0.5\n2,%s\n" % (b"1" * 200_000), [1, 3, 4]),
    ],
    ids=["empty", "removed", "binary", "text", "more fields", "not a number", "changed step", "long field"],
)
def test_lost_rows_are_reported_and_a_damaged_file_is_kept(tmp_path, caplog, content, kept):
    path, damaged = tmp_path / "metrics.csv", tmp_path / "metrics-damaged.csv"
    if content is not None:
        path.write_bytes(content)
    file = MetricsFile(path, resumed_step=2)
    assert f"metrics.csv lacks the rows of {4 - len(kept)} of the 2 steps so far." in caplog.text
    assert (damaged.read_bytes() if damaged.exists() else b"") == (content or b"")
    file.append([{"step": 3, "loss": 0.1}])
    file.append([{"step": 4, "loss": 0.1}])
    assert [row["step"] for row in read_metrics(path)] == kept


@pytest.mark.parametrize("how", ["removed", "emptied", "folder removed"])
def test_rows_continue_after_somebody_has_changed_the_file(tmp_path, caplog, how):
    path = tmp_path / "run" / "metrics.csv"
    file = MetricsFile(path, resumed_step=0)
    file.append([{"step": 1, "loss": 0.1}])

    def damage():
        if how == "emptied":
            path.write_text("")
        else:
            path.unlink() if how == "removed" else shutil.rmtree(path.parent)

    damage()
    file.append([{"step": 2, "loss": 0.1}])
    file.append([{"step": 3, "loss": 0.1}])
    assert [row["step"] for row in read_metrics(path)] == [2, 3]
    damage()
    file.amend({"fid@13": 3.5})
    assert read_metrics(path) == [{"step": 3, "loss": 0.1, "fid@13": 3.5}]
    assert caplog.text.count("was changed or removed during the run") == 2


def plot(folder: Path, *evaluations: Evaluation) -> None:
    history = EvaluationHistory()
    file = MetricsFile(folder / "metrics.csv", resumed_step=0)
    for item in evaluations:
        history.add(item, 1.0)
        file.append([{"step": item.step, "loss": 1.0, "learning_rate": 0.1} | item.values()])
    plot_evaluations(folder / "metrics.csv", folder / "eval.png", history)
    assert Image.open(folder / "eval.png").width > 500


def test_each_metric_is_in_its_panel(tmp_path, titles):
    values = {"fid": 2.0, "kid": 0.1, "precision": 0.5, "density": 3.0, "recall": 0.4, "class_accuracy": 0.9}
    plot(tmp_path, evaluation(1, **values), evaluation(2, **values))
    assert titles == [["FID@13"], ["KID@13"], ["precision@13", "recall@13", "class accuracy@13"]]


def test_new_metrics_and_the_metric_of_the_best_step_have_panels_of_their_own(tmp_path, titles, monkeypatch):
    new_metric = metrics.Metric("new", frozenset({"reference"}), lambda inputs: MetricValue(1.0), panel="new")
    monkeypatch.setitem(METRICS, "new", new_metric)
    plot(tmp_path, evaluation(1, fid=2.0), evaluation(2, "density", fid=1.0, density=1.0, new=5.0))
    assert titles == [["FID@13"], ["density@13"], ["new@13"]]


def test_every_loss_is_plotted(tmp_path, titles):
    rows = [{"step": step, "g_loss": 0.1, "d_loss": 0.2, "learning_rate": 0.1} for step in range(1, 41)]
    MetricsFile(tmp_path / "metrics.csv", resumed_step=0).append(rows)
    plot_losses(tmp_path / "metrics.csv", tmp_path / "loss.png")
    assert titles == [["g_loss, mean of the last 2 steps", "d_loss, mean of the last 2 steps"]]


def test_a_loss_that_few_steps_have_is_plotted_between_them(tmp_path, figures):
    rows = [{"step": step, "d_loss": 0.2, "d_learning_rate": 0.1} for step in range(1, 121)]
    for row in rows[::3]:
        row |= {"g_loss": 0.1, "g_learning_rate": 0.3}
    MetricsFile(tmp_path / "metrics.csv", resumed_step=0).append(rows)
    plot_losses(tmp_path / "metrics.csv", tmp_path / "loss.png")
    losses, rates = figures[0].axes
    plotted = {line.get_color(): line for line in losses.get_lines()}["C1"]  # the smoothed one comes last
    assert list(plotted.get_xdata()) == list(range(4, 121, 3)) and np.allclose(plotted.get_ydata(), 0.1)
    assert list(rates.get_lines()[1].get_xdata()) == list(range(1, 121, 3))


def test_losses_of_two_stages_are_not_mixed(tmp_path, titles, figures):
    rows = [{"step": step, "loss": 0.1 if step <= 30 else 2.0, "learning_rate": 0.1} for step in range(1, 61)]
    MetricsFile(tmp_path / "metrics.csv", resumed_step=0).append(rows)
    plot_losses(tmp_path / "metrics.csv", tmp_path / "loss.png", last_stage=30)
    assert titles == [["loss, mean of the last 3 steps", "stage 2 begins at step 30"]]
    losses, rates = figures[0].axes
    _, first, second, mark, _ = losses.get_lines()
    assert np.allclose(first.get_ydata(), 0.1) and np.allclose(second.get_ydata(), 2.0)
    assert list(mark.get_xdata()) == [30, 30] == list(rates.get_lines()[0].get_xdata())


def test_a_missing_tracker_is_reported_with_its_installation(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name, command in (
        ("wandb", "'wandb>="),
        ("tensorboard", "'tensorboard>="),
        ("trackio", "trackio"),
    ):
        with pytest.raises(InputError, match=f"--report_to {name} needs .*pip install {command}"):
            tracker_names(name)
    assert tracker_names("none") == tracker_names("all") == []
