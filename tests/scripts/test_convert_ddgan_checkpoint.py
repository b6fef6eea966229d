"""Claims about the conversion of official checkpoints; that converted networks compute the same is in tests/models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddgan.scripts.convert_ddgan_checkpoint import convert_discriminator, convert_generator

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SHAPES_TELL = {
    "generator_a": ("nz", "z_emb_dim", "n_mlp", "num_channels", "num_channels_dae"),
    "discriminator_small": ("nc", "ngf", "t_emb_dim"),
}
CONVERT = {"generator_a": convert_generator, "discriminator_small": convert_discriminator}


def checkpoint(name):
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    prefix = "state_dict/"
    state_dict = {
        key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(prefix)
    }
    return state_dict, json.loads(str(arrays["config_json"]))


@pytest.mark.parametrize("name", CONVERT)
def test_prefix_and_arguments_that_the_shapes_tell_may_be_missing(name):
    state_dict, config = checkpoint(name)
    full = CONVERT[name](state_dict, config).state_dict()
    bare = {key.removeprefix("module."): value for key, value in state_dict.items()}
    less = {key: value for key, value in config.items() if key not in SHAPES_TELL[name]}
    converted = CONVERT[name](bare, less).state_dict()
    assert converted.keys() == full.keys()
    assert all(torch.equal(converted[key], full[key]) for key in full)


@pytest.mark.parametrize("name", CONVERT)
def test_every_parameter_finds_its_place_once(name):
    state_dict, config = checkpoint(name)
    converted = CONVERT[name](state_dict, config).state_dict()
    assert sum(p.numel() for p in converted.values()) == sum(p.numel() for p in state_dict.values())


@pytest.mark.parametrize("name", CONVERT)
def test_keys_that_do_not_fit_are_listed(name):
    state_dict, config = checkpoint(name)
    lost = list(state_dict)[-1]
    del state_dict[lost]
    state_dict["module.unheard_of.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="not understood: unheard_of") as error:
        CONVERT[name](state_dict, config)
    assert "missing: " in str(error.value)


def test_wrong_arguments_are_told_from_the_keys():
    state_dict, config = checkpoint("generator_a")
    with pytest.raises(ValueError, match="does not fit the configuration"):
        convert_generator(state_dict, {**config, "attn_resolutions": [8]})
    with pytest.raises(ValueError, match="of shape"):
        convert_generator(state_dict, {**config, "ch_mult": [1, 2, 4]})
    with pytest.raises(ValueError, match="fir_kernel"):
        convert_generator(state_dict, {**config, "fir_kernel": [1, 2, 1]})
