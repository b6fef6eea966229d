"""The image that push_to_hub.py compares tells pipelines of every kind apart."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny import few_step_scheduler, tiny_unet

from ddgan import (
    ClassConditionalPipeline,
    ClassConditionedUnet,
    ContextUnet,
    DDGANPipeline,
    DDGANScheduler,
    GuidedPipeline,
    NCSNpp,
)
from ddgan.hub.samples import sample_arguments

SIZES = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
DDGAN = {"sample_size": 8, "block_out_channels": (8, 12), "layers_per_block": 1, "latent_dim": 5}
PIPELINES = {
    "plain": lambda: DDPMPipeline(tiny_unet(), DDPMScheduler()),
    "few steps": lambda: DDPMPipeline(tiny_unet(), few_step_scheduler(3, 1)),
    "gray": lambda: DDPMPipeline(tiny_unet(in_channels=1, out_channels=1), DDPMScheduler()),
    "ddgan": lambda: DDGANPipeline(NCSNpp(**DDGAN, attention_resolutions=()), DDGANScheduler()),
    "ddgan by class": lambda: DDGANPipeline(
        NCSNpp(**DDGAN, attention_resolutions=(), num_class_embeds=3), DDGANScheduler()
    ),
    "by class": lambda: ClassConditionalPipeline(ClassConditionedUnet(**SIZES, **BLOCKS), DDPMScheduler()),
    "by context": lambda: ClassConditionalPipeline(ContextUnet(n_feat=8, height=8), DDIMScheduler()),
    "guided": lambda: GuidedPipeline(tiny_unet(), DDIMScheduler()),
    "guided by class": lambda: GuidedPipeline(ClassConditionedUnet(**SIZES, **BLOCKS), DDIMScheduler()),
}


def sample(pipe) -> np.ndarray:
    return pipe(**sample_arguments(pipe, 1, 2), output_type="np").images[0]


@pytest.mark.parametrize("kind", PIPELINES)
def test_the_image_depends_on_the_weights_and_on_nothing_else(kind):
    torch.manual_seed(0)
    pipe = PIPELINES[kind]()
    pipe.unet.eval()
    pipe.set_progress_bar_config(disable=True)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first = sample(pipe)
    torch.manual_seed(1)
    assert len(pipe.scheduler.timesteps) == (3 if kind == "few steps" else 2)
    assert first.shape == (8, 8, 1 if kind == "gray" else first.shape[2])
    assert np.array_equal(sample(pipe), first)
    with torch.no_grad():
        list(pipe.unet.parameters())[-1].add_(0.1)
    assert not np.array_equal(sample(pipe), first)
