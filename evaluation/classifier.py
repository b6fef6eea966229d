"""A small image classifier: its classes judge conditional samples, its penultimate layer is a feature space."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

NORM_GROUPS = 8


class ImageClassifierBlock(nn.Module):
    """Two 3x3 convolutions, each normalised, with a shortcut around them; the first has the stride."""

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
    """
    A residual network of the kind of [He et al. 2016](https://arxiv.org/abs/1512.03385), small enough for a CPU.

    Every block but the first halves height and width; the mean over what is left is the feature vector. Group
    normalisation makes an image's features independent of the images beside it, in training too.

    Args:
        sample_size (`int`, defaults to 28): height and width of the images.
        in_channels (`int`, defaults to 1): channels of the images.
        num_classes (`int`, defaults to 10): number of classes.
        widths (`tuple[int, ...]`, defaults to `(16, 32, 64, 96)`):
            Channels of each block, multiples of 8; the last is the number of features.
        id2label (`dict[int, str]`, *optional*): names of the classes; without it they are named by their numbers.

    Raises:
        `ValueError`: for a width that is no multiple of 8, and for names that are not one for each class.
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
            raise ValueError(f"`widths` is {tuple(widths)}, but must be multiples of {NORM_GROUPS}, at least one.")
        # JSON, where configs are kept, turns the numbers into text
        named = {int(label): name for label, name in (id2label or {}).items()}
        if named and sorted(named) != list(range(num_classes)):
            raise ValueError(f"`id2label` names the classes {sorted(named)}, but must name 0 to {num_classes - 1}.")
        self.class_names = [named.get(label, str(label)) for label in range(num_classes)]

        self.blocks = nn.ModuleList(
            ImageClassifierBlock(before, width, stride=1 if i == 0 else 2)
            for i, (before, width) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True))
        )
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, sample: torch.Tensor) -> torch.Tensor:
        """
        The penultimate layer, `(batch_size, widths[-1])`, at least 0; `head` makes the logits of it.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, sample_size, sample_size)`): in [-1, 1].

        Raises:
            `ValueError`: for images of another size or with other channels.
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
        """
        Logits `(batch_size, num_classes)` of images `(batch_size, in_channels, sample_size, sample_size)` in [-1, 1].

        Raises:
            `ValueError`: for images of another size or with other channels.
        """
        return self.head(self.features(sample))
