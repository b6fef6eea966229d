"""Local shards and full tensors of networks that FSDP shards."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def num_shards(accelerator: Accelerator) -> int:
    """Return the number of shards of each parameter: 1 without FSDP."""
    return accelerator.num_processes if accelerator.is_fsdp2 else 1


def local_shards(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return the parameters, or the local shards of sharded ones; they share memory with the originals."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]  # pyright: ignore[reportReturnType]


def gather_shards(shard: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Gather a tensor whose local shards correspond to those of a parameter; every process must call this."""
    if not isinstance(parameter, DTensor):
        return shard
    mesh, placements = parameter.device_mesh, parameter.placements
    # the shape and the stride, because the shards may have different sizes
    sharded = DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=parameter.stride())
    return sharded.full_tensor()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor from its shards; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(network: torch.nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass left gathered.

    The next forward pass gathers them again, with the values that the shards have by then.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def original_class(network: Any) -> Any:
    """Return the class of a network, which FSDP replaces with a subclass."""
    return type(network).__bases__[-1] if isinstance(network, FSDPModule) else type(network)


def gather_pipeline(
    pipeline: DiffusionPipeline | ModelMixin, accelerator: Accelerator
) -> DiffusionPipeline | ModelMixin:
    """Return the pipeline with full networks in the main process; every process must call this."""
    if not isinstance(pipeline, DiffusionPipeline):
        return pipeline  # only the networks of pipelines are trained with FSDP
    pipeline = copy.copy(pipeline)
    for name, component in pipeline.components.items():
        if isinstance(component, FSDPModule):
            state = accelerator.get_state_dict(component)
            if accelerator.is_main_process:
                network = original_class(component).from_config(component.config)
                network.load_state_dict(state)
                setattr(pipeline, name, network)
    return pipeline
