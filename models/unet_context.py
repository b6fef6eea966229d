"""A small UNet whose features are scaled by a context embedding and shifted by a time embedding."""

import logging
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

NORM_NUM_GROUPS = 8


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each followed by group norm and GELU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(NORM_NUM_GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(NORM_NUM_GROUPS, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = F.gelu(self.norm1(self.conv1(hidden_states)))
        return F.gelu(self.norm2(self.conv2(hidden_states)))


class ResidualConvBlock(ConvBlock):
    """A `ConvBlock` with a residual connection; the sum is divided by sqrt 2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        return (residual + super().forward(hidden_states)) * math.sqrt(0.5)


class ContextDownBlock(nn.Module):
    """Two `ConvBlock`s followed by 2x2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.block1 = ConvBlock(in_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.block2(self.block1(hidden_states)), 2)


class TwoLayerEmbedding(nn.Module):
    """Two linear layers with GELU in between, which map a vector to one value per channel."""

    def __init__(self, in_features: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(vector)))[:, :, None, None]


class ContextUpBlock(nn.Module):
    """Context and time conditioning, skip connection, upsampling by a transposed convolution, and two `ConvBlock`s."""

    def __init__(self, channels: int, out_channels: int, n_cfeat: int):
        super().__init__()
        self.context_embedding = TwoLayerEmbedding(n_cfeat, channels)
        self.time_embedding = TwoLayerEmbedding(1, channels)
        self.upsample = nn.ConvTranspose2d(2 * channels, out_channels, 2, stride=2)
        self.block1 = ConvBlock(out_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor, context: torch.Tensor, time: torch.Tensor):
        hidden_states = self.context_embedding(context) * hidden_states + self.time_embedding(time)
        hidden_states = self.upsample(torch.cat([hidden_states, skip], dim=1))
        return self.block2(self.block1(hidden_states))


class ContextOutBlock(nn.Module):
    """Output convolutions on the last features concatenated with the first ones."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(NORM_NUM_GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv1(torch.cat([hidden_states, initial], dim=1))
        return self.conv2(F.relu(self.norm(hidden_states)))


class ContextUnet(ModelMixin, ConfigMixin):
    """The network of the DeepLearning.AI course "How Diffusion Models Work", which generates sprites of 16x16 pixels.

    In each up block, features become context * features + time, where context and time are embeddings of the context
    vector and of t / T. All norms are group norms, so that an image does not depend on the rest of its batch.

    A class label stands for its one-hot context. The all-zero context is the null class of
    [classifier-free guidance](https://arxiv.org/abs/2207.12598); with `class_dropout` above 0 it has the label
    `n_cfeat`. The network does not drop labels itself: the training loop replaces a label by the null class with
    probability `config.class_dropout`.

    Args:
        in_channels (`int`, defaults to 3): Number of channels of the noisy image.
        n_feat (`int`, defaults to 64): Width of the finest level, a multiple of 8; coarser levels have twice that.
        n_cfeat (`int`, defaults to 5): Length of a context vector, which is the number of classes.
        height (`int`, defaults to 16): Height and width of the images, a multiple of 4.
        num_train_timesteps (`int`, defaults to 500): T of the noise process, by which t is divided.
        class_dropout (`float`, defaults to 0.0): Probability of the null class in training, within [0, 1).
        id2label (`dict[int, str]` or `list[str]`, *optional*): Names of the classes.
        out_channels (`int`, *optional*, defaults to `in_channels`): Number of channels of the output.
        sample_size (`int`, *optional*, defaults to `height`):
            Same as `height`; the name under which pipelines read the image size from the config.

    Raises:
        `ValueError`: If `n_feat` is not a multiple of 8, `height` is not a multiple of 4, `sample_size` differs from
            `height`, `class_dropout` is outside [0, 1), or `id2label` does not name each class exactly once.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = [
        "ConvBlock",
        "ResidualConvBlock",
        "ContextDownBlock",
        "ContextUpBlock",
        "ContextOutBlock",
    ]
    _repeated_blocks: ClassVar = ["ContextDownBlock", "ContextUpBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        n_feat: int = 64,
        n_cfeat: int = 5,
        height: int = 16,
        num_train_timesteps: int = 500,
        class_dropout: float = 0.0,
        id2label: dict[int, str] | list[str] | None = None,
        out_channels: int | None = None,
        sample_size: int | None = None,
    ):
        super().__init__()
        if n_feat < 1 or n_feat % NORM_NUM_GROUPS:
            raise ValueError(f"`n_feat` is {n_feat}, but must be a multiple of {NORM_NUM_GROUPS}.")
        if height < 4 or height % 4:
            raise ValueError(f"`height` is {height}, but must be a multiple of 4, since it is halved twice.")
        if sample_size not in (None, height):
            raise ValueError(
                f"`sample_size` is {sample_size} and `height` is {height}, but both mean the same: pass only one."
            )
        if not 0 <= class_dropout < 1:
            raise ValueError(f"`class_dropout` is {class_dropout}, but must be a probability within [0, 1).")
        if id2label is not None:
            labels = sorted(int(label) for label in (id2label if isinstance(id2label, dict) else range(len(id2label))))
            if labels != list(range(n_cfeat)):
                raise ValueError(
                    f"`id2label` names the labels {labels}, but must name each of the {n_cfeat} classes, "
                    f"0 to {n_cfeat - 1}."
                )
        out_channels = in_channels if out_channels is None else out_channels
        self.register_to_config(sample_size=height, out_channels=out_channels)
        self.gradient_checkpointing = False
        self.num_labels = n_cfeat + (class_dropout > 0)

        self.conv_in = ResidualConvBlock(in_channels, n_feat)
        self.down_block1 = ContextDownBlock(n_feat, n_feat)
        self.down_block2 = ContextDownBlock(n_feat, 2 * n_feat)
        self.unpool = nn.ConvTranspose2d(2 * n_feat, 2 * n_feat, height // 4)
        self.norm = nn.GroupNorm(NORM_NUM_GROUPS, 2 * n_feat)
        self.up_block1 = ContextUpBlock(2 * n_feat, n_feat, n_cfeat)
        self.up_block2 = ContextUpBlock(n_feat, n_feat, n_cfeat)
        self.conv_out = ContextOutBlock(n_feat, out_channels)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict the noise, or whatever target the network was trained on.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, height)`): The noisy images.
            timestep (`torch.Tensor`, `float` or `int`): t, either one value or a tensor of shape `(batch_size,)`.
            class_labels (`torch.Tensor`):
                Integers of shape `(batch_size,)` below `n_cfeat`, or `n_cfeat` itself for the null class if there is
                one; or a float matrix `(batch_size, n_cfeat)` of contexts: one-hot, mixed (half of one class and half
                of another), or zeros for no context.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~models.unets.unet_2d.UNet2DOutput`] instead of a plain tuple.

        Returns:
            [`~models.unets.unet_2d.UNet2DOutput`] or `tuple`: The prediction, `(batch_size, out_channels, height,
            height)`.

        Raises:
            `ValueError`: If the images are not of size `height`, or `class_labels` has another shape.
        """
        batch_size, n_cfeat, size = sample.shape[0], self.config.n_cfeat, self.config.height
        if sample.shape[2:] != (size, size):
            raise ValueError(
                f"`sample` has images of {sample.shape[2]}x{sample.shape[3]} pixels, but this network was built for "
                f"{size}x{size} only (`height`)."
            )
        if class_labels.shape != ((batch_size, n_cfeat) if class_labels.is_floating_point() else (batch_size,)):
            raise ValueError(
                f"`class_labels` is {class_labels.dtype} of shape {tuple(class_labels.shape)}, but must hold one "
                f"integer for each of the {batch_size} images, or be a float matrix ({batch_size}, {n_cfeat})."
            )

        # 1. context and time
        if class_labels.is_floating_point():
            context = class_labels
        else:
            context = F.one_hot(class_labels.long(), self.num_labels)[:, :n_cfeat]
        context = context.to(sample.dtype)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(batch_size)
        time = (timestep / self.config.num_train_timesteps).to(sample.dtype)[:, None]

        # 2. down, to a single vector
        initial = self.conv_in(sample)
        skip1 = self._run_block(self.down_block1, initial)
        skip2 = self._run_block(self.down_block2, skip1)
        vector = F.gelu(skip2.mean(dim=(2, 3), keepdim=True))

        # 3. up
        hidden_states = F.relu(self.norm(self.unpool(vector)))
        hidden_states = self._run_block(self.up_block1, hidden_states, skip2, context, time)
        hidden_states = self._run_block(self.up_block2, hidden_states, skip1, context, time)
        hidden_states = self.conv_out(hidden_states, initial)

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

    def _run_block(self, block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)  # pyright: ignore[reportOptionalCall]
        return block(*args)
