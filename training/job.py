"""The interface between a training script and the loop: networks, losses and optimizers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR

from ..hub.cards import CardFacts
from ..sampling.generation import PipelineSampler
from ..sampling.grids import image_grid
from .ema import EMA
from .evaluator import Evaluation
from .objectives.micro_batch import MicroBatch
from .run_folder import RunFolder

Sampler = Callable[[list[int], list[int] | None], list[Image.Image]]  # images of these seeds and, if any, classes


@dataclass(kw_only=True)
class TrainedNetwork:
    """A network in training, with its loss and its optimizer.

    Attributes:
        network: the module.
        objective: called with the network as prepared by Accelerate (wrapped for several processes) and a
            `MicroBatch`; returns one `loss` for each sample, (B,), and further values to log, one for each sample, NaN
            where there is none. They may differ between steps.
        optimizer: over the network's parameters.
        lr_schedule: creates the learning-rate schedule from the optimizer and the number of its steps.
        name: prefix of its columns in metrics.csv; empty if the run trains one network.
        first_step: the optimizer step, from 0, at which its training and its learning-rate schedule begin.
        interval: optimizer steps between its updates, beginning with `first_step`.
    """

    network: torch.nn.Module
    objective: Callable[[torch.nn.Module, MicroBatch], dict[str, torch.Tensor]]
    optimizer: torch.optim.Optimizer
    lr_schedule: Callable[[torch.optim.Optimizer, int], LambdaLR]
    name: str = ""
    first_step: int = 0
    interval: int = 1


@dataclass(kw_only=True)
class TrainingJob:
    """Everything that a training script passes to the loop.

    Attributes:
        networks: updated one after the other in each step, on the same images with independent random numbers;
            meanwhile the parameters of the others need no gradients.
        pipeline: the pipeline to sample and save; a model for a run without samples.
        ema: the EMA weights of its trained network, used for sampling and saving.
        card: the facts for the model card that the script knows; the loop adds those of the run.
        arguments: all arguments of the script, dataclasses, for config.yaml and the trackers.
        sampler: samples from the pipeline, one image for each seed and class; without it, the run has no sample grids.
        start_samplers: samplers of the network before training, for grids of step 0 by name. The one named "" replaces
            `sampler` in the ordinary grid of this step.
        final_samplers: likewise of the trained network, for the last step.
        labels: the class of each image in a sample grid, if there are classes.
        grid: arranges these images, in their order.
        prepare: called in every process with the run folder before the first step, also when the run is resumed, while
            the networks still have the weights with which training started.
        finish: called in the main process with the run folder and the number of steps once everything is saved; the
            final card includes what it adds to the folder and to `card`.
        last_stage: the optimizer step, from 0, at which the last stage of a run in stages begins; its losses differ
            from those of the earlier stages.
        monitor: reads the rows of metrics.csv as they are logged; returns a warning, or None.
        evaluation_monitor: likewise an evaluation, and the rows of metrics.csv with the comparable ones before it.
    """

    networks: list[TrainedNetwork]
    pipeline: DiffusionPipeline | ModelMixin
    ema: EMA
    card: CardFacts
    arguments: tuple[Any, ...]
    sampler: PipelineSampler | None = None
    start_samplers: dict[str, Sampler] = field(default_factory=dict)
    final_samplers: dict[str, Sampler] = field(default_factory=dict)
    labels: list[int] | None = None
    grid: Callable[[list[Image.Image]], Image.Image] = image_grid
    prepare: Callable[[RunFolder], None] | None = None
    finish: Callable[[RunFolder, int], None] = lambda folder, step: None
    last_stage: int = 0
    monitor: Callable[[list[dict[str, float]]], str | None] = lambda rows: None
    evaluation_monitor: Callable[[Evaluation, list[dict[str, float]]], str | None] | None = None
