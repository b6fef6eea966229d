"""Arguments of the commands, as dataclasses; nothing here imports PyTorch.

Mistakes in them are therefore reported at once. Training commands take several dataclasses, such as
`FINETUNE_ARGUMENTS`, in the order of the parameters of the command in Python. Arguments that several commands share
are in `sampling/arguments.py` and `training/arguments.py`.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal
from zipfile import BadZipFile, ZipFile

from ..conversion.published_models import PUBLISHED_MODELS
from ..core.cli import Arguments, option
from ..core.errors import InputError
from ..core.files import check_can_write, contains_files
from ..core.locations import resolve_locations, resolve_paths
from ..core.run_files import CONFIG_FILE
from ..data.arguments import IMAGE_OBJECTS, check_value_range
from ..evaluation.arguments import (
    CACHE_DIR,
    EXTRACTOR_HELP,
    INCEPTION,
    METRIC_NAMES,
    MIN_IMAGES,
    NORM_GROUPS,
    STACKED_MNIST_SAMPLES,
    WEIGHTS_HELP,
    check_metric_name,
    resolve_extractor,
)
from ..guidance.arguments import (
    CLIP_MODEL_HELP,
    DEFAULT_MODEL,
    MAX_GUIDANCE_SCALE,
    TOWARDS_HELP,
    clip_model_names,
    default_guidance_scale,
    needs_clip,
    parse_color,
    split_loss,
)
from ..hub.arguments import CARD_NAME, check_repo_id
from ..sampling.arguments import (
    MAX_CLASS_GUIDANCE_SCALE,
    SCHEDULERS,
    VARY_COLUMNS,
    PipelineArguments,
    SamplingArguments,
)
from ..training.arguments import (
    MAX_EMA_LENGTH,
    MAX_GRID_IMAGES,
    MAX_IMAGE_SIZE,
    DataArguments,
    EvaluationArguments,
    LabelArguments,
    LearningRateArguments,
    RunArguments,
    ValidationArguments,
)

# --freeze choice -> substrings of the names of the parameters that are still trained
TRAINED_PARTS = {
    "none": ("",),
    "all_but_attention": ("attentions.",),
    "all_but_norms": ("norm",),
    "all_but_up_blocks": ("up_blocks.", "conv_norm_out", "conv_out"),
}

# of train_ddgan.py, per block: multiples of --discriminator_channels, and whether it halves the resolution (from the
# appendix of the paper)
DISCRIMINATORS = {
    "small": ((2, 4, 8, 8), (False, True, True, True)),
    "large": ((4, 8, 8, 8, 8, 8), (True, True, True, True, True, True)),
}
AUGMENTATIONS = ("color", "translation", "cutout")
MAX_ATTENTION_HEIGHT = 16  # of the feature maps with attention by default, as in all recipes of the paper

MAX_WIDTH, MAX_LAYERS = 16_384, 100  # far above any network that can be trained

CLASS_DATASETS = ("mnist", "fashion_mnist")
# flags of train_class_conditional.py that describe a new network
NETWORK_SETTINGS = (
    "unet",
    "block_out_channels",
    "class_emb_size",
    "layers_per_block",
    "attention_levels",
    "norm_num_groups",
)
MIN_WIDTH = 8  # channels of one attention head in the blocks of Diffusers

GRID_IMAGES = 64

DEFAULT_NUM_IMAGES = 10_000  # samples of a pipeline to evaluate; with fewer the bias of FID is large


@dataclass
class UnclippedRunArguments(RunArguments):
    """A training run that does not clip gradients by default."""

    max_grad_norm: float = option(0.0, "clip gradients to this norm; 0 turns clipping off", minimum=0)


# ---------------------------------------------------------------------------------------------------------------------
# finetune_model.py


@dataclass
class FinetuneArguments(Arguments):
    """The model to fine-tune, and the loss."""

    _argument_group_name = "fine-tuning"

    _alternatives = ({"start_model", "model_config"},)

    start_model: str | None = option(
        None,
        "pipeline folder or Hub repository of an unconditional UNet2DModel to start from (default: the embedded model "
        "of emoji)",
        objects="a DiffusionPipeline",
    )
    model_config: str | None = option(
        None, "train from scratch instead: config.json of a UNet2DModel, or the folder that contains it"
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the start model")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "what the network predicts (default: same as the start model; epsilon with --model_config)"
    )
    min_snr_gamma: float | None = option(
        None, "weight the loss by min(SNR, gamma); 5 is common (default: no weighting)", above=0
    )
    freeze: str = option("none", "which part of the UNet to freeze", choices=TRAINED_PARTS)
    sample_scheduler: str = option("ddim", "scheduler for the sample grids", choices=SCHEDULERS)
    sample_steps: int = option(40, "sampling steps for these grids", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.start_model is not None and self.model_config:
            raise InputError(
                "--start_model names a pretrained model, and --model_config trains a new one: pass only one of them."
            )
        if self.start_model is None and not self.model_config:
            self.start_model = "examples/models/noto-emoji-32"
        resolve_locations(self, "start_model")
        resolve_paths(self, "model_config")


FINETUNE_ARGUMENTS = (
    RunArguments,
    LearningRateArguments,
    DataArguments,
    EvaluationArguments,
    ValidationArguments,
    FinetuneArguments,
)


# ---------------------------------------------------------------------------------------------------------------------
# finetune_few_step.py


@dataclass
class FewStepArguments(Arguments):
    """The model to fine-tune, its number of sampling steps, and the two stages of training."""

    _argument_group_name = "few steps"

    start_model: str = option(  # __post_init__ refuses None
        None,
        "pipeline folder or Hub repository of an unconditional UNet2DModel or a ClassConditionedUnet to start from",
        objects="a DiffusionPipeline",
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the start model")
    num_inference_steps: list[int] = option(
        [4],
        "sampling steps; with several numbers, one model learns all of them, and the first is its default",
        minimum=1,
    )
    distillation_steps: int = option(
        500,
        "optimizer steps of the first stage, in which the network learns to reach in one evaluation what the start "
        "model reaches in many; the steps after them are adversarial",
        minimum=0,
    )
    distillation_lr: float = option(1e-3, "peak learning rate of the first stage", above=0)
    distillation_weight: float = option(
        20.0, "weight of the loss of the first stage in the adversarial steps", minimum=0
    )
    teacher_samples: int = option(2048, "number of samples of the start model to learn from", minimum=1)
    teacher_steps: int = option(20, "DDIM steps for each of these samples", minimum=1)
    teacher_guidance_scale: float = option(
        1.0,
        "classifier-free guidance of these samples, for a class-conditional model with a null class; 1: none",
        minimum=1,
        maximum=MAX_CLASS_GUIDANCE_SCALE,
    )
    lr_g: float = option(5e-5, "peak learning rate of the network in the adversarial steps", above=0)
    lr_d: float = option(2e-4, "peak learning rate of the discriminator", above=0)
    gamma: float = option(0.1, "weight of the gradient penalties R1 and R2; 0 turns them off", minimum=0)
    instance_noise: float = option(
        0.5, "probability of noise on the clean images that the discriminator sees", minimum=0, maximum=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.start_model is None:
            raise InputError("Name the pipeline to start from with --start_model.")
        resolve_locations(self, "start_model")
        if not self.num_inference_steps:
            raise InputError("--num_inference_steps needs at least one number.")
        if len(set(self.num_inference_steps)) < len(self.num_inference_steps):
            raise InputError("--num_inference_steps names a number of steps twice.")


@dataclass
class FewStepRunArguments(UnclippedRunArguments):
    """The training run: its length, what it logs and what it saves."""

    _default_output_dir: ClassVar = "few-step-model"


FEW_STEP_ARGUMENTS = (
    FewStepRunArguments,
    DataArguments,
    LabelArguments,
    EvaluationArguments,
    FewStepArguments,
)


# ---------------------------------------------------------------------------------------------------------------------
# train_ddgan.py


@dataclass
class DDGANArguments(Arguments):
    """The noise process, the two networks, and their losses."""

    _argument_group_name = "DDGAN"

    num_train_timesteps: int = option(4, "denoising steps T", minimum=1, maximum=1000)
    beta_min: float = option(0.1, "noise process: rate (vp) or variance (geometric) at the start", above=0)
    beta_max: float = option(20.0, "noise process: rate (vp) or variance (geometric, below 1) at the end", above=0)
    variance_schedule: Literal["vp", "geometric", "cosine"] = option(
        "vp", "noise process: how its variance grows; cosine ignores --beta_min and --beta_max"
    )

    image_channels: Literal[1, 2, 3, 4] = option(3, "channels of the images: gray, gray and alpha, RGB, RGBA")
    class_conditional: bool = option(False, "condition both networks on the class labels of the images")
    block_out_channels: list[int] = option(
        [128, 256, 256, 256],
        "generator: channels of each level, highest resolution first",
        minimum=4,
        maximum=MAX_WIDTH,
    )
    layers_per_block: int = option(2, "generator: residual blocks per level", minimum=1, maximum=MAX_LAYERS)
    attention_resolutions: list[int] | None = option(
        None,
        "generator: heights of feature maps with attention, in addition to the middle block; 0: none (default: the "
        "largest of at most 16)",
        minimum=0,
    )
    latent_dim: int = option(100, "generator: length of the latent z", minimum=1, maximum=MAX_WIDTH)
    latent_embed_dim: int = option(256, "generator: width of the mapping network of z", minimum=1, maximum=MAX_WIDTH)
    latent_mapping_layers: int = option(
        4, "generator: layers of the mapping network after the first", minimum=0, maximum=MAX_LAYERS
    )
    dropout: float = option(0.0, "generator: dropout probability", minimum=0, below=1)
    discriminator: str = option(
        "small", "the paper's discriminator for 32x32 (small) or 256x256 (large)", choices=DISCRIMINATORS
    )
    discriminator_channels: int = option(
        64, "discriminator: base width, which its blocks multiply", minimum=1, maximum=MAX_WIDTH
    )
    wavelet_levels: int = option(
        0, "both networks work on wavelet sub-bands at 1/2, 1/4, ... of the resolution", minimum=0, maximum=4
    )

    lr_g: float = option(1.6e-4, "learning rate of the generator", above=0)
    lr_d: float = option(1.25e-4, "learning rate of the discriminator", above=0)
    adam_beta1: float = option(0.5, "Adam: decay of the mean of the gradients", minimum=0, below=1)
    adam_beta2: float = option(0.9, "Adam: decay of the mean of the squared gradients", minimum=0, below=1)
    lr_min: float = option(
        1e-5, "final learning rate of both networks, after a cosine decay in steps of one epoch", minimum=0
    )
    gan_loss: Literal["non_saturating", "relativistic"] = option(
        "non_saturating",
        "that of the paper (non_saturating), or one that compares logits of real and generated images (relativistic)",
    )
    r1_gamma: float = option(0.05, "weight of the gradient penalty R1, on real images; 0 turns it off", minimum=0)
    r2_gamma: float = option(0.0, "weight of the gradient penalty R2, on generated images; 0 turns it off", minimum=0)
    lazy_reg: int = option(15, "steps between applications of the penalties", minimum=1)
    gradient_penalty: Literal["exact", "finite_differences"] = option(
        "exact", "how penalties are computed; finite differences need no second derivative"
    )
    instance_noise: float = option(
        0.0,
        "standard deviation of noise on clean images, real and generated, for the discriminator",
        minimum=0,
        maximum=10,
    )
    reconstruction_weight: float = option(
        0.0, "weight of the squared error of the predicted clean image; speeds up training on small data", minimum=0
    )
    energy_weight: float = option(
        0.0, "weight of the energy score of two predictions from the noisiest images, for varied samples", minimum=0
    )
    d_steps: int = option(
        1, "updates of the discriminator, one in each step, per update of the generator", minimum=1, maximum=100
    )
    diffaug: list[str] = option(
        [], "differentiable augmentations, for small datasets: any of color,translation,cutout"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.block_out_channels:
            raise InputError("--block_out_channels needs at least one width.")
        if self.beta_min > self.beta_max:
            raise InputError(
                f"--beta_min {self.beta_min:g} is the lowest rate of the noise process, but greater than --beta_max "
                f"{self.beta_max:g}."
            )
        if self.lr_min > min(self.lr_g, self.lr_d):
            raise InputError(
                f"--lr_min is {self.lr_min}, the final value of --lr_g {self.lr_g} and --lr_d {self.lr_d}; it must "
                "not be greater than either."
            )
        self.diffaug = [name.strip() for names in self.diffaug for name in names.split(",")]
        if unknown := set(self.diffaug) - set(AUGMENTATIONS):
            raise InputError(f"--diffaug {' '.join(sorted(unknown))}: choose from {', '.join(AUGMENTATIONS)}.")
        if len(set(self.diffaug)) < len(self.diffaug):
            raise InputError(f"--diffaug {' '.join(self.diffaug)} names an augmentation twice.")


@dataclass
class DDGANRunArguments(UnclippedRunArguments):
    """The training run: its length, what it logs and what it saves."""

    _default_output_dir: ClassVar = "ddgan-model"


DDGAN_ARGUMENTS = (
    DDGANRunArguments,
    DataArguments,
    LabelArguments,
    EvaluationArguments,
    DDGANArguments,
)


# ---------------------------------------------------------------------------------------------------------------------
# train_class_conditional.py


@dataclass
class ClassConditionalArguments(Arguments):
    """The class-conditional network, and its loss."""

    _argument_group_name = "class conditioning"
    _alternatives = (
        {"dataset", "dataset_name", "train_data_dir"},
        {"data_dir", "dataset_name", "train_data_dir"},
    )
    _overrides: ClassVar = {"start_model": (*NETWORK_SETTINGS, "image_channels", "prediction_type")}

    dataset: str | None = option(
        None,
        "images in --data_dir, downloaded if missing (default: mnist, unless other images are named)",
        choices=CLASS_DATASETS,
    )
    data_dir: str | None = option(
        None, "folder with torchvision's MNIST/raw or FashionMNIST/raw, for --dataset (default: data)"
    )

    start_model: str | None = option(
        None,
        "pretrained model to start from instead of a new network: pipeline folder or Hub repository of an "
        "unconditional UNet2DModel, which gets the classes, or of an earlier result of this command",
        objects="a DiffusionPipeline",
    )
    trust_remote_code: bool = option(False, "run Python code that comes with the start model")

    unet: Literal["class_conditioned", "context"] = option(
        "class_conditioned",
        "how the class enters: as extra input channels (class_conditioned), or as factors of the features (context)",
    )
    image_channels: Literal[1, 2, 3, 4] | None = option(
        None,
        "channels of the images: gray, gray and alpha, RGB, RGBA (default: 1; with --start_model those of the model)",
    )
    class_dropout: float = option(
        0.0, "probability of the null class in training; above 0 allows classifier-free guidance", minimum=0, below=1
    )
    block_out_channels: list[int] = option(
        [32, 64, 64],
        "channels of each level, highest resolution first; context: only the first is used",
        minimum=MIN_WIDTH,
        maximum=MAX_WIDTH,
    )
    class_emb_size: int = option(
        4, "class_conditioned: size of the class embedding; 0: one-hot vectors", minimum=0, maximum=MAX_WIDTH
    )
    layers_per_block: int = option(2, "class_conditioned: residual blocks per level", minimum=1, maximum=MAX_LAYERS)
    attention_levels: list[int] = option(
        [1, 2], "class_conditioned: levels with attention; 0 is the highest resolution", minimum=0
    )
    norm_num_groups: int = option(
        32, "class_conditioned: groups of the group norms; must divide the channels of every level", minimum=1
    )

    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option(
        None, "what the network predicts (default: epsilon; with --start_model what that model predicts)"
    )
    min_snr_gamma: float | None = option(
        None, "weight the loss by min(SNR, gamma); 5 is common (default: no weighting)", above=0
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform", "distribution of the timesteps: uniform, or concentrated in the middle"
    )
    sample_steps: int = option(50, "DDIM steps for the sample grids", minimum=1)
    guidance_scale: float = option(
        1.0,
        "classifier-free guidance scale for these grids; above 1 needs --class_dropout",
        minimum=1,
        maximum=MAX_CLASS_GUIDANCE_SCALE,
    )

    def __post_init__(self):
        super().__post_init__()
        resolve_locations(self, "start_model")
        if self.start_model is not None:
            new = ClassConditionalArguments()
            changed = [f"--{name}" for name in NETWORK_SETTINGS if getattr(self, name) != getattr(new, name)]
            if changed:
                raise InputError(
                    f"--start_model {self.start_model} has an architecture already, and {', '.join(changed)} would "
                    "describe a new network: omit one or the other."
                )
        if not self.block_out_channels:
            raise InputError("--block_out_channels needs at least one width.")
        if self.guidance_scale > 1 and not self.class_dropout:
            raise InputError(
                f"--guidance_scale {self.guidance_scale} needs a null class for the unconditional prediction: train "
                "with --class_dropout 0.1, or sample with --guidance_scale 1."
            )


@dataclass
class ClassConditionalLearningRateArguments(LearningRateArguments):
    """The learning rate and its schedule, and the other settings of the optimizer."""

    learning_rate: float = option(1e-3, "peak learning rate", minimum=0)
    adam_weight_decay: float = option(0.0, "AdamW: weight decay, times the learning rate", minimum=0)


@dataclass
class ClassConditionalRunArguments(RunArguments):
    """The training run: its length, what it logs and what it saves."""

    _default_output_dir: ClassVar = "class-conditional"

    num_samples: int = option(
        80,
        "images in a sample grid with one row per class, rounded up to full rows",
        minimum=1,
        maximum=MAX_GRID_IMAGES,
    )


CLASS_CONDITIONAL_ARGUMENTS = (
    ClassConditionalRunArguments,
    ClassConditionalLearningRateArguments,
    DataArguments,
    LabelArguments,
    EvaluationArguments,
    ValidationArguments,
    ClassConditionalArguments,
)


# ---------------------------------------------------------------------------------------------------------------------
# scripts/train_classifier.py


@dataclass
class ClassifierArguments(Arguments):
    """The classifier, its augmentation and its test split."""

    _argument_group_name = "classifier"

    widths: list[int] = option([16, 32, 64, 96], "channels of each block", minimum=NORM_GROUPS, maximum=16_384)
    augmentation: float = option(
        1.0, "strength of random shifts, rotations, scaling and noise; 0 disables them", minimum=0, maximum=10
    )
    test_split: str | None = option(
        None,
        "split for the test accuracy (default: `test` if it exists, else a tenth of the images is held out)",
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.widths:
            raise InputError("--widths needs at least one width.")
        if any(width % NORM_GROUPS for width in self.widths):
            raise InputError(
                f"--widths {' '.join(map(str, self.widths))}: the widths must be multiples of {NORM_GROUPS}."
            )


@dataclass
class ClassifierDataArguments(DataArguments):
    """The labeled images, and how they are resized and cropped."""

    dataset_name: str | None = option(
        None,
        "labeled dataset on the Hub, or a local one: a folder, or a .parquet, .arrow, .tar, .zip or .npz file; this "
        "or --train_data_dir is required",
        objects=IMAGE_OBJECTS,
    )
    image_size: int | None = option(
        None,
        "height and width of the input (default: the shorter side of the first image)",
        minimum=1,
        maximum=MAX_IMAGE_SIZE,
    )
    center_crop: bool = option(True, "crop to a square at the center; --no_center_crop: at random")
    cache_images: bool = option(
        True, "cache the decoded, resized images in memory; --no_cache_images reads them again in each epoch"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.dataset_name and not self.train_data_dir:
            raise InputError("Pass the labeled images with either --dataset_name or --train_data_dir.")
        if self.resolution:
            raise InputError("A classifier takes square images: pass --image_size instead of --resolution.")
        if self.streaming:
            raise InputError("Test images are held out, which a stream does not allow: omit --streaming.")


@dataclass
class ClassifierLearningRateArguments(LearningRateArguments):
    """The learning rate and its schedule, and the other settings of the optimizer."""

    learning_rate: float = option(4e-3, "peak learning rate", minimum=0)
    adam_weight_decay: float = option(0.05, "AdamW: weight decay, times the learning rate", minimum=0)
    lr_warmup_steps: int | None = option(
        None, "optimizer steps of linear warmup from zero (default: a twentieth)", minimum=0
    )


@dataclass
class ClassifierRunArguments(UnclippedRunArguments):
    """The training run: its length, its optimizer, what it logs and what it saves."""

    _default_output_dir: ClassVar = "classifier"

    batch_size: int = option(128, "images in a micro-batch of one process", minimum=1)
    num_epochs: int = option(6, "passes over the images", minimum=1)
    ema_decay: float = option(0.0, "maximum decay of the EMA weights; 0 turns EMA off", minimum=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        if self.gradient_checkpointing:
            raise InputError("The classifier is too small for --gradient_checkpointing: omit it.")
        if self.push_to_hub:
            raise InputError("--push_to_hub uploads pipelines, not classifiers: omit it.")
        if self.posthoc_ema:
            raise InputError("--posthoc_ema is for pipelines, whose samples are measured with each EMA: omit it.")


CLASSIFIER_ARGUMENTS = (
    ClassifierRunArguments,
    ClassifierLearningRateArguments,
    ClassifierDataArguments,
    LabelArguments,
    ClassifierArguments,
)


# ---------------------------------------------------------------------------------------------------------------------
# scripts/generate.py


@dataclass
class GenerateArguments(SamplingArguments, PipelineArguments):
    """The pipeline, how to sample it, and the output folder."""

    output_dir: str = option("generated", "folder for images/, grid.png, intermediates.png and generate.json")
    num_images: int = option(16, "total number of images; a higher number adds to existing images", minimum=1)
    format: Literal["png", "npz", "webdataset"] = option(
        "png",
        "one PNG file per image, or shards of 512 images: .npz (arr_0, and the classes in arr_1) or WebDataset (.tar)",
    )
    overwrite: bool = option(False, "replace the images that --output_dir contains")
    batch_size: int = option(
        16, "images per batch on an accelerator; on a CPU it depends on the image size only", minimum=1
    )
    class_labels: list[str | int] | None = option(
        None, "classes of the images, in turn, as labels or names: --class_labels 0 1 Sandal"
    )
    vary: Literal["z", "noise"] | None = option(
        None,
        f"for a DDGAN: along each row of {VARY_COLUMNS} images, vary only the latent z, or only the noise (x_T and "
        "that of the steps), and save the --grid",
    )
    grid: bool = option(
        False,
        f"save the first {GRID_IMAGES} images as grid.png, with a column or row for each of several --class_labels",
    )
    intermediates: int | None = option(
        None, "show this many denoising steps of the first image in intermediates.png", minimum=1
    )
    color: str | None = option(None, "guide towards a color: '#BB2266', teal")
    clip_prompt: list[str] | None = option(None, "guide towards one or more texts with a CLIP model")
    towards: list[str] | None = option(None, TOWARDS_HELP)
    clip_model: list[str] | None = option(None, CLIP_MODEL_HELP)
    guidance_scale: float | None = option(
        None,
        "scale of guidance by --color, --clip_prompt and --towards: larger images need a larger scale, and a negative "
        f"one guides away from the target (default: {default_guidance_scale(1):g} / number of steps). Without these "
        "flags: scale of --autoguidance if it is set, otherwise of classifier-free guidance towards --class_labels, "
        f"from 1 (none) to {MAX_CLASS_GUIDANCE_SCALE}",
        minimum=-MAX_GUIDANCE_SCALE,
        maximum=MAX_GUIDANCE_SCALE,
    )
    autoguidance_scale: float | None = option(
        None,
        "with --color, --clip_prompt or --towards, scale of --autoguidance in addition to them",
        minimum=1,
        maximum=MAX_CLASS_GUIDANCE_SCALE,
    )
    guidance_gradient: Literal["sample", "model"] | None = option(
        None,
        "model: differentiate through the network too, which takes more time and memory, and which few-step pipelines "
        "need (default: model for a few-step pipeline, otherwise sample)",
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.pipeline:
            raise InputError("Pass a pipeline folder or Hub repository with --pipeline.")
        check_can_write(self.output_dir, "--output_dir")
        if self.vary and self.is_guided:
            raise InputError("--vary does not work with guidance: omit --color, --clip_prompt and --towards.")
        self.grid = self.grid or self.vary is not None
        if self.color:
            parse_color(self.color)
        for text in self.towards or []:
            split_loss(text)
        if self.clip_prompt or any(map(needs_clip, self.towards or [])):
            self.clip_model = clip_model_names(self.clip_model)
        elif self.clip_model:
            raise InputError("--clip_model needs a --clip_prompt, or a CLIP loss in --towards.")
        if self.is_guided:
            if self.guidance_scale == 0:
                raise InputError(
                    "With --guidance_scale 0 guidance has no effect: omit --color, --clip_prompt and --towards."
                )
            if self.class_guidance_scale is not None:
                raise InputError(
                    "Guidance by a loss does not work with classifier-free guidance: omit --class_guidance_scale, or "
                    "--color, --clip_prompt and --towards."
                )
            if not self.autoguidance and (self.autoguidance_scale is not None or self.guidance_interval):
                raise InputError(
                    "With --color, --clip_prompt or --towards, --autoguidance_scale and --guidance_interval are for "
                    "autoguidance: pass a worse version of the pipeline with --autoguidance."
                )
        elif self.autoguidance_scale is not None:
            raise InputError(
                "--autoguidance_scale is for --autoguidance in addition to --color, --clip_prompt or --towards: "
                "without these, pass --guidance_scale."
            )
        elif self.guidance_gradient:
            raise InputError(
                "--guidance_gradient is for guidance by a loss: pass --color, --clip_prompt or --towards, or omit it."
            )
        elif self.guidance_scale is not None and not self.class_labels and not self.autoguidance:
            raise InputError(
                "Guidance needs a target: pass --color, --clip_prompt or --towards, or a worse model with "
                "--autoguidance, or for classifier-free guidance --class_labels."
            )
        elif self.guidance_scale is not None and not 1 <= self.guidance_scale <= MAX_CLASS_GUIDANCE_SCALE:
            raise InputError(
                f"--guidance_scale is {self.guidance_scale:g}; for classifier-free guidance and autoguidance it must "
                f"be from 1 (none) to {MAX_CLASS_GUIDANCE_SCALE}."
            )

    @property
    def autoguidance_flag(self) -> str:
        return "autoguidance_scale" if self.is_guided else "guidance_scale"

    @property
    def guidance(self) -> dict[str, float | list[float]]:
        more = {} if self.autoguidance_scale is None else {"autoguidance_scale": self.autoguidance_scale}
        return super().guidance | more

    @property
    def is_guided(self) -> bool:
        """Whether there is guidance by a loss."""
        return bool(self.color or self.clip_prompt or self.towards)


# ---------------------------------------------------------------------------------------------------------------------
# scripts/evaluate.py


def _is_evaluation(path: Path) -> bool:
    """Return whether a file was written by an evaluation."""
    try:
        return path.is_file() and {"metrics", "warnings"} <= json.loads(path.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):  # not JSON, or not an object
        return False


def _is_statistics(path: Path) -> bool:
    """Return whether a file was written by `--save_statistics`."""
    try:
        with ZipFile(path) as file:
            return set(file.namelist()) == {"mu.npy", "sigma.npy", "protocol.npy"}
    except (OSError, BadZipFile):
        return False


@dataclass
class MeasurementArguments(SamplingArguments):
    """How samples are generated and measured: their number, the reference images and the features."""

    num_images: int | None = option(
        None,
        f"images to measure (default: {DEFAULT_NUM_IMAGES:,} samples of a --pipeline, {STACKED_MNIST_SAMPLES:,} with "
        "--stacked_mnist, all of --images); fewer of --images are a random subset or, with --class_labels, the first",
        minimum=MIN_IMAGES,
    )
    reference: str | None = option(
        None,
        "images to measure against: folder, MNIST-style folder, dataset folder or Hub dataset, .npz, .zip, .parquet, "
        ".arrow or .tar file; instead of images also an .npz with mu and sigma, or a .safetensors file of cached "
        "features; or the URL of a file",
        objects=IMAGE_OBJECTS,
    )
    reference_split: str | None = option(None, "split of the reference (default: train, if it has splits)")
    reference_config: str | None = option(None, "configuration of a reference dataset, if it has several")
    num_reference: int | None = option(
        None, "size of a random subset of the reference (default: all images)", minimum=MIN_IMAGES
    )
    image_column: str | None = option(None, "column with the images (default: the first image column)")
    value_range: list[float] | None = option(
        None,
        "values of black and white in the files of --images and references: --value_range 0 4095 (default: the full "
        "range of their bits for integers, 0 1 for floating-point numbers)",
    )
    feature_extractor: str | None = option(None, f"network that computes the features: {EXTRACTOR_HELP}")
    extractor_weights: str | None = option(None, WEIGHTS_HELP)
    classifier: str | None = option(
        None, "folder of a classifier of classes or digits (default: the feature extractor, if it is a classifier)"
    )
    batch_size: int = option(
        64, "images per forward pass; for samples on a CPU it depends on the image size only", minimum=1
    )
    class_labels: list[str | int] | None = option(
        None,
        "classes of the images, in turn, as labels or names: --class_labels 0 1 Sandal; a classifier "
        "(--classifier or --feature_extractor) measures their accuracy",
    )
    cache_dir: str = option(str(CACHE_DIR), "folder for cached features")


@dataclass
class EvaluateArguments(MeasurementArguments, PipelineArguments):
    """The samples to measure, the reference images and the features."""

    images: str | None = option(
        None,
        "existing images to measure instead of --pipeline, in any form that --reference takes images in",
        objects=IMAGE_OBJECTS,
    )
    held_out: str | None = option(
        None,
        "images not used in training, to detect memorization; --reference must be the training images",
        objects=IMAGE_OBJECTS,
    )
    held_out_split: str | None = option(None, "split of the held-out images (default: test, if they have splits)")
    stacked_mnist: bool = option(False, "count modes of StackedMNIST: a digit in each channel")
    output: str = option("evaluation.json", "JSON file for all metrics and their protocol")
    save_images: str | None = option(None, "save the samples in this folder")
    save_statistics: str | None = option(
        None, "write mean and covariance of the features of --reference, with their protocol, to this .npz file"
    )
    update_card: bool = option(False, "write the metrics into the model card of the pipeline folder")

    def __post_init__(self):
        super().__post_init__()
        if bool(self.pipeline) == bool(self.images):
            raise InputError("Pass either --pipeline, to sample from it, or existing --images.")
        if self.images and self.save_images:
            raise InputError("--save_images saves the samples of a --pipeline; those of --images already exist.")
        if self.images:
            for argument in (*fields(PipelineArguments), *fields(SamplingArguments)):
                if (value := getattr(self, argument.name)) != argument.default:
                    raise InputError(
                        f"--{argument.name} {value} is for sampling a --pipeline, but --images exist already: omit it."
                    )
        if self.held_out and not self.reference:
            raise InputError("--held_out images are compared with training images: pass these with --reference.")
        self._check_references()
        if self.feature_extractor is None:
            self.feature_extractor = INCEPTION if self.reference else self.classifier
        if self.feature_extractor is None:
            raise InputError("Pass images to measure against with --reference, or a --classifier.")
        if self.classifier not in (None, self.feature_extractor) and not (self.class_labels or self.stacked_mnist):
            raise InputError(
                f"--classifier {self.classifier} predicts classes and digits: pass --class_labels or --stacked_mnist, "
                "too, or use it for the features with --feature_extractor."
            )
        resolve_locations(self, "images", "reference", "held_out", datasets=True)
        resolve_paths(self, "classifier")
        resolve_extractor(self)
        check_value_range(self.value_range)
        check_can_write(self.output, "--output", is_folder=False)
        if self.save_images:
            check_can_write(self.save_images, "--save_images")
        if Path(self.output).is_dir():
            raise InputError(f"--output {self.output} is a folder: name a file.")
        if Path(self.output).exists() and not _is_evaluation(Path(self.output)):
            raise InputError(
                f"--output {self.output} exists and is not the result of an evaluation: name another file."
            )
        if self.save_statistics:
            self._check_statistics(Path(self.save_statistics))
        if self.update_card and not (self.pipeline and self.card.is_file()):
            raise InputError(f"--update_card needs the --pipeline of a local folder with a model card ({CARD_NAME}).")

    def _check_references(self) -> None:
        """Check that settings of the references belong to one.

        Raises:
            InputError: if not; the message names the flag.
        """
        needed = {
            "reference_split": "reference",
            "reference_config": "reference",
            "num_reference": "reference",
            "held_out_split": "held_out",
        }
        for name, source in needed.items():
            if (value := getattr(self, name)) and not getattr(self, source):
                raise InputError(f"--{name} {value} needs --{source}.")
        if self.image_column and not (self.images or self.reference):
            raise InputError(f"--image_column {self.image_column} needs a dataset: pass --images or --reference.")
        if self.value_range and not (self.images or self.reference):
            raise InputError("--value_range applies to image files: pass some with --images or --reference.")

    def _check_statistics(self, path: Path) -> None:
        """Check that statistics can be written to a file.

        Raises:
            InputError: if there is no reference, or the file exists and holds anything else.
        """
        if not self.reference:
            raise InputError(f"--save_statistics {path} saves the statistics of a --reference: pass one.")
        if path.suffix != ".npz":
            raise InputError(f"--save_statistics {path} must be the name of an .npz file.")
        if path.exists() and not _is_statistics(path):
            raise InputError(f"--save_statistics {path} exists and holds no statistics of this command: name another.")

    @property
    def card(self) -> Path:
        """The model card of the pipeline folder."""
        return Path(str(self.pipeline or "")) / CARD_NAME


# ---------------------------------------------------------------------------------------------------------------------
# scripts/choose_ema.py


@dataclass
class ChooseEMAArguments(MeasurementArguments):
    """The run, the lengths of the EMA to try, and how their samples are measured."""

    run: str | None = option(None, "folder of a run with --posthoc_ema")
    lengths: list[float] = option(
        [0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2, 0.25],
        "lengths of the EMA to try: standard deviations of the averaged steps, relative to the number of steps",
        above=0,
        below=MAX_EMA_LENGTH,
    )
    best_metric: str = option("fid", f"metric that selects the best length: {', '.join(METRIC_NAMES)}")
    num_images: int = option(1000, "samples of each length to measure", minimum=MIN_IMAGES)

    def __post_init__(self):
        super().__post_init__()
        if not self.run or not self.reference:
            raise InputError(
                "Pass the run and the images to measure against: --run my-model --reference path/to/images."
            )
        if not self.lengths:
            raise InputError("--lengths needs at least one length.")
        check_metric_name(self)
        resolve_paths(self, "run")
        if not (Path(self.run) / CONFIG_FILE).is_file():
            raise InputError(f"--run {self.run} is not the folder of a training run: it has no {CONFIG_FILE}.")
        self.evaluation()  # checks the flags of the measurement
        self.lengths = sorted(set(self.lengths))

    def evaluation(self, pipeline: Any = None) -> EvaluateArguments:
        """Return the arguments with which `ddgan evaluate` measures a pipeline like this command.

        Args:
            pipeline: a pipeline in memory; None for that of the run.
        """
        shared = {argument.name: getattr(self, argument.name) for argument in fields(MeasurementArguments)}
        output = Path(str(self.run), "posthoc", "evaluation.json")
        return EvaluateArguments(pipeline=self.run if pipeline is None else pipeline, output=str(output), **shared)


# ---------------------------------------------------------------------------------------------------------------------
# scripts/convert_ddgan_checkpoint.py


@dataclass
class ConvertArguments(Arguments):
    """The checkpoint, its training arguments, and the output folder."""

    checkpoint_path: str | None = option(None, "checkpoint to convert: netG_*.pth or content.pth")
    config_path: str | None = option(None, "JSON file with the training arguments of the checkpoint")
    recipe: str | None = option(
        None,
        "published model to take the training arguments from, instead of --config_path",
        choices=PUBLISHED_MODELS,
    )
    output_dir: str | None = option(None, "folder for the pipeline")
    num_samples: int = option(
        16, "images to generate on the CPU for the model card, slow at 256x256; 0 for none", minimum=0, maximum=10_000
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.checkpoint_path or not self.output_dir:
            raise InputError("Pass the checkpoint with --checkpoint_path and the output folder with --output_dir.")
        if self.config_path and self.recipe:
            raise InputError("Pass only one of --config_path and --recipe: both define the training arguments.")
        resolve_paths(self, "checkpoint_path", "config_path")
        check_can_write(self.output_dir, "--output_dir")
        output = Path(self.output_dir)
        if output.exists() and (not output.is_dir() or contains_files(output)):
            raise InputError(f"--output_dir {output} already exists and is not empty: choose another folder.")


# ---------------------------------------------------------------------------------------------------------------------
# scripts/push_to_hub.py


@dataclass
class PushArguments(Arguments):
    """The pipeline to publish, and its repository."""

    folder: str | None = option(None, "pipeline folder: written by a training run or by `save_pretrained`")
    repo_id: str | None = option(None, "repository on the Hub, user/name; created if needed")
    private: bool = option(False, "create it as a private repository")
    revision: str | None = option(None, "branch to upload to, created if needed (default: main)")
    create_pr: bool = option(False, "upload as a pull request")
    trust_remote_code: bool = option(
        False, "run Python code that comes with the pipeline to check it, even if this package did not write that code"
    )
    space: bool = option(False, "also upload the app of examples/space: a Space of the same name that runs the model")

    def __post_init__(self):
        super().__post_init__()
        if not self.folder or not self.repo_id:
            raise InputError("Pass the folder and the repository: --folder my-model --repo_id user/my-model.")
        if self.create_pr and self.revision:
            raise InputError("--create_pr opens a pull request to the main branch: omit --revision.")
        if self.space and (self.create_pr or self.revision not in (None, "main")):
            raise InputError(
                "--space creates a Space that loads the repository's main branch, which --revision and --create_pr do "
                "not change: publish to the main branch, or omit --space."
            )
        check_repo_id(self.repo_id)
        resolve_paths(self, "folder")


# ---------------------------------------------------------------------------------------------------------------------
# scripts/space.py


@dataclass
class SpaceArguments(Arguments):
    """The models of the web demo, and its address."""

    pipeline: list[str] | None = option(
        None, "pipeline folders or Hub repositories to offer (default: the embedded models)"
    )
    clip_model: str | None = option(
        None, f"CLIP model for text guidance (default: {DEFAULT_MODEL}, if it is in the local cache of the Hub)"
    )
    autoguidance: str | None = option(
        None,
        "worse version of a pipeline for autoguidance, such as one trained for fewer steps: folder or Hub repository",
    )
    host: str | None = option(
        None,
        "address to listen on; 0.0.0.0 makes the page accessible from other machines (default: GRADIO_SERVER_NAME, or "
        "127.0.0.1)",
    )
    port: int | None = option(
        None,
        "port to listen on (default: the first free one from GRADIO_SERVER_PORT or 7860)",
        minimum=1,
        maximum=65535,
    )

    def __post_init__(self):
        super().__post_init__()
        resolve_locations(self, "pipeline", "autoguidance")
        if text := next((str(name) for name in self.pipeline or [] if "," in str(name)), None):
            raise InputError(
                f"--pipeline {text}: the web demo cannot use a folder with a comma in its name. Rename it."
            )
