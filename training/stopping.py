"""Stopping a run cleanly on SIGTERM, SIGUSR1 and Ctrl-C."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator

# clusters announce the end of a job with SIGTERM or SIGUSR1; Windows has no SIGUSR1
STOP_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class RunStopped(SystemExit):
    """Raised when a signal stops the run; if not caught, it ends the command with exit code 128 + signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopRequest:
    """A context that turns `STOP_SIGNALS` into a request to stop, which all processes see at the same point.

    A second signal of the same kind ends the process at once. In a thread other than the main one, signals are left
    to the program.
    """

    def __init__(self, accelerator: Accelerator):
        self.signal = 0
        # on the CPU, so that the all-reduce does not wait for queued GPU work
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "StopRequest":
        in_main_thread = threading.current_thread() is threading.main_thread()
        self.previous_handlers: dict[int, Any] = {
            s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS if in_main_thread
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _) -> None:
        self.signal = number
        signal.signal(number, self.previous_handlers[number])

    def raise_if_requested(self) -> None:
        """Raise `RunStopped` if any process received a signal; every process must call this."""
        if self.group is not None:
            number = torch.tensor(self.signal)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self.group)  # pyright: ignore[reportArgumentType]
            self.signal = int(number)
        if self.signal:
            raise RunStopped(self.signal)
