"""Recorded values of the published networks: weights, inputs, outputs and gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

IN_THIS_REPOSITORY = Path(__file__).parents[1] / "fixtures" / "golden"
BESIDE_IT = Path(__file__).parents[3] / "shared" / "golden"


@pytest.fixture(scope="session")
def golden():
    """Reads a file into its tensors, its configuration and its state_dict; skips the test if there is none."""

    def read(name):
        files = [folder / f"{name}.npz" for folder in (IN_THIS_REPOSITORY, BESIDE_IT)]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            pytest.skip(f"{name}.npz is too large for this repository and is not in ../shared/golden")
        arrays = dict(np.load(file, allow_pickle=False))
        config = json.loads(str(arrays.pop("config_json")))
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        prefix = "state_dict/"
        state_dict = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        return tensors, config, state_dict

    return read
