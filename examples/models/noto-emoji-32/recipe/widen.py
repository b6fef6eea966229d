"""Widen the UNet of `noto-emoji-32` by half: nearly the same function, and room to learn more.

    python widen.py path/to/second-run path/to/widened

Each layer gets copies of the first half of its channels, and the weights of a channel that now exists twice are
divided between both at random (Net2WiderNet, arXiv 1511.05641). The result differs from the original only where
normalization groups contain channels of two concatenated tensors, and by the fit of the timestep embedding.
"""

import re
import sys

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

HEAD_DIM = 32  # of the original
CONCATENATED = re.compile(r"up_blocks\.(\d)\.resnets\.(\d)\.(?:norm1|conv1\.weight|conv_shortcut\.weight)")
FITTED = "time_embedding.linear_1"
NUM_TIMESTEPS = 1000


def repeat_half(sizes: list[int]) -> Tensor:
    """Return the original channel of each channel after widening, for a concatenation of tensors with these sizes."""
    parts = torch.arange(sum(sizes)).split(sizes)
    return torch.cat([torch.cat([part, part[: len(part) // 2]]) for part in parts])


def inputs(unet: UNet2DModel, name: str, channels: int) -> Tensor:
    """Return the original input channel of each input channel of a parameter after widening."""
    if ".to_out." in name:
        return repeat_half([HEAD_DIM] * (channels // HEAD_DIM))
    if match := CONCATENATED.match(name):
        block, resnet = int(match[1]), int(match[2])
        widths = unet.config.block_out_channels[::-1]
        hidden = widths[max(block - 1, 0)] if resnet == 0 else widths[block]
        return repeat_half([hidden, channels - hidden])
    return torch.arange(channels) if name == "conv_in.weight" else repeat_half([channels])


def outputs(unet: UNet2DModel, name: str, channels: int) -> Tensor:
    """Return the original output channel of each output channel of a parameter after widening."""
    if re.search(r"\.to_[qkv]\.", name):
        return repeat_half([HEAD_DIM] * (channels // HEAD_DIM))
    if ".norm1." in name:
        return inputs(unet, name, channels)
    return torch.arange(channels) if name.startswith("conv_out.") else repeat_half([channels])


def divide(weight: Tensor, original: Tensor) -> Tensor:
    """Widen the input channels of a weight; copies of a channel share its weight in random parts of 25 to 75 %."""
    wide = weight[:, original]
    for channel in range(weight.shape[1]):
        copies = (original == channel).nonzero()[:, 0]
        if len(copies) == 2:
            share = 0.25 + 0.5 * torch.rand((weight.shape[0],) + (1,) * (weight.ndim - 2))
            wide[:, copies[0]], wide[:, copies[1]] = weight[:, channel] * share, weight[:, channel] * (1 - share)
    return wide


def widen(name: str, parameter: Tensor, unet: UNet2DModel) -> Tensor:
    """Widen one parameter of the UNet."""
    wide = parameter[outputs(unet, name, parameter.shape[0])]
    if parameter.ndim > 1:
        wide = divide(wide, inputs(unet, name, parameter.shape[1]))
    if ".to_q." in name:
        # the dot products and their scale, 1 / sqrt(dimension), stay the same
        wide = wide * 1.5**0.5
        wide.view(-1, 3 * HEAD_DIM // 2, *wide.shape[1:])[:, HEAD_DIM:] = 0
    return wide


@torch.no_grad()
def fit_timestep_embedding(unet: UNet2DModel, wide: UNet2DModel) -> dict[str, Tensor]:
    """Fit the first layer of the timestep embedding, whose sinusoids have other frequencies, by least squares."""
    timesteps = torch.arange(NUM_TIMESTEPS)
    wanted = unet.time_embedding.linear_1(unet.time_proj(timesteps))
    features = torch.cat([wide.time_proj(timesteps), torch.ones(NUM_TIMESTEPS, 1)], dim=1)
    ridge = 0.03 * torch.eye(features.shape[1])
    padding = torch.zeros(features.shape[1], wanted.shape[1])
    solution = torch.linalg.lstsq(torch.cat([features, ridge]), torch.cat([wanted, padding])).solution
    solution = solution[:, repeat_half([wanted.shape[1]])]
    return {f"{FITTED}.weight": solution[:-1].T, f"{FITTED}.bias": solution[-1]}


if __name__ == "__main__":
    torch.manual_seed(0)
    pipe = DDPMPipeline.from_pretrained(sys.argv[1])
    unet = pipe.unet
    widths = [3 * width // 2 for width in unet.config.block_out_channels]
    wide = UNet2DModel.from_config(
        unet.config, block_out_channels=widths, norm_num_groups=12, attention_head_dim=3 * HEAD_DIM // 2
    )
    others = {name: value for name, value in unet.state_dict().items() if not name.startswith(FITTED)}
    widened = {name: widen(name, value, unet) for name, value in others.items()}
    wide.load_state_dict(widened | fit_timestep_embedding(unet, wide))
    DDPMPipeline(wide, pipe.scheduler).save_pretrained(sys.argv[2])
