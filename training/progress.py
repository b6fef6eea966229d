"""Progress and timing of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .evaluator import EvaluationHistory


class Clock:
    """The time of a run: training, waiting for data, and pauses for samples, evaluations and saves.

    Attributes:
        earlier_seconds: seconds that the run took before it was resumed.
        waited: seconds of waiting for data since `start`.
        paused_seconds: seconds of pauses since `start`.
    """

    def __init__(self):
        self.earlier_seconds = self.waited = self.paused_seconds = 0.0
        self.start(0)

    def start(self, images: int) -> None:
        """Start the clock, given the number of images trained on so far."""
        self.started = time.perf_counter()
        self.last_reading = 0.0, images  # training seconds and images when the speed was last read

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Seconds since `start`."""
        return time.perf_counter() - self.started

    @property
    def total_seconds(self) -> float:
        """Seconds of the whole run, including those before it was resumed."""
        return self.earlier_seconds + self.seconds

    @property
    def waiting_share(self) -> float:
        """Share of the training time since `start` that was spent waiting for data."""
        return self.waited / max(self.seconds - self.paused_seconds, 1e-9)

    def images_per_second(self, images: int) -> float:
        """Return the training speed since the last call, given the number of images trained on so far."""
        seconds = self.seconds - self.paused_seconds
        last_seconds, last_images = self.last_reading
        self.last_reading = seconds, images
        return (images - last_images) / max(seconds - last_seconds, 1e-9)


class RunProgress:
    """The progress of a run, saved in the state.json of its checkpoints.

    Attributes:
        step: optimizer steps taken.
        broken: the images that were skipped because they cannot be read.
        evaluations: the newest and the best evaluation.
        clock: the time of the run.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.step = 0
        self.broken: set[str] = set()
        self.evaluations = EvaluationHistory()
        self.clock = Clock()

    def save(self, folder: Path) -> dict[str, Any]:
        if self.accelerator.num_processes > 1:
            broken_by_process: list[set[str]] = [set() for _ in range(self.accelerator.num_processes)]
            torch.distributed.all_gather_object(broken_by_process, self.broken)
            self.broken = set().union(*broken_by_process)
        return {
            "step": self.step,
            "seconds": self.clock.total_seconds,
            "broken": sorted(self.broken),
            "evaluations": self.evaluations.to_json(),
        }

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self.step, self.clock.earlier_seconds, self.broken = state["step"], state["seconds"], set(state["broken"])
        self.evaluations = EvaluationHistory.from_json(state.get("evaluations", {}))  # earlier versions saved none
