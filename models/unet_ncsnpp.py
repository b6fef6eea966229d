"""NCSN++ as the generator of Denoising Diffusion GANs (Xiao, Kreis, Vahdat, ICLR 2022)."""

import logging
import math
from functools import partial
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn


def haar_transform(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the sub-bands of an orthonormal Haar wavelet packet transform.

    Each level replaces every channel by four of half the height and width: the average of each 2x2 square, times two
    to preserve norms, and its horizontal, vertical and diagonal differences. The next level splits all four.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Height and width must be divisible by 2**levels.
        levels (`int`): Number of levels; 0 returns the images.

    Returns:
        `torch.Tensor` of shape `(batch_size, 4**levels * channels, height / 2**levels, width / 2**levels)`.
    """
    for _ in range(levels):
        images = _hadamard(F.pixel_unshuffle(images, 2))
    return images


def inverse_haar_transform(bands: torch.Tensor, levels: int) -> torch.Tensor:
    """Return the images with these sub-bands, see [`haar_transform`]."""
    for _ in range(levels):
        bands = F.pixel_shuffle(_hadamard(bands), 2)
    return bands


def _hadamard(channels: torch.Tensor) -> torch.Tensor:
    """Multiply each four consecutive channels by the orthonormal Hadamard matrix, which is its own inverse."""
    a, b, c, d = channels.unflatten(1, (-1, 4)).unbind(2)
    bands = a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d
    return torch.stack(bands, dim=2).flatten(1, 2) / 2


def check_wavelet_levels(levels: int, height: int, width: int) -> None:
    """Check that `haar_transform` can be applied to images of this size.

    Raises:
        `ValueError`: If not.
    """
    if levels < 0 or height % 2**levels or width % 2**levels:
        raise ValueError(
            f"`wavelet_levels` is {levels}, but images of {height}x{width} pixels can be halved that many times only "
            f"if height and width are divisible by {2 ** max(levels, 0)}."
        )


def num_groups(channels: int) -> int:
    """Return the largest divisor of `channels` that is at most min(channels // 4, 32)."""
    groups = max(min(channels // 4, 32), 1)
    while channels % groups:
        groups -= 1
    return groups


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift come from the latent embedding (arXiv 2112.07804, appendix)."""

    def __init__(self, channels: int, latent_embed_dim: int):
        super().__init__()
        self.num_groups = num_groups(channels)
        self.style = nn.Linear(latent_embed_dim, 2 * channels)

    def forward(self, hidden_states: torch.Tensor, z_emb: torch.Tensor) -> torch.Tensor:
        batch_size, channels, height, width = hidden_states.shape
        gamma, beta = self.style(z_emb).chunk(2, dim=1)
        # Treating all samples as channels of a single one lets group norm apply each sample's scale and shift in the
        # same pass over memory, forward and backward.
        merged = hidden_states.reshape(1, batch_size * channels, height, width)
        groups = batch_size * self.num_groups
        return F.group_norm(merged, groups, gamma.flatten(), beta.flatten(), eps=1e-6).view_as(hidden_states)


def depthwise(convolve, hidden_states: torch.Tensor, kernel: torch.Tensor, **options) -> torch.Tensor:
    """Convolve every channel with the same kernel. On a CPU, channels-last memory makes this several times faster."""
    channels = hidden_states.shape[1]
    if hidden_states.device.type == "cpu":
        hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
    kernel = kernel.to(hidden_states.dtype).expand(channels, -1, -1, -1)
    return convolve(hidden_states, kernel, groups=channels, **options)


class Downsample(nn.Module):
    """Halve height and width, rounding down, with a 3x3 convolution if `with_conv`.

    With `fir` the filter is the outer product of (1 3 3 1) normalized to sum 1, otherwise a 2x2 mean.
    """

    kernel: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, fir: bool, with_conv: bool):
        super().__init__()
        self.fir = fir
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2) if with_conv else None
        if fir:
            kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
            self.register_buffer("kernel", kernel.outer(kernel)[None, None], persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fir:
            if self.conv is None:
                return depthwise(F.conv2d, hidden_states, self.kernel, stride=2, padding=1)
            # the strided 3x3 convolution does the subsampling
            return self.conv(depthwise(F.conv2d, hidden_states, self.kernel, padding=2))
        if self.conv is None:
            return F.avg_pool2d(hidden_states, 2)
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width, with a 3x3 convolution if `with_conv`.

    With `fir` this is the transposed FIR filter of `Downsample` with gain 4, otherwise nearest-neighbor interpolation.
    """

    kernel: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, fir: bool, with_conv: bool):
        super().__init__()
        self.fir = fir
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=0 if fir else 1) if with_conv else None
        if fir:
            kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
            self.register_buffer("kernel", kernel.outer(kernel)[None, None], persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fir:
            # a one-pixel margin remains for the 3x3 convolution, which does not pad
            margin = 1 if self.conv is None else 0
            hidden_states = depthwise(F.conv_transpose2d, hidden_states, self.kernel, stride=2, padding=margin)
        else:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)


def extend_to(hidden_states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pad to `size` by repeating the last row or column, because halving an odd size rounds it down."""
    height, width = size[0] - hidden_states.shape[2], size[1] - hidden_states.shape[3]
    if height == 0 and width == 0:
        return hidden_states
    return F.pad(hidden_states, (0, width, 0, height), mode="replicate")


class ResnetBlock(nn.Module):
    """Residual block of NCSN++ with adaptive group norms.

    `resnet_type` is `"biggan"` (may change the resolution; has a 1x1 shortcut if channels or resolution change),
    `"biggan_oneadagn"` (the same, but the second norm is a plain group norm) or `"ddpm"` (has a 1x1 shortcut only if
    the channels change).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_embed_dim: int | None,
        latent_embed_dim: int,
        resnet_type: str,
        dropout: float,
        skip_rescale: bool,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.skip_scale = math.sqrt(0.5) if skip_rescale else 1.0
        self.norm1 = AdaptiveGroupNorm(in_channels, latent_embed_dim)
        self.resample = resample
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_embed_dim is None else nn.Linear(time_embed_dim, out_channels)
        self.two_adaptive_norms = resnet_type != "biggan_oneadagn"
        if self.two_adaptive_norms:
            self.norm2 = AdaptiveGroupNorm(out_channels, latent_embed_dim)
        else:
            self.norm2 = nn.GroupNorm(num_groups(out_channels), out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = in_channels != out_channels or resample is not None
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if changes else None

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None, z_emb: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = F.silu(self.norm1(hidden_states, z_emb))
        if self.resample is not None:
            hidden_states = self.resample(hidden_states)
            residual = self.resample(residual)
        hidden_states = self.conv1(hidden_states)
        if self.time_emb_proj is not None:
            hidden_states = hidden_states.add_(self.time_emb_proj(temb)[:, :, None, None])
        if self.two_adaptive_norms:
            hidden_states = F.silu(self.norm2(hidden_states, z_emb))
        else:
            hidden_states = F.silu(self.norm2(hidden_states))
        hidden_states = self.conv2(self.dropout(hidden_states))
        if self.conv_shortcut is not None:
            residual = self.conv_shortcut(residual)
        return hidden_states.add_(residual).mul_(self.skip_scale)


class AttentionProcessor:
    """Single-head self-attention over all positions, through Diffusers' attention dispatch."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "AttentionBlock", hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = (proj(hidden_states)[:, :, None] for proj in (attn.to_q, attn.to_k, attn.to_v))
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(hidden_states[:, :, 0])


class AttentionBlock(nn.Module, AttentionModuleMixin):
    """Group norm, single-head self-attention over all pixels, and the residual connection."""

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)
    _supports_qkv_fusion = False
    processor: AttentionProcessor

    def __init__(self, channels: int, skip_rescale: bool):
        super().__init__()
        self.skip_scale = math.sqrt(0.5) if skip_rescale else 1.0
        self.group_norm = nn.GroupNorm(num_groups(channels), channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)
        self.set_processor(AttentionProcessor())  # pyright: ignore[reportArgumentType]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = self.group_norm(hidden_states).flatten(2).transpose(1, 2)
        tokens = self.processor(self, tokens)
        return (hidden_states + tokens.transpose(1, 2).reshape(hidden_states.shape)) * self.skip_scale


class NCSNppDownBlock(nn.Module):
    """One encoder level: residual blocks with attention, then downsampling and the input pyramid."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        resnet: partial,
        attention: partial | None,
        downsampler: nn.Module | None,
        pyramid_downsampler: Downsample | None,
        pyramid_conv: nn.Conv2d | None,
        pyramid_combine: str,
        skip_scale: float,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(resnet(a, b) for a, b in pairwise(widths))
        self.attentions = None
        if attention is not None:
            self.attentions = nn.ModuleList(attention(out_channels) for _ in range(num_layers))
        self.downsampler = downsampler
        # Decided here because Diffusers executes remote code again at each load, which rebinds the name ResnetBlock
        # to another class.
        self.downsampler_is_resnet = isinstance(downsampler, ResnetBlock)
        self.pyramid_downsampler = pyramid_downsampler
        self.pyramid_conv = pyramid_conv
        self.pyramid_combine = pyramid_combine
        self.skip_scale = skip_scale

    def forward(self, hidden_states, pyramid, temb, z_emb):
        """Return the hidden states, the skip connections for the decoder, and the input pyramid at this resolution."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            hidden_states = resnet(hidden_states, temb, z_emb)
            if self.attentions is not None:
                hidden_states = self.attentions[i](hidden_states)
            skips.append(hidden_states)
        if self.downsampler is not None:
            if self.downsampler_is_resnet:
                hidden_states = self.downsampler(hidden_states, temb, z_emb)
            else:
                hidden_states = self.downsampler(hidden_states)
            if self.pyramid_downsampler is not None:
                pyramid = self.pyramid_downsampler(pyramid)
                if self.pyramid_conv is None:
                    pyramid = hidden_states = (pyramid + hidden_states) * self.skip_scale
                elif self.pyramid_combine == "cat":
                    hidden_states = torch.cat([self.pyramid_conv(pyramid), hidden_states], dim=1)
                else:
                    hidden_states = self.pyramid_conv(pyramid) + hidden_states
            skips.append(hidden_states)
        return hidden_states, skips, pyramid


class NCSNppMidBlock(nn.Module):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, channels: int, resnet: partial, attention: partial):
        super().__init__()
        self.resnets = nn.ModuleList([resnet(channels, channels), resnet(channels, channels)])
        self.attention = attention(channels)

    def forward(self, hidden_states, temb, z_emb):
        hidden_states = self.resnets[0](hidden_states, temb, z_emb)
        hidden_states = self.attention(hidden_states)
        return self.resnets[1](hidden_states, temb, z_emb)


class NCSNppUpBlock(nn.Module):
    """One decoder level: residual blocks on the skip connections, attention, the output pyramid, then upsampling."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: list[int],
        out_channels: int,
        resnet: partial,
        attention: partial | None,
        pyramid_upsampler: Upsample | None,
        pyramid_channels: int | None,
        upsampler: nn.Module | None,
        residual_pyramid: bool,
        skip_scale: float,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(resnet(a + b, out_channels) for a, b in zip(widths, skip_channels, strict=True))
        self.attention = None if attention is None else attention(out_channels)
        self.pyramid_upsampler = pyramid_upsampler
        self.pyramid_norm = self.pyramid_conv = None
        if pyramid_channels is not None:
            self.pyramid_norm = nn.GroupNorm(num_groups(out_channels), out_channels, eps=1e-6)
            self.pyramid_conv = nn.Conv2d(out_channels, pyramid_channels, 3, padding=1)
        self.upsampler = upsampler
        self.upsampler_is_resnet = isinstance(upsampler, ResnetBlock)
        self.residual_pyramid = residual_pyramid
        self.skip_scale = skip_scale

    def forward(self, hidden_states, skips, pyramid, temb, z_emb, size):
        """Return the hidden states, at `size` if there is a finer level, and the output pyramid at this resolution."""
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            hidden_states = resnet(torch.cat([hidden_states, skip], dim=1), temb, z_emb)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states)
        if self.pyramid_upsampler is not None:
            pyramid = extend_to(self.pyramid_upsampler(pyramid), hidden_states.shape[2:])
            if self.residual_pyramid:
                pyramid = hidden_states = (pyramid + hidden_states) * self.skip_scale
        if self.pyramid_norm is not None and self.pyramid_conv is not None:
            level_output = self.pyramid_conv(F.silu(self.pyramid_norm(hidden_states)))
            pyramid = level_output if pyramid is None else pyramid + level_output
        if self.upsampler is not None:
            if self.upsampler_is_resnet:
                hidden_states = self.upsampler(hidden_states, temb, z_emb)
            else:
                hidden_states = self.upsampler(hidden_states)
            hidden_states = extend_to(hidden_states, size)
        return hidden_states, pyramid


class NCSNpp(ModelMixin, AttentionMixin, ConfigMixin):
    """NCSN++ of [Score-Based Generative Modeling through SDEs](https://arxiv.org/abs/2011.13456), with a latent z.

    The conditioning on z follows [Denoising Diffusion GANs](https://arxiv.org/abs/2112.07804): a small network maps z
    to an embedding, which scales and shifts every adaptive group norm.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 32):
            Height and width of the images. Other sizes can be passed to `forward`; this one decides which levels have
            attention.
        in_channels (`int`, defaults to 3): Number of channels of the noisy image.
        out_channels (`int`, defaults to 3): Number of channels of the predicted image.
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 256, 256, 256)`): Width of each level, finest first.
        base_channels (`int`, *optional*, defaults to `block_out_channels[0]`):
            Width of the first convolution and number of sinusoids of the time embedding.
        layers_per_block (`int`, defaults to 2): Residual blocks per down block; up blocks have one more.
        attention_resolutions (`tuple[int, ...]`, defaults to `(16,)`):
            Levels whose height `sample_size // 2**(wavelet_levels + level)` is listed here have attention: after every
            residual block in the encoder, after the last one in the decoder.
        latent_dim (`int`, defaults to 100): Length of z.
        latent_embed_dim (`int`, defaults to 256): Width of the network that maps z.
        latent_mapping_layers (`int`, defaults to 4): Number of layers of that network after the first one.
        num_class_embeds (`int`, *optional*): Number of classes; the class embedding is added to that of z.
        id2label (`dict[int, str]` or `list[str]`, *optional*): Names of the classes.
        resnet_type (`"biggan"`, `"biggan_oneadagn"` or `"ddpm"`, defaults to `"biggan"`):
            Residual blocks that also resample, the same with only one adaptive norm per block, or residual blocks with
            separate resampling layers.
        fir (`bool`, defaults to `True`):
            Whether to resample with the (1 3 3 1) filter instead of 2x2 means and nearest-neighbor interpolation.
        resample_with_conv (`bool`, defaults to `True`):
            Whether the resampling layers of `"ddpm"` have a 3x3 convolution.
        progressive_input (`"none"`, `"input_skip"` or `"residual"`, defaults to `"residual"`):
            How the downsampled input enters each level: not at all, through a 1x1 convolution, or through a residual
            pyramid.
        progressive_combine (`"sum"` or `"cat"`, defaults to `"sum"`):
            How `"input_skip"` is combined with the hidden states.
        progressive_output (`"none"`, `"output_skip"` or `"residual"`, defaults to `"none"`):
            How the output is summed over the levels: not at all, through a convolution per level, or through a
            residual pyramid.
        time_conditioning (`bool`, defaults to `True`): Whether the network sees the timestep.
        time_embedding_type (`"positional"` or `"fourier"`, defaults to `"positional"`):
            Sinusoids of t, or random Fourier features of log t (log 1/2 at t = 0, where log t is undefined).
        fourier_scale (`float`, defaults to 16.0): Standard deviation of the frequencies of `"fourier"`.
        skip_rescale (`bool`, defaults to `True`): Whether to divide sums of two branches by sqrt 2.
        center_input_sample (`bool`, defaults to `False`): Whether to map inputs from [0, 1] to [-1, 1].
        tanh_output (`bool`, defaults to `True`): Whether to end in a tanh, which keeps the image within [-1, 1].
        dropout (`float`, defaults to 0.0): Dropout probability in the residual blocks.
        wavelet_levels (`int`, defaults to 0):
            Number of levels of a Haar wavelet transform ([arXiv 2211.16152](https://arxiv.org/abs/2211.16152)): the
            network sees and predicts sub-bands, at 1/2**wavelet_levels of the resolution, instead of pixels.

    Raises:
        `ValueError`: If an option has an unknown value, `sample_size` is too small for the number of levels or not
            divisible by 2**wavelet_levels, or `id2label` does not name each class once.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["NCSNppDownBlock", "NCSNppMidBlock", "NCSNppUpBlock"]
    _repeated_blocks: ClassVar = ["NCSNppDownBlock", "NCSNppMidBlock", "NCSNppUpBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]
    # Fourier frequencies exceed 100; rounding them to half precision would change the embedding.
    _keep_in_fp32_modules: ClassVar = ["time_proj"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 256),
        base_channels: int | None = None,
        layers_per_block: int = 2,
        attention_resolutions: tuple[int, ...] = (16,),
        latent_dim: int = 100,
        latent_embed_dim: int = 256,
        latent_mapping_layers: int = 4,
        num_class_embeds: int | None = None,
        id2label: dict[int, str] | list[str] | None = None,
        resnet_type: Literal["biggan", "biggan_oneadagn", "ddpm"] = "biggan",
        fir: bool = True,
        resample_with_conv: bool = True,
        progressive_input: Literal["none", "input_skip", "residual"] = "residual",
        progressive_combine: Literal["sum", "cat"] = "sum",
        progressive_output: Literal["none", "output_skip", "residual"] = "none",
        time_conditioning: bool = True,
        time_embedding_type: Literal["positional", "fourier"] = "positional",
        fourier_scale: float = 16.0,
        skip_rescale: bool = True,
        center_input_sample: bool = False,
        tanh_output: bool = True,
        dropout: float = 0.0,
        wavelet_levels: int = 0,
    ):
        super().__init__()
        for name, value, known in (
            ("resnet_type", resnet_type, ("biggan", "biggan_oneadagn", "ddpm")),
            ("progressive_input", progressive_input, ("none", "input_skip", "residual")),
            ("progressive_combine", progressive_combine, ("sum", "cat")),
            ("progressive_output", progressive_output, ("none", "output_skip", "residual")),
            ("time_embedding_type", time_embedding_type, ("positional", "fourier")),
        ):
            if value not in known:
                raise ValueError(f"`{name}` is {value!r}, but must be one of {', '.join(map(repr, known))}.")
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        check_wavelet_levels(wavelet_levels, height, width)
        in_channels, out_channels = (channels * 4**wavelet_levels for channels in (in_channels, out_channels))
        height, width = height >> wavelet_levels, width >> wavelet_levels
        levels = len(block_out_channels)
        if min(height, width) >> (levels - 1) == 0:
            inputs = "sub-bands of a wavelet transform" if wavelet_levels else "images"
            raise ValueError(
                f"`block_out_channels` has {levels} levels, too many to halve {inputs} of {height}x{width} pixels "
                f"{levels - 1} times: use fewer levels or larger images."
            )

        if id2label is not None:
            labels = sorted(int(label) for label in (id2label if isinstance(id2label, dict) else range(len(id2label))))
            if labels != list(range(num_class_embeds or 0)):
                raise ValueError(
                    f"`id2label` names the labels {labels}, but must name each of the {num_class_embeds or 0} classes."
                )

        self.gradient_checkpointing = False

        # 1. embeddings of the timestep, of z and of the class
        base_channels = base_channels or block_out_channels[0]
        time_embed_dim = None
        if not time_conditioning or time_embedding_type == "positional":
            self._keep_in_fp32_modules = None  # no frequencies with weights
        if time_conditioning:
            time_embed_dim = 4 * base_channels
            if time_embedding_type == "fourier":
                self.time_proj = GaussianFourierProjection(base_channels, fourier_scale, set_W_to_weight=False)
                self.time_embedding = TimestepEmbedding(2 * base_channels, time_embed_dim)
            else:
                self.time_proj = Timesteps(base_channels, flip_sin_to_cos=False, downscale_freq_shift=1)
                self.time_embedding = TimestepEmbedding(base_channels, time_embed_dim)
        widths = [latent_dim] + [latent_embed_dim] * (latent_mapping_layers + 1)
        self.latent_mapping = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, latent_embed_dim)

        skip_scale = math.sqrt(0.5) if skip_rescale else 1.0
        resnet = partial(
            ResnetBlock,
            time_embed_dim=time_embed_dim,
            latent_embed_dim=latent_embed_dim,
            resnet_type=resnet_type,
            dropout=dropout,
            skip_rescale=skip_rescale,
        )
        attention = partial(AttentionBlock, skip_rescale=skip_rescale)
        has_attention = [height >> level in attention_resolutions for level in range(levels)]

        # 2. down
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        channels, pyramid_channels = base_channels, in_channels
        skip_channels = [channels]
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(block_out_channels):
            skip_channels += [out] * layers_per_block
            downsampler = pyramid_downsampler = pyramid_conv = None
            width_after = out
            if level < levels - 1:
                if resnet_type == "ddpm":
                    downsampler = Downsample(out, out, fir, with_conv=resample_with_conv)
                else:
                    downsampler = resnet(out, out, resample=Downsample(out, out, fir, with_conv=False))
                if progressive_input == "input_skip":
                    pyramid_downsampler = Downsample(in_channels, in_channels, fir, with_conv=False)
                    pyramid_conv = nn.Conv2d(in_channels, out, 1)
                    width_after = 2 * out if progressive_combine == "cat" else out
                elif progressive_input == "residual":
                    pyramid_downsampler = Downsample(pyramid_channels, out, fir, with_conv=True)
                    pyramid_channels = out
                skip_channels.append(width_after)
            self.down_blocks.append(
                NCSNppDownBlock(
                    channels,
                    out,
                    layers_per_block,
                    resnet,
                    attention if has_attention[level] else None,
                    downsampler,
                    pyramid_downsampler,
                    pyramid_conv,
                    progressive_combine,
                    skip_scale,
                )
            )
            channels = width_after

        # 3. middle
        self.mid_block = NCSNppMidBlock(channels, resnet, attention)

        # 4. up
        pyramid_channels = block_out_channels[-1]
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(block_out_channels))):
            level_skip_channels = [skip_channels.pop() for _ in range(layers_per_block + 1)]
            upsampler = pyramid_upsampler = None
            if progressive_output == "output_skip":
                level_output_channels = out_channels
                if level < levels - 1:
                    pyramid_upsampler = Upsample(out_channels, out_channels, fir, with_conv=False)
            elif progressive_output == "residual":
                level_output_channels = out if level == levels - 1 else None
                if level < levels - 1:
                    pyramid_upsampler = Upsample(pyramid_channels, out, fir, with_conv=True)
                pyramid_channels = out
            else:
                level_output_channels = None
            if level > 0:
                if resnet_type == "ddpm":
                    upsampler = Upsample(out, out, fir, with_conv=resample_with_conv)
                else:
                    upsampler = resnet(out, out, resample=Upsample(out, out, fir, with_conv=False))
            self.up_blocks.append(
                NCSNppUpBlock(
                    channels,
                    level_skip_channels,
                    out,
                    resnet,
                    attention if has_attention[level] else None,
                    pyramid_upsampler,
                    level_output_channels,
                    upsampler,
                    progressive_output == "residual",
                    skip_scale,
                )
            )
            channels = out

        # 5. out
        self.conv_norm_out = self.conv_out = None
        if progressive_output != "output_skip":
            self.conv_norm_out = nn.GroupNorm(num_groups(channels), channels, eps=1e-6)
            self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

        self._init_weights()

    def _init_weights(self):
        """Initialize weights uniformly, near zero where a branch joins the main path; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                init_uniform(module)
        for module in self.modules():
            if isinstance(module, AdaptiveGroupNorm):
                nn.init.ones_(module.style.bias[: module.style.out_features // 2])
            elif isinstance(module, ResnetBlock):
                init_uniform(module.conv2, scale=1e-10)
                if module.conv_shortcut is not None and self.config.resnet_type == "ddpm":
                    init_uniform(module.conv_shortcut, scale=0.1)
            elif isinstance(module, AttentionBlock):
                for projection in (module.to_q, module.to_k, module.to_v):
                    init_uniform(projection, scale=0.1)
                init_uniform(module.to_out, scale=1e-10)
        if self.conv_out is not None:
            init_uniform(self.conv_out, scale=1e-10)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        z: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict the clean images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy images.
            timestep (`torch.Tensor`, `float` or `int`): t, either one value or a tensor of shape `(batch_size,)`.
            z (`torch.Tensor` of shape `(batch_size, latent_dim)`): The latents, standard normal.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): Integers below `num_class_embeds`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~models.unets.unet_2d.UNet2DOutput`] instead of a plain tuple.

        Returns:
            [`~models.unets.unet_2d.UNet2DOutput`] or `tuple`: The prediction, `(batch_size, out_channels, height,
            width)`.

        Raises:
            `ValueError`: If `class_labels` are passed to an unconditional network, or missing for a class-conditional
                one, or if the wavelet transform does not fit the size of the images.
        """
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "`class_labels` must be passed if and only if the network was built with `num_class_embeds`, which is "
                f"{self.config.num_class_embeds}."
            )

        # 1. embeddings
        temb = None
        if self.config.time_conditioning:
            timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
            if self.config.time_embedding_type == "fourier":
                timestep = timestep.float().clamp(min=0.5)
            temb = F.silu(self.time_embedding(self.time_proj(timestep).to(sample.dtype)))
        z_emb = F.rms_norm(z.float(), z.shape[-1:], eps=1e-8).to(sample.dtype)
        for layer in self.latent_mapping:
            z_emb = F.silu(layer(z_emb))
        if self.class_embedding is not None:
            z_emb = z_emb + self.class_embedding(class_labels)

        # 2. down
        if self.config.center_input_sample:
            sample = 2 * sample - 1
        wavelet_levels = self.config.wavelet_levels
        check_wavelet_levels(wavelet_levels, *sample.shape[2:])
        sample = haar_transform(sample, wavelet_levels)
        hidden_states = self.conv_in(sample)
        skips, pyramid = [hidden_states], sample
        for block in self.down_blocks:
            hidden_states, block_skips, pyramid = self._run_block(block, hidden_states, pyramid, temb, z_emb)
            skips += block_skips

        # 3. middle
        hidden_states = self._run_block(self.mid_block, hidden_states, temb, z_emb)

        # 4. up
        pyramid = None
        for block in self.up_blocks:
            skips, block_skips = skips[: -len(block.resnets)], skips[-len(block.resnets) :]  # pyright: ignore[reportArgumentType]
            size = skips[-1].shape[2:] if skips else None
            hidden_states, pyramid = self._run_block(block, hidden_states, block_skips, pyramid, temb, z_emb, size)

        # 5. out
        if self.conv_norm_out is not None and self.conv_out is not None:
            hidden_states = self.conv_out(F.silu(self.conv_norm_out(hidden_states)))
        else:
            assert pyramid is not None
            hidden_states = pyramid
        hidden_states = inverse_haar_transform(hidden_states, wavelet_levels)
        if self.config.tanh_output:
            hidden_states = hidden_states.tanh()

        if not return_dict:
            return (hidden_states,)
        return UNet2DOutput(sample=hidden_states)

    def to(self, *args, **kwargs):
        """Move or cast the network, see [`ModelMixin.to`]."""
        logger = logging.getLogger(ModelMixin.__module__)

        # Diffusers 0.42 warns of casts even if no module has to stay in float32
        def is_justified(record: logging.LogRecord) -> bool:
            return "in float32: []" not in record.getMessage()

        logger.addFilter(is_justified)
        try:
            return super().to(*args, **kwargs)
        finally:
            logger.removeFilter(is_justified)

    def _run_block(self, block, *args):
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)  # pyright: ignore[reportOptionalCall]
        return block(*args)


def init_uniform(layer: nn.Linear | nn.Conv2d, scale: float = 1.0):
    """Initialize a layer with uniform weights of variance `scale / fan_avg` and zero biases."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
