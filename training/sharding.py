"""Networks that FSDP has cut into shards: the part that this process holds, and the whole."""

import copy
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The parameters; of those that are sharded, this process's shard, in the same memory."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together from its shards; called by every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(network: torch.nn.Module) -> None:
    """Give up what a forward pass without a backward pass has left gathered, so that the next one gathers anew."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_pipeline(pipeline: DiffusionPipeline, accelerator: Accelerator) -> DiffusionPipeline:
    """The pipeline with its networks put together from their shards, in the main process; called by every process."""
    pipeline = copy.copy(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, FSDPModule):
            state = accelerator.get_state_dict(part)
            if accelerator.is_main_process:
                kind = type(part).__bases__[-1]  # what FSDP derived the class of the network from
                network = kind.from_config(part.config)
                network.load_state_dict(state)
                setattr(pipeline, name, network)
    return pipeline
