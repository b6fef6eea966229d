"""A small image classifier, for the class accuracy of conditional samples and as a feature extractor."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .arguments import NORM_GROUPS


class ImageClassifierBlock(nn.Module):
    """A residual block: two 3x3 convolutions with group normalization, the first one strided, and a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv_shortcut(hidden_states)
        hidden_states = F.relu(self.norm1(self.conv1(hidden_states)))
        return F.relu(self.norm2(self.conv2(hidden_states)) + residual)


class ImageClassifier(ModelMixin, ConfigMixin):
    """A residual network in the style of [He et al. 2016](https://arxiv.org/abs/1512.03385), small enough for a CPU.

    Every block but the first halves height and width; global average pooling gives the feature vector. With group
    normalization, the features of an image do not depend on the rest of the batch, not even in training mode.

    Args:
        sample_size (`int`, defaults to 28): Height and width of the images.
        in_channels (`int`, defaults to 1): Channels of the images.
        num_classes (`int`, defaults to 10): Number of classes.
        widths (`tuple[int, ...]`, defaults to `(16, 32, 64, 96)`):
            Channels of each block, multiples of 8; the last is the number of features.
        id2label (`dict[int, str]`, *optional*): Names of the classes, by default their numbers.

    Raises:
        `ValueError`: If a width is not a multiple of 8, or `id2label` does not name every class once.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: tuple[int, ...] = (16, 32, 64, 96),
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        if not widths or any(width % NORM_GROUPS for width in widths):
            raise ValueError(
                f"`widths` is {tuple(widths)}, but must hold at least one width, all multiples of {NORM_GROUPS}."
            )
        # configs are saved as JSON, which turns integer keys into strings
        names = {int(label): name for label, name in (id2label or {}).items()}
        if names and sorted(names) != list(range(num_classes)):
            raise ValueError(f"`id2label` names the classes {sorted(names)}, but must name 0 to {num_classes - 1}.")
        self.class_names = [names.get(label, str(label)) for label in range(num_classes)]

        self.blocks = nn.ModuleList(
            ImageClassifierBlock(previous_width, width, stride=1 if i == 0 else 2)
            for i, (previous_width, width) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, sample: torch.Tensor) -> torch.Tensor:
        """Compute the penultimate layer, `(batch_size, widths[-1])`, nonnegative; `head` maps it to logits.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): In [-1, 1].

        Raises:
            `ValueError`: For images of another size or number of channels.
        """
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if sample.shape[1:] != expected:
            raise ValueError(
                f"The images have the shape {tuple(sample.shape[1:])}, but this classifier was trained on {expected} "
                "(channels, height, width): resize them first."
            )
        hidden_states = sample
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states.mean((2, 3))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Compute the logits `(batch_size, num_classes)`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): In [-1, 1].

        Raises:
            `ValueError`: For images of another size or number of channels.
        """
        return self.head(self.features(sample))
