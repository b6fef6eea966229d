"""What can be said on the command line of every training script, and how it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..core.cli import option, require_above, require_at_least
from ..core.errors import InputError
from ..evaluation.metrics import MIN_IMAGES


@dataclass
class DataArguments:
    """Which images are trained on and how they are cut to size."""

    _argument_group_name = "data"
    _alternatives = ({"image_size", "resolution"}, {"dataset_name", "train_data_dir"})

    dataset_name: str | None = option(
        None, "dataset on the Hub, or a local folder that `datasets.load_dataset` reads (default: the embedded emoji)"
    )
    dataset_config: str | None = option(None, "configuration of that dataset, where it has several")
    split: str = option("train", "split of the dataset")
    image_column: str | None = option(None, "column with the images (default: the first image column)")
    streaming: bool = option(False, "read the dataset as a stream, without a copy on disk; needs --max_train_steps")
    train_data_dir: str | None = option(
        None,
        "folder of image files, searched with its sub-folders but for hidden ones and run folders, or torchvision's "
        "MNIST-style folder",
    )
    image_size: int | None = option(
        None, "train at this height and width (default: the start model's; without one 28 by class, 32 for a GAN)"
    )
    resolution: list[int] | None = option(None, "height and width, where they differ: --resolution 64 96")
    center_crop: bool = option(False, "crop images that are not square at the centre, not at random")
    random_flip: bool = option(False, "mirror half of the images, drawn anew each time")
    skip_broken_images: bool = option(False, "leave out images that cannot be read, and count them")
    cache_images: bool = option(False, "keep the decoded, resized images in memory (images x channels x H x W bytes)")
    dataloader_num_workers: int = option(0, "processes that read images ahead of the training loop")

    def __post_init__(self):
        if self.dataset_name and self.train_data_dir:
            raise InputError(
                f"--dataset_name {self.dataset_name} and --train_data_dir {self.train_data_dir} both name the "
                "images to train on. Give one of them."
            )
        if self.resolution and (self.image_size or len(self.resolution) != 2):
            raise InputError(
                "--resolution takes a height and a width (--resolution 64 96) and stands in place of --image_size."
            )
        require_at_least(1, self, "image_size", "resolution")
        require_at_least(0, self, "dataloader_num_workers")
        if self.streaming and not self.dataset_name:
            raise InputError("--streaming reads a dataset as a stream: name it with --dataset_name.")


@dataclass
class RunArguments:
    """How a training run goes: its length, its optimizer, what it shows and what it keeps."""

    _argument_group_name = "run"
    _alternatives = ({"num_epochs", "max_train_steps"},)
    _default_output_dir: ClassVar = "finetuned"

    output_dir: str | None = option(None, "the run folder (default: --model_save_name)")
    model_save_name: str | None = option(
        None, "name of the model on its card and on the Hub (default: --output_dir's)"
    )
    seed: int = option(0, "with the same seed and settings a run repeats itself")
    batch_size: int = option(16, "images in a micro-batch of one process")
    grad_accumulation_steps: int = option(1, "micro-batches of each process that make one optimizer step")
    num_epochs: int = option(10, "passes over the images")
    max_train_steps: int | None = option(None, "optimizer steps, in place of --num_epochs")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0 leaves them")
    ema_decay: float = option(0.9999, "upper bound on the decay of the averaged weights (EMA); 0 turns them off")
    ema_inv_gamma: float = option(1.0, "EMA warm-up: the decay after n steps is 1 - (1 + n / inv_gamma) ** -power")
    ema_power: float = option(0.75, "EMA warm-up: see --ema_inv_gamma")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(None, "(default: what `accelerate launch` says)")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    compile: bool = option(False, "compile the network with torch.compile")
    channels_last: bool = option(False, "keep tensors in channels-last order: faster convolutions on most devices")
    log_samples_every: int = option(200, "optimizer steps between grids of samples; 0: only before and after")
    num_samples: int = option(16, "images in such a grid")
    save_model_every: int = option(500, "optimizer steps between saves of the pipeline; 0: only at the end")
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints to resume from; 0: only at the end")
    checkpoints_total_limit: int = option(2, "checkpoints that are kept; 0 keeps all")
    resume_from_checkpoint: str | None = option(None, "go on from this checkpoint folder, or from the `latest`")
    report_to: Literal["tensorboard", "wandb", "trackio", "none", "all"] | None = option(
        None, "where metrics and samples go (default: wandb with --wandb_project, else tensorboard)"
    )
    wandb_project: str | None = option(None, "project name for the tracker")
    push_to_hub: bool = option(False, "upload what is saved to the Hugging Face Hub, in the background")
    hub_model_id: str | None = option(None, "repository to upload to (default: you/--model_save_name)")
    hub_private: bool = option(False, "make that repository private")

    def __post_init__(self):
        if not self.output_dir:
            self.output_dir = self.model_save_name or self._default_output_dir
        if self.model_save_name is None:
            self.model_save_name = Path(self.output_dir).resolve().name
        if self.report_to is None:
            self.report_to = "wandb" if self.wandb_project else "tensorboard"
        require_at_least(
            1, self, "batch_size", "grad_accumulation_steps", "num_epochs", "num_samples", "max_train_steps"
        )
        require_at_least(0, self, "max_grad_norm")
        every = ("log_samples_every", "save_model_every", "checkpointing_steps", "checkpoints_total_limit")
        require_at_least(0, self, *every, "seed")
        require_above(0, self, "ema_inv_gamma")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema_decay is {self.ema_decay}; it must be at least 0 (no EMA) and less than 1.")


@dataclass
class EvaluationArguments:
    """How what a run draws is measured while it goes, against its own training images."""

    _argument_group_name = "evaluation"

    eval_every: int = option(0, "optimizer steps between evaluations, the last of which is at the end; 0: none")
    eval_images: int = option(1000, "pictures that are drawn for an evaluation")
    feature_extractor: str | None = option(
        None, "inception-v3-compat (default), dinov2, or a classifier folder from scripts/train_classifier.py"
    )
    extractor_weights: str | None = option(None, "file (inception-v3-compat) or folder (dinov2) with its weights")

    def __post_init__(self):
        require_at_least(0, self, "eval_every")
        require_at_least(MIN_IMAGES, self, "eval_images")


@dataclass
class LabelArguments:
    """Where the class labels of the images are."""

    _argument_group_name = "labels"

    label_column: str | None = option(
        None, "column with the class labels (default: the first column of class labels, or `label`)"
    )


@dataclass
class LearningRateArguments:
    """How fast a run's one network learns, and when."""

    _argument_group_name = "learning rate"

    learning_rate: float = option(1e-4, "peak learning rate")
    lr_scheduler: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = option(
        "cosine", "course of the learning rate over the optimizer steps"
    )
    lr_warmup_steps: int = option(0, "optimizer steps over which the learning rate rises from zero")

    def __post_init__(self):
        require_at_least(0, self, "learning_rate", "lr_warmup_steps")
