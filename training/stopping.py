"""Stopping a run cleanly on SIGTERM and Ctrl-C."""

import signal
import sys

import torch
from accelerate import Accelerator


class RunStopped(Exception):
    """The run is to stop."""


class StopRequest:
    """SIGTERM and Ctrl-C as a wish to stop after the step, which all processes learn of together."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.signal = accelerator, 0
        # on the CPU, so that agreeing on it does not wait for the accelerator's queue
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "StopRequest":
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.signal = number
        signal.signal(number, self.before[number])  # a second one ends the process at once

    def requested(self) -> bool:
        if self.group is not None:
            number = torch.tensor(self.signal)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self.group)
            self.signal = int(number)
        return self.signal > 0

    def raise_if_requested(self) -> None:
        if self.requested():
            raise RunStopped

    def leave(self, step: int, checkpoint: str) -> None:
        name = signal.Signals(self.signal).name
        self.accelerator.print(
            f"\nStopped by {name} after step {step}. Saved: {checkpoint}. Go on with --resume_from_checkpoint latest."
        )
        self.accelerator.end_training()
        sys.exit(128 + self.signal)
