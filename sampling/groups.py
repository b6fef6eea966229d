"""Generate images in groups of seeds, so that an image depends only on its seed.

The rounding of a network's arithmetic depends on the size of the batch, but not on what else is in the batch. Images
are therefore generated in batches of a fixed size, in which each seed has a fixed place: with groups of 16, seed 37 is
always number 5 of the seeds 32 to 47. On a CPU each group is computed on one thread, and several groups at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ..data.images import CHANNEL_MODES
from .arguments import VARY_COLUMNS
from .generation import image_size, sample
from .loading import with_own_scheduler

# On a CPU the time per image is nearly constant from batches of this many pixels on, see benchmarks/README.md.
GROUP_PIXELS = 2**14
MAX_GROUP_SIZE = 32


@dataclass(frozen=True)
class GroupSampler:
    """Generates images in groups of seeds; several threads can call it at the same time.

    The parameters of the pipeline's networks are frozen.

    Attributes:
        pipe: The pipeline.
        size: Number of images in a group.
        seed: Seed of image 0; image i has the seed `seed` + i.
        num_inference_steps: As for `sample`.
        class_labels: Classes of the images, used in turn: image i has the class `class_labels[i % len(class_labels)]`.
        options: Further arguments, as for `sample`.
        vary: For a DDGAN, what varies along each row of `VARY_COLUMNS` consecutive images: the latent z, or all other
            noise. It has the seed `seed` + column, and the other one, fixed in a row, `seed` + row. Each row has one
            class.
    """

    pipe: DiffusionPipeline
    size: int
    seed: int = 0
    num_inference_steps: int | None = None
    class_labels: Sequence[int | str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    vary: Literal["z", "noise"] | None = None

    def __post_init__(self):
        # guided sampling freezes the network for the time of a call, which would affect the other threads
        guide = self.options.get("guide")
        for pipe in (self.pipe, guide) if guide else (self.pipe,):
            for component in pipe.components.values():
                if isinstance(component, torch.nn.Module):
                    component.requires_grad_(False)

    @property
    def offset(self) -> int:
        """The position of image 0 in its group."""
        return 0 if self.vary else self.seed % self.size

    def class_label(self, i: int) -> int | str | None:
        """Return the class of image i."""
        turn = i // VARY_COLUMNS if self.vary else i
        return self.class_labels[turn % len(self.class_labels)] if self.class_labels else None

    def seeds(self, i: int) -> dict[str, int]:
        """Return the seeds of image i by the names of the arguments of `sample`."""
        if not self.vary:
            return {"seeds": self.seed + i}
        row, column = divmod(i, VARY_COLUMNS)
        seeds, z_seeds = (row, column) if self.vary == "z" else (column, row)
        return {"seeds": self.seed + seeds, "z_seeds": self.seed + z_seeds}

    def __call__(self, indices: Sequence[int]) -> list[Image.Image]:
        """Generate images of one group; its other images are generated, too, and discarded."""
        start = indices[0] - (self.offset + indices[0]) % self.size
        group = range(start, start + self.size)
        labels: Any = [self.class_label(i) for i in group] if self.class_labels else None
        pipe = with_own_scheduler(self.pipe)
        by_image = [self.seeds(i) for i in group]
        seeds: dict[str, Any] = {name: [one[name] for one in by_image] for name in by_image[0]}
        arguments = {**self.options, "num_inference_steps": self.num_inference_steps, "class_labels": labels}
        images = sample(pipe, **seeds, **arguments)
        return [images[i - start] for i in indices]


def split_into_groups(count: int, size: int, offset: int = 0) -> list[range]:
    """Split the indices 0 .. count-1 into groups of which all but the first and the last have `size` indices.

    Args:
        count: Number of indices.
        size: Size of a group.
        offset: Position of index 0 in the first group, less than `size`.
    """
    return [range(max(start, 0), min(start + size, count)) for start in range(-offset, count, size)]


def group_size(pipe: DiffusionPipeline, batch_size: int) -> int:
    """Return the size of a group: `batch_size` on an accelerator, on a CPU a power of two fixed by the image size.

    On a CPU, large images take as long in a batch as one by one, so their groups have one image. So do those of
    pipelines with further networks, such as a VAE.
    """
    if pipe.device.type != "cpu":
        return batch_size
    config = _pixel_space_config(pipe)
    if config is None:
        return 1
    height, width = image_size(config)
    fitting = min(MAX_GROUP_SIZE, GROUP_PIXELS // (height * width))
    return 1 << max(0, fitting.bit_length() - 1)


def image_format(pipe: DiffusionPipeline) -> tuple[str, tuple[int, int]] | None:
    """Return the mode and the size, width first, of the PIL images of a pipeline; None if its config lacks them."""
    config = _pixel_space_config(pipe)
    if config is None or config.get("in_channels") not in CHANNEL_MODES:
        return None
    height, width = image_size(config)
    return CHANNEL_MODES[config["in_channels"]], (width, height)


def _pixel_space_config(pipe: DiffusionPipeline) -> Mapping[str, Any] | None:
    """Return the config of a pipeline's only network, if it states the size of the images."""
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    config = getattr(networks[0], "config", {}) if len(networks) == 1 else {}
    return config if config.get("sample_size") else None
