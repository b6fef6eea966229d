"""Losses and gradient norms of optimizer steps, read back from the device a few steps at a time."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from ..core.errors import RunError
from .checkpoints import Checkpoints
from .plan import BatchPlan

# consecutive optimizer steps that the fp16 gradient scaler may skip; each halves the scale, until none is left to try
_MAX_SKIPPED_STEPS = 50


@dataclass
class _Step:
    """A step not yet read back: numbers known on the host, and sums over processes and norms still on the device."""

    row: dict[str, float]
    sums: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]


class StepLog:
    """The steps whose numbers are still on the device, so that training need not wait for each of them."""

    def __init__(self, accelerator: Accelerator, plan: BatchPlan, checkpoints: Checkpoints):
        self.accelerator, self.plan, self.checkpoints = accelerator, plan, checkpoints
        self.pending: list[_Step] = []
        self.skipped_steps = 0  # consecutive ones, up to the newest step

    def add(
        self,
        step: int,
        learning_rates: dict[str, float],
        sums: dict[str, torch.Tensor],
        norms: dict[str, torch.Tensor],
    ) -> None:
        """Add a step.

        Args:
            learning_rates: by column.
            sums: by column, the part of this process in each mean over the global batch.
            norms: by column, the norms of the gradients, equal in all processes.
        """
        row = {"step": step, "epoch": self.plan.epoch(step), "images": self.plan.images_seen(step)}
        self.pending.append(_Step(row | learning_rates, sums, norms))

    def read(self) -> list[dict[str, float]]:
        """Read back the rows of metrics.csv since the last call; every process must call this.

        Raises:
            RunError: if a loss is not finite, or if gradients are not and the gradient scaler cannot recover.
        """
        if not self.pending:
            return []
        sums = torch.stack([value for step in self.pending for value in step.sums.values()])
        sums = iter(self.accelerator.reduce(sums, reduction="sum").tolist())
        norms = iter(torch.stack([norm for step in self.pending for norm in step.norms.values()]).tolist())
        rows = []
        for step in self.pending:  # each with its own columns
            step_norms = {name: next(norms) for name in step.norms}
            row = step.row | {name: next(sums) for name in step.sums} | step_norms
            self._check_finite(row, list(step_norms.values()))
            rows.append(row)
        self.pending.clear()
        return rows

    def _check_finite(self, row: dict[str, float], norms: list[float]) -> None:
        self.skipped_steps = 0 if all(map(math.isfinite, norms)) else self.skipped_steps + 1
        # the fp16 gradient scaler skips steps whose gradients are not finite
        allowed = 0 if self.accelerator.scaler is None else _MAX_SKIPPED_STEPS
        losses_are_finite = all(math.isfinite(value) for name, value in row.items() if name.endswith("loss"))
        if losses_are_finite and self.skipped_steps <= allowed:
            return
        step = int(row["step"])
        if losses_are_finite:
            value = f"gradient of step {step}" + (f", like those of the {allowed} before it," if allowed else "")
        else:
            value = f"loss of step {step}"
        raise RunError(
            f"The {value} is not finite ({_format_row(row)}). Nothing was overwritten. The last good checkpoint is "
            f"{self.checkpoints.last()}. A lower learning rate, or bf16 instead of fp16, usually helps; resume with "
            "--resume_from_checkpoint latest."
        )


def _format_row(row: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in row.items()
        if name.endswith(("loss", "grad_norm", "learning_rate"))
    )
