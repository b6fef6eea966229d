"""Intermediate steps of sampling."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import level_difference, tiny_pipeline

from ddgan import DDGANScheduler
from ddgan.sampling.generation import sample
from ddgan.sampling.loading import SCHEDULERS, with_scheduler
from ddgan.sampling.traces import intermediates, trace_steps

# networks sum in another order for other batch sizes, which can change the rounding to 256 levels
ONE_LEVEL = 1


def test_default_is_all_steps_for_ddpm_and_at_most_fifty_for_others():
    pipe = tiny_pipeline(DDPMScheduler(num_train_timesteps=60))
    assert len(intermediates(pipe, 0, 100)[0]) == 60
    assert len(intermediates(with_scheduler(pipe, "ddim"), 0, 100)[0]) == 50


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_intermediates_end_in_the_final_image(name, kind):
    pipe = with_scheduler(tiny_pipeline(DDPMScheduler(prediction_type=kind)), name)
    timesteps, noisy, clean = intermediates(pipe, 5, 4, 9)
    assert len(timesteps) == len(noisy) == len(clean) == 4
    assert timesteps == sorted(timesteps, reverse=True)
    assert level_difference(clean[-1], sample(pipe, [5], 9)[0]) <= ONE_LEVEL
    assert level_difference(clean[0], clean[-1]) > 10


def test_intermediates_start_in_the_initial_noise():
    expected = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()
    for name in SCHEDULERS:
        _, noisy, _ = intermediates(with_scheduler(tiny_pipeline(), name), 5, 4, 9)
        assert np.abs(np.asarray(noisy[0]) - expected).max() <= ONE_LEVEL


def test_traced_sampling_can_be_ended_by_an_exception():
    pipe, seen = tiny_pipeline(), []

    def watch(step):
        seen.append(step)
        if step.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), trace_steps(pipe, watch):
        sample(pipe, [5, 6], 9)
    assert [(step.number, step.total) for step in seen] == [(0, 9), (1, 9), (2, 9)]
    assert all(step.noisy.shape == step.clean.shape == (2, 3, 8, 8) for step in seen)
    assert "step" not in vars(pipe.scheduler)


def test_intermediates_of_a_ddgan_hold_all_steps():
    pipe = tiny_pipeline(DDGANScheduler(num_train_timesteps=4))
    timesteps, _, clean = intermediates(pipe, 5, 10)
    assert timesteps == [3, 2, 1, 0]
    assert level_difference(clean[-1], sample(pipe, [5])[0]) == 0
