"""Shared fixtures: recorded values, a pipeline folder, a folder of images, training runs, and a local Hub."""

import json
import os
import signal
import tempfile
from pathlib import Path

# set before the libraries are imported, because they read these on import; no test needs the network
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["OMP_NUM_THREADS"] = "1"  # more threads only slow tiny networks down
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
# modules whose fixtures take longer than their tests: a single process runs the whole module
TOGETHER = ("examples/test_space.py", "hub/test_export.py", "test_wheel.py", "test_start_up.py")


class Scheduler(LoadScopeScheduling):
    """Distribute tests one by one, starting with the modules that stay together."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return module if module.endswith(TOGETHER) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log) -> Scheduler:
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list) -> None:
    """Run slow tests first, so that none of them is left for the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the handlers that a launcher in this process has replaced."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def golden():
    """Return a function that reads the recorded tensors, configuration and state dict of a published network.

    Files that are too large for this repository are looked up next to it; if they are missing, the test is skipped.
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
    """A DDPMPipeline folder; the network has dropout, so that its random numbers are tested too."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDPMPipeline(tiny_unet(dropout=0.1), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """The folder of a tiny CLIP model."""
    from tiny_clip import save_clip  # imports Transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip"
    save_clip(folder)
    return folder


@pytest.fixture
def two_threads():
    """Set the number of threads of PyTorch to 2."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """13 images, so that with batches of 8 the last one of each epoch has 5."""
    return write_images(tmp_path_factory.mktemp("data") / "thirteen", 13)


@pytest.fixture
def finetune(tiny_model, images, tmp_path):
    """Return a function that runs finetune_model.py in this process on `tiny_model` and `images`."""
    from accelerate.state import AcceleratorState

    from ddgan import finetune_model

    def run(name: str, *flags) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune_model.main(finetune_flags(tiny_model, images, tmp_path / name, *flags))
        return tmp_path / name

    return run


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A local Hub; the client in this process and its child processes is logged in as `ann`."""
    with LocalHub() as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_ann"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        # the client read these when it was imported
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(api, "endpoint", hub.url)  # used by functions such as create_repo, which Diffusers calls
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        yield hub
    close_session()
