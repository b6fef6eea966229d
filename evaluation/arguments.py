"""Evaluation on the command line: names of metrics and extractors, limits; nothing here imports PyTorch."""

from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from ..core.errors import InputError
from ..core.locations import resolve_paths

# the keys of `metrics.METRICS`
METRIC_NAMES = (
    "fid",
    "kid",
    "cmmd",
    "precision",
    "recall",
    "density",
    "coverage",
    "near_copies",
    "nearest_training_ratio",
    "memorized",
    "inception_score",
    "classifier_score",
    "modes",
    "mode_kl",
    "class_accuracy",
)
INCEPTION, PIXELS = "inception-v3-compat", "pixels-8x8"
DINOV2, CLIP = "dinov2-vit-l-14", "clip-vit-l-14-336px"  # those of FD-DINOv2 and of CMMD
# extractors that are models of Transformers, named as in torch-fidelity, and their repositories
HUB_EXTRACTORS = {
    "dinov2-vit-s-14": "facebook/dinov2-small",
    "dinov2-vit-b-14": "facebook/dinov2-base",
    DINOV2: "facebook/dinov2-large",
    "dinov2-vit-g-14": "facebook/dinov2-giant",
    "clip-vit-b-32": "openai/clip-vit-base-patch32",
    "clip-vit-b-16": "openai/clip-vit-base-patch16",
    "clip-vit-l-14": "openai/clip-vit-large-patch14",
    CLIP: "openai/clip-vit-large-patch14-336",
}
EXTRACTOR_NAMES = INCEPTION, *HUB_EXTRACTORS, PIXELS
EXTRACTOR_HELP = (
    f"{', '.join(EXTRACTOR_NAMES)}, or a classifier folder from ddgan train-classifier; all but {PIXELS} and "
    f"classifiers download their weights (default: {INCEPTION})"
)
WEIGHTS_HELP = (
    f"weights of the extractor, instead of downloading them: a file for {INCEPTION}, a folder or repository of a "
    "Transformers model for DINOv2 and CLIP"
)
CACHE_DIR = Path(HF_HOME) / "ddgan-evaluation"  # of the features of references
MIN_IMAGES = 12  # of samples and of references: six in each half
STACKED_MNIST_SAMPLES = 25_600  # the usual number of samples for counting modes, in arXiv 2112.07804 and others
NORM_GROUPS = 8  # of an `ImageClassifier`, which divide its widths


def check_metric_name(arguments: Any) -> None:
    """Check that `best_metric` of these arguments is the name of a metric.

    Raises:
        InputError: if it is not.
    """
    if arguments.best_metric not in METRIC_NAMES:
        raise InputError(f"--best_metric is {arguments.best_metric}; it must be one of {', '.join(METRIC_NAMES)}.")


def resolve_extractor(arguments: Any) -> None:
    """Check that `feature_extractor` of these arguments, if given, is the name of one or an existing folder.

    `extractor_weights` must be those of one that takes weights.

    Raises:
        InputError: if it is not.
    """
    if arguments.feature_extractor in (None, *EXTRACTOR_NAMES):
        return
    try:
        resolve_paths(arguments, "feature_extractor")
    except InputError as error:
        raise InputError(
            f"{error} Name the folder of a classifier, or one of the extractors {', '.join(EXTRACTOR_NAMES)}."
        ) from None
    if arguments.extractor_weights:
        raise InputError(
            f"--extractor_weights {arguments.extractor_weights} are for {INCEPTION}, DINOv2 and CLIP, but "
            f"--feature_extractor {arguments.feature_extractor} is a classifier with its own weights: omit the former."
        )
