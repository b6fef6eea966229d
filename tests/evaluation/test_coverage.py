"""Claims about mode coverage and class accuracy."""

import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ddgan.evaluation import coverage
from ddgan.evaluation.facts import EvaluationProtocol, ExtractorFacts, ImageProperties, SampleFacts
from ddgan.evaluation.reporting import comparability_warnings


def test_evenly_covered_modes_have_no_divergence():
    result = coverage.mode_coverage(torch.arange(1000).repeat(3), 1000)
    assert (result.modes, result.of) == (1000, 1000)
    assert result.kl == pytest.approx(0, abs=1e-12)


def test_missed_modes_cost_their_logarithm():
    result = coverage.mode_coverage(torch.arange(0, 1000, 4), 1000)
    assert result.modes == 250
    assert result.kl == pytest.approx(math.log(4))


def test_divergence_of_unevenly_covered_modes():
    result = coverage.mode_coverage(torch.tensor([0, 0, 0, 1]), 3)
    assert result.modes == 2
    assert result.kl == pytest.approx(0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3))


def test_stacked_digits_have_a_thousand_modes():
    digits = torch.cartesian_prod(*[torch.arange(10)] * 3)
    assert coverage.stacked_mnist_coverage(digits).modes == 1000
    assert coverage.stacked_mnist_coverage(digits[digits[:, 1] != 7]).modes == 900
    assert coverage.stacked_mnist_coverage(torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 3]])).modes == 2


def test_mode_counts_of_an_unusual_number_of_samples_have_a_warning():
    def warnings(count: int) -> list[str]:
        samples = SampleFacts(count, ImageProperties("8x8", 3, "PNG"))
        protocol = EvaluationProtocol(samples, None, None, ExtractorFacts("digits", "", ""), None, {})
        return comparability_warnings(protocol, channels=1, dimensions=16, bias=None, is_clip=False, counts_modes=True)

    assert not warnings(25_600)
    for count in (10_000, 50_000):
        (warning,) = warnings(count)
        assert f"counted in {count:,} samples" in warning and "count them in 25,600" in warning


def test_modes_out_of_range_and_no_samples_are_rejected():
    with pytest.raises(ValueError, match="within 0 to 9"):
        coverage.mode_coverage(torch.tensor([3, 10]), 10)
    with pytest.raises(ValueError, match="no sample"):
        coverage.mode_coverage(torch.tensor([], dtype=torch.int64), 10)


def test_the_grid_of_25_gaussians():
    centers = coverage.gaussian_grid()
    assert centers.shape == (25, 2) and centers.mean(0).tolist() == [0, 0]
    assert centers.min() == -4 and centers.max() == 4
    noise = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = centers.repeat(200, 1) + 0.05 * noise
    result, at_mode = coverage.gaussian_coverage(samples, centers, std=0.05)
    assert result.modes == 25 and result.kl == pytest.approx(0, abs=1e-3)
    assert at_mode == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # of a Gaussian in the plane within 3 std
    collapsed, _ = coverage.gaussian_coverage(samples[::25], centers, std=0.05)
    assert collapsed.modes == 1 and collapsed.kl == pytest.approx(math.log(25))
    between, at_mode = coverage.gaussian_coverage(centers + 1, centers, std=0.05)
    assert (between.modes, between.kl, at_mode) == (0, math.inf, 0)


def test_confusion_counts_and_accuracies():
    requested, predicted = torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 0, 1, 2, 0])
    counts = coverage.confusion_matrix(requested, predicted, 3)
    assert counts.tolist() == [[2, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert coverage.class_accuracies(counts) == (3 / 5, [2 / 3, None, 1 / 2])


def test_the_confusion_matrix_plot_is_darkest_where_most_samples_are():
    counts = torch.tensor([[90, 10, 0], [0, 50, 0], [5, 5, 0]])
    figure = coverage.confusion_matrix_plot(counts, ["T-shirt/top", "Bag", "2"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1, :, 0].astype(int)  # rows from the bottom, as in matplotlib
    to_pixel = figure.axes[0].transData.transform
    corners = [[to_pixel((j - 0.4, i - 0.4)).astype(int) for j in range(3)] for i in range(3)]  # beside the numbers
    shades = [[pixels[y, x] for x, y in row] for row in corners]
    assert shades[0][0] < shades[0][1] < shades[0][2] == 255
    assert shades[1][1] == 0
    assert shades[2][0] == shades[2][1] < 255
