"""Sampling starts from noise, whatever the scheduler and the number of steps."""

import numpy as np
import pytest
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from tiny import tiny_pipeline, tiny_unet

from ddgan import ClassConditionalPipeline, DDGANScheduler
from ddgan.core.errors import InputError
from ddgan.sampling.generation import PipelineSampler, sample
from ddgan.sampling.loading import SCHEDULERS, ddim_usage, load_pipeline, with_scheduler
from ddgan.sampling.spacing import changed_spacing
from ddgan.sampling.steps import default_steps

PROCESSES = {
    "plain": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "offset": {"steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["as-saved", *SCHEDULERS])
def test_every_number_of_steps_starts_from_noise_and_gives_an_image(process, name):
    pipe = tiny_pipeline(DDPMScheduler(num_train_timesteps=10, **PROCESSES[process]))
    for steps in (1, 7, 10):
        changed = with_scheduler(pipe, name, steps)
        (image,) = sample(changed, [0], steps)
        assert len(changed.scheduler.timesteps) == steps
        assert changed.scheduler.timesteps[0] == 9
        assert np.asarray(image).std() > 5


@pytest.mark.parametrize(
    ("steps", "first", "spacing"),
    [(50, 980, "leading"), (40, 975, "leading"), (1000, 999, "leading")]
    + [(steps, 999, "trailing") for steps in (1, 4, 334, 400, 600, 900)]
    + [(223, 999, "linspace")],  # Diffusers would add a timestep -1 to trailing ones
)
def test_timesteps_are_changed_only_if_they_start_too_early(steps, first, spacing):
    pipe = tiny_pipeline(DDIMScheduler())
    changed = with_scheduler(pipe, "ddim", steps)
    changed.scheduler.set_timesteps(steps)
    assert (len(changed.scheduler.timesteps), changed.scheduler.timesteps[0]) == (steps, first)
    assert changed.scheduler.config.timestep_spacing == spacing
    assert changed_spacing(pipe, changed.scheduler) == ({} if spacing == "leading" else {"timestep_spacing": spacing})
    assert pipe.scheduler.config.timestep_spacing == "leading"


def test_an_unsupported_schedule_of_betas_is_passed_as_its_values():
    pipe = tiny_pipeline(DDPMScheduler(beta_schedule="sigmoid"))
    for name in SCHEDULERS:
        betas = with_scheduler(pipe, name, 10).scheduler.betas
        assert (betas == pipe.scheduler.betas).all()


def test_a_pipeline_samples_the_same_before_it_is_saved_and_after(tmp_path):
    pipe = tiny_pipeline(DDPMScheduler(num_train_timesteps=40))
    pipe.save_pretrained(tmp_path)
    for name in SCHEDULERS:
        configs = [dict(with_scheduler(p, name, 5).scheduler.config) for p in (pipe, load_pipeline(str(tmp_path)))]
        for key in ("timestep_spacing", "num_train_timesteps", "steps_offset"):
            assert configs[0].get(key) == configs[1].get(key)


@pytest.mark.parametrize("name", ["dpmsolver", "unipc"])
def test_timesteps_that_coincide_are_reported_instead_of_failing_inside_a_scheduler(name):
    config = {**DDPMScheduler(beta_schedule="squaredcos_cap_v2").config, "use_karras_sigmas": True}
    pipe = tiny_pipeline(DDPMScheduler.from_config(config))
    with pytest.raises(InputError, match=r"has no timesteps .* in 50 steps .*Use fewer steps, or another scheduler"):
        with_scheduler(pipe, name, 50)


def test_the_spacing_is_part_of_the_protocol_and_of_the_usage_on_a_card():
    pipe = tiny_pipeline()
    assert "timestep_spacing" not in PipelineSampler("ddim", 50).protocol(pipe)
    assert PipelineSampler("ddim", 5).protocol(pipe)["timestep_spacing"] == "trailing"
    assert ddim_usage(pipe, 50).endswith("from_config(pipe.scheduler.config)")
    assert ddim_usage(pipe, 5).endswith('from_config(pipe.scheduler.config, timestep_spacing="trailing")')
    with pytest.raises(InputError, match="1001 inference steps are more than the 1000 timesteps"):
        PipelineSampler("ddim", 1001).protocol(pipe)


def test_the_default_number_of_steps_starts_from_noise_too():
    pipe = DDIMPipeline(tiny_unet().eval(), DDIMScheduler(num_train_timesteps=80))
    assert default_steps(pipe) == 50
    assert with_scheduler(pipe, "as-saved").scheduler.config.timestep_spacing == "trailing"
    pipe = ClassConditionalPipeline(tiny_unet(num_class_embeds=3), DDPMScheduler(num_train_timesteps=80))
    assert with_scheduler(pipe, "ddim").scheduler.config.timestep_spacing == "trailing"


def test_other_noise_processes_are_left_alone():
    pipe = tiny_pipeline(DDGANScheduler())
    assert with_scheduler(pipe, "as-saved", 4) is pipe
