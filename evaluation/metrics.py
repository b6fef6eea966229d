"""The table of metrics, `METRICS`, and the functions that compute them, all in float64.

Features are tensors (N, D) on the CPU. No result depends on the order of their rows, if no two have the same sum:
before a random subset is taken, the rows are sorted by their sums. Every function raises `ValueError` for features
that are not finite, have different dimensions, or are too few.

To add a metric, write a function from `MetricInputs` to a `MetricValue`, add an entry to `METRICS` and its
key to `arguments.METRIC_NAMES`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ..core.extras import missing_extra
from .arguments import CLIP, DINOV2, INCEPTION
from .coverage import ModeCoverage, class_accuracies, stacked_mnist_coverage

MANIFOLD_IMAGES = 10_000  # maximum of each set; the usual number, because the cost is quadratic
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_BANDWIDTH, CMMD_SCALE = 10, 1000  # arXiv 2401.09603
IS_SPLITS = 10
PRECISION_NEIGHBORS = 3  # arXiv 1904.06991
DENSITY_NEIGHBORS = 5  # arXiv 2002.09797
CLOSE_QUANTILE = 0.01  # fraction of the held-out images that counts as close to the training images
NEAR_COPY_RATIO = 1 / 3  # arXiv 2310.02664
MIN_HELD_OUT = 100  # so that the fraction is at least one image
DISTANCE_EPSILON = 1e-5  # fraction of the length of features below which a distance is rounding error
_ROWS = 2000  # rows of a distance matrix in memory at a time


@dataclass
class MetricValue:
    """The value of a metric with the settings that are needed to reproduce it.

    Attributes:
        std: standard deviation over subsets or splits, where the metric has one.
        protocol: settings of the metric.
    """

    value: float
    std: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "spread": self.std, "protocol": self.protocol}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MetricValue":
        return cls(values["value"], values["spread"], values["protocol"])


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> "Gaussian":
        array = _checked(features, min_images=2).numpy()
        return cls(array.mean(0), np.cov(array, rowvar=False).reshape(array.shape[1], -1))

    @cached_property
    def root(self) -> np.ndarray:
        """R, (D, D), with `covariance` = R R^T."""
        eigenvalues, eigenvectors = np.linalg.eigh(self.covariance)
        return eigenvectors * np.sqrt(eigenvalues.clip(0))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), arXiv 1706.08500, equation (6).

    With S = R R^T the trace of the root is the sum of the singular values of R_a^T R_b. That is exact to rounding for
    singular covariances too, whereas the roots of the eigenvalues of S_a S_b, as in torch-fidelity, are off by 1e-5.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"The features have {len(a.mean)} and {len(b.mean)} dimensions: use one extractor for both.")
    if not all(np.isfinite(part).all() for part in (a.mean, a.covariance, b.mean, b.covariance)):
        raise ValueError("The mean or the covariance of the features is not finite.")
    root_trace = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace)


def frechet_bias(samples: torch.Tensor, reference: Gaussian, distance: float) -> float:
    """Estimate from halves of the samples by how much their Frechet distance exceeds that of infinitely many.

    The distance falls like 1 / N with the number of samples (arXiv 1911.07023), so its decrease from N / 2 to N equals
    its decrease from N to infinity.

    Args:
        distance: the Frechet distance of all samples.
    """
    samples = _checked(samples, min_images=4)
    halves = samples[_shuffled_order(samples)].tensor_split(2)
    half_distances = [frechet_distance(Gaussian.of(half), reference) for half in halves]
    return float(np.mean(half_distances)) - distance


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distances and inception score


def kernel_distance(
    samples: torch.Tensor, reference: torch.Tensor, subset_size: int | None = None, subsets: int = KID_SUBSETS
) -> MetricValue:
    """Compute the KID of arXiv 1801.01401 with torch-fidelity: the unbiased estimate, averaged over random subsets.

    Being unbiased, it can lie slightly below 0 for sets of one distribution.

    Args:
        subset_size: None means 1,000, or half of the smaller set if that is less.
    """
    metric = _torch_fidelity("metric_kid")
    samples, reference = _checked_pair(samples, reference, min_images=4)
    size = subset_size or min(KID_SUBSET_SIZE, min(len(samples), len(reference)) // 2)
    results = metric.kid_features_to_metric(
        samples[_order(samples)],
        reference[_order(reference)],
        kid_subsets=subsets,
        kid_subset_size=size,
        verbose=False,
    )
    return MetricValue(
        results[metric.KEY_METRIC_KID_MEAN],
        results[metric.KEY_METRIC_KID_STD],
        {"kernel": "polynomial, degree 3", "subsets": subsets, "subset_size": size},
    )


def clip_distance(samples: torch.Tensor, reference: torch.Tensor) -> MetricValue:
    """Compute the CMMD of arXiv 2401.09603: the squared MMD of CLIP features with a Gaussian kernel, times 1,000.

    The features are normalized to unit length, and the bandwidth of the kernel is 10, as in the authors' code. The
    estimate is the unbiased one of the paper, so that it can lie slightly below 0 for sets of one distribution. The
    authors' code includes the kernel of each image with itself, which adds less than 0.01 for a set of 1,000 images
    and 0.1 for one of 100. At most `MANIFOLD_IMAGES` of each set are used.
    """
    samples, reference = _checked_pair(samples, reference, min_images=2)
    sets = [part[_shuffled_order(part)[:MANIFOLD_IMAGES]] for part in (samples, reference)]
    x, y = (torch.nn.functional.normalize(part) for part in sets)

    def kernel_sum(a: torch.Tensor, b: torch.Tensor) -> float:
        # |u - v|^2 = 2 - 2 u v for vectors of length 1
        return sum(((rows @ b.T - 1) / CMMD_BANDWIDTH**2).exp().sum().item() for rows in a.split(_ROWS))

    # the kernel of an image with itself is 1
    within = sum((kernel_sum(part, part) - len(part)) / (len(part) * (len(part) - 1)) for part in (x, y))
    value = within - 2 * kernel_sum(x, y) / (len(x) * len(y))
    kernel = f"Gaussian, bandwidth {CMMD_BANDWIDTH}, of normalized features"
    protocol = {"kernel": kernel, "estimator": "unbiased", "reference_images": len(y), "images": len(x)}
    return MetricValue(CMMD_SCALE * value, None, protocol)


def inception_score(logits: torch.Tensor) -> MetricValue:
    """Compute exp of the mean KL divergence of p(class | image) from p(class), arXiv 1606.03498, with torch-fidelity.

    Args:
        logits: (N, classes), of the Inception network, or of another classifier, which makes it a different score.
    """
    metric = _torch_fidelity("metric_isc")
    logits = _checked(logits, min_images=IS_SPLITS)
    results = metric.isc_features_to_metric(logits[_order(logits)], splits=IS_SPLITS)
    return MetricValue(results[metric.KEY_METRIC_ISC_MEAN], results[metric.KEY_METRIC_ISC_STD], {"splits": IS_SPLITS})


# ---------------------------------------------------------------------------------------------------------------------
# Manifolds of nearest neighbors


def manifold_metrics(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, MetricValue]:
    """Compute precision, recall (arXiv 1904.06991, with torch-fidelity), density and coverage (arXiv 2002.09797).

    Both sets are reduced to the same number of images: that of the smaller one, at most `MANIFOLD_IMAGES`.
    """
    metric = _torch_fidelity("metric_prc")
    samples, reference = _checked_pair(samples, reference, min_images=DENSITY_NEIGHBORS + 1)
    count = min(len(samples), len(reference), MANIFOLD_IMAGES)
    samples, reference = samples[_shuffled_order(samples)[:count]], reference[_shuffled_order(reference)[:count]]
    results = metric.prc_features_to_metric(
        samples,
        reference,
        prc_neighborhood=PRECISION_NEIGHBORS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    radii = torch.cat(
        [torch.cdist(part, reference).kthvalue(DENSITY_NEIGHBORS + 1).values for part in reference.split(_ROWS)]
    )
    inside, nearest = 0, torch.full_like(radii, math.inf)
    for part in samples.split(_ROWS):
        distances = torch.cdist(part, reference)
        inside += (distances <= radii).sum().item()
        nearest = torch.minimum(nearest, distances.amin(0))
    values = {
        "precision": (results[metric.KEY_METRIC_PRECISION], PRECISION_NEIGHBORS),
        "recall": (results[metric.KEY_METRIC_RECALL], PRECISION_NEIGHBORS),
        "density": (inside / (DENSITY_NEIGHBORS * count), DENSITY_NEIGHBORS),
        "coverage": ((nearest <= radii).double().mean().item(), DENSITY_NEIGHBORS),
    }
    return {name: MetricValue(value, None, {"neighbors": k, "images": count}) for name, (value, k) in values.items()}


def memorization_metrics(
    samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor
) -> dict[str, MetricValue]:
    """Compare the distances of samples and of held-out images to the training images.

    At most `MANIFOLD_IMAGES` samples and held-out images are used, and all training images.

    Returns:
        `nearest_training_ratio`: the median distance to the nearest training image, of samples over that of held-out
        images; well below 1 where training images are repeated. `memorized`: the fraction of samples that are at least
        as close to a training image as the closest 1% of the held-out images; about 0.01 where nothing is repeated.

    Raises:
        ValueError: if at least half of the held-out images are training images.
    """
    samples, training = _checked_pair(samples, training, min_images=1)
    held_out, _ = _checked_pair(held_out, training, min_images=MIN_HELD_OUT)
    samples, held_out = (part[_shuffled_order(part)[:MANIFOLD_IMAGES]] for part in (samples, held_out))
    sample_distances, held_out_distances = (_nearest(part, training, 1)[:, 0] for part in (samples, held_out))
    if held_out_distances.median() == 0:
        raise ValueError(
            "At least half of the held-out images are among the training images, so they do not show how close unseen "
            "images come. Use other held-out images."
        )
    close = held_out_distances.quantile(CLOSE_QUANTILE)
    ratio = (sample_distances.median() / held_out_distances.median()).item()
    memorized = (sample_distances <= close).double().mean().item()
    protocol = {"training_images": len(training), "images": len(samples), "held_out_images": len(held_out)}
    return {
        "nearest_training_ratio": MetricValue(ratio, None, protocol),
        "memorized": MetricValue(memorized, None, {**protocol, "quantile": CLOSE_QUANTILE}),
    }


def near_copies(samples: torch.Tensor, reference: torch.Tensor) -> MetricValue:
    """Compute the fraction of samples that are near-copies of a reference image (arXiv 2310.02664).

    Such a sample is at most a third as far from its nearest reference image as from the second nearest. Other samples,
    blurred ones too, are about equally far from both. At most `MANIFOLD_IMAGES` samples are used, and all reference
    images. This needs no held-out images, but misses copies of images of which the reference has variants.
    """
    samples, reference = _checked_pair(samples, reference, min_images=2)
    samples = samples[_shuffled_order(samples)[:MANIFOLD_IMAGES]]
    nearest, second = _nearest(samples, reference, 2).unbind(1)
    fraction = (nearest <= NEAR_COPY_RATIO * second).double().mean().item()
    return MetricValue(fraction, None, {"reference_images": len(reference), "images": len(samples)})


def _nearest(features: torch.Tensor, others: torch.Tensor, count: int) -> torch.Tensor:
    """Return the distances from each row to the nearest of the others, (N, count); rounding errors are set to 0."""
    rows = max(1, _ROWS * MANIFOLD_IMAGES // max(len(others), MANIFOLD_IMAGES))
    distances = torch.cat(
        [torch.cdist(part, others).topk(count, largest=False).values for part in features.split(rows)]
    )
    return distances.masked_fill(distances < DISTANCE_EPSILON * others.norm(dim=1).mean(), 0)


# ---------------------------------------------------------------------------------------------------------------------
# The table of metrics


@dataclass(frozen=True)
class MetricInputs:
    """The inputs of metrics; those that an evaluation does not have are None.

    Attributes:
        features: (N, D), of the samples.
        reference: (M, D), features of the reference images.
        reference_gaussian: mean and covariance of the reference features.
        held_out: (K, D), features of images that the training has not seen.
        inception_logits: (N, classes), of the samples, from the Inception network.
        classifier_logits: (N, classes), of the samples, from another classifier.
        digits: (N, 3), the digit in each channel of the samples.
        confusion: (classes, classes), the confusion matrix of conditional samples.
        clip_features: `features`, if CLIP computed them.
    """

    features: torch.Tensor
    reference: torch.Tensor | None = None
    reference_gaussian: Gaussian | None = None
    held_out: torch.Tensor | None = None
    inception_logits: torch.Tensor | None = None
    classifier_logits: torch.Tensor | None = None
    digits: torch.Tensor | None = None
    confusion: torch.Tensor | None = None
    clip_features: torch.Tensor | None = None

    @property
    def available(self) -> set[str]:
        """Names of the inputs that are present."""
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}

    # results that several metrics share

    @cached_property
    def manifold_metrics(self) -> dict[str, MetricValue]:
        assert self.reference is not None
        return manifold_metrics(self.features, self.reference)

    @cached_property
    def memorization_metrics(self) -> dict[str, MetricValue]:
        assert self.reference is not None and self.held_out is not None
        return memorization_metrics(self.features, self.reference, self.held_out)

    @cached_property
    def mode_coverage(self) -> ModeCoverage:
        assert self.digits is not None
        return stacked_mnist_coverage(self.digits)


@dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`.

    Attributes:
        title: name in tables, plots and model cards.
        needs: attributes of `MetricInputs` that it requires; without them it is left out.
        compute: the function that computes it.
        lower_is_better: whether a lower value is better.
        panel: panel of a run's evaluation plot, which metrics may share; None if the metric is not plotted.
        is_headline: whether one-line summaries show the metric.
        known_as: the name of the metric in papers for some extractors, by extractor. This name alone says which
            network was used.
    """

    title: str
    needs: frozenset[str]
    compute: Callable[[Any], MetricValue]  # called with `MetricInputs`, in which those that it needs are not None
    lower_is_better: bool = False
    panel: str | None = None
    is_headline: bool = False
    known_as: Mapping[str, str] = field(default_factory=dict)

    def name(self, extractor: str) -> str:
        """Return the name of the metric with the features of this extractor, such as FID or FD-DINOv2."""
        return self.known_as.get(extractor, self.title)

    def is_better(self, value: float, other: float) -> bool:
        return value < other if self.lower_is_better else value > other


_REFERENCE = frozenset({"reference"})
_HELD_OUT = frozenset({"reference", "held_out"})

# keyed by the name in result files, metrics.csv and model-index metadata; results are listed in this order
METRICS = {
    "fid": Metric(
        "FD",
        frozenset({"reference_gaussian"}),
        lambda inputs: MetricValue(frechet_distance(Gaussian.of(inputs.features), inputs.reference_gaussian)),
        lower_is_better=True,
        panel="fid",
        is_headline=True,
        known_as={INCEPTION: "FID", DINOV2: "FD-DINOv2"},  # arXiv 1706.08500, arXiv 2306.04675
    ),
    "kid": Metric(
        "KD",
        _REFERENCE,
        lambda inputs: kernel_distance(inputs.features, inputs.reference),
        lower_is_better=True,
        panel="kid",
        is_headline=True,
        known_as={INCEPTION: "KID"},
    ),
    "cmmd": Metric(
        "CMMD",
        frozenset({"reference", "clip_features"}),
        lambda inputs: clip_distance(inputs.clip_features, inputs.reference),
        lower_is_better=True,
        panel="cmmd",
        is_headline=True,
        known_as={CLIP: "CMMD"},
    ),
    "precision": Metric(
        "precision", _REFERENCE, lambda inputs: inputs.manifold_metrics["precision"], panel="fractions"
    ),
    "recall": Metric("recall", _REFERENCE, lambda inputs: inputs.manifold_metrics["recall"], panel="fractions"),
    "density": Metric("density", _REFERENCE, lambda inputs: inputs.manifold_metrics["density"]),
    "coverage": Metric("coverage", _REFERENCE, lambda inputs: inputs.manifold_metrics["coverage"], panel="fractions"),
    "near_copies": Metric(
        "near-copies of reference images",
        _REFERENCE,
        lambda inputs: near_copies(inputs.features, inputs.reference),
        lower_is_better=True,
    ),
    "nearest_training_ratio": Metric(
        "distance to training images, ratio to held-out",
        _HELD_OUT,
        lambda inputs: inputs.memorization_metrics["nearest_training_ratio"],
    ),
    "memorized": Metric(
        "memorized", _HELD_OUT, lambda inputs: inputs.memorization_metrics["memorized"], lower_is_better=True
    ),
    "inception_score": Metric(
        "Inception score", frozenset({"inception_logits"}), lambda inputs: inception_score(inputs.inception_logits)
    ),
    "classifier_score": Metric(
        "Inception score with a classifier",
        frozenset({"classifier_logits"}),
        lambda inputs: inception_score(inputs.classifier_logits),
    ),
    "modes": Metric(
        "modes",
        frozenset({"digits"}),
        lambda inputs: MetricValue(inputs.mode_coverage.modes, None, {"of": inputs.mode_coverage.of}),
    ),
    "mode_kl": Metric(
        "KL of modes to uniform",
        frozenset({"digits"}),
        lambda inputs: MetricValue(inputs.mode_coverage.kl, None, {"unit": "nats"}),
        lower_is_better=True,
    ),
    "class_accuracy": Metric(
        "class accuracy",
        frozenset({"confusion"}),
        lambda inputs: MetricValue(class_accuracies(inputs.confusion)[0]),
        panel="fractions",
        is_headline=True,
    ),
}


def available_metrics(inputs: Collection[str]) -> list[str]:
    """Return the keys of the metrics that can be computed from these attributes of `MetricInputs`."""
    return [key for key, metric in METRICS.items() if metric.needs <= set(inputs)]


def compute_metrics(inputs: MetricInputs) -> dict[str, MetricValue]:
    """Compute every metric for which the inputs suffice."""
    return {key: METRICS[key].compute(inputs) for key in available_metrics(inputs.available)}


def reference_baseline(
    reference: torch.Tensor,
    count: int,
    logits: torch.Tensor | None = None,
    logits_input: str | None = "inception_logits",
    is_clip: bool = False,
) -> dict[str, MetricValue]:
    """Compute the metrics of one half of a reference against the other, the real-vs-real baseline ("floor").

    Samples can be better than these values only by chance, if their number is that of the first half.

    Args:
        count: number of images of the first half that stand in for samples, at most all of them.
        logits: of the reference, (N, classes); adds their score if there are enough images.
        logits_input: attribute of `MetricInputs` that takes the logits.
        is_clip: whether the features are those of CLIP.
    """
    first, second = _shuffled_order(_checked(reference, min_images=2)).tensor_split(2)
    first = first[:count]
    more: dict[str, torch.Tensor] = {"clip_features": reference[first]} if is_clip else {}
    if logits is not None and logits_input is not None and len(first) >= IS_SPLITS:
        more[logits_input] = logits[first]
    other_half = reference[second]
    inputs = MetricInputs(reference[first], other_half, Gaussian.of(other_half), **more)
    baseline = compute_metrics(inputs)
    for value in baseline.values():
        value.protocol.update(halves=[len(first), len(second)])
    return baseline


# ---------------------------------------------------------------------------------------------------------------------


def _checked(features: torch.Tensor, min_images: int) -> torch.Tensor:
    """Return features as float64.

    Raises:
        ValueError: if they are not a finite matrix with at least `min_images` rows.
    """
    if features.ndim != 2:
        raise ValueError(f"Features have the shape {tuple(features.shape)}, but must be (images, dimensions).")
    if len(features) < min_images:
        raise ValueError(f"There are features of {len(features)} images; this metric needs at least {min_images}.")
    broken = (~features.isfinite()).any(1).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"The features of {len(broken)} of {len(features)} images are not finite, the first being image "
            f"{broken[0].item()}. Check these images, or compute the features in float32."
        )
    return features.double()


def _checked_pair(a: torch.Tensor, b: torch.Tensor, min_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _checked(a, min_images), _checked(b, min_images)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"The features have {a.shape[1]} and {b.shape[1]} dimensions: use one extractor for both.")
    return a, b


def _order(features: torch.Tensor) -> torch.Tensor:
    """Return the indices of the rows, sorted by their sums."""
    return features.sum(1).argsort(stable=True)


def _shuffled_order(features: torch.Tensor) -> torch.Tensor:
    """Return the indices of the rows in a random order that does not depend on the current one."""
    return _order(features)[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]


def _torch_fidelity(module: str) -> ModuleType:
    try:
        return import_module(f"torch_fidelity.{module}")
    except ImportError:
        raise ImportError(f"This metric needs a package: {missing_extra('torch-fidelity', 'eval')}.") from None
