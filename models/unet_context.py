"""A small UNet that is steered by a context vector, which multiplies its features, and by the time, which is added."""

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
    """Two 3x3 convolutions, each with group norm and GELU."""

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
    """A block and the way past it; their sum divided by sqrt 2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        return (residual + super().forward(hidden_states)) * math.sqrt(0.5)


class ContextDownBlock(nn.Module):
    """Two blocks, then the maximum of each 2x2 pixels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.block1 = ConvBlock(in_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.block2(self.block1(hidden_states)), 2)


class TwoLayerEmbedding(nn.Module):
    """Linear, GELU, linear: from a vector to one number a channel."""

    def __init__(self, in_features: int, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(vector)))[:, :, None, None]


class ContextUpBlock(nn.Module):
    """Context and time, what was kept on the way down, a transposed convolution that doubles the size, two blocks."""

    def __init__(self, channels: int, out_channels: int, n_cfeat: int):
        super().__init__()
        self.context_embedding = TwoLayerEmbedding(n_cfeat, channels)
        self.time_embedding = TwoLayerEmbedding(1, channels)
        self.upsample = nn.ConvTranspose2d(2 * channels, out_channels, 2, stride=2)
        self.block1 = ConvBlock(out_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)

    def forward(self, hidden_states: torch.Tensor, kept: torch.Tensor, context: torch.Tensor, time: torch.Tensor):
        hidden_states = self.context_embedding(context) * hidden_states + self.time_embedding(time)
        hidden_states = self.upsample(torch.cat([hidden_states, kept], dim=1))
        return self.block2(self.block1(hidden_states))


class ContextOutBlock(nn.Module):
    """The output from the last features and the first ones."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(NORM_NUM_GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv1(torch.cat([hidden_states, initial], dim=1))
        return self.conv2(F.relu(self.norm(hidden_states)))


class ContextUnet(ModelMixin, ConfigMixin):
    """
    The network of the DeepLearning.AI course "How Diffusion Models Work", which draws sprites of 16x16 pixels.

    On the way up, features become context * features + time at each stage, where context and time are embeddings of
    the context vector and of t / T. Norms are group norms throughout, so that a picture does not depend on its batch.

    A class label stands for its one-hot context. The context of zeros is the null class of
    [classifier-free guidance](https://arxiv.org/abs/2207.12598); with `class_dropout` above 0 it has the label
    `n_cfeat`. The network draws nothing by itself: whoever trains it puts the null class in the place of a label with
    the probability `config.class_dropout`.

    Args:
        in_channels (`int`, defaults to 3): channels of the noisy picture.
        n_feat (`int`, defaults to 64): width of the finest level, a multiple of 8; the coarser ones have twice that.
        n_cfeat (`int`, defaults to 5): length of a context vector, the number of classes.
        height (`int`, defaults to 16): height and width of the picture, a multiple of 4.
        num_train_timesteps (`int`, defaults to 500): T of the noise process, by which t is divided.
        class_dropout (`float`, defaults to 0.0): probability of the null class in training, within [0, 1).
        id2label (`dict[int, str]` or `list[str]`, *optional*): names of the classes.
        out_channels (`int`, *optional*, defaults to `in_channels`): channels of the output.
        sample_size (`int`, *optional*, defaults to `height`):
            The same as `height`: the name under which pipelines look for it in the config.

    Raises:
        `ValueError`: for sizes that do not divide, a `sample_size` that differs from `height`, a `class_dropout`
            outside [0, 1), and names that do not name each class once.
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
            raise ValueError(f"`sample_size` is {sample_size} and `height` {height}, but they are the same: give one.")
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
        """
        Predicts the noise, or whatever the network is trained for.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, height)`): the noisy picture.
            timestep (`torch.Tensor`, `float` or `int`): t, one for all or of shape `(batch_size,)`.
            class_labels (`torch.Tensor`):
                Integers of shape `(batch_size,)` below `n_cfeat`, with `n_cfeat` itself for the null class if there is
                one, or a float matrix `(batch_size, n_cfeat)` of contexts: one-hot, mixed (half of one class and half
                of another), or zeros, which leave the context out.
            return_dict (`bool`, defaults to `True`): an [`~models.unets.unet_2d.UNet2DOutput`] or a tuple of one.

        Raises:
            `ValueError`: for pictures of another size than `height`, and for class labels of another shape.
        """
        batch_size, n_cfeat, size = sample.shape[0], self.config.n_cfeat, self.config.height
        if sample.shape[2:] != (size, size):
            raise ValueError(
                f"`sample` has pictures of {sample.shape[2]}x{sample.shape[3]} pixels, but this network was built for "
                f"{size}x{size} alone (`height`)."
            )
        if class_labels.shape != ((batch_size, n_cfeat) if class_labels.is_floating_point() else (batch_size,)):
            raise ValueError(
                f"`class_labels` is {class_labels.dtype} of shape {tuple(class_labels.shape)}, but must hold one "
                f"integer for each of the {batch_size} pictures, or be a float matrix ({batch_size}, {n_cfeat})."
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
        kept1 = self._run(self.down_block1, initial)
        kept2 = self._run(self.down_block2, kept1)
        vector = F.gelu(kept2.mean(dim=(2, 3), keepdim=True))

        # 3. up
        hidden_states = F.relu(self.norm(self.unpool(vector)))
        hidden_states = self._run(self.up_block1, hidden_states, kept2, context, time)
        hidden_states = self._run(self.up_block2, hidden_states, kept1, context, time)
        hidden_states = self.conv_out(hidden_states, initial)

        if not return_dict:
            return (hidden_states,)
        return UNet2DOutput(sample=hidden_states)

    def _run(self, block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)
