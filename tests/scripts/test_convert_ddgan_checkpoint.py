"""The conversion of official checkpoints. That converted networks have the same outputs is tested in tests/models."""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageChops

from ddgan import DDGANDiscriminator, DDGANPipeline, NCSNpp
from ddgan.conversion.ddgan_checkpoints import (
    COMMON_ARGUMENTS,
    PUBLISHED_MODELS,
    convert_discriminator,
    convert_generator,
    generator_arguments,
    generator_config,
)
from ddgan.core.errors import InputError
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import load_pipeline
from ddgan.scripts.convert_ddgan_checkpoint import main

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
CONVERT = {
    "generator_a": convert_generator,
    "generator_c": convert_generator,
    "generator_e_cat": convert_generator,
    "discriminator_small": convert_discriminator,
}


def checkpoint(name):
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    prefix = "state_dict/"
    state_dict = {
        key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith(prefix)
    }
    return state_dict, json.loads(str(arrays["config_json"]))


@pytest.mark.parametrize("name", CONVERT)
def test_prefix_and_inferable_arguments_may_be_missing(name):
    state_dict, config = checkpoint(name)
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
def test_every_parameter_is_converted_exactly_once(name):
    state_dict, config = checkpoint(name)
    converted = CONVERT[name](state_dict, config).state_dict()
    assert sum(p.numel() for p in converted.values()) == sum(p.numel() for p in state_dict.values())


@pytest.mark.parametrize("name", CONVERT)
def test_unknown_and_missing_keys_are_listed(name):
    state_dict, config = checkpoint(name)
    del state_dict[list(state_dict)[-1]]
    state_dict["module.other.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="unknown: other") as error:
        CONVERT[name](state_dict, config)
    assert "missing: " in str(error.value)


def test_arguments_that_contradict_the_checkpoint_are_refused():
    state_dict, config = checkpoint("generator_a")
    with pytest.raises(ValueError, match="does not fit the configuration"):
        convert_generator(state_dict, {**config, "attn_resolutions": [8]})
    with pytest.raises(ValueError, match="of shape"):
        convert_generator(state_dict, {**config, "ch_mult": [1, 2, 4]})
    with pytest.raises(ValueError, match="fir_kernel"):
        convert_generator(state_dict, {**config, "fir_kernel": [1, 2, 1]})


# ---- the command line


def arguments_of(config):
    return {key: value for key, value in config.items() if key not in ("nc", "cls", "act")}


def run(*flags):
    main([str(flag) for flag in flags])


@pytest.mark.parametrize("training_state", [False, True])
def test_a_checkpoint_becomes_a_pipeline_folder(tmp_path, golden, training_state):
    generator, config = checkpoint("generator_a")
    discriminator, d_config = checkpoint("discriminator_small")
    path, output = tmp_path / "state.pth", tmp_path / "ddgan-small"
    if training_state:
        arguments = argparse.Namespace(**arguments_of({**d_config, **config}), exp="a run", lr_g=1.6e-4)
        states = {"epoch": 3, "args": arguments, "netG_dict": generator, "netD_dict": discriminator}
        torch.save({**states, "optimizerG": torch.optim.Adam([torch.zeros(1)]).state_dict()}, path)
        run("--checkpoint_path", path, "--output_dir", output, "--num_samples", 2)
    else:
        torch.save(generator, path)
        (tmp_path / "args.json").write_text(json.dumps(config))
        config_path = ("--config_path", tmp_path / "args.json")
        run("--checkpoint_path", path, *config_path, "--output_dir", output, "--num_samples", 0)

    pipe = DDGANPipeline.from_pretrained(output)
    recorded, _, _ = golden("generator_a")
    with torch.no_grad():
        x_0 = pipe.unet(recorded["input/x"], recorded["input/t"], recorded["input/z"]).sample
    torch.testing.assert_close(x_0, recorded["output"], rtol=0, atol=2e-5)
    assert pipe.scheduler.config.num_train_timesteps == config["num_timesteps"]
    assert (output / "discriminator").exists() == training_state
    if training_state:
        recorded, _, _ = golden("discriminator_small")
        logits = DDGANDiscriminator.from_pretrained(output / "discriminator")(
            recorded["input/x"], recorded["input/t"], recorded["input/x_t"]
        )
        torch.testing.assert_close(logits, recorded["output"][:, 0], rtol=0, atol=2e-5)
    metadata = ModelCard.load(output / "README.md").data
    assert (metadata.license, metadata.license_name) == ("other", "nvidia-source-code-license")
    assert metadata.license_link.startswith("https://") and "non-commercial" in metadata.tags
    card = (output / "README.md").read_text()
    assert "for non-commercial use (research or evaluation) only" in card
    assert f"Made with diffusers-ddgan {version('diffusers-ddgan')}, diffusers " in card
    assert ("](samples.png)\n\n*Seeds 0 to 1, nothing left out.*" in card) == training_state
    assert (output / "samples.png").exists() == training_state
    if training_state:
        # `from_pretrained` leaves the weights in the file, at addresses for which the CPU's kernels round differently
        aligned = load_pipeline(str(output))
        expected = image_grid([sample(aligned, [seed])[0] for seed in (0, 1)])
        assert ImageChops.difference(Image.open(output / "samples.png"), expected).getbbox() is None
    for file in ("pipeline_ddgan", "unet_ncsnpp", "scheduling_ddgan"):
        assert file in card.split("## Code")[1]


def test_recipes_describe_the_published_models():
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


def test_invalid_input_is_refused_before_anything_is_written(tmp_path):
    generator, _ = checkpoint("generator_a")
    discriminator, _ = checkpoint("discriminator_small")
    path = tmp_path / "netG.pth"

    def refused(match, state, *more):
        torch.save(state, path)
        with pytest.raises(InputError, match=match):
            run("--checkpoint_path", path, "--output_dir", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()

    refused("does not hold its training arguments.*--recipe cifar10", generator)
    refused("does not fit the configuration", generator, "--recipe", "cifar10")
    refused("holds no generator", discriminator, "--recipe", "cifar10")
    refused("cannot be read as tensors and plain values", {"all_modules.0": Path("/")}, "--recipe", "cifar10")
    refused("cannot be read: ", generator, "--config_path", tmp_path / "missing.json")
    (tmp_path / "args.json").write_text('{"num_timesteps": 4}')
    refused("lack 'image_size', which cannot be inferred", generator, "--config_path", tmp_path / "args.json")
    with pytest.raises(InputError, match="There is no checkpoint"):
        run("--checkpoint_path", tmp_path / "missing.pth", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        run("--checkpoint_path", path, "--output_dir", tmp_path)
