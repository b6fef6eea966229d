"""Fixtures that the tests share: a pipeline folder, a folder of images, and runs on them."""

import os
import tempfile
from pathlib import Path

# read when the libraries are imported; nothing in the tests needs the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny import finetune_flags, tiny_unet, write_images

torch.set_num_threads(1)  # tiny networks only lose by more


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A DDPMPipeline folder, with dropout, so that what a network draws by itself is tested too."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDPMPipeline(tiny_unet(dropout=0.1), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """13 images, so that windows of 8 leave a short one of 5 at the end of each epoch."""
    return write_images(tmp_path_factory.mktemp("data") / "thirteen", 13)


@pytest.fixture
def finetune(tiny_model, images, tmp_path):
    """Run finetune_model.py's main in this process on the tiny model and images; returns the run folder."""
    from accelerate.state import AcceleratorState

    from ddgan import finetune_model

    def run(name: str, *flags) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune_model.main(finetune_flags(tiny_model, images, tmp_path / name, *flags))
        return tmp_path / name

    return run
