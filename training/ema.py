"""The exponential moving average (EMA) of a network's weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from .arguments import RunArguments
from .sharding import local_shards, num_shards, reshard


class EMA:
    """The EMA weights of a network; with `--ema_decay 0` they are its own weights.

    The trainer updates them after each optimizer step.

    Args:
        network: the network whose weights are averaged, one of the pipeline's components.
        args: the decay and its warmup.
    """

    def __init__(self, network: torch.nn.Module, args: RunArguments):
        self.network, self.args = network, args
        self.average: EMAModel | None = None

    @property
    def enabled(self) -> bool:
        return self.args.ema_decay > 0

    def prepare(self, accelerator: Accelerator) -> None:
        """Start averaging from the current weights, once Accelerate has placed and sharded the network."""
        self.accelerator = accelerator
        if self.enabled:
            self.average = _average(local_shards(self.network.parameters()), self.args)

    def step(self) -> None:
        """Update the EMA weights after an optimizer step."""
        if self.average:
            self.average.step(local_shards(self.network.parameters()))

    def weights(self) -> list[torch.Tensor]:
        """Return the EMA weights, or the local shards of sharded ones; empty without EMA."""
        return list(self.average.shadow_params) if self.average else []

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context, the network holds its EMA weights and is in evaluation mode."""
        if self.average:
            self.average.store(local_shards(self.network.parameters()))
            self.average.copy_to(local_shards(self.network.parameters()))
        self.network.eval()
        try:
            yield
        finally:
            self.network.train()
            reshard(self.network)
            if self.average:
                self.average.restore(local_shards(self.network.parameters()))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the EMA weights into a checkpoint: one file, or one for each process with FSDP."""
        if self.average and (num_shards(self.accelerator) > 1 or self.accelerator.is_main_process):
            tensors = {str(i): tensor.contiguous() for i, tensor in enumerate(self.average.shadow_params)}
            save_file(tensors, folder / self._file_name)
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read the EMA weights from a checkpoint."""
        if self.average:
            tensors = load_file(folder / self._file_name)
            device = self.accelerator.device  # copied, because the file has them at unaligned addresses
            self.average.shadow_params = [tensors[str(i)].to(device, copy=True) for i in range(len(tensors))]
            self.average.optimization_step = state["step"]

    @property
    def _file_name(self) -> str:
        sharded = num_shards(self.accelerator) > 1
        return f"ema_{self.accelerator.process_index}.safetensors" if sharded else "ema.safetensors"


def half_life(args: RunArguments, step: int) -> float:
    """Return the half-life of the EMA weights after `step` optimizer steps, in steps; 0 without EMA.

    After that many further steps, the weight of the network's parameters at that step in the average has halved.
    """
    decay = _average([], args).get_decay(step) if args.ema_decay else 0
    return math.log(0.5) / math.log(decay) if decay else 0.0


def _average(parameters: list[torch.nn.Parameter], args: RunArguments) -> EMAModel:
    return EMAModel(
        parameters,
        decay=args.ema_decay,
        use_ema_warmup=True,
        inv_gamma=args.ema_inv_gamma,
        power=args.ema_power,
        foreach=True,
    )
