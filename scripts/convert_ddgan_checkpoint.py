"""Official DDGAN checkpoints as this package's networks: which parameter of the one is which of the other."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ddgan import DDGANDiscriminator, NCSNpp

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
        config: the reference's arguments by their own names; those that the shapes tell may be missing.

    Raises:
        `ValueError`: with the list of keys that do not fit.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    config = {**config, **generator_shapes(state_dict)}
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


def generator_shapes(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes of the reference's parameters (without `module.`) tell of its arguments."""
    found = {}
    if "z_transform.1.weight" in state_dict:
        found["z_emb_dim"], found["nz"] = state_dict["z_transform.1.weight"].shape
        found["n_mlp"] = sum(bool(re.fullmatch(r"z_transform\.\d+\.weight", key)) for key in state_dict) - 1
    convolutions = [key for key in state_dict if re.fullmatch(r"all_modules\.\d+\.weight", key)]
    first = next((state_dict[key] for key in convolutions if state_dict[key].ndim == 4), None)
    if first is not None:
        found["num_channels_dae"], found["num_channels"] = first.shape[:2]
    return found


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
