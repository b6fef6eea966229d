"""Results for people and for model cards: a table, and the model-index of a card's metadata."""

import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .coverage import STACKED_MNIST_SAMPLES
from .metrics import MetricValue

NAMES = {
    "fid": "FID",
    "kid": "KID",
    "inception_score": "Inception score",
    "classifier_score": "Inception score with a classifier",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "nearest_training_ratio": "distance to training images, ratio to held-out",
    "memorised": "memorised",
    "class_accuracy": "accuracy of classes",
    "modes": "modes",
    "mode_kl": "KL of modes to uniform",
}
TASK = "unconditional-image-generation"
ENOUGH_FOR_FID = 10_000
_PACKAGES = (
    "diffusers-ddgan",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "torch-fidelity",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """The installed packages that a number depends on."""
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def protocol(facts: dict[str, Any]) -> dict[str, str]:
    """What a number depends on, in words.

    Args:
        facts: `samples`, `reference`, `held_out`, `extractor`, `classifier` and `versions`, each a dict; None for
            what is not there.
    """
    parts = ("samples", "reference", "held_out", "extractor", "classifier", "versions")
    return {
        part: ", ".join(_in_words(*fact) for fact in facts[part].items() if fact[1] is not None)
        for part in parts
        if facts[part]
    }


def _in_words(name: str, value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return str(value) if name in ("name", "extractor") else f"{name.replace('_', ' ')} {value}"


def warnings(
    samples: dict[str, Any],
    reference: dict[str, Any] | None,
    extractor: dict[str, Any],
    channels: int,
    dimensions: int,
    bias: float | None,
    counts_modes: bool,
) -> list[str]:
    """What makes these numbers other than those of a paper or of another run, in words.

    Args:
        samples: `images` (how many), `size`, `channels` and `format`.
        reference: the same and `preparation` and `measured_at`; or only `statistics`.
        extractor: `resize` and what else its protocol has.
        channels: of the extractor.
        dimensions: of the features.
        bias: of the Frechet distance, where it was estimated.
        counts_modes: of StackedMNIST, whose digits are seen channel by channel.
    """
    found = []
    count, colour = samples["images"], {1: "grey", 3: "colour"}
    if reference and count < ENOUGH_FOR_FID:
        found.append(
            f"Too few samples: {count:,}. FID falls with their number; with infinitely many it would lie lower by "
            f"about {bias:.3g}, estimated from halves of the samples. Compare it only with FID@{count}, or measure "
            f"{ENOUGH_FOR_FID:,} or more (papers: 50,000)."
        )
    if counts_modes and count != STACKED_MNIST_SAMPLES:
        found.append(
            f"Modes were counted in {count:,} samples. Fewer samples find fewer modes and lie further from uniform: "
            f"the numbers of papers, that of Denoising Diffusion GANs too, are those of {STACKED_MNIST_SAMPLES:,}."
        )
    for name, images in (("samples", count), ("reference images", (reference or {}).get("images", dimensions + 1))):
        if reference and images <= dimensions:
            found.append(
                f"There are {images:,} {name}, not more than the {dimensions:,} dimensions of the features: the "
                "covariance is singular, and FID says little. Features of fewer dimensions, or KID, need fewer images."
            )
    if reference and "channels" in reference and reference["channels"] != samples["channels"]:
        found.append(
            f"The samples are {colour[samples['channels']]}, the reference is {colour[reference['channels']]}: much "
            "of the distance is that difference."
        )
    for name, facts in (("samples", samples), ("reference images", reference or {})):
        if channels == 1 and not counts_modes and facts.get("channels") == 3:
            found.append(f"The {name} have colours, which this classifier of grey images does not see.")
    if reference and ("JPEG" in reference.get("format", "")) != ("JPEG" in samples["format"]):
        found.append(
            f"The samples are {samples['format']}, the reference images {reference.get('format', 'unknown')}: JPEG "
            "leaves traces that the features see. Compare pictures that were saved alike."
        )
    if "statistics" in (reference or {}):
        found.append(
            f"The reference are saved statistics ({reference['statistics']}): whether its images were resized and "
            "saved like the samples, and measured by the same network, cannot be told."
        )
    elif reference and reference["preparation"] != "as they are":
        found.append(
            f"The reference images, {reference['size']}, were {reference['preparation']}. Numbers for references that "
            "were resized with another filter do not compare."
        )
    if reference and reference.get("measured_at", samples["size"]) != samples["size"]:
        found.append(
            f"The reference was measured at {reference['measured_at']}, the samples are {samples['size']}: part of "
            "the distance is that they were resized differently."
        )
    if reference and reference.get("resize", extractor["resize"]) != extractor["resize"]:
        found.append(
            f"The reference was resized {reference['resize']}, the samples {extractor['resize']}: part of the "
            "distance is the difference of these filters."
        )
    return found


def table(measures: dict[str, MetricValue], floors: dict[str, MetricValue]) -> str:
    """A line for each measure, keyed `name@images`, with what the reference itself gives where that is known."""
    rows = [("", "value", "floor"), ("", "", "")]
    for key, measure in measures.items():
        name = key.partition("@")[0]
        rows.append((title(key), number(measure), number(floors[name]) if name in floors else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows[1] = tuple("-" * width for width in widths)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def title(key: str) -> str:
    """What people call a measure with the key `name@images`."""
    name, _, images = key.partition("@")
    return f"{NAMES[name]}@{images}"


def number(measure: MetricValue) -> str:
    """A measure as people read it."""
    return f"{measure.value:.4g}" + (f" ± {measure.spread:.2g}" if measure.spread is not None else "")


def eval_results(
    measures: dict[str, MetricValue], dataset: str, split: str | None, words: dict[str, str]
) -> list[EvalResult]:
    """The measures as the Hub's metadata has them, each with its protocol in `words`."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=key.partition("@")[0],
            metric_name=title(key),
            metric_value=float(f"{measure.value:.6g}"),
            metric_args={**words, **measure.protocol}
            | ({} if measure.spread is None else {"spread": float(f"{measure.spread:.6g}")}),
        )
        for key, measure in measures.items()
    ]


def write_to_card(path: Path, results: list[EvalResult]) -> None:
    """Put results into the model-index of a card, in place of those of the same data and metric; the text stays."""
    card = ModelCard.load(path)

    def about(result: EvalResult) -> tuple:
        return result.dataset_name, result.dataset_split, result.metric_name

    replaced = {about(result) for result in results}
    kept = [result for result in card.data.eval_results or [] if about(result) not in replaced]
    card.data.eval_results = [*kept, *results]
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    temporary = path.with_name(f".tmp-{path.name}")
    card.save(temporary)
    os.replace(temporary, path)
