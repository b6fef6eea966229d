"""Compute all metrics that the features of samples allow, with their baselines and protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import metrics
from .coverage import class_accuracies, confusion_matrix
from .extractors import ClassifierFeatures, FeatureExtractor
from .facts import EvaluationProtocol, SampleFacts, package_versions
from .features import Features
from .metrics import MetricInputs, MetricValue
from .references import Reference
from .reporting import ENOUGH_FOR_FID, comparability_warnings, full_title


@dataclass(frozen=True)
class ClassResults:
    """Class accuracy of conditional samples in detail.

    Attributes:
        names: names of the classes.
        confusion: (classes, classes), requested classes in rows, predicted ones in columns.
    """

    names: list[str]
    confusion: torch.Tensor

    @property
    def accuracies(self) -> dict[str, float | None]:
        """Accuracy of each class, None for a class without samples."""
        return dict(zip(self.names, class_accuracies(self.confusion)[1], strict=True))


@dataclass(frozen=True)
class Results:
    """The results of an evaluation.

    Attributes:
        metrics: keyed `name@images`.
        floors: the real-vs-real baseline, keyed by name.
        protocol: what the numbers depend on.
        warnings: caveats for comparing the numbers with others.
        classes: class accuracy of conditional samples.
    """

    metrics: dict[str, MetricValue]
    floors: dict[str, MetricValue]
    protocol: EvaluationProtocol
    warnings: list[str]
    classes: ClassResults | None = None

    def to_json(self) -> dict[str, Any]:
        descriptions = self.protocol.descriptions()
        extractor = self.protocol.extractor.name
        classifier = self.protocol.classifier and self.protocol.classifier.name
        entries: dict[str, dict[str, Any]] = {}
        for key, metric in self.metrics.items():
            entries[key] = {"name": full_title(key, extractor, classifier), "value": metric.value}
            if metric.std is not None:
                entries[key]["spread"] = metric.std
            if floor := self.floors.get(key.partition("@")[0]):
                entries[key]["floor"] = {"value": floor.value, "spread": floor.std, **floor.protocol}
            entries[key]["protocol"] = {**metric.protocol, **descriptions}
        classes = {}
        if self.classes:
            classes = {"class_accuracies": self.classes.accuracies, "confusion": self.classes.confusion.tolist()}
        return {"metrics": entries, **classes, **self.protocol.as_dict(), "warnings": self.warnings}


def compute_results(
    samples: SampleFacts,
    features: Features,
    extractor: FeatureExtractor,
    reference: Reference | None = None,
    held_out: Reference | None = None,
    classifier: ClassifierFeatures | None = None,
    class_labels: Sequence[int] | None = None,
) -> Results:
    """Compute every metric for which there are inputs.

    Args:
        samples: how the samples were made.
        features: `features` of each sample, `logits` if the extractor is a classifier, and the predictions of
            `classifier`: the `digits` in three channels, or the `classes`.
        extractor: the network that computed the features.
        reference: the reference that the samples are compared with.
        held_out: features of images that the training has not seen.
        classifier: the network that predicted classes or digits.
        class_labels: the requested classes, which the samples cycle through.

    Raises:
        ValueError: if there are too few images, or the saved statistics of the reference do not fit the features.
    """
    has_digits = "digits" in features
    inputs: dict[str, Any] = {}
    floors: dict[str, MetricValue] = {}
    if reference:
        inputs["reference_gaussian"] = reference.gaussian
        if reference.features:
            inputs["reference"] = reference.features["features"]
            logits_input = None if has_digits else extractor.logits_input
            floors = reference.baseline(samples.count, logits_input, extractor.is_clip)
    if extractor.is_clip:
        inputs["clip_features"] = features["features"]
    if held_out:
        assert held_out.features is not None
        inputs["held_out"] = held_out.features["features"]
    classes = None
    if has_digits:
        inputs["digits"] = features["digits"]
    else:
        if extractor.logits_input:
            inputs[extractor.logits_input] = features["logits"]
        if "classes" in features:
            assert class_labels is not None and classifier is not None
            repeats = -(-samples.count // len(class_labels))
            requested = torch.tensor(class_labels).repeat(repeats)[: samples.count]
            names = classifier.network.class_names
            classes = ClassResults(names, confusion_matrix(requested, features["classes"], len(names)))
            inputs["confusion"] = classes.confusion

    values = metrics.compute_metrics(MetricInputs(features["features"], **inputs))
    bias = None
    if reference and samples.count < ENOUGH_FOR_FID:
        bias = metrics.frechet_bias(features["features"], reference.gaussian, values["fid"].value)
        values["fid"].protocol["estimated_bias"] = bias

    protocol = EvaluationProtocol(
        samples=samples,
        reference=reference and reference.facts,
        held_out=held_out and held_out.facts,
        extractor=extractor.facts,
        classifier=classifier and classifier.facts,
        versions=package_versions(),
    )
    warnings = comparability_warnings(
        protocol, extractor.channels, features["features"].shape[1], bias, extractor.is_clip, counts_modes=has_digits
    )
    return Results(
        {f"{name}@{samples.count}": value for name, value in values.items()}, floors, protocol, warnings, classes
    )
