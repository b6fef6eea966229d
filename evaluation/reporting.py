"""Presentation of results: tables, warnings, and the model-index of a model card."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard
from yaml import YAMLError

from ..core.errors import naming_file
from ..core.files import fingerprint, replace_file
from .arguments import DINOV2, INCEPTION, STACKED_MNIST_SAMPLES
from .facts import CLIP_GUIDANCE, EvaluationProtocol
from .metrics import METRICS, MetricValue

if TYPE_CHECKING:
    from .results import Results

TASK = "unconditional-image-generation"
ENOUGH_FOR_FID = 10_000


def metric_title(key: str, extractor: str) -> str:
    """Return the name of a metric next to its protocol, such as `FID@1000`, `FD-DINOv2@1000` or `FD@1000`.

    Args:
        key: `name@images`.
        extractor: name of the feature extractor.
    """
    name, _, images = key.partition("@")
    return f"{METRICS[name].name(extractor)}@{images}"


def full_title(key: str, extractor: str, classifier: str | None) -> str:
    """Return the name of a metric outside of its protocol, such as `FID@1000`, `FD-DINOv2@1000` or `FD@1000 (mnist)`.

    Numbers of different networks are not comparable, so it contains the network, unless that is the Inception network,
    as in papers, or the name of the metric already implies it, as that of FD-DINOv2.

    Args:
        key: `name@images`.
        extractor: name of the feature extractor.
        classifier: name of the network that predicted classes or digits.
    """
    network = _network(key, extractor, classifier)
    return metric_title(key, extractor) + (f" ({network})" if network else "")


def metric_type(key: str, extractor: str, classifier: str | None) -> str:
    """Return the type of a metric in a model-index, such as `fid`, `fd-dinov2` or `fd-mnist`; see `full_title`."""
    name = key.partition("@")[0]
    network = _network(key, extractor, classifier)
    base = METRICS[name].name(extractor).lower() if METRICS[name].known_as else name
    return base + (f"-{network}" if network else "")


def _network(key: str, extractor: str, classifier: str | None) -> str | None:
    metric = METRICS[key.partition("@")[0]]
    network = classifier if metric.needs & {"confusion", "digits"} else extractor
    return None if network == INCEPTION or network in metric.known_as else network


def format_value(metric: MetricValue) -> str:
    """Format a value with its standard deviation, if it has one."""
    return f"{metric.value:.4g}" + (f" ± {metric.std:.2g}" if metric.std is not None else "")


def format_table(metrics: dict[str, MetricValue], floors: dict[str, MetricValue], extractor: str) -> str:
    """Format metrics, keyed `name@images`, as a table with the real-vs-real baseline where it is known.

    Args:
        extractor: name of the feature extractor.
    """
    rows: list[tuple[str, ...]] = [("", "value", "floor"), ("", "", "")]
    for key, metric in metrics.items():
        name = key.partition("@")[0]
        floor = format_value(floors[name]) if name in floors else ""
        rows.append((metric_title(key, extractor), format_value(metric), floor))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows[1] = tuple("-" * width for width in widths)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def comparability_warnings(
    protocol: EvaluationProtocol, channels: int, dimensions: int, bias: float | None, is_clip: bool, counts_modes: bool
) -> list[str]:
    """Return warnings about what makes these numbers differ from those of a paper or of another run.

    Args:
        protocol: what the numbers depend on.
        channels: number of channels of the extractor.
        dimensions: number of dimensions of the features.
        bias: estimated bias of the Frechet distance, if there is an estimate.
        is_clip: whether the features are those of CLIP.
        counts_modes: whether modes of StackedMNIST are counted, whose digits are classified channel by channel.
    """
    warnings = []
    samples, reference = protocol.samples, protocol.reference
    count, properties, color = samples.count, samples.properties, {1: "gray", 3: "color"}
    fid, kid = (METRICS[name].name(protocol.extractor.name) for name in ("fid", "kid"))
    if reference and count < ENOUGH_FOR_FID:
        warnings.append(
            f"Too few samples: {count:,}. {fid} decreases as their number grows; with infinitely many it would be "
            f"lower by about {bias:.3g}, estimated from halves of the samples. Compare it only with {fid}@{count}, or "
            f"measure {ENOUGH_FOR_FID:,} or more (papers: 50,000)."
        )
    if counts_modes and count != STACKED_MNIST_SAMPLES:
        warnings.append(
            f"Modes were counted in {count:,} samples. Fewer samples cover fewer modes and lie further from uniform: "
            f"papers, including that on Denoising Diffusion GANs, count them in {STACKED_MNIST_SAMPLES:,}."
        )
    for name, number in (("samples", count), ("reference images", reference and reference.images)):
        if reference and number is not None and number <= dimensions:
            warnings.append(
                f"There are {number:,} {name}, not more than the {dimensions:,} dimensions of the features: the "
                f"covariance is singular, and {fid} is unreliable. Features with fewer dimensions, or "
                f"{'CMMD' if is_clip else kid}, need fewer images."
            )
    if reference and reference.channels not in (None, properties.channels):
        warnings.append(
            f"The samples are {color[properties.channels]}, the reference is {color[reference.channels]}: much of the "
            "distance is due to that difference."
        )
    for name, number in (("samples", properties.channels), ("reference images", reference and reference.channels)):
        if channels == 1 and not counts_modes and number == 3:
            warnings.append(f"The {name} are in color, but this classifier only sees them in gray.")
    if is_clip and (models := samples.settings.get(CLIP_GUIDANCE)):
        warnings.append(
            f"The samples were generated with guidance by CLIP ({models}), and these are features of CLIP, so the "
            "numbers favor them. Measure guided images with features of another kind, such as --feature_extractor "
            f"{DINOV2}."
        )
    if reference is None:
        return warnings

    if ("JPEG" in (reference.format or "")) != ("JPEG" in properties.format):
        warnings.append(
            f"The samples are {properties.format}, the reference images {reference.format or 'unknown'}: JPEG leaves "
            "artifacts that affect the features. Compare images that were saved in the same format."
        )
    if reference.statistics is not None and reference.extractor_digest is None:
        warnings.append(
            f"The reference consists of saved statistics ({reference.statistics}): whether its images were resized "
            "and saved like the samples, and measured by the same network, is unknown."
        )
    elif reference.preparation != "as they are":
        warnings.append(
            f"The reference images, {reference.size}, were {reference.preparation}. Numbers for references that were "
            "resized with another filter are not comparable."
        )
    return warnings


def model_index_entries(
    metrics: dict[str, MetricValue],
    dataset: str,
    split: str | None,
    protocol: dict[str, str],
    extractor: str,
    classifier: str | None,
) -> list[EvalResult]:
    """Return metrics, keyed `name@images`, as entries of a card's model-index, each with its protocol.

    Args:
        protocol: see `EvaluationProtocol.descriptions`.
        extractor, classifier: see `full_title`.
    """
    entries = []
    for key, metric in metrics.items():
        entry = EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric_type(key, extractor, classifier),
            metric_name=full_title(key, extractor, classifier),
            metric_value=float(f"{metric.value:.6g}"),
            metric_args={**protocol, **metric.protocol}
            | ({} if metric.std is None else {"spread": float(f"{metric.std:.6g}")}),
        )
        entries.append(entry)
    return entries


def check_card(card_path: Path) -> None:
    """Check that a model card can be updated.

    Raises:
        InputError: if its metadata are not valid YAML.
    """
    with naming_file(card_path, YAMLError):
        ModelCard.load(card_path)


def update_card(card_path: Path, results: "Results") -> None:
    """Write results into a model card: visible, with their warnings, and as metadata (model-index).

    They replace those of an earlier evaluation of the same data by the same protocol, whatever its seeds and weights.
    """
    protocol = results.protocol
    extractor, classifier = protocol.extractor.name, protocol.classifier and protocol.classifier.name
    dataset = (protocol.reference or protocol.classifier or protocol.extractor).name
    split = protocol.reference and protocol.reference.split
    entries = model_index_entries(results.metrics, dataset, split, protocol.descriptions(), extractor, classifier)
    card = ModelCard.load(card_path)
    replaced = {_identity(entry) for entry in entries}
    others = [entry for entry in card.data.eval_results or [] if _identity(entry) not in replaced]
    card.data.eval_results = [*others, *entries]
    card.data.model_name = card.data.model_name or card_path.resolve().parent.name

    mark = fingerprint([*_protocol_identity(protocol.descriptions()), dataset, split])[:8]
    start, end = f"<!-- evaluation {mark} -->", f"<!-- end of evaluation {mark} -->"
    section = f"{start}\n{_section(results, dataset, split, extractor, classifier)}\n{end}"
    text = card.text
    if start in text and end in text:
        card.text = text[: text.index(start)] + section + text[text.index(end) + len(end) :]
    else:
        card.text = f"{text.rstrip()}\n\n{section}\n"
    replace_file(card_path, card.save)


def _section(results: "Results", dataset: str, split: str | None, extractor: str, classifier: str | None) -> str:
    """Return the section of a model card that shows results."""
    rows = ["| | value | real images against real ones |", "|---|---|---|"]
    for key, metric in results.metrics.items():
        title = full_title(key, extractor, classifier)
        floor = results.floors.get(key.partition("@")[0])
        rows.append(f"| {title} | {format_value(metric)} | {format_value(floor) if floor else ''} |")
    parts = results.protocol.descriptions().items()
    paragraphs = [
        f"## Evaluation on {dataset}{f', {split}' if split else ''}",
        "\n".join(rows),
        *(f"**Warning:** {warning}" for warning in results.warnings),
        " ".join(f"{part.replace('_', ' ').capitalize()}: {text}." for part, text in parts),
    ]
    return "\n\n".join(paragraphs)


def _identity(entry: EvalResult) -> tuple:
    """Return what makes an entry of a model-index another number than the others."""
    metric, images = (entry.metric_type or "").partition("-")[0], re.search(r"@(\d+)", entry.metric_name or "")
    metric = {"fid": "fd", "kid": "kd"}.get(metric, metric)  # their names in earlier versions, whatever the extractor
    protocol = _protocol_identity(entry.metric_args or {})
    return entry.dataset_name, entry.dataset_split, metric, images and images[1], *protocol


def _protocol_identity(protocol: dict[str, Any]) -> list[str]:
    """Return the parts of a protocol in which evaluations must agree to be the same one, repeated."""
    samples = re.sub(r"\b(contents|seeds|step) [^,]*(, |$)", "", str(protocol.get("samples", "")))
    return [samples, *(str(protocol.get(part, "")) for part in ("reference", "held_out", "extractor", "classifier"))]
