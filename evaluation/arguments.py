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
    "precision",
    "recall",
    "density",
    "coverage",
    "near_copies",
    "nearest_training_ratio",
    "memorised",
    "inception_score",
    "classifier_score",
    "modes",
    "mode_kl",
    "class_accuracy",
)
EXTRACTOR_NAMES = INCEPTION, DINOV2, PIXELS = "inception-v3-compat", "dinov2", "pixels-8x8"
CACHE_DIR = Path(HF_HOME) / "ddgan-evaluation"  # of the features of references
MIN_IMAGES = 12  # of samples and of references: six in each half
STACKED_MNIST_SAMPLES = 25_600  # the usual number of samples for counting modes, in arXiv 2112.07804 and others
NORM_GROUPS = 8  # of an `ImageClassifier`, which divide its widths


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
            f"--extractor_weights {arguments.extractor_weights} are for {INCEPTION} and {DINOV2}, but "
            f"--feature_extractor {arguments.feature_extractor} is a classifier with weights of its own: omit it."
        )
