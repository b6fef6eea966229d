"""Fixtures that the tests share: recorded values, a pipeline folder, a folder of images, and runs on them."""

import json
import os
import tempfile
from pathlib import Path

# read when the libraries are imported; nothing in the tests needs the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["OMP_NUM_THREADS"] = "1"  # tiny networks only lose by more
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import close_session, constants
from huggingface_hub.hf_api import api
from local_hub import LocalHub
from tiny import finetune_flags, tiny_unet, write_images
from xdist.scheduler import LoadScopeScheduling

GOLDEN = [Path(__file__).parent / "fixtures" / "golden", Path(__file__).parents[2] / "shared" / "golden"]


# Modules whose fixtures cost more than their tests: one process runs all of such a module.
TOGETHER = ("examples/test_space.py", "hub/test_export.py")


class Scheduler(LoadScopeScheduling):
    """Gives out tests one by one, and the modules that stay together first."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if module.endswith(TOGETHER) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> Scheduler:
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list) -> None:
    """The slow ones come first, so that at the end no process is left alone with them."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def golden():
    """Reads recorded values of the published networks: their tensors, their configuration and a state_dict.

    A file that is too large for this repository is looked for beside it; without it the test is skipped.
    """

    def read(name):
        file = next((folder / f"{name}.npz" for folder in GOLDEN if (folder / f"{name}.npz").exists()), None)
        if file is None:
            pytest.skip(f"{name}.npz is too large for this repository and is not in ../shared/golden")
        arrays = dict(np.load(file, allow_pickle=False))
        config = json.loads(str(arrays.pop("config_json")))
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items() if array.dtype.kind != "U"}
        prefix = "state_dict/"
        state_dict = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        return tensors, config, state_dict

    return read


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


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A Hub on this machine; the client here, and in processes that are started from here, talks to it as `ann`."""
    with LocalHub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ann"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # the client has read them when it was imported
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(api, "endpoint", hub.url)  # of functions such as create_repo, which Diffusers calls
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        yield hub
    close_session()
