"""Convert official checkpoints of Denoising Diffusion GANs to `NCSNpp` and `DDGANDiscriminator`.

"Original" is NVIDIA's implementation (https://github.com/NVlabs/denoising-diffusion-gan). Its networks are defined by
command-line arguments, here called arguments, and its generator keeps all layers in one list, `all_modules`.
"""

import argparse
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.errors import InputError
from ..models.discriminator_ddgan import DDGANDiscriminator
from ..models.unet_ncsnpp import NCSNpp
from .published_models import COMMON_ARGUMENTS

# layer names inside one entry of `all_modules`: original name -> name in this package
_RESNET = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
    "NIN_0": "conv_shortcut",
}
_ATTENTION = {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out"}
_RESAMPLER = {"Conv_0": "conv", "Conv2d_0": "conv"}
_COMBINER = {"Conv_0": ""}
_PLAIN = {"": ""}

Arguments = Mapping[str, Any]
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint.

    Attributes:
        generator: parameters of the generator: the EMA weights if the file has them.
        is_ema: whether the optimizer state of a full training state contained EMA weights, which netG_*.pth files
            have already.
        discriminator: parameters of the discriminator, if the file has them.
        arguments: arguments of the training run, if the file has them.
    """

    generator: dict[str, torch.Tensor]
    is_ema: bool
    discriminator: dict[str, torch.Tensor] | None
    arguments: dict[str, Any] | None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the weights of a generator (netG_*.pth) or a full training state (content.pth).

    Raises:
        InputError: if there is no such file, it contains more than tensors and plain values, or has no generator.
    """
    if path.is_dir():
        raise InputError(f"The checkpoint {path} is a folder: name the file in it, netG_*.pth or content.pth.")
    if not path.is_file():
        raise InputError(f"The checkpoint {path} does not exist.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"The checkpoint {path} cannot be read as tensors and plain values: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"The checkpoint {path} contains a {type(content).__name__} instead of a state dict.")
    values = [content, *content.values()]
    states = [
        value
        for value in values
        if isinstance(value, dict)
        and any(map(torch.is_tensor, value.values()))
        and all(isinstance(key, str) for key in value)
    ]

    def find_state(key_part: str) -> dict[str, torch.Tensor] | None:
        found = next((state for state in states if any(key_part in key for key in state)), None)
        for key, value in (found or {}).items():
            if not torch.is_tensor(value):
                raise InputError(f"{key} in the checkpoint {path} is a {type(value).__name__} instead of a tensor.")
        return found

    generator = find_state("all_modules.")
    if generator is None:
        keys = ", ".join(map(str, content))[:300]
        raise InputError(f"The checkpoint {path} contains no generator: its keys are {keys}.")
    arguments = next((vars(value) for value in values if isinstance(value, argparse.Namespace)), None)
    ema = _ema_weights(generator, content)
    return Checkpoint(ema or generator, ema is not None, find_state("start_conv."), arguments)


def _ema_weights(generator: State, content: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Return the EMA weights of the generator from the state of its optimizer, None if there are none.

    The optimizer numbers the parameters in their order, and has no state for those that are not trained.
    """
    keys = list(generator)
    for value in content.values():
        state = value.get("state") if isinstance(value, dict) else None
        if not isinstance(state, dict) or not state or not all(isinstance(index, int) for index in state):
            continue
        ema = {index: entry["ema"] for index, entry in state.items() if isinstance(entry, dict) and "ema" in entry}
        if len(ema) == len(state) and all(
            torch.is_tensor(weights) and index in range(len(keys)) and weights.shape == generator[keys[index]].shape
            for index, weights in ema.items()
        ):
            return {**generator, **{keys[index]: weights for index, weights in ema.items()}}
    return None


def _generator_modules(arguments: Arguments) -> list[tuple[str, dict[str, str]]]:
    """Return the `NCSNpp` module for each entry of `all_modules`, in order, with its layer names."""
    levels = len(arguments["ch_mult"])
    ddpm = arguments["resblock_type"] == "ddpm"
    image_size, attention_resolutions = arguments["image_size"], arguments["attn_resolutions"]
    with_attention = [image_size >> level in attention_resolutions for level in range(levels)]
    modules = []

    # 1. embeddings
    if arguments["embedding_type"] == "fourier":
        modules.append(("time_proj", _PLAIN))
    if arguments["conditional"]:
        modules += [("time_embedding.linear_1", _PLAIN), ("time_embedding.linear_2", _PLAIN)]

    # 2. down
    modules.append(("conv_in", _PLAIN))
    for level in range(levels):
        block = f"down_blocks.{level}"
        for i in range(arguments["num_res_blocks"]):
            modules.append((f"{block}.resnets.{i}", _RESNET))
            if with_attention[level]:
                modules.append((f"{block}.attentions.{i}", _ATTENTION))
        if level < levels - 1:
            modules.append((f"{block}.downsampler", _RESAMPLER if ddpm else _RESNET))
            if arguments["progressive_input"] == "input_skip":
                modules.append((f"{block}.pyramid_conv", _COMBINER))
            elif arguments["progressive_input"] == "residual":
                modules.append((f"{block}.pyramid_downsampler", _RESAMPLER))

    # 3. middle
    modules += [
        ("mid_block.resnets.0", _RESNET),
        ("mid_block.attention", _ATTENTION),
        ("mid_block.resnets.1", _RESNET),
    ]

    # 4. up
    for index, level in enumerate(reversed(range(levels))):
        block = f"up_blocks.{index}"
        modules += [(f"{block}.resnets.{i}", _RESNET) for i in range(arguments["num_res_blocks"] + 1)]
        if with_attention[level]:
            modules.append((f"{block}.attention", _ATTENTION))
        if arguments["progressive"] == "output_skip" or (arguments["progressive"] == "residual" and index == 0):
            modules += [(f"{block}.pyramid_norm", _PLAIN), (f"{block}.pyramid_conv", _PLAIN)]
        elif arguments["progressive"] == "residual":
            modules.append((f"{block}.pyramid_upsampler", _RESAMPLER))
        if level > 0:
            modules.append((f"{block}.upsampler", _RESAMPLER if ddpm else _RESNET))

    # 5. out
    if arguments["progressive"] != "output_skip":
        modules += [("conv_norm_out", _PLAIN), ("conv_out", _PLAIN)]
    return modules


def generator_config(arguments: Arguments) -> dict[str, Any]:
    """Return the config of `NCSNpp` for the original arguments.

    Raises:
        ValueError: if `fir_kernel` is not [1, 3, 3, 1].
    """
    if list(arguments["fir_kernel"]) != [1, 3, 3, 1]:
        raise ValueError(f"`fir_kernel` is {arguments['fir_kernel']}, but only [1, 3, 3, 1] is supported.")
    return {
        "sample_size": arguments["image_size"],
        "in_channels": arguments["num_channels"],
        "out_channels": arguments["num_channels"],
        "block_out_channels": [arguments["num_channels_dae"] * multiplier for multiplier in arguments["ch_mult"]],
        "base_channels": arguments["num_channels_dae"],
        "layers_per_block": arguments["num_res_blocks"],
        "attention_resolutions": list(arguments["attn_resolutions"]),
        "latent_dim": arguments["nz"],
        "latent_embed_dim": arguments["z_emb_dim"],
        "latent_mapping_layers": arguments["n_mlp"],
        "resnet_type": arguments["resblock_type"],
        "fir": arguments["fir"],
        "resample_with_conv": arguments["resamp_with_conv"],
        "progressive_input": arguments["progressive_input"],
        "progressive_combine": arguments["progressive_combine"],
        "progressive_output": arguments["progressive"],
        "time_conditioning": arguments["conditional"],
        "time_embedding_type": arguments["embedding_type"],
        "fourier_scale": arguments["fourier_scale"],
        "skip_rescale": arguments["skip_rescale"],
        "center_input_sample": not arguments["centered"],
        "tanh_output": not arguments["not_use_tanh"],
        "dropout": arguments["dropout"],
    }


def _discriminator_config(arguments: Arguments, large: bool) -> dict[str, Any]:
    """Return the config of `DDGANDiscriminator` for the original small or large discriminator."""
    multipliers = (4, 8, 8, 8, 8, 8) if large else (2, 4, 8, 8)
    return {
        "sample_size": arguments["image_size"],
        "in_channels": arguments["nc"] // 2,
        "base_channels": 2 * arguments["ngf"],
        "block_out_channels": [multiplier * arguments["ngf"] for multiplier in multipliers],
        "down_blocks": [large or i > 0 for i in range(len(multipliers))],
        "time_embed_dim": arguments["t_emb_dim"],
        "near_zero_conv_out": not large,
    }


def convert_generator(state_dict: State, arguments: Arguments) -> NCSNpp:
    """Convert the original generator to an `NCSNpp` with the same outputs.

    Args:
        state_dict: parameters of the generator, with or without the prefix `module.`.
        arguments: original arguments; those that `generator_arguments` can complete may be missing.

    Raises:
        ValueError: if the parameters do not fit the arguments; the message lists all affected keys.
        KeyError: if an argument is missing that can neither be inferred nor is common to the published models.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    arguments = generator_arguments(state_dict, arguments)
    modules = _generator_modules(arguments)
    converted, unknown = {}, []
    for key, value in state_dict.items():
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", key):
            index, path = int(match[1]), match[2]
            layer_path, _, parameter = path.rpartition(".")
            layer, _, inner = layer_path.partition(".")
            if index >= len(modules) or layer not in modules[index][1]:
                unknown.append(key)
                continue
            module, layer_names = modules[index]
            if layer == "Dense_0" and not arguments["conditional"]:
                continue
            name = ".".join(part for part in (module, layer_names[layer], inner) if part)
            if parameter == "W" and layer.startswith("NIN"):  # "network in network": a 1x1 convolution, transposed
                value = value.T
                if layer_names is _RESNET:
                    value = value[:, :, None, None]
            parameter = {"W": "weight", "b": "bias"}.get(parameter, parameter)
            converted[f"{name}.{parameter}"] = value.contiguous()
        elif match := re.fullmatch(r"z_transform\.(\d+)\.(weight|bias)", key):
            # entry 0 is the normalization, followed by alternating linear layers and activations
            converted[f"latent_mapping.{int(match[1]) // 2}.{match[2]}"] = value
        else:
            unknown.append(key)
    model = NCSNpp(**generator_config(arguments))
    _load_converted(model, converted, unknown)
    return model


def convert_discriminator(state_dict: State, arguments: Arguments) -> DDGANDiscriminator:
    """Convert the original discriminator, small or large by its number of blocks, to a `DDGANDiscriminator`.

    Args:
        state_dict: parameters of the discriminator, with or without the prefix `module.`.
        arguments: original arguments; only `image_size` is not inferred from the parameters.

    Raises:
        ValueError: if the parameters do not fit; the message lists all affected keys.
        KeyError: if an argument is missing.
    """
    names = {"start_conv": "conv_in", "final_conv": "conv_out", "end_linear": "linear_out"}
    names |= {"t_embed.main.0": "time_linear_1", "t_embed.main.2": "time_linear_2"}
    for i in range(6):
        layers = {"conv1.0": "conv1", "conv2.0": "conv2", "dense_t1": "time_emb_proj", "skip.0": "conv_shortcut"}
        names |= {f"conv{i + 1}.{layer}": f"blocks.{i}.{name}" for layer, name in layers.items()}
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    converted, unknown = {}, []
    for key, value in state_dict.items():
        layer, _, parameter = key.rpartition(".")
        if layer in names:
            converted[f"{names[layer]}.{parameter}"] = value
        else:
            unknown.append(key)
    shapes = {}
    if "start_conv.weight" in state_dict and "t_embed.main.0.weight" in state_dict:
        width, channels = state_dict["start_conv.weight"].shape[:2]
        shapes = {"nc": channels, "ngf": width // 2, "t_emb_dim": state_dict["t_embed.main.0.weight"].shape[1]}
    large = "conv5.skip.0.weight" in state_dict
    model = DDGANDiscriminator(**_discriminator_config({**arguments, **shapes}, large))
    _load_converted(model, converted, unknown)
    return model


def generator_arguments(state_dict: State, arguments: Arguments) -> dict[str, Any]:
    """Complete the arguments of the original generator.

    Missing arguments are inferred from keys and shapes: widths, depth, blocks, attention, embeddings and pyramids.
    Those that the parameters do not reveal, such as `skip_rescale`, default to `COMMON_ARGUMENTS`. `image_size`
    (which `attn_resolutions` depends on) and `num_timesteps` are not completed.

    Args:
        state_dict: parameters of the generator, with or without the prefix `module.`.
        arguments: known arguments, which take precedence.

    Raises:
        ValueError: if the entries of `all_modules` are not numbered consecutively.
    """
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    inferred, entries = {}, {}
    if "z_transform.1.weight" in state_dict:
        inferred["z_emb_dim"], inferred["nz"] = state_dict["z_transform.1.weight"].shape
        inferred["n_mlp"] = sum(bool(re.fullmatch(r"z_transform\.\d+\.weight", key)) for key in state_dict) - 1
    for key, value in state_dict.items():
        if match := re.fullmatch(r"all_modules\.(\d+)\.(.+)", key):
            entries.setdefault(int(match[1]), {})[match[2]] = value
    count = max(entries, default=-1) + 1
    if count > 2 * len(entries) + 10:  # few entries have no parameters
        raise ValueError(
            f"The checkpoint has {len(entries)} entries of `all_modules`, but one with number {count - 1}."
        )
    modules = [entries.get(index, {}) for index in range(count)]
    with suppress(KeyError, ValueError, IndexError):  # if keys are missing, the conversion lists them
        inferred |= infer_arguments(modules, arguments.get("image_size"))
    return {**COMMON_ARGUMENTS, **inferred, **arguments}


def infer_arguments(modules: list[dict[str, torch.Tensor]], image_size: int | None) -> dict[str, Any]:
    """Infer original arguments from the parameters of each entry of `all_modules`.

    Args:
        modules: parameters of each entry, keyed by their names inside it.
        image_size: height and width of the images; without it `attn_resolutions` is not inferred.

    Raises:
        KeyError, ValueError, IndexError: if parameters are missing.
    """
    kinds = [_module_kind(module) for module in modules]
    first, last = kinds.index("conv"), len(kinds) - 1 - kinds[::-1].index("resnet")
    width, channels = modules[first]["weight"].shape[:2]
    arguments: dict[str, Any] = {"num_channels_dae": width, "num_channels": channels}
    arguments["embedding_type"] = "fourier" if "fourier" in kinds else "positional"
    arguments["conditional"] = "linear" in kinds

    blocks = [module for module, kind in zip(modules, kinds, strict=True) if kind == "resnet"]
    ddpm = any("NIN_0.W" in block for block in blocks)
    one_norm = any("GroupNorm_1.weight" in block for block in blocks)
    arguments["resblock_type"] = "ddpm" if ddpm else "biggan_oneadagn" if one_norm else "biggan"

    # 1. levels: find the modules that change the resolution, as many in the decoder as in the encoder. For ddpm this
    # is the first module between two blocks, for biggan a block whose shortcut does not change the width.
    if ddpm:
        inside = [kind in ("resnet", "attention") for kind in kinds]
        changes = [i for i in range(first + 2, last) if inside[i - 1] and not inside[i]]
    else:
        changes = [i for i, module in enumerate(modules) if _is_resampling(module)]
    downs = changes[: len(changes) // 2]
    starts = [first + 1] + [kinds.index("resnet", down + 1) for down in downs]
    levels = len(starts)
    arguments["num_res_blocks"] = (len(blocks) - (0 if ddpm else len(changes)) - 2 - levels) // (2 * levels)
    arguments["ch_mult"] = [modules[start]["Conv_0.weight"].shape[0] // width for start in starts]
    if image_size is not None:
        attention = [level for level, start in enumerate(starts) if kinds[start + 1] == "attention"]
        arguments["attn_resolutions"] = [image_size >> level for level in attention]

    # 2. pyramids
    if downs:
        pyramid_index = downs[0] + 1  # if there is a pyramid
        pyramid = kinds[pyramid_index]
        arguments["progressive_input"] = {"combiner": "input_skip", "resampler": "residual"}.get(pyramid, "none")
        if pyramid == "combiner":
            summed = modules[starts[1]]["Conv_0.weight"].shape[1] == modules[pyramid_index]["Conv_0.weight"].shape[0]
            arguments["progressive_combine"] = "sum" if summed else "cat"
        if ddpm:
            arguments["resamp_with_conv"] = bool(modules[downs[0]])
    arguments["progressive"] = "none"
    if kinds.count("norm") > 1:  # the first one precedes the output convolution of a pyramid
        makes_image = modules[kinds.index("norm") + 1]["weight"].shape[0] == channels
        arguments["progressive"] = "output_skip" if makes_image else "residual"

    resamplers = [module for module, kind in zip(modules, kinds, strict=True) if module and kind == "resampler"]
    if resamplers:
        arguments["fir"] = any("Conv2d_0.weight" in module for module in resamplers)
    return arguments


def _module_kind(module: State) -> str:
    """Classify an entry of `all_modules` by the names and shapes of its parameters."""
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
    return "resampler"  # possibly without parameters


def _is_resampling(module: State) -> bool:
    """Return whether a module is a biggan block that resamples: it has a shortcut that does not change the width."""
    return "Conv_2.weight" in module and module["Conv_2.weight"].shape[0] == module["Conv_2.weight"].shape[1]


def _load_converted(model: torch.nn.Module, converted: State, unknown: list[str]) -> None:
    """Load the converted parameters, or raise with all keys that are unknown, missing or of another shape."""
    expected = model.state_dict()
    problems = [f"unknown: {key}" for key in unknown]
    problems += [f"missing: {key}" for key in expected.keys() - converted.keys()]
    for key, value in converted.items():
        if key not in expected:
            problems.append(f"not in the network: {key}")
        elif value.shape != expected[key].shape:
            problems.append(f"of shape {list(value.shape)} instead of {list(expected[key].shape)}: {key}")
    if problems:
        raise ValueError(
            "The checkpoint does not fit the configuration: check the arguments that it was trained with. Keys:\n  "
            + "\n  ".join(sorted(problems))
        )
    model.load_state_dict(converted)
