"""Claims about the pipelines that fine-tuning starts from: which are rejected, and why."""

import json

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVeScheduler,
)
from tiny import tiny_unet

from ddgan import DDGANScheduler
from ddgan.core.errors import InputError
from ddgan.core.locations import InMemory
from ddgan.sampling.steps import trained_steps
from ddgan.training.start_model import load_start_model


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (
            "unet vae text_encoder",
            "generates the latents of an autoencoder instead of pixels and it is conditioned on text",
        ),
        ("unet text_encoder_2", "it is conditioned on text"),
        ("unet movq", "its network generates the latents of an autoencoder instead of pixels"),
        ("unet image_encoder", "it has more components than a UNet and a scheduler"),
        ("", "it has no UNet or no scheduler"),
    ],
)
def test_other_pipelines_are_rejected_before_their_weights_are_loaded(tmp_path, components, message):
    index = {name: ["diffusers", "SomeModel"] for name in components.split()}
    index |= {"_class_name": "SomePipeline", "scheduler": ["diffusers", "DDPMScheduler"], "safety_checker": [None] * 2}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"is a SomePipeline with .*{message}[.] .* pixel-space .*UNet2D") as raised:
        load_start_model(str(tmp_path))
    assert "\n" not in str(raised.value)
    assert "safety_checker" not in str(raised.value)


@pytest.mark.parametrize(
    ("scheduler", "process"),
    [
        (FlowMatchEulerDiscreteScheduler(), "flow matching"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "flow matching"),
        (EDMEulerScheduler(), "EDM"),
        (ScoreSdeVeScheduler(), r"variance exploding \(VE\)"),
        (DDGANScheduler(4), "that of a Denoising Diffusion GAN, which samples in few steps already"),
        (CMStochasticIterativeScheduler(), "one that DDPMScheduler does not have"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_noise_processes_are_rejected(tmp_path, scheduler, process):
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=f"noise process of its scheduler is {process}.* scheduler compatible with DDPM"
    ):
        load_start_model(str(tmp_path))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_samplers_of_the_same_noise_process_are_accepted(tmp_path, scheduler):
    saved = scheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", num_train_timesteps=100)
    DDPMPipeline(tiny_unet(), saved).save_pretrained(tmp_path)
    loaded = load_start_model(str(tmp_path)).scheduler
    assert loaded.config.prediction_type == "v_prediction"
    assert loaded.alphas_cumprod.tolist() == saved.alphas_cumprod.tolist()


def test_a_pipeline_in_half_precision_is_trained_in_float32():
    pipe = DDPMPipeline(tiny_unet().bfloat16(), DDPMScheduler())
    assert load_start_model(InMemory(pipe)).unet.dtype == torch.float32
    assert pipe.unet.dtype == torch.bfloat16


def test_a_learned_variance_is_removed(tmp_path):
    unet = tiny_unet(out_channels=6)
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path)
    loaded = load_start_model(str(tmp_path))
    assert loaded.scheduler.config.variance_type == "fixed_small"
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        assert torch.equal(loaded.unet(x, t).sample, unet(x, t).sample[:, :3])


def test_a_few_step_model_loses_its_number_of_steps(tmp_path):
    """Otherwise the result of any further training would be sampled in that number of steps by default."""
    saved = DDPMScheduler(timestep_spacing="trailing")
    saved.register_to_config(_num_inference_steps=[4])
    DDPMPipeline(tiny_unet(), saved).save_pretrained(tmp_path)
    pipeline = load_start_model(str(tmp_path))
    assert not trained_steps(pipeline)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
