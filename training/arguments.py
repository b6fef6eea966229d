"""Arguments shared by the training commands; nothing here imports PyTorch."""

from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from ..core.cli import Arguments, option
from ..core.errors import InputError
from ..core.extras import missing_extra
from ..core.files import check_can_write
from ..core.locations import is_url, resolve_locations, resolve_paths
from ..data.arguments import IMAGE_OBJECTS, check_value_range
from ..evaluation.arguments import (
    EXTRACTOR_HELP,
    METRIC_NAMES,
    MIN_IMAGES,
    WEIGHTS_HELP,
    check_metric_name,
    resolve_extractor,
)

MAX_GRID_IMAGES = 10_000
NUM_SNAPSHOTS = 16  # of the EMAs of a run
MAX_EMA_LENGTH = 12**-0.5  # of the average with the same weight for all steps
MAX_IMAGE_SIZE = 16_384  # pixels; far above what any network here can be trained at


@dataclass
class DataArguments(Arguments):
    """The training images, and how they are resized and cropped."""

    _argument_group_name = "data"
    _alternatives = ({"image_size", "resolution"}, {"dataset_name", "train_data_dir"})

    dataset_name: str | None = option(
        None,
        "dataset on the Hub, or a local one: a folder, or a .parquet, .arrow, .tar, .zip or .npz file, or the URL of "
        "such files (default: the embedded emoji; MNIST for ddgan train-class-conditional)",
        objects=IMAGE_OBJECTS,
    )
    dataset_config: str | None = option(None, "configuration of that dataset, if it has several")
    split: str | None = option(None, "split of the images (default: train, if they are divided into splits)")
    image_column: str | None = option(None, "column with the images (default: the first image column)")
    streaming: bool = option(False, "stream the dataset without a copy on disk; needs --max_train_steps")
    train_data_dir: str | None = option(
        None,
        "folder of images, including subfolders (hidden ones and run folders excepted), .zip, .npz, .parquet, .arrow "
        "or .tar file, or MNIST-style folder in torchvision's layout",
        objects=IMAGE_OBJECTS,
    )
    image_size: int | None = option(
        None,
        "train at this height and width (default: those of the start model; for a new network 28 or 32)",
        minimum=1,
        maximum=MAX_IMAGE_SIZE,
    )
    resolution: list[int] | None = option(
        None, "height and width, if they differ: --resolution 64 96", minimum=1, maximum=MAX_IMAGE_SIZE
    )
    center_crop: bool = option(False, "crop to the aspect ratio at the center instead of at random")
    random_flip: bool = option(False, "flip images horizontally at random")
    value_range: list[float] | None = option(
        None,
        "values of black and white in the image files: --value_range 0 4095 (default: the full range of their bits "
        "for integers, 0 1 for floating-point numbers)",
    )
    skip_broken_images: bool = option(False, "skip images that cannot be read, and count them")
    cache_images: bool = option(False, "cache the decoded, resized images in memory (images x channels x H x W bytes)")
    dataloader_num_workers: int = option(
        0,
        "worker processes that load images ahead of the training loop, at most one for a stream",
        minimum=0,
        maximum=1024,
    )

    _overrides: ClassVar = {"streaming": ("cache_images",)}  # of a recipe

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name and self.train_data_dir:
            raise InputError(
                f"--dataset_name {self.dataset_name} and --train_data_dir {self.train_data_dir} both name the "
                "images to train on. Use only one of them."
            )
        if self.resolution and (self.image_size or len(self.resolution) != 2):
            raise InputError("--resolution takes a height and a width (--resolution 64 96) and replaces --image_size.")
        if isinstance(self.train_data_dir, str) and is_url(self.train_data_dir):
            raise InputError(f"--train_data_dir {self.train_data_dir} is a URL: pass it with --dataset_name.")
        resolve_locations(self, "dataset_name", datasets=True)
        resolve_paths(self, "train_data_dir")
        check_value_range(self.value_range)
        if self.streaming and not self.dataset_name:
            raise InputError("--streaming needs a dataset: pass it with --dataset_name.")
        if self.streaming and self.cache_images and not type(self).cache_images:
            raise InputError("--cache_images has no effect with --streaming, whose images are read once: omit it.")

    @property
    def size(self) -> list[int] | None:
        """Height and width to train at; None for those of the start model or of the command."""
        return self.resolution or ([self.image_size] * 2 if self.image_size else None)


@dataclass
class RunArguments(Arguments):
    """The training run: its length, its optimizer, what it logs and what it saves."""

    _argument_group_name = "run"
    _alternatives = ({"num_epochs", "max_train_steps"},)
    _default_output_dir: ClassVar = "finetuned"

    # __post_init__ replaces None in these two and in report_to
    output_dir: str = option(None, "the run folder (default: --model_save_name, or a fixed name for each command)")
    model_save_name: str = option(
        None, "name of the model on its card and on the Hub (default: the name of --output_dir)"
    )
    seed: int = option(0, "random seed; on a CPU, runs with the same seed and settings are identical", minimum=0)
    batch_size: int = option(16, "images in a micro-batch of one process", minimum=1)
    grad_accumulation_steps: int = option(1, "micro-batches of each process in one optimizer step", minimum=1)
    num_epochs: int = option(10, "passes over the images", minimum=1)
    max_train_steps: int | None = option(None, "optimizer steps; overrides --num_epochs", minimum=1)
    max_grad_norm: float = option(1.0, "clip gradients to this norm; 0 turns clipping off", minimum=0)
    ema_decay: float = option(0.9999, "maximum decay of the EMA weights; 0 turns EMA off", minimum=0, below=1)
    ema_inv_gamma: float = option(
        1.0, "EMA warmup: the decay after n steps is 1 - (1 + n / inv_gamma) ** -power", above=0
    )
    ema_power: float = option(0.75, "EMA warmup: see --ema_inv_gamma", above=0)
    posthoc_ema: bool = option(
        False,
        f"keep {NUM_SNAPSHOTS} snapshots of two EMAs, from which ddgan choose-ema computes EMAs of other lengths "
        "after the run; --dry_run prints the memory and the disk space",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "mixed precision (default: as configured in Accelerate)"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: saves memory, but is slower"
    )
    compile: bool = option(False, "compile the networks with torch.compile")
    channels_last: bool = option(False, "use the channels-last memory format: faster convolutions on most devices")
    log_samples_every: int = option(
        200, "optimizer steps between sample grids; 0: only before and after training", minimum=0
    )
    num_samples: int = option(16, "images in a sample grid", minimum=1, maximum=MAX_GRID_IMAGES)
    save_model_every: int = option(500, "optimizer steps between saves of the pipeline; 0: only at the end", minimum=0)
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints; 0: only at the end", minimum=0)
    checkpoints_total_limit: int = option(2, "number of newest checkpoints to keep; 0 keeps all", minimum=0)
    resume_from_checkpoint: str | None = option(
        None, "resume from this checkpoint folder of the run, or from the newest one (`latest`)"
    )
    dry_run: bool = option(
        False, "load everything, print the sizes of the run, its memory and its disk space, and write nothing"
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "none", "all"] = option(
        None, "where metrics and samples go (default: wandb with --wandb_project, else tensorboard)"
    )
    wandb_project: str | None = option(None, "project name for the tracker")
    push_to_hub: bool = option(False, "upload the pipeline to the Hugging Face Hub at each save, in the background")
    hub_model_id: str | None = option(None, "repository to upload to (default: your user name/--model_save_name)")
    hub_private: bool = option(False, "create that repository as private")

    def __post_init__(self):
        super().__post_init__()
        if self.output_dir is None:
            self.output_dir = self.model_save_name or self._default_output_dir
        check_can_write(self.output_dir, "--output_dir")
        if self.model_save_name is None:
            self.model_save_name = self.folder_name
        if self.report_to is None:
            self.report_to = "wandb" if self.wandb_project else "tensorboard"
        if self.wandb_project and self.report_to in ("none", "tensorboard"):
            raise InputError(
                f"--wandb_project {self.wandb_project} has no effect with --report_to {self.report_to}: omit one of "
                "them, or choose --report_to wandb."
            )
        for name in ("hub_model_id", "hub_private"):
            if (value := getattr(self, name)) and not self.push_to_hub:
                raise InputError(f"--{name} {value} has no effect without --push_to_hub.")
        if self.resume_from_checkpoint != "latest":
            resolve_paths(self, "resume_from_checkpoint")

    @property
    def folder_name(self) -> str:
        """Name of the run folder, without the folders above it."""
        return Path(self.output_dir).resolve().name


@dataclass
class EvaluationArguments(Arguments):
    """Evaluation during training: samples of the run are measured against its training images."""

    _argument_group_name = "evaluation"

    eval_every: int | None = option(
        None, "optimizer steps between evaluations; the last step is always evaluated (default: 0, none)", minimum=0
    )
    eval_images: int = option(1000, "samples in an evaluation", minimum=MIN_IMAGES)
    feature_extractor: str | None = option(None, f"network that computes the features: {EXTRACTOR_HELP}")
    extractor_weights: str | None = option(None, WEIGHTS_HELP)
    best_metric: str = option(
        "fid", f"metric that selects the best evaluation, kept in best/: {', '.join(METRIC_NAMES)}"
    )

    def __post_init__(self):
        super().__post_init__()
        check_metric_name(self)
        resolve_extractor(self)
        for argument in fields(self):
            if self.eval_every is None and (value := getattr(self, argument.name)) != argument.default:
                raise InputError(
                    f"--{argument.name} {value} has no effect without --eval_every: set --eval_every, or omit "
                    f"--{argument.name}."
                )


@dataclass
class ValidationArguments(Arguments):
    """The validation loss: the training loss on held-out images, at fixed noise and timesteps."""

    _argument_group_name = "validation"

    validation_fraction: float = option(
        0.0, "fraction of the images to hold out for the validation loss; 0: none", minimum=0, below=1
    )
    validation_every: int = option(
        200,
        "optimizer steps between computations of the validation loss, besides those before and after training",
        minimum=1,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.validation_every != type(self).validation_every and not self.validation_fraction:
            raise InputError(
                f"--validation_every {self.validation_every} has no effect without --validation_fraction: set "
                "--validation_fraction, or omit --validation_every."
            )


@dataclass
class LabelArguments(Arguments):
    """The class labels of the images."""

    _argument_group_name = "labels"

    label_column: str | None = option(
        None, "column with the class labels (default: the first column of class labels, or `label`)"
    )


@dataclass
class LearningRateArguments(Arguments):
    """The learning rate and its schedule, and the other settings of the optimizer."""

    _argument_group_name = "optimizer"

    learning_rate: float = option(1e-4, "peak learning rate", minimum=0)
    lr_scheduler: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup"] = option(
        "cosine", "learning-rate schedule over the optimizer steps"
    )
    lr_warmup_steps: int = option(0, "optimizer steps of linear warmup from zero", minimum=0)
    adam_beta1: float = option(0.9, "AdamW: decay of the mean of the gradients", minimum=0, below=1)
    adam_beta2: float = option(0.999, "AdamW: decay of the mean of the squared gradients", minimum=0, below=1)
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay, multiplied by the learning rate", minimum=0)
    adam_epsilon: float = option(1e-8, "AdamW: added to the denominator, for numerical stability", above=0)
    use_8bit_adam: bool = option(
        False, "AdamW: keep the optimizer state in 8 bits (bitsandbytes), in about a quarter of the memory"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.use_8bit_adam and not find_spec("bitsandbytes"):
            raise InputError(f"--use_8bit_adam needs a package: {missing_extra('bitsandbytes', 'bitsandbytes')}.")
