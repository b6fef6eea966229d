"""The toy problem of 25 Gaussians: a generator trained with our objectives reaches the modes."""

import pytest
from tiny import ROOT


@pytest.mark.slow
def test_a_four_step_generator_covers_25_gaussians(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bench_mode_coverage import Gaussians, samples, settings, train

    gaussians = Gaussians()
    pipeline = train(gaussians, settings(0.005)["GAN, R1 every 15 steps"], seed=1, steps=800)
    coverage, fraction_at_modes = gaussians.coverage(samples(pipeline, gaussians.num_samples))
    assert coverage.modes >= 15  # 19 to 25, depending on the seed and the processor
    assert coverage.kl < 1  # that of nine equally frequent modes; 0.4 to 0.7 with other seeds
    assert fraction_at_modes > 0.3  # of uniform points between -5 and 5 it is 0.07
