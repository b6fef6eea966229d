"""The time-conditional discriminator of Denoising Diffusion GANs (Xiao, Kreis, Vahdat, ICLR 2022)."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class DDGANDiscriminatorBlock(nn.Module):
    """Residual block with a time embedding. With `down` it halves height and width, rounding down."""

    kernel: torch.Tensor

    def __init__(self, in_channels: int, out_channels: int, time_embed_dim: int, down: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.down = down
        if down:
            kernel = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
            self.register_buffer("kernel", kernel.outer(kernel)[None, None], persistent=False)

    def downsample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the FIR filter (1 3 3 1) along both axes at every second pixel, as a strided depthwise convolution."""
        channels = hidden_states.shape[1]
        kernel = self.kernel.to(hidden_states.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(hidden_states, kernel, stride=2, padding=1, groups=channels)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.conv1(F.leaky_relu(hidden_states, 0.2))
        hidden_states = hidden_states.add_(self.time_emb_proj(temb)[:, :, None, None])
        hidden_states = F.leaky_relu(hidden_states, 0.2, inplace=True)
        if self.down:
            hidden_states = self.downsample(hidden_states)
            residual = self.downsample(residual)
        return self.conv2(hidden_states).add_(self.conv_shortcut(residual)).mul_(math.sqrt(0.5))


class DDGANDiscriminator(ModelMixin, ConfigMixin):
    """The discriminator D(x_{t-1}, x_t, t) of [Denoising Diffusion GANs](https://arxiv.org/abs/2112.07804).

    It scores how likely x_{t-1} is to be a real denoised version of x_t (section 3.2 and appendix). The defaults are
    the paper's small network (32x32). Its large network (256x256) has `base_channels=128, block_out_channels=(256,
    512, 512, 512, 512, 512), down_blocks=(True,) * 6, near_zero_conv_out=False`.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 32):
            Height and width of the images, large enough for every downsampling block to halve them.
        in_channels (`int`, defaults to 3): Number of channels of one image; the network sees two images.
        base_channels (`int`, defaults to 128): Width of the first convolution (1x1).
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 256, 512, 512)`): Width of each block.
        down_blocks (`tuple[bool, ...]`, defaults to `(False, True, True, True)`): Which blocks halve the resolution.
        time_embed_dim (`int`, defaults to 256): Number of sinusoids of t and width of the time embedding.
        near_zero_conv_out (`bool`, defaults to `True`): Whether to initialize the last convolution near zero.
        num_class_embeds (`int`, *optional*):
            Number of classes. Class embeddings condition the logits by projection (arXiv 1802.05637).
        wavelet_levels (`int`, defaults to 0):
            Halves the resolution that many times by moving pixels to channels, so that it works at the resolution of
            an [`NCSNpp`] with the same number of levels. The convolution that follows is 1x1, so a wavelet transform,
            a rotation of these channels, would give the same set of functions.

    Raises:
        `ValueError`: If `down_blocks` and `block_out_channels` differ in length, or if `sample_size` is too small for
            the number of downsampling blocks, or not divisible by 2**wavelet_levels.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DDGANDiscriminatorBlock"]
    _repeated_blocks: ClassVar = ["DDGANDiscriminatorBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        base_channels: int = 128,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        down_blocks: tuple[bool, ...] = (False, True, True, True),
        time_embed_dim: int = 256,
        near_zero_conv_out: bool = True,
        num_class_embeds: int | None = None,
        wavelet_levels: int = 0,
    ):
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        if wavelet_levels < 0 or height % 2**wavelet_levels or width % 2**wavelet_levels:
            raise ValueError(
                f"`wavelet_levels` is {wavelet_levels}, but images of {height}x{width} pixels can be halved that many "
                f"times only if height and width are divisible by {2 ** max(wavelet_levels, 0)}."
            )
        height, width = height >> wavelet_levels, width >> wavelet_levels
        if len(down_blocks) != len(block_out_channels):
            raise ValueError(
                f"`down_blocks` has {len(down_blocks)} entries, but must have one for each of the "
                f"{len(block_out_channels)} entries of `block_out_channels`."
            )
        if min(height, width) >> sum(down_blocks) == 0:
            inputs = "sub-bands of a wavelet transform" if wavelet_levels else "images"
            raise ValueError(
                f"`down_blocks` halves the resolution {sum(down_blocks)} times, which is too often for {inputs} of "
                f"{height}x{width} pixels: use larger images or fewer downsampling blocks (for training, "
                "--discriminator small)."
            )
        self.gradient_checkpointing = False

        self.time_proj = Timesteps(time_embed_dim, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.time_linear_1 = nn.Linear(time_embed_dim, time_embed_dim)
        self.time_linear_2 = nn.Linear(time_embed_dim, time_embed_dim)
        self.conv_in = nn.Conv2d(2 * in_channels * 4**wavelet_levels, base_channels, 1)
        self.blocks = nn.ModuleList()
        channels = base_channels
        for out_channels, down in zip(block_out_channels, down_blocks, strict=True):
            self.blocks.append(DDGANDiscriminatorBlock(channels, out_channels, time_embed_dim, down))
            channels = out_channels
        self.conv_out = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.linear_out = nn.Linear(channels, 1)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, channels)

        # uniform weights of variance 1 / fan_avg, scaled by 1e-10 where a layer should start near zero
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.xavier_uniform_(block.conv2.weight, gain=1e-5)  # pyright: ignore[reportArgumentType]
        if near_zero_conv_out:
            nn.init.xavier_uniform_(self.conv_out.weight, gain=1e-5)
        if self.class_embedding is not None:
            nn.init.zeros_(self.class_embedding.weight)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        noisy_sample: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Score pairs of a less noisy and a noisier image.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): x_{t-1}, real or generated.
            timestep (`torch.Tensor`, `float` or `int`): t, either one value or a tensor of shape `(batch_size,)`.
            noisy_sample (`torch.Tensor`): x_t, of the same shape as `sample`.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): Integers below `num_class_embeds`.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`: The logits, positive for "real". They depend on the rest of the
            batch through the minibatch standard deviation.

        Raises:
            `ValueError`: If `class_labels` are passed to an unconditional network, or missing for a class-conditional
                one.
        """
        if (class_labels is None) != (self.class_embedding is None):
            raise ValueError(
                "`class_labels` must be passed if and only if the network was built with `num_class_embeds`, which is "
                f"{self.config.num_class_embeds}."
            )
        batch_size = sample.shape[0]

        # 1. time
        timestep = torch.as_tensor(timestep, device=sample.device).expand(batch_size)
        temb = F.leaky_relu(self.time_linear_1(self.time_proj(timestep).to(sample.dtype)), 0.2)
        temb = F.leaky_relu(self.time_linear_2(temb), 0.2)

        # 2. features of the pair
        pair = torch.cat([sample, noisy_sample], dim=1)
        hidden_states = self.conv_in(F.pixel_unshuffle(pair, 2**self.config.wavelet_levels))
        if hidden_states.device.type == "cpu":  # faster there, depthwise convolutions several times
            hidden_states = hidden_states.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, temb)  # pyright: ignore[reportOptionalCall]
            else:
                hidden_states = block(hidden_states, temb)

        # 3. minibatch standard deviation (arXiv 1710.10196, section 3) over groups of 4, or of the next larger size
        # that divides the batch
        _, channels, height, width = hidden_states.shape
        size = min(4, batch_size)
        while batch_size % size:
            size += 1
        grouped = hidden_states.float().reshape(size, batch_size // size, channels, height, width)
        variance = grouped.var(dim=0, unbiased=False)
        std = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3))  # in float32, because 1e-8 underflows in half precision
        std = std.to(hidden_states.dtype).repeat(size).view(batch_size, 1, 1, 1).expand(-1, 1, height, width)
        hidden_states = torch.cat([hidden_states, std], dim=1)

        # 4. logit
        features = F.leaky_relu(self.conv_out(hidden_states), 0.2).sum(dim=(2, 3))
        logits = self.linear_out(features)[:, 0]
        if self.class_embedding is not None:
            logits = logits + (self.class_embedding(class_labels) * features).sum(dim=1)
        return logits
