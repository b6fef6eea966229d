"""A noise-conditional discriminator built from the encoder of a pretrained diffusion UNet."""

import inspect
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn


class UNetDiscriminatorHead(nn.Module):
    """Convolutional head that maps the features of one resolution to a logit, which is zero before training."""

    def __init__(self, channels: int, norm_num_groups: int, norm_eps: float):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels, norm_eps)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.conv(self.act(self.norm(hidden_states)))
        return self.conv_out(self.act(hidden_states)).mean(dim=(1, 2, 3))


class UNetDiscriminator(ModelMixin, ConfigMixin):
    """The encoder of a [`UNet2DModel`] with a small convolutional head at each of its lowest resolutions.

    It classifies an image at a given noise level as real or generated. Copied from the pretrained UNet that is
    fine-tuned (`from_unet`), the encoder has useful features at every noise level from the first step on, as in
    [UFOGen](https://arxiv.org/abs/2311.09257) and [SiDA](https://arxiv.org/abs/2410.14919).

    The head of the lowest resolution sees the output of the mid block, the others that of the last residual (and
    attention) block before each downsampling. Attention runs in [`AttnProcessor`], since fused attention kernels have
    no second derivative, which exact gradient penalties need. Autocast does not apply.

    Args:
        unet_config (`dict`): arguments of the [`UNet2DModel`].
        num_heads (`int`, defaults to 3):
            Number of heads, counted from the lowest resolution; a UNet of fewer resolutions gets one at each.
        num_class_labels (`int`, *optional*):
            Number of classes, the null class included, where `unet_config["in_channels"]` counts the channels of a
            class embedding beside those of the image, as in `ClassConditionedUnet`.
        class_emb_size (`int`, *optional*): number of these channels.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]

    @register_to_config
    def __init__(
        self,
        unet_config: dict[str, Any],
        num_heads: int = 3,
        num_class_labels: int | None = None,
        class_emb_size: int | None = None,
    ):
        super().__init__()
        unet = UNet2DModel(**unet_config)
        block_out_channels = unet.config.block_out_channels
        self.center_input_sample = unet.config.center_input_sample
        self.class_embed_type = unet.config.class_embed_type

        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.class_embedding = unet.class_embedding
        self.input_class_embedding = None
        if num_class_labels is not None:
            assert class_emb_size is not None
            self.input_class_embedding = nn.Embedding(num_class_labels, class_emb_size)
        self.conv_in = unet.conv_in
        self.down_blocks = unet.down_blocks
        self.mid_block = unet.mid_block
        self.heads = nn.ModuleList(
            UNetDiscriminatorHead(channels, unet.config.norm_num_groups, unet.config.norm_eps)
            for channels in block_out_channels[-num_heads:]
        )
        for module in self.modules():
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())

    @classmethod
    def from_unet(cls, unet: ModelMixin, num_heads: int = 3) -> "UNetDiscriminator":
        """Build a discriminator, in float32, whose encoder is a copy of a UNet's.

        Args:
            unet ([`UNet2DModel`] or `ClassConditionedUnet`): the network to copy, unconditional or class-conditional.
            num_heads (`int`, defaults to 3): number of heads at most, counted from the lowest resolution.
        """
        inner = unet if isinstance(unet, UNet2DModel) else unet.unet
        arguments = inspect.signature(UNet2DModel.__init__).parameters
        unet_config = {name: value for name, value in inner.config.items() if name in arguments}
        state = inner.state_dict()
        num_class_labels = class_emb_size = None
        if inner is not unet and inner.class_embedding is None:  # the class enters as channels of the input
            num_class_labels = unet.num_labels
            if unet.class_embedding is None:  # one-hot vectors, and zeros for the null class
                class_emb_size = unet.config.num_classes
                state["input_class_embedding.weight"] = torch.eye(num_class_labels, class_emb_size)
            else:
                class_emb_size = unet.config.class_emb_size
                state["input_class_embedding.weight"] = unet.class_embedding.weight
        model = cls(unet_config, num_heads, num_class_labels, class_emb_size)
        model.load_state_dict(state, strict=False)  # the decoder of the UNet is left out, the heads are new
        return model.to(inner.device)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Classify images as real or generated.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The images, real or generated.
            timestep (`torch.Tensor`, `float` or `int`):
                The noise level of `sample` as the UNet's timestep, one for all or of shape `(batch_size,)`; 0 for a
                clean image.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): as the UNet takes them.

        Returns:
            `torch.Tensor` of shape `(batch_size, heads)`: logits, positive for "real", from fine to coarse.

        Raises:
            `ValueError`: if the class labels are missing, or the UNet is not class-conditional.
        """
        class_conditional = self.class_embedding is not None or self.input_class_embedding is not None
        if (class_labels is None) == class_conditional:
            raise ValueError(
                "`class_labels` must be passed if and only if the UNet is class-conditional, which this one is"
                f"{'' if class_conditional else ' not'}."
            )

        # gradient penalties compare logits that are almost equal, which mixed precision would round away
        with torch.autocast(sample.device.type, enabled=False):
            # 1. time and class
            timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
            temb = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
            if self.class_embedding is not None:
                if self.class_embed_type == "timestep":
                    class_labels = self.time_proj(class_labels).to(sample.dtype)
                temb = temb + self.class_embedding(class_labels).to(sample.dtype)

            # 2. features at each resolution
            if self.input_class_embedding is not None:
                class_emb = self.input_class_embedding(class_labels).to(sample.dtype)
                sample = torch.cat([sample, class_emb[:, :, None, None].expand(-1, -1, *sample.shape[2:])], dim=1)
            if self.center_input_sample:
                sample = 2 * sample - 1.0
            hidden_states, skip_sample, features = self.conv_in(sample), sample, []
            for block in self.down_blocks:
                if hasattr(block, "skip_conv"):
                    hidden_states, states, skip_sample = block(hidden_states, temb, skip_sample=skip_sample)
                else:
                    hidden_states, states = block(hidden_states, temb)
                features.append(states[len(block.resnets) - 1])  # pyright: ignore[reportArgumentType]
            if self.mid_block is not None:
                features[-1] = self.mid_block(hidden_states, temb)

            # 3. logits
            features = features[-len(self.heads) :]
            logits = [head(hidden_states) for head, hidden_states in zip(self.heads, features, strict=True)]
            return torch.stack(logits, dim=1)
