"""The conversion of official checkpoints. That converted networks have the same outputs is tested in tests/models."""

import pytest
import torch

from ddgan import NCSNpp
from ddgan.conversion.ddgan_checkpoints import (
    convert_discriminator,
    convert_generator,
    generator_arguments,
    generator_config,
)
from ddgan.conversion.published_models import COMMON_ARGUMENTS, PUBLISHED_MODELS

CONVERT = {
    "generator_a": convert_generator,
    "generator_c": convert_generator,
    "generator_e_cat": convert_generator,
    "discriminator_small": convert_discriminator,
}


@pytest.mark.parametrize("name", CONVERT)
def test_prefix_and_inferable_arguments_may_be_missing(golden, name):
    _, config, state_dict = golden(name)
    full = CONVERT[name](state_dict, config)
    bare = {key.removeprefix("module."): value for key, value in state_dict.items()}
    converted = CONVERT[name](bare, {"image_size": config["image_size"]})
    assert converted.config == full.config
    expected = full.state_dict()
    assert converted.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in converted.state_dict().items())


@pytest.mark.parametrize("name", ["c_fir_noconv", "d", "e_sum", "f_nofir", "h", "j_fourier", "l_unconditional"])
def test_every_argument_with_parameters_is_inferred(golden, name):
    _, config, state_dict = golden(f"generator_{name}")
    arguments = generator_arguments(state_dict, {"image_size": config["image_size"]})
    assert arguments == {key: config[key] for key in arguments}
    assert {"ch_mult", "num_res_blocks", "attn_resolutions", "nz", "n_mlp"} <= set(arguments)


@pytest.mark.parametrize("name", CONVERT)
def test_every_parameter_is_converted_exactly_once(golden, name):
    _, config, state_dict = golden(name)
    converted = CONVERT[name](state_dict, config).state_dict()
    assert sum(p.numel() for p in converted.values()) == sum(p.numel() for p in state_dict.values())


@pytest.mark.parametrize("name", CONVERT)
def test_unknown_and_missing_keys_are_listed(golden, name):
    _, config, state_dict = golden(name)
    del state_dict[list(state_dict)[-1]]
    state_dict["module.other.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown: other") as error:
        CONVERT[name](state_dict, config)
    assert "missing: " in str(error.value)


def test_arguments_that_contradict_the_checkpoint_are_refused(golden):
    _, config, state_dict = golden("generator_a")
    with pytest.raises(ValueError, match="does not fit the configuration"):
        convert_generator(state_dict, {**config, "attn_resolutions": [8]})
    with pytest.raises(ValueError, match="of shape"):
        convert_generator(state_dict, {**config, "ch_mult": [1, 2, 4]})
    with pytest.raises(ValueError, match="fir_kernel"):
        convert_generator(state_dict, {**config, "fir_kernel": [1, 2, 1]})


def test_arguments_of_the_published_models_are_complete():
    for name, width, z_layers, timesteps in (("cifar10", 128, 4, 4), ("celebahq_256", 64, 3, 2)):
        config = {
            **COMMON_ARGUMENTS,
            **PUBLISHED_MODELS[name],
            "num_channels_dae": width,
            "n_mlp": z_layers,
            "nz": 100,
            "z_emb_dim": 256,
        }
        with torch.device("meta"):
            network = NCSNpp(**generator_config(config))
        assert len(network.config.block_out_channels) == len(PUBLISHED_MODELS[name]["ch_mult"])
        assert config["num_timesteps"] == timesteps
    assert sum(p.numel() for p in network.parameters()) > 30e6
