"""A UNet that receives the class as additional input channels, or with the timestep."""

import inspect
import logging
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import nn

_CLASS_ARGUMENTS = ("class_embed_type", "num_class_embeds")


class ClassConditionedUnet(ModelMixin, ConfigMixin):
    """A [`UNet2DModel`] whose input is concatenated with an embedding of the class, the same at every pixel.

    This is the class-conditioned network of unit 2 of the Hugging Face Diffusion Models Course. The defaults are those
    for MNIST, with 1.7 M parameters.

    With `conditioning="time"` an embedding of the class is added to that of the timestep instead, as in a
    [`UNet2DModel`] with `num_class_embeds`. `from_unet` makes such a network from an unconditional one.

    With `class_dropout` above 0 there is one more class label, `num_classes`: the null class for
    [classifier-free guidance](https://arxiv.org/abs/2207.12598). The network does not drop labels itself: the training
    loop replaces a label by the null class with probability `config.class_dropout`.

    Args:
        sample_size (`int` or `tuple[int, int]`, defaults to 28):
            Height and width of the images, which every level except the last must be able to halve exactly.
        in_channels (`int`, defaults to 1): Number of channels of the noisy image, excluding those of the class.
        out_channels (`int`, defaults to 1): Number of channels of the output.
        num_classes (`int`, defaults to 10): Number of classes; their labels are 0 .. num_classes-1.
        class_emb_size (`int`, *optional*, defaults to 4):
            Length of the learned class embedding. `None` uses one-hot vectors of length `num_classes` instead, and
            zeros for the null class. Only used with `conditioning="input"`.
        class_dropout (`float`, defaults to 0.0): Probability of the null class in training, within [0, 1).
        layers_per_block (`int`, defaults to 2): Residual blocks per down block; up blocks have one more.
        block_out_channels (`tuple[int, ...]`, defaults to `(32, 64, 64)`): Width of each level, finest first.
        down_block_types (`tuple[str, ...]`): Type of down block at each level, as in [`UNet2DModel`].
        up_block_types (`tuple[str, ...]`): Type of up block at each level, coarsest first.
        attention_head_dim (`int`, defaults to 8): Number of channels per attention head.
        norm_num_groups (`int`, defaults to 32): Number of groups of the group norms; must divide every width.
        id2label (`dict[int, str]` or `list[str]`, *optional*): Names of the classes.
        conditioning (`str`, defaults to `"input"`):
            Where the class enters the network: `"input"` for additional channels, `"time"` for the time embedding.
        unet_options (`dict[str, Any]`, *optional*): Further arguments of [`UNet2DModel`].

    Raises:
        `ValueError`: If `class_dropout` is outside [0, 1), `id2label` does not name each class exactly once, or
            `conditioning` is neither of its values.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["UNet2DModel"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        num_classes: int = 10,
        class_emb_size: int | None = 4,
        class_dropout: float = 0.0,
        layers_per_block: int = 2,
        block_out_channels: tuple[int, ...] = (32, 64, 64),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim: int = 8,
        norm_num_groups: int = 32,
        id2label: dict[int, str] | list[str] | None = None,
        conditioning: Literal["input", "time"] = "input",
        unet_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        if conditioning not in ("input", "time"):
            raise ValueError(f"`conditioning` is {conditioning!r}, but must be 'input' or 'time'.")
        if not 0 <= class_dropout < 1:
            raise ValueError(f"`class_dropout` is {class_dropout}, but must be a probability within [0, 1).")
        if id2label is not None:
            labels = sorted(int(label) for label in (id2label if isinstance(id2label, dict) else range(len(id2label))))
            if labels != list(range(num_classes)):
                raise ValueError(
                    f"`id2label` names the labels {labels}, but must name each of the {num_classes} classes, "
                    f"0 to {num_classes - 1}."
                )

        self.num_labels = num_classes + (class_dropout > 0)
        self.class_embedding = None
        if conditioning == "time":
            unet_options = {**(unet_options or {}), "num_class_embeds": self.num_labels}
        elif class_emb_size is None:
            in_channels += num_classes
        else:
            self.class_embedding = nn.Embedding(self.num_labels, class_emb_size)
            in_channels += class_emb_size
        self.unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            layers_per_block=layers_per_block,
            block_out_channels=block_out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            **(unet_options or {}),
        )

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DModel,
        num_classes: int,
        class_dropout: float = 0.0,
        id2label: dict[int, str] | list[str] | None = None,
    ) -> "ClassConditionedUnet":
        """Make a class-conditional network from an unconditional one, with a copy of its weights.

        The embeddings of the classes, which are added to that of the timestep, are zero: until it is trained, the
        network predicts the same as `unet` for each class.

        Args:
            unet ([`UNet2DModel`]): The unconditional network.
            num_classes (`int`): Number of classes.
            class_dropout (`float`, defaults to 0.0): Probability of the null class in training, within [0, 1).
            id2label (`dict[int, str]` or `list[str]`, *optional*): Names of the classes.

        Raises:
            `ValueError`: If `unet` is class-conditional already, or see `ClassConditionedUnet`.
        """
        if unet.class_embedding is not None:
            raise ValueError("The UNet is class-conditional already; `from_unet` takes an unconditional one.")
        own = inspect.signature(cls.__init__).parameters
        arguments = inspect.signature(UNet2DModel.__init__).parameters
        config = {name: value for name, value in unet.config.items() if name in arguments}
        model = cls(
            **{name: value for name, value in config.items() if name in own},
            num_classes=num_classes,
            class_emb_size=None,
            class_dropout=class_dropout,
            id2label=id2label,
            conditioning="time",
            unet_options={
                name: value
                for name, value in config.items()
                if name not in own and name not in _CLASS_ARGUMENTS and value != arguments[name].default
            },
        )
        embeddings = torch.zeros_like(model.unet.state_dict()["class_embedding.weight"])
        model.unet.load_state_dict({**unet.state_dict(), "class_embedding.weight": embeddings})
        return model.to(unet.device, unet.dtype)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predict the noise, or whatever target the network was trained on.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy images.
            timestep (`torch.Tensor`, `float` or `int`): t, either one value or a tensor of shape `(batch_size,)`.
            class_labels (`torch.Tensor` of shape `(batch_size,)`):
                Integers below `num_classes`, or `num_classes` itself for the null class if there is one.
            return_dict (`bool`, defaults to `True`):
                Whether to return an [`~models.unets.unet_2d.UNet2DOutput`] instead of a plain tuple.

        Returns:
            [`~models.unets.unet_2d.UNet2DOutput`] or `tuple`: The prediction, `(batch_size, out_channels, height,
            width)`.

        Raises:
            `ValueError`: If `class_labels` is not one integer per image.
        """
        if class_labels.shape != sample.shape[:1] or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` is {class_labels.dtype} of shape {tuple(class_labels.shape)}, but must hold one "
                f"integer for each of the {sample.shape[0]} images."
            )
        if self.config.conditioning == "time":
            return self.unet(sample, timestep, class_labels, return_dict=return_dict)
        if self.class_embedding is None:
            condition = F.one_hot(class_labels.long(), self.num_labels)[:, : self.config.num_classes]
        else:
            condition = self.class_embedding(class_labels)
        condition = condition.to(sample.dtype)[:, :, None, None].expand(-1, -1, *sample.shape[2:])
        return self.unet(torch.cat([sample, condition], dim=1), timestep, return_dict=return_dict)

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
