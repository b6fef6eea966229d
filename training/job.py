"""What a training script hands to the loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR

from ..hub.cards import CardFacts
from ..sampling.generation import PipelineSampler
from ..sampling.grids import image_grid
from .objectives.denoising import MicroBatch


@dataclass
class TrainedNetwork:
    """A network that is trained, with its loss and its optimizer.

    Attributes:
        name: what its columns in metrics.csv begin with; empty where a run has one player.
        network: the module.
        objective: from the network as it is to be called (wrapped for several processes) and `MicroBatch` gives one
            `loss` a sample, (B,), and beside it what else is to be logged, one value a sample, NaN where none is.
        optimizer: over the network's parameters.
        schedule: gives the course of the learning rate from the optimizer and the number of optimizer steps.
    """

    name: str
    network: torch.nn.Module
    objective: Callable[[torch.nn.Module, MicroBatch], dict[str, torch.Tensor]]
    optimizer: torch.optim.Optimizer
    schedule: Callable[[torch.optim.Optimizer, int], LambdaLR]


@dataclass
class TrainingJob:
    """What a training script hands over to the loop.

    Attributes:
        players: updated one after the other in every step, on the same images with draws of their own; meanwhile the
            others' parameters need no gradients.
        pipeline: holds the networks; it is what is sampled and saved.
        averaged: the network of the pipeline that has averaged weights (EMA).
        sampler: draws from the pipeline; a picture depends on its seed and its class alone.
        card: what the model card says beside the facts of the run.
        arguments: all of the script's arguments, for config.yaml and the trackers.
        labels: the class of each of the pictures that are shown, where there are classes.
        grid: lays these pictures out, in their order.
        watch: is shown the rows of metrics.csv as they are logged, and says in words what looks wrong.
    """

    players: list[TrainedNetwork]
    pipeline: DiffusionPipeline
    averaged: torch.nn.Module
    sampler: PipelineSampler
    card: CardFacts
    arguments: tuple
    labels: list[int] | None = None
    grid: Callable[[list[Image.Image]], Image.Image] = image_grid
    watch: Callable[[list[dict[str, float]]], str | None] = lambda rows: None
