"""How far two sets of features are apart, and whether samples repeat training images; all in float64.

Features are tensors (N, D) on the CPU. No result depends on the order of their rows: where a random part of them is
taken, they are brought into an order of their own first. Every function raises `ValueError` for features that are not
finite, not of one dimension, or too few.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MIN_IMAGES = 12  # on each side: six in each half
MANIFOLD_IMAGES = 10_000  # of each side at most; the usual number, and the cost grows with its square
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10
PRECISION_NEIGHBOURS = 3  # arXiv 1904.06991
DENSITY_NEIGHBOURS = 5  # arXiv 2002.09797
CLOSE = 0.01  # part of the held-out images that counts as close to the training images
MIN_HELD_OUT = 100  # of which that part is one image
SAME = 1e-5  # part of the length of features below which a distance is rounding
_ROWS = 2000  # of a matrix of distances that are in memory at once


@dataclass
class MetricValue:
    """A number with what it takes to compute it again.

    Attributes:
        spread: standard deviation over subsets or splits, where the metric has one.
        protocol: settings of the metric.
    """

    value: float
    spread: float | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: torch.Tensor) -> "Gaussian":
        features = _checked(features, least=2).numpy()
        return cls(features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), the Frechet distance of arXiv 1706.08500, equation (6).

    With S = R R^T the trace of the root is the sum of the singular values of R_a^T R_b. That is exact to rounding for
    singular covariances too, where roots of the eigenvalues of S_a S_b, torch-fidelity's way, are wrong by about 1e-5.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"The features have {len(a.mean)} and {len(b.mean)} dimensions: use one extractor for both.")
    if not all(np.isfinite(part).all() for part in (a.mean, a.covariance, b.mean, b.covariance)):
        raise ValueError("The mean or the covariance of the features is not finite.")
    root_trace = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root_trace)


def _root(covariance: np.ndarray) -> np.ndarray:
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    return eigenvectors * np.sqrt(eigenvalues.clip(0))


def frechet_bias(samples: torch.Tensor, reference: Gaussian) -> float:
    """By how much the Frechet distance of these samples exceeds that of infinitely many, from its halves.

    The distance falls like 1 / N with the number of samples (arXiv 1911.07023), so what it loses from N / 2 to N it
    loses once more from N on.
    """
    samples = _checked(samples, least=4)
    halves = samples[_shuffled_order(samples)].tensor_split(2)
    of_halves = [frechet_distance(Gaussian.of(half), reference) for half in halves]
    return float(np.mean(of_halves)) - frechet_distance(Gaussian.of(samples), reference)


# ---------------------------------------------------------------------------------------------------------------------
# Kernel distance and inception score


def kernel_distance(
    samples: torch.Tensor, reference: torch.Tensor, subset_size: int | None = None, subsets: int = KID_SUBSETS
) -> MetricValue:
    """KID of arXiv 1801.01401, through torch-fidelity: mean and spread of the unbiased estimate over random subsets.

    Without bias, it lies a little below 0 for sets of one distribution.

    Args:
        subset_size: None takes 1,000, or half of the smaller set where that is less.
    """
    metric = _torch_fidelity("metric_kid")
    samples, reference = _pair(samples, reference, least=4)
    size = subset_size or min(KID_SUBSET_SIZE, min(len(samples), len(reference)) // 2)
    found = metric.kid_features_to_metric(
        samples[_order(samples)],
        reference[_order(reference)],
        kid_subsets=subsets,
        kid_subset_size=size,
        verbose=False,
    )
    return MetricValue(
        found[metric.KEY_METRIC_KID_MEAN],
        found[metric.KEY_METRIC_KID_STD],
        {"kernel": "polynomial, degree 3", "subsets": subsets, "subset_size": size},
    )


def inception_score(logits: torch.Tensor) -> MetricValue:
    """exp of the mean divergence of p(class | image) from p(class), arXiv 1606.03498, through torch-fidelity.

    Args:
        logits: (N, classes), of the Inception network, or of another classifier, which makes it another score.
    """
    metric = _torch_fidelity("metric_isc")
    logits = _checked(logits, least=IS_SPLITS)
    logits = logits[_order(logits)]
    found = metric.isc_features_to_metric(logits, splits=IS_SPLITS)
    return MetricValue(found[metric.KEY_METRIC_ISC_MEAN], found[metric.KEY_METRIC_ISC_STD], {"splits": IS_SPLITS})


# ---------------------------------------------------------------------------------------------------------------------
# Manifolds of nearest neighbours


def manifold_measures(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, MetricValue]:
    """Precision, recall (arXiv 1904.06991, through torch-fidelity), density and coverage (arXiv 2002.09797).

    Both sides have the same number of images: the smaller set's, at most `MANIFOLD_IMAGES`.
    """
    metric = _torch_fidelity("metric_prc")
    samples, reference = _pair(samples, reference, least=DENSITY_NEIGHBOURS + 1)
    count = min(len(samples), len(reference), MANIFOLD_IMAGES)
    samples, reference = samples[_shuffled_order(samples)[:count]], reference[_shuffled_order(reference)[:count]]
    found = metric.prc_features_to_metric(
        samples,
        reference,
        prc_neighborhood=PRECISION_NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    radii = torch.cat(
        [torch.cdist(part, reference).kthvalue(DENSITY_NEIGHBOURS + 1).values for part in reference.split(_ROWS)]
    )
    inside, nearest = 0, torch.full_like(radii, math.inf)
    for part in samples.split(_ROWS):
        distances = torch.cdist(part, reference)
        inside += (distances <= radii).sum().item()
        nearest = torch.minimum(nearest, distances.amin(0))
    values = {
        "precision": (found[metric.KEY_METRIC_PRECISION], PRECISION_NEIGHBOURS),
        "recall": (found[metric.KEY_METRIC_RECALL], PRECISION_NEIGHBOURS),
        "density": (inside / (DENSITY_NEIGHBOURS * count), DENSITY_NEIGHBOURS),
        "coverage": ((nearest <= radii).double().mean().item(), DENSITY_NEIGHBOURS),
    }
    return {name: MetricValue(value, None, {"neighbours": k, "images": count}) for name, (value, k) in values.items()}


def memorisation(samples: torch.Tensor, training: torch.Tensor, held_out: torch.Tensor) -> dict[str, MetricValue]:
    """Whether samples lie closer to the training images than images do that the training has not seen.

    Returns:
        `nearest_training_ratio`: the median distance to the nearest training image, of samples over that of held-out
        images; well below 1 where training images are repeated. `memorised`: the part of the samples that is closer
        to a training image than the closest 1 % of the held-out images, or as close; about 0.01 where nothing is
        repeated. At most `MANIFOLD_IMAGES` samples and held-out images are looked at, and all training images.

    Raises:
        ValueError: if most held-out images are training images.
    """
    samples, training = _pair(samples, training, least=1)
    held_out, _ = _pair(held_out, training, least=MIN_HELD_OUT)
    samples, held_out = (part[_shuffled_order(part)[:MANIFOLD_IMAGES]] for part in (samples, held_out))
    of_samples, of_held_out = _nearest(samples, training), _nearest(held_out, training)
    if of_held_out.median() == 0:
        raise ValueError(
            "At least half of the held-out images are among the training images, so they do not show how close images "
            "come that the training has not seen. Name others."
        )
    close = of_held_out.quantile(CLOSE)
    protocol = {"training_images": len(training), "samples": len(samples), "held_out_images": len(held_out)}
    return {
        "nearest_training_ratio": MetricValue((of_samples.median() / of_held_out.median()).item(), None, protocol),
        "memorised": MetricValue((of_samples <= close).double().mean().item(), None, {**protocol, "quantile": CLOSE}),
    }


def _nearest(features: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The distance from each to the nearest of the others, 0 where that is rounding."""
    rows = max(1, _ROWS * MANIFOLD_IMAGES // max(len(others), MANIFOLD_IMAGES))
    found = torch.cat([torch.cdist(part, others).amin(1) for part in features.split(rows)])
    return found.masked_fill(found < SAME * others.norm(dim=1).mean(), 0)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


def distances(
    samples: torch.Tensor, reference: torch.Tensor, gaussian: Gaussian | None = None
) -> dict[str, MetricValue]:
    """`fid`, `kid`, `precision`, `recall`, `density` and `coverage` of samples against a reference.

    Args:
        gaussian: the reference's, where it is known already.
    """
    return {
        "fid": MetricValue(frechet_distance(Gaussian.of(samples), gaussian or Gaussian.of(reference))),
        "kid": kernel_distance(samples, reference),
        **manifold_measures(samples, reference),
    }


def floor(reference: torch.Tensor, count: int, logits: torch.Tensor | None = None) -> dict[str, MetricValue]:
    """`distances` of one half of a reference to the other: what samples cannot fall below but by chance.

    Args:
        count: images of the first half that stand in for samples, at most all of it.
        logits: of the reference, (N, classes); with them also the `inception_score` of these images, if they are
            enough for one.
    """
    first, second = _shuffled_order(_checked(reference, least=2)).tensor_split(2)
    first = first[:count]
    found = distances(reference[first], reference[second])
    if logits is not None and len(first) >= IS_SPLITS:
        found["inception_score"] = inception_score(logits[first])
    for measure in found.values():
        measure.protocol.update(halves=[len(first), len(second)])
    return found


# ---------------------------------------------------------------------------------------------------------------------


def _checked(features: torch.Tensor, least: int) -> torch.Tensor:
    """Features as float64.

    Raises:
        ValueError: if they are not a finite matrix of at least so many rows.
    """
    if features.ndim != 2:
        raise ValueError(f"Features have the shape {tuple(features.shape)}, but must be (images, dimensions).")
    if len(features) < least:
        raise ValueError(f"There are features of {len(features)} images; this metric needs at least {least}.")
    broken = (~features.isfinite()).any(1).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"The features of {len(broken)} of {len(features)} images are not finite, first those of image "
            f"{broken[0].item()}. Look at these images, or compute the features in float32."
        )
    return features.double()


def _pair(a: torch.Tensor, b: torch.Tensor, least: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _checked(a, least), _checked(b, least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"The features have {a.shape[1]} and {b.shape[1]} dimensions: use one extractor for both.")
    return a, b


def _order(features: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows, in an order that does not depend on the one they came in."""
    return features.sum(1).argsort(stable=True)


def _shuffled_order(features: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows, in a random order that does not depend on the one they came in."""
    return _order(features)[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]


def _torch_fidelity(module: str):
    from importlib import import_module

    try:
        return import_module(f"torch_fidelity.{module}")
    except ImportError:
        raise ImportError(
            "This metric is computed by torch-fidelity, which is not installed: pip install 'diffusers-ddgan[eval]'."
        ) from None
