"""Claims about distances between sets of features."""

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ddgan.evaluation import metrics
from ddgan.evaluation.arguments import METRIC_NAMES
from ddgan.evaluation.metrics import METRICS, Gaussian, MetricInputs, frechet_distance
from ddgan.evaluation.reporting import metric_title


def features(count: int, dimensions: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated, not negative, like those of a network."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99)) / dimensions**0.5
    return (torch.randn(count, dimensions, generator=random) @ mix + shift).relu()


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return features(300, 24, 0), features(400, 24, 1, shift=0.3)


class Identity(torch.nn.Module):
    """torchmetrics asks for a network: this one takes features for images."""

    num_features = 24

    def forward(self, images):
        return images.flatten(1)


def fid(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Gaussian.of(a), Gaussian.of(b))


# ---------------------------------------------------------------------------------------------------------------------
# The table of metrics


def test_the_table_has_the_names_that_arguments_accept():
    assert tuple(METRICS) == METRIC_NAMES


def test_a_new_metric_is_one_entry_of_the_table(pair, monkeypatch):
    metric = metrics.Metric(
        "distance of the means",
        frozenset({"reference"}),
        lambda inputs: metrics.MetricValue((inputs.features.mean(0) - inputs.reference.mean(0)).norm().item()),
        lower_is_better=True,
    )
    monkeypatch.setitem(METRICS, "mean_distance", metric)
    a, b = pair
    values = metrics.compute_metrics(MetricInputs(a, reference=b))
    assert values["mean_distance"].value == pytest.approx((a.mean(0) - b.mean(0)).norm().item())
    assert "mean_distance" not in metrics.compute_metrics(MetricInputs(a, reference_gaussian=Gaussian.of(b)))
    assert metric_title("mean_distance@300", "inception-v3-compat") == "distance of the means@300"
    assert metric.is_better(1, 2) and not METRICS["precision"].is_better(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Agreement


def test_frechet_distance_agrees_with_the_formula_torch_fidelity_and_torchmetrics(pair):
    result = fid(*pair)

    a, b = (x.double().numpy() for x in pair)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    direct = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)

    statistics = [fid_features_to_statistics(x.double()) for x in pair]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    torchmetric = FrechetInceptionDistance(feature=Identity(), input_img_size=(1, 4, 6)).set_dtype(torch.float64)
    for x, real in zip(pair, (False, True), strict=True):
        torchmetric.update(x.double().view(-1, 1, 4, 6), real=real)

    assert result == pytest.approx(direct, rel=1e-9)
    assert result == pytest.approx(fidelity, rel=1e-9)
    assert result == pytest.approx(torchmetric.compute().item(), rel=1e-4)


def test_kernel_distance_agrees_with_the_formula_torch_fidelity_and_torchmetrics(pair):
    a, b = pair[0], pair[1][:300]
    result = metrics.kernel_distance(a, b, subset_size=300, subsets=2)

    x, y = a.double(), b.double()
    xx, yy, xy = (((u @ v.T) / 24 + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    n = 300
    direct = sum((k.sum() - k.diagonal().sum()) / (n * (n - 1)) for k in (xx, yy)) - 2 * xy.mean()

    fidelity = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=n, verbose=False)
    torchmetric = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=n)
    for z, real in ((a, False), (b, True)):
        torchmetric.update(z.view(-1, 1, 4, 6), real=real)

    assert result.value == pytest.approx(direct.item(), rel=1e-9)
    assert result.value == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-9)
    assert result.value == pytest.approx(torchmetric.compute()[0].item(), rel=1e-4)
    assert result.std == pytest.approx(0, abs=1e-12)  # every subset is the whole


def test_the_kernel_distance_has_a_standard_deviation_over_subsets(pair):
    result = metrics.kernel_distance(*pair)
    assert result.protocol["subset_size"] == 150 and result.protocol["subsets"] == 100
    assert 0 < result.std < result.value


def clip_kernel(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """The kernel of arXiv 2401.09603 on features of unit length, with a bandwidth of 10, from distances."""
    a, b = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1)[:, None] for x in (a, b))
    return np.exp(-scipy.spatial.distance.cdist(a, b, "sqeuclidean") / (2 * 10**2))


def test_cmmd_agrees_with_the_formula(pair, monkeypatch):
    a, b = pair
    result = metrics.clip_distance(a, b)
    within = (np.mean(kernel[~np.eye(len(kernel), dtype=bool)]) for kernel in (clip_kernel(a, a), clip_kernel(b, b)))
    assert result.value == pytest.approx(1000 * (sum(within) - 2 * clip_kernel(a, b).mean()), rel=1e-8)
    # the estimator of the authors' code
    biased = 1000 * (clip_kernel(a, a).mean() + clip_kernel(b, b).mean() - 2 * clip_kernel(a, b).mean())
    assert 0 < biased - result.value < 10 / len(a) + 10 / len(b)
    assert metrics.clip_distance(3 * a, b).value == pytest.approx(result.value)
    monkeypatch.setattr(metrics, "_ROWS", 7)
    assert metrics.clip_distance(a, b).value == pytest.approx(result.value)
    monkeypatch.setattr(metrics, "MANIFOLD_IMAGES", 250)
    part = metrics.clip_distance(a, b)
    assert part.value == pytest.approx(result.value, rel=0.5) and part.protocol["images"] == 250


def test_cmmd_of_few_images_is_unbiased():
    values = [metrics.clip_distance(features(12, 8, i), features(12, 8, 1000 + i)).value for i in range(200)]
    error = np.std(values) / len(values) ** 0.5
    assert abs(np.mean(values)) < 3 * error
    bias = 1000 * (1 - clip_kernel(features(12, 8, 0), features(12, 8, 0)).mean()) / 12  # of the authors' code
    assert bias > 6 * error


def test_inception_score_agrees_with_the_formula(pair):
    logits = pair[0][:, :5]
    result = metrics.inception_score(logits)
    fidelity = isc_features_to_metric(logits, splits=10)
    # splits differ, so the values are close but not equal
    assert result.value == pytest.approx(fidelity["inception_score_mean"], rel=0.02)
    assert 1 < result.value < 5
    assert metrics.inception_score(torch.zeros(50, 7)).value == pytest.approx(1)
    certain = 100 * torch.eye(10).repeat(100, 1)
    assert metrics.inception_score(certain).value == pytest.approx(10, rel=0.05)


def test_manifold_metrics_agree_with_torch_fidelity_and_the_formulas(pair):
    samples, reference = pair[0].double(), pair[1][:300].double()
    result = {name: metric.value for name, metric in metrics.manifold_metrics(samples, reference).items()}
    fidelity = prc_features_to_metric(samples, reference, verbose=False)
    assert result["precision"] == pytest.approx(fidelity["precision"])
    assert result["recall"] == pytest.approx(fidelity["recall"])

    among = torch.cdist(reference, reference, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values
    radii = among[:, 5]  # the first neighbor of an image is itself
    across = torch.cdist(samples, reference, compute_mode="donot_use_mm_for_euclid_dist")
    assert result["density"] == pytest.approx((across <= radii).double().sum(1).mean().item() / 5)
    assert result["coverage"] == pytest.approx((across <= radii).any(0).double().mean().item())


# ---------------------------------------------------------------------------------------------------------------------
# Known values


@pytest.mark.parametrize(("count", "dimensions"), [(200, 16), (30, 64), (2, 8), (5, 1)])
def test_identical_sets_have_no_frechet_distance(count, dimensions):
    same = 10 * features(count, dimensions, 0)
    assert abs(fid(same, same.flip(0))) < 1e-6


def test_identical_sets_have_perfect_manifold_metrics():
    same = features(200, 6, 0)
    result = metrics.manifold_metrics(same, same)
    assert result["precision"].value == result["recall"].value == result["coverage"].value == 1
    assert result["density"].value > 1


def test_known_gaussians_give_the_closed_form():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(7, 7)))[0]
    a, b = random.uniform(0.1, 4, size=(2, 7))  # variances along common axes
    means = random.normal(size=(2, 7))
    gaussians = [Gaussian(mean, basis * variance @ basis.T) for mean, variance in zip(means, (a, b), strict=True)]
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-12)


def test_the_estimated_bias_is_that_of_a_small_sample():
    random = torch.Generator().manual_seed(0)
    reference = Gaussian(np.zeros(20), np.eye(20))
    samples = torch.randn(400, 20, generator=random, dtype=torch.float64)
    result = fid(samples, torch.randn(200_000, 20, generator=random, dtype=torch.float64))
    distance = frechet_distance(Gaussian.of(samples), reference)
    assert distance == pytest.approx(result, rel=0.05)
    # the true distance is 0, so all of it is bias
    assert metrics.frechet_bias(samples, reference, distance) == pytest.approx(result, rel=0.3)


def test_the_kernel_distance_within_one_distribution_is_near_zero():
    result = metrics.kernel_distance(features(500, 8, 0), features(500, 8, 1))
    assert abs(result.value) < result.std


def test_disjoint_sets_have_no_precision_and_no_coverage():
    result = metrics.manifold_metrics(features(50, 4, 0), features(50, 4, 1) + 100)
    assert all(metric.value == 0 for metric in result.values())


def test_missing_modes_lower_recall_and_spurious_ones_precision():
    modes = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    both = modes.repeat(100, 1) + torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    one = modes[:1] + torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    lost, invented = metrics.manifold_metrics(one, both), metrics.manifold_metrics(both, one)
    assert lost["precision"].value > 0.9 and lost["recall"].value < 0.6 and lost["coverage"].value < 0.6
    assert invented["precision"].value < 0.6 and invented["recall"].value > 0.9


def test_repeated_training_images_are_detected():
    training, held_out, fresh = (features(n, 8, seed) for seed, n in enumerate((400, 300, 300)))
    copies = training[:150] + 1e-3 * features(150, 8, 5)
    result = metrics.memorization_metrics(fresh, training, held_out)
    assert result["nearest_training_ratio"].value == pytest.approx(1, abs=0.15)
    assert result["memorized"].value < 0.05
    result = metrics.memorization_metrics(torch.cat([fresh[:150], copies]), training, held_out)
    assert result["memorized"].value == pytest.approx(0.5, abs=0.03)
    assert metrics.memorization_metrics(copies, training, held_out)["nearest_training_ratio"].value < 0.05
    few_known = torch.cat([held_out, training[: len(held_out) // 20]])  # as in data with duplicates
    assert metrics.memorization_metrics(training[:100], training, few_known)["memorized"].value == 1
    with pytest.raises(ValueError, match="At least half of the held-out images are among the training images"):
        metrics.memorization_metrics(fresh, training, training[:100])


def test_near_copies_are_samples_with_a_single_close_reference_image():
    reference, fresh = features(400, 24, 0), features(100, 24, 1)
    copies = reference[:50] + 1e-2 * features(50, 24, 2)
    value = metrics.near_copies(torch.cat([fresh, copies]), reference)
    assert value.value == pytest.approx(50 / 150)
    assert value.protocol == {"reference_images": 400, "images": 150}
    assert metrics.near_copies(0.1 * fresh, reference).value == 0  # close to the mean, but not to a single image
    twins = torch.cat([reference, reference])
    assert metrics.near_copies(reference[:50], twins).value == 1  # exact copies have no distance to either
    assert metrics.near_copies(copies, twins).value == 0


# ---------------------------------------------------------------------------------------------------------------------
# Invariances and errors


def test_metrics_do_not_depend_on_the_order(pair):
    samples, reference = pair
    reordered = samples.flip(0), reference.roll(37, 0)
    values, reordered_values = (
        metrics.compute_metrics(MetricInputs(a, b, Gaussian.of(b), clip_features=a))
        for a, b in ((samples, reference), reordered)
    )
    assert list(values) == ["fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "near_copies"]
    for name, metric in values.items():
        assert reordered_values[name].value == pytest.approx(metric.value, rel=1e-9, abs=1e-12), name
        assert (reordered_values[name].std or 0) == pytest.approx(metric.std or 0, rel=1e-9), name
    score, again = metrics.inception_score(samples), metrics.inception_score(reordered[0])
    assert again.value == pytest.approx(score.value, rel=1e-12)
    held_out = features(100, 24, 2)
    for name, metric in metrics.memorization_metrics(samples, reference, held_out).items():
        reordered_value = metrics.memorization_metrics(*reordered, held_out.flip(0))[name].value
        assert reordered_value == pytest.approx(metric.value, rel=1e-9)


def test_metrics_do_not_depend_on_the_number_of_rows_in_memory(pair, monkeypatch):
    held_out = features(100, 24, 2)
    whole = {**metrics.manifold_metrics(*pair), **metrics.memorization_metrics(*pair, held_out)}
    monkeypatch.setattr(metrics, "_ROWS", 7)
    parts = {**metrics.manifold_metrics(*pair), **metrics.memorization_metrics(*pair, held_out)}
    assert {n: m.value for n, m in parts.items()} == pytest.approx({n: m.value for n, m in whole.items()})


def test_the_baseline_is_half_against_half_at_the_number_of_samples():
    reference = features(600, 8, 0)
    whole, small = metrics.reference_baseline(reference, 10_000), metrics.reference_baseline(reference, 40)
    assert whole["fid"].protocol["halves"] == [300, 300] and small["fid"].protocol["halves"] == [40, 300]
    assert 0 < whole["fid"].value < small["fid"].value
    assert whole["fid"].value < fid(features(300, 8, 1, shift=0.5), reference)


def test_the_baseline_of_the_score_is_that_of_the_images_that_stand_in_for_samples():
    reference = features(40, 8, 0)
    logits = 100 * torch.eye(40)  # one class per image, so the score is the number of images in a split
    assert metrics.inception_score(logits).value == pytest.approx(40 / 10)
    assert metrics.reference_baseline(reference, 10_000, logits)["inception_score"].value == pytest.approx(20 / 10)
    assert metrics.reference_baseline(reference, 12, logits)["inception_score"].protocol["halves"] == [12, 20]
    assert "inception_score" not in metrics.reference_baseline(reference[:18], 12, logits[:18])  # nine in a half
    reordered = metrics.reference_baseline(reference.flip(0), 12, logits.flip(0))["inception_score"].value
    assert reordered == pytest.approx(metrics.reference_baseline(reference, 12, logits)["inception_score"].value)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_reported_with_their_image(pair, broken):
    samples = pair[0].clone()
    samples[17, 3] = broken
    for compute in (metrics.kernel_distance, metrics.manifold_metrics):
        with pytest.raises(ValueError, match=r"1 of 300 images are not finite, the first being image 17"):
            compute(samples, pair[1])
    with pytest.raises(ValueError, match="not finite"):
        Gaussian.of(samples)


def test_too_few_images_and_unequal_dimensions_are_rejected(pair):
    with pytest.raises(ValueError, match="1 images; this metric needs at least 2"):
        Gaussian.of(pair[0][:1])
    with pytest.raises(ValueError, match="needs at least 6"):
        metrics.manifold_metrics(pair[0][:5], pair[1])
    with pytest.raises(ValueError, match="needs at least 10"):
        metrics.inception_score(pair[0][:9])
    with pytest.raises(ValueError, match="needs at least 100"):
        metrics.memorization_metrics(*pair, features(99, 24, 0))
    with pytest.raises(ValueError, match="24 and 8 dimensions"):
        metrics.kernel_distance(pair[0], features(50, 8, 0))
    with pytest.raises(ValueError, match="24 and 8 dimensions"):
        fid(pair[0], features(50, 8, 0))
    with pytest.raises(ValueError, match="must be \\(images, dimensions\\)"):
        Gaussian.of(pair[0][0])
