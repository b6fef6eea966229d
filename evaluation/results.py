"""Every number that can be had from the features of samples, and what there is to know beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from . import coverage, metrics, report
from .extractors import INCEPTION, ClassifierFeatures, FeatureExtractor
from .features import Features
from .metrics import Gaussian, MetricValue
from .references import Reference


@dataclass
class Results:
    """All numbers, keyed `name@images`; floors are keyed by name, facts are what else there is to know."""

    measures: dict[str, MetricValue]
    floors: dict[str, MetricValue]
    facts: dict[str, Any]
    picture: Image.Image | None = None


def evaluate(
    samples: dict[str, Any],
    measured: Features,
    extractor: FeatureExtractor,
    reference: Reference | None = None,
    held_out: Reference | None = None,
    judge: ClassifierFeatures | None = None,
    class_labels: Sequence[int] | None = None,
) -> Results:
    """Every measure that can be had from the features.

    Args:
        samples: how the samples were made: `images` (how many), `size`, `channels`, `format` and more.
        measured: of each sample `features`, of a classifier its `logits`, and what the judge sees: the `digits` in
            three channels, or the `classes`.
        class_labels: the classes that were asked for, in turn.

    Raises:
        ValueError: if they are too few, or the statistics of the reference do not fit them.
    """
    count = samples["images"]
    found: dict[str, MetricValue] = {}
    floors: dict[str, MetricValue] = {}
    facts: dict[str, Any] = {}
    picture = bias = None
    features = measured["features"]
    if reference and reference.features:
        found |= metrics.distances(features, reference.features["features"], reference.gaussian)
        floors |= reference.floor(count)
    elif reference:
        found["fid"] = MetricValue(metrics.frechet_distance(Gaussian.of(features), reference.gaussian))
    if reference and count < report.ENOUGH_FOR_FID:
        bias = found["fid"].protocol["estimated_bias"] = metrics.frechet_bias(features, reference.gaussian)
    if held_out:
        found |= metrics.memorisation(features, reference.features["features"], held_out.features["features"])
    if "logits" in measured and "digits" not in measured:
        name = "inception_score" if extractor.name == INCEPTION else "classifier_score"
        found[name] = metrics.inception_score(measured["logits"])
        if "inception_score" in floors:
            floors[name] = floors.pop("inception_score")
    if "digits" in measured:
        covered = coverage.stacked_mnist_coverage(measured["digits"])
        found["modes"] = MetricValue(covered.modes, None, {"of": covered.of})
        found["mode_kl"] = MetricValue(covered.kl, None, {"unit": "nats"})
    elif "classes" in measured:
        asked = torch.tensor(class_labels).repeat(-(-count // len(class_labels)))[:count]
        names = judge.network.class_names
        counts = coverage.confusion(asked, measured["classes"], len(names))
        accuracy, each = coverage.class_accuracies(counts)
        found["class_accuracy"] = MetricValue(accuracy)
        facts["class_accuracies"] = dict(zip(names, each, strict=True))
        facts["confusion"] = counts.tolist()
        picture = coverage.confusion_picture(counts, names)

    facts |= {
        "samples": samples,
        "reference": reference and reference.facts,
        "held_out": held_out and held_out.facts,
        "extractor": extractor.protocol,
        "classifier": judge and {"name": judge.name, "digest": judge.digest, "resize": judge.resize},
        "versions": report.versions(),
        "warnings": report.warnings(
            samples,
            reference and reference.facts,
            extractor.protocol,
            extractor.channels,
            features.shape[1],
            bias,
            counts_modes="digits" in measured,
        ),
    }
    return Results({f"{name}@{count}": measure for name, measure in found.items()}, floors, facts, picture)
