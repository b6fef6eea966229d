"""scripts/convert_ddgan_checkpoint.py, through its command line."""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageChops

from ddgan import DDGANDiscriminator, DDGANPipeline, api
from ddgan.commands.arguments import ConvertArguments
from ddgan.commands.convert import convert
from ddgan.core.errors import InputError
from ddgan.core.locks import locked
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import image_grid
from ddgan.sampling.loading import load_pipeline
from ddgan.scripts.convert_ddgan_checkpoint import main


def arguments_of(config):
    return {key: value for key, value in config.items() if key not in ("nc", "cls", "act")}


def run(*flags):
    main([str(flag) for flag in flags])


@pytest.mark.parametrize("training_state", [False, True])
def test_a_checkpoint_becomes_a_pipeline_folder(tmp_path, golden, training_state):
    _, config, generator = golden("generator_a")
    _, d_config, discriminator = golden("discriminator_small")
    raw = {key: value + 1 for key, value in generator.items()}  # the EMA weights are recorded
    ema = {i: {"ema": value, "exp_avg": value} for i, value in enumerate(generator.values())}
    optimizers = {"optimizerD": torch.optim.Adam([torch.zeros(1)]).state_dict(), "optimizerG": {"state": ema}}
    path, output = tmp_path / "state.pth", tmp_path / "ddgan-small"
    if training_state:
        arguments = argparse.Namespace(**arguments_of({**d_config, **config}), exp="a run", lr_g=1.6e-4)
        states = {"epoch": 3, "args": arguments, "netG_dict": raw, "netD_dict": discriminator}
        torch.save({**states, **optimizers}, path)
        run("--checkpoint_path", path, "--output_dir", output, "--num_samples", 2)
    else:
        torch.save(generator, path)
        (tmp_path / "args.json").write_text(json.dumps(config))
        paths = {"checkpoint_path": path, "config_path": tmp_path / "args.json", "output_dir": output}
        assert api.convert(**paths, num_samples=0) == output

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
    assert f"| network | NCSNpp, {pipe.unet.num_parameters():,} parameters |" in card
    assert f"| image size | {config['image_size']}x{config['image_size']}, " in card
    assert f"Made with diffusers-ddgan {version('diffusers-ddgan')}, diffusers " in card
    assert ("](samples.png)\n\n*Seeds 0 to 1, uncurated.*" in card) == training_state
    assert (output / "samples.png").exists() == training_state
    assert ("| weights | EMA, from the state of the optimizer |" in card) == training_state
    if training_state:
        # `from_pretrained` leaves the weights in the file, at addresses for which the CPU's kernels round differently
        aligned = load_pipeline(str(output))
        expected = image_grid([sample(aligned, [seed])[0] for seed in (0, 1)])
        assert ImageChops.difference(Image.open(output / "samples.png"), expected).getbbox() is None
    for file in ("pipeline_ddgan", "unet_ncsnpp", "scheduling_ddgan"):
        assert file in card.split("## Code")[1]


def test_invalid_input_is_refused_before_anything_is_written(tmp_path, golden):
    _, _, generator = golden("generator_a")
    _, _, discriminator = golden("discriminator_small")
    path = tmp_path / "netG.pth"

    def refused(match, state, *more):
        torch.save(state, path)
        with pytest.raises(InputError, match=match):
            run("--checkpoint_path", path, "--output_dir", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()

    refused("does not contain its training arguments.*--recipe cifar10", generator)
    refused("does not fit the configuration", generator, "--recipe", "cifar10")
    refused("contains no generator", discriminator, "--recipe", "cifar10")
    refused("contains no generator", {1: torch.zeros(1)}, "--recipe", "cifar10")
    key = next(key for key in generator if "all_modules" in key)
    refused(f"{key} in the checkpoint .* is a str instead of a tensor", {**generator, key: "a"}, "--recipe", "cifar10")
    far = {**generator, "all_modules.99999999.weight": torch.zeros(1)}
    refused("entries of `all_modules`, but one with number 99999999", far, "--recipe", "cifar10")
    refused("cannot be converted", {**generator, key: torch.zeros(())}, "--recipe", "cifar10")
    refused("cannot be read as tensors and plain values", {"all_modules.0": Path("/")}, "--recipe", "cifar10")
    refused(r"--config_path .*missing\.json does not exist", generator, "--config_path", tmp_path / "missing.json")
    (tmp_path / "args.json").write_text('{"num_timesteps": 4}')
    refused("lack 'image_size', which cannot be inferred", generator, "--config_path", tmp_path / "args.json")
    for content in (b"", b"PK\3\4", b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as tensors and plain values"):
            run("--checkpoint_path", path, "--recipe", "cifar10", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        run("--checkpoint_path", tmp_path / "missing.pth", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="is a folder: name the file in it"):
        run("--checkpoint_path", tmp_path, "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        run("--checkpoint_path", path, "--output_dir", tmp_path)
    arguments = ConvertArguments(str(path), output_dir=str(tmp_path / "out"))
    with locked(tmp_path / "out"), pytest.raises(InputError, match=r"out is in use"):
        convert(arguments)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / ".tmp-files").mkdir(parents=True)  # as a killed command leaves them
    (tmp_path / "out" / ".lock").touch()
    ConvertArguments(str(path), output_dir=str(tmp_path / "out"))


def test_the_base_installation_is_enough(tmp_path, golden):
    _, config, generator = golden("generator_a")
    torch.save(generator, tmp_path / "state.pth")
    (tmp_path / "args.json").write_text(json.dumps(config))
    flags = "--checkpoint_path state.pth --config_path args.json --output_dir converted --num_samples 2"
    missing = ("accelerate", "datasets", "matplotlib", "tensorboard")
    program = f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
    program += f"from ddgan.scripts.convert_ddgan_checkpoint import main\nmain({flags.split()})"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    card = (tmp_path / "converted" / "README.md").read_text()
    assert f"torch {version('torch')}." in card and "accelerate" not in card
