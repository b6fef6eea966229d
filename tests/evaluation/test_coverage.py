"""Claims about modes that are found and classes that are hit."""

import math

import numpy as np
import pytest
import torch

from ddgan.evaluation import coverage, report


def test_all_modes_evenly_are_covered_without_divergence():
    found = coverage.mode_coverage(torch.arange(1000).repeat(3), 1000)
    assert (found.modes, found.of) == (1000, 1000)
    assert found.kl == pytest.approx(0, abs=1e-12)


def test_modes_that_are_missed_cost_their_logarithm():
    found = coverage.mode_coverage(torch.arange(0, 1000, 4), 1000)
    assert found.modes == 250
    assert found.kl == pytest.approx(math.log(4))


def test_divergence_of_uneven_modes():
    found = coverage.mode_coverage(torch.tensor([0, 0, 0, 1]), 3)
    assert found.modes == 2
    assert found.kl == pytest.approx(0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3))


def test_stacked_digits_are_modes_of_a_thousand():
    digits = torch.cartesian_prod(*[torch.arange(10)] * 3)
    assert coverage.stacked_mnist_coverage(digits).modes == 1000
    assert coverage.stacked_mnist_coverage(digits[digits[:, 1] != 7]).modes == 900
    assert coverage.stacked_mnist_coverage(torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 3]])).modes == 2


def test_modes_of_another_number_of_samples_than_the_papers_are_warned_about():
    def said(count: int) -> list[str]:
        samples = {"images": count, "channels": 3}
        return report.warnings(samples, None, {}, channels=1, dimensions=16, bias=None, counts_modes=True)

    assert not said(25_600)
    for count in (10_000, 50_000):
        (warning,) = said(count)
        assert f"counted in {count:,} samples" in warning and "those of 25,600" in warning


def test_modes_out_of_range_and_no_samples_are_refused():
    with pytest.raises(ValueError, match="within 0 to 9"):
        coverage.mode_coverage(torch.tensor([3, 10]), 10)
    with pytest.raises(ValueError, match="no sample"):
        coverage.mode_coverage(torch.tensor([], dtype=torch.int64), 10)


def test_25_gaussians():
    centres = coverage.gaussian_grid()
    assert centres.shape == (25, 2) and centres.mean(0).tolist() == [0, 0]
    assert centres.min() == -4 and centres.max() == 4
    noise = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = centres.repeat(200, 1) + 0.05 * noise
    found, at_one = coverage.gaussian_coverage(samples, centres, std=0.05)
    assert found.modes == 25 and found.kl == pytest.approx(0, abs=1e-3)
    assert at_one == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # of a Gaussian in the plane within 3 std
    collapsed, _ = coverage.gaussian_coverage(samples[::25], centres, std=0.05)
    assert collapsed.modes == 1 and collapsed.kl == pytest.approx(math.log(25))
    between, at_one = coverage.gaussian_coverage(centres + 1, centres, std=0.05)
    assert (between.modes, between.kl, at_one) == (0, math.inf, 0)


def test_confusion_counts_and_accuracies():
    asked, seen = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 0, 1, 2, 0])
    counts = coverage.confusion(asked, seen, 3)
    assert counts.tolist() == [[2, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert coverage.class_accuracies(counts) == (3 / 5, [2 / 3, None, 1 / 2])


def test_the_confusion_picture_is_darkest_where_most_samples_are():
    counts = torch.tensor([[90, 10, 0], [0, 50, 0], [5, 5, 0]])
    picture = coverage.confusion_picture(counts, ["T-shirt/top", "Bag", "2"])
    pixels = np.asarray(picture).astype(int)
    left = picture.width - 3 * 44 - 8
    shades = [[pixels[left + 44 * i + 3, left + 44 * j + 3] for j in range(3)] for i in range(3)]
    assert shades[0][0] < shades[0][1] < shades[0][2] == 255
    assert shades[1][1] == 0
    assert shades[2][0] == shades[2][1] < 255
