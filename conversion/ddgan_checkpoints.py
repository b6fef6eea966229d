"""Official checkpoints of Denoising Diffusion GANs as `NCSNpp` and `DDGANDiscriminator`."""

import argparse
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..models.discriminator_ddgan import DDGANDiscriminator
from ..models.unet_ncsnpp import NCSNpp

# Names inside one entry of `all_modules`, theirs to ours. NIN layers are handled by `convert_layer`.
RESNET = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
    "NIN_0": "conv_shortcut",
}
ATTENTION = {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out"}
RESAMPLER = {"Conv_0": "conv", "Conv2d_0": "conv"}
COMBINER = {"Conv_0": ""}
PLAIN = {"": ""}
# the reference's arguments for the published checkpoints, beside which all three have those of COMMON
COMMON = {
    "num_channels": 3,
    "centered": True,
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
    "resamp_with_conv": True,
    "conditional": True,
    "fir": True,
    "fir_kernel": [1, 3, 3, 1],
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "embedding_type": "positional",
    "fourier_scale": 16.0,
    "not_use_tanh": False,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "use_geometric": False,
}


def read_checkpoint(path: Path) -> tuple[dict, dict | None, dict | None]:
    """State of the generator, and of the discriminator and the arguments where they are in there too.

    Raises:
        InputError: if the file is not there, holds more than tensors and plain values, or no generator.
    """
    if not path.is_file():
        raise InputError(f"--checkpoint_path {path}: there is no such file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--checkpoint_path {path} cannot be read as tensors and plain values: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"--checkpoint_path {path} holds a {type(content).__name__} and not a state of networks.")
    parts = [content, *content.values()]
    states = [part for part in parts if isinstance(part, dict) and any(map(torch.is_tensor, part.values()))]

    def holding(mark: str) -> dict | None:
        return next((state for state in states if any(mark in key for key in state)), None)

    generator, discriminator = holding("all_modules."), holding("start_conv.")
    if generator is None:
        raise InputError(f"--checkpoint_path {path} holds no generator: it has {', '.join(map(str, content))[:300]}.")
    arguments = next((vars(part) for part in parts if isinstance(part, argparse.Namespace)), None)
    return generator, discriminator, arguments


def generator_modules(config: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Our module for each of the reference's `all_modules`, in order, with the names inside it."""
    levels = len(config["ch_mult"])
    ddpm = config["resblock_type"] == "ddpm"
    with_attention = [config["image_size"] >> level in config["attn_resolutions"] for level in range(levels)]
    modules = []

    # 1. embeddings
    if config["embedding_type"] == "fourier":
        modules.append(("time_proj", PLAIN))
    if config["conditional"]:
        modules += [("time_embedding.linear_1", PLAIN), ("time_embedding.linear_2", PLAIN)]

    # 2. down
    modules.append(("conv_in", PLAIN))
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(config["num_res_blocks"]):
            modules.append((f"{block}.resnets.{i}", RESNET))
            if with_attention[level]:
                modules.append((f"{block}.attentions.{i}", ATTENTION))
        if level < levels - 1:
            modules.append((f"{block}.downsampler", RESAMPLER if ddpm else RESNET))
            if config["progressive_input"] == "input_skip":
                modules.append((f"{block}.pyramid_conv", COMBINER))
            elif config["progressive_input"] == "residual":
                modules.append((f"{block}.pyramid_downsampler", RESAMPLER))

    # 3. middle
    modules += [("mid_block.resnets.0", RESNET), ("mid_block.attention", ATTENTION), ("mid_block.resnets.1", RESNET)]

    # 4. up
    for index, level in enumerate(reversed(range(levels))):
        block = f"up_blocks.{index}"
        modules += [(f"{block}.resnets.{i}", RESNET) for i in range(config["num_res_blocks"] + 1)]
        if with_attention[level]:
            modules.append((f"{block}.attention", ATTENTION))
        if config["progressive"] == "output_skip" or (config["progressive"] == "residual" and index == 0):
            modules += [(f"{block}.pyramid_norm", PLAIN), (f"{block}.pyramid_conv", PLAIN)]
        elif config["progressive"] == "residual":
            modules.append((f"{block}.pyramid_upsampler", RESAMPLER))
        if level > 0:
            modules.append((f"{block}.upsampler", RESAMPLER if ddpm else RESNET))

    # 5. out
    if config["progressive"] != "output_skip":
        modules += [("conv_norm_out", PLAIN), ("conv_out", PLAIN)]
    return modules


def generator_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`NCSNpp`'s arguments for the reference's."""
    if list(config["fir_kernel"]) != [1, 3, 3, 1]:
        raise ValueError(f"`fir_kernel` is {config['fir_kernel']}, but only [1, 3, 3, 1] is supported.")
    return {
        "sample_size": config["image_size"],
        "in_channels": config["num_channels"],
        "out_channels": config["num_channels"],
        "block_out_channels": [config["num_channels_dae"] * multiplier for multiplier in config["ch_mult"]],
        "base_channels": config["num_channels_dae"],
        "layers_per_block": config["num_res_blocks"],
        "attention_resolutions": list(config["attn_resolutions"]),
        "latent_dim": config["nz"],
        "latent_embed_dim": config["z_emb_dim"],
        "latent_mapping_layers": config["n_mlp"],
        "resnet_type": config["resblock_type"],
        "fir": config["fir"],
        "resample_with_conv": config["resamp_with_conv"],
        "progressive_input": config["progressive_input"],
        "progressive_combine": config["progressive_combine"],
        "progressive_output": config["progressive"],
        "time_conditioning": config["conditional"],
        "time_embedding_type": config["embedding_type"],
        "fourier_scale": config["fourier_scale"],
        "skip_rescale": config["skip_rescale"],
        "center_input_sample": not config["centered"],
        "tanh_output": not config["not_use_tanh"],
        "dropout": config["dropout"],
    }


def discriminator_config(config: Mapping[str, Any], large: bool) -> dict[str, Any]:
    """`DDGANDiscriminator`'s arguments for the reference's small or large discriminator."""
    multipliers = (4, 8, 8, 8, 8, 8) if large else (2, 4, 8, 8)
    return {
        "sample_size": config["image_size"],
        "in_channels": config["nc"] // 2,
        "base_channels": 2 * config["ngf"],
        "block_out_channels": [multiplier * config["ngf"] for multiplier in multipliers],
        "down_blocks": [large or i > 0 for i in range(len(multipliers))],
        "time_embed_dim": config["t_emb_dim"],
        "near_zero_conv_out": not large,
    }


def convert_generator(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> NCSNpp:
    """
    The reference's generator as an `NCSNpp` that computes the same.

    Args:
        state_dict: its parameters, with or without the prefix `module.`.
        config: the reference's arguments by their own names; those that `generator_arguments` gives may be missing.

    Raises:
        `ValueError`: with the list of keys that do not fit.
        `KeyError`: if an argument is missing that neither the keys tell nor all published checkpoints share.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    config = generator_arguments(state_dict, config)
    modules = generator_modules(config)
    converted, unknown = {}, []
    for key, value in state_dict.items():
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", key):
            number, rest = int(match[1]), match[2]
            theirs, leaf = rest.rpartition(".")[::2]
            layer, _, inner = theirs.partition(".")
            if number >= len(modules) or layer not in modules[number][1]:
                unknown.append(key)
                continue
            ours, names = modules[number]
            if layer == "Dense_0" and not config["conditional"]:
                continue
            name = ".".join(part for part in (ours, names[layer], inner) if part)
            if leaf in ("W", "b") and layer.startswith("NIN"):
                value = value.T if leaf == "W" else value
                if leaf == "W" and names is RESNET:
                    value = value[:, :, None, None]
            leaf = {"W": "weight", "b": "bias"}.get(leaf, leaf)
            converted[f"{name}.{leaf}"] = value.contiguous()
        elif match := re.fullmatch(r"z_transform\.(\d+)\.(weight|bias)", key):
            # entry 0 is the normalisation, then a linear layer and an activation in turn
            converted[f"latent_mapping.{int(match[1]) // 2}.{match[2]}"] = value
        else:
            unknown.append(key)
    model = NCSNpp(**generator_config(config))
    load(model, converted, unknown)
    return model


def convert_discriminator(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> DDGANDiscriminator:
    """
    The reference's small or large discriminator (its number of blocks tells which) as a `DDGANDiscriminator`.

    Arguments and errors as for `convert_generator`.
    """
    names = {"start_conv": "conv_in", "final_conv": "conv_out", "end_linear": "linear_out"}
    names |= {"t_embed.main.0": "time_linear_1", "t_embed.main.2": "time_linear_2"}
    for i in range(6):
        inner = {"conv1.0": "conv1", "conv2.0": "conv2", "dense_t1": "time_emb_proj", "skip.0": "conv_shortcut"}
        names |= {f"conv{i + 1}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in inner.items()}
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    converted, unknown = {}, []
    for key, value in state_dict.items():
        layer, _, leaf = key.rpartition(".")
        if layer in names:
            converted[f"{names[layer]}.{leaf}"] = value
        else:
            unknown.append(key)
    shapes = {}
    if "start_conv.weight" in state_dict and "t_embed.main.0.weight" in state_dict:
        width, channels = state_dict["start_conv.weight"].shape[:2]
        shapes = {"nc": channels, "ngf": width // 2, "t_emb_dim": state_dict["t_embed.main.0.weight"].shape[1]}
    model = DDGANDiscriminator(**discriminator_config({**config, **shapes}, large="conv5.skip.0.weight" in state_dict))
    load(model, converted, unknown)
    return model


def generator_arguments(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of the reference's generator: those given, else as keys and shapes tell, else as usual (`COMMON`).

    The keys tell of its widths, depth, blocks, attention, embeddings and pyramids; not of what has no parameters, such
    as `image_size` (which `attn_resolutions` needs too), `skip_rescale` or `num_timesteps`.

    Args:
        state_dict: its parameters, with or without the prefix `module.`.
        config: the arguments given.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    found, entries = {}, {}
    if "z_transform.1.weight" in state_dict:
        found["z_emb_dim"], found["nz"] = state_dict["z_transform.1.weight"].shape
        found["n_mlp"] = sum(bool(re.fullmatch(r"z_transform\.\d+\.weight", key)) for key in state_dict) - 1
    for key, value in state_dict.items():
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", key):
            entries.setdefault(int(match[1]), {})[match[2]] = value
    modules = [entries.get(number, {}) for number in range(max(entries, default=-1) + 1)]  # some have no parameters
    with suppress(KeyError, ValueError, IndexError):  # where keys are missing: which ones, the conversion tells
        found |= structure(modules, config.get("image_size"))
    return {**COMMON, **found, **config}


def structure(modules: list[dict[str, torch.Tensor]], image_size: int | None) -> dict[str, Any]:
    """What the reference's `all_modules`, each with its parameters, tell of its arguments."""
    kinds = [kind_of(module) for module in modules]
    first, last = kinds.index("conv"), len(kinds) - 1 - kinds[::-1].index("resnet")
    width, channels = modules[first]["weight"].shape[:2]
    found = {"num_channels_dae": width, "num_channels": channels}
    found["embedding_type"] = "fourier" if "fourier" in kinds else "positional"
    found["conditional"] = "linear" in kinds

    blocks = [module for module, kind in zip(modules, kinds, strict=True) if kind == "resnet"]
    ddpm = any("NIN_0.W" in block for block in blocks)
    one_norm = any("GroupNorm_1.weight" in block for block in blocks)
    found["resblock_type"] = "ddpm" if ddpm else "biggan_oneadagn" if one_norm else "biggan"

    # 1. where the resolution changes, on the way down and as often on the way up: at the first of the modules between
    # two ddpm blocks, or at a biggan block whose shortcut changes no width
    if ddpm:
        inside = [kind in ("resnet", "attention") for kind in kinds]
        changes = [i for i in range(first + 2, last) if inside[i - 1] and not inside[i]]
    else:
        changes = [i for i, module in enumerate(modules) if is_resampling(module)]
    downs = changes[: len(changes) // 2]
    starts = [first + 1] + [kinds.index("resnet", down + 1) for down in downs]
    levels = len(starts)
    found["num_res_blocks"] = (len(blocks) - (0 if ddpm else len(changes)) - 2 - levels) // (2 * levels)
    found["ch_mult"] = [modules[start]["Conv_0.weight"].shape[0] // width for start in starts]
    if image_size is not None:
        attention = [level for level, start in enumerate(starts) if kinds[start + 1] == "attention"]
        found["attn_resolutions"] = [image_size >> level for level in attention]

    # 2. pyramids
    if downs:
        after = downs[0] + 1  # the pyramid's module, if it has one
        pyramid = kinds[after]
        found["progressive_input"] = {"combiner": "input_skip", "resampler": "residual"}.get(pyramid, "none")
        if pyramid == "combiner":
            summed = modules[starts[1]]["Conv_0.weight"].shape[1] == modules[after]["Conv_0.weight"].shape[0]
            found["progressive_combine"] = "sum" if summed else "cat"
        if ddpm:
            found["resamp_with_conv"] = bool(modules[downs[0]])
    found["progressive"] = "none"
    if kinds.count("norm") > 1:  # the first one is followed by what makes a picture, or features
        is_picture = modules[kinds.index("norm") + 1]["weight"].shape[0] == channels
        found["progressive"] = "output_skip" if is_picture else "residual"

    resamplers = [module for module, kind in zip(modules, kinds, strict=True) if module and kind == "resampler"]
    if resamplers:
        found["fir"] = any("Conv2d_0.weight" in module for module in resamplers)
    return found


def kind_of(module: Mapping[str, torch.Tensor]) -> str:
    """What one of the reference's `all_modules` is, by the names and shapes of its parameters."""
    if "NIN_3.W" in module:
        return "attention"
    if "Conv_1.weight" in module:
        return "resnet"
    if "W" in module:
        return "fourier"
    if "weight" in module:
        return {1: "norm", 2: "linear", 4: "conv"}.get(module["weight"].ndim, "unknown")
    if "Conv_0.weight" in module and module["Conv_0.weight"].shape[-1] == 1:
        return "combiner"
    return "resampler"  # it may have no parameters


def is_resampling(module: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is a biggan block that changes the resolution: its shortcut changes no width."""
    return "Conv_2.weight" in module and module["Conv_2.weight"].shape[0] == module["Conv_2.weight"].shape[1]


def load(model: torch.nn.Module, converted: Mapping[str, torch.Tensor], unknown: list[str]):
    """Loads the converted parameters, or raises with all that are unknown, missing, or of another shape."""
    expected = model.state_dict()
    problems = [f"not understood: {key}" for key in unknown]
    problems += [f"missing: {key}" for key in expected.keys() - converted.keys()]
    for key, value in converted.items():
        if key not in expected:
            problems.append(f"not in the network: {key}")
        elif value.shape != expected[key].shape:
            problems.append(f"of shape {list(value.shape)} instead of {list(expected[key].shape)}: {key}")
    if problems:
        raise ValueError(
            "The checkpoint does not fit the configuration; compare the arguments it was trained with. Keys:\n  "
            + "\n  ".join(sorted(problems))
        )
    model.load_state_dict(converted)
