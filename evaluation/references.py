"""What samples are measured against: features of images, computed once and kept, or their mean and covariance."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from PIL import Image

from ..core.errors import RunError
from ..core.files import fingerprint
from ..data.images import RESIZE, color_channels, open_image, to_bytes
from ..data.preprocessing import Preprocessing, read_image
from ..data.sources import ImageSource
from . import metrics
from .extractors import FeatureExtractor
from .features import Features, cached_features
from .metrics import Gaussian, MetricValue

CACHE_DIR = Path(HF_HOME) / "ddgan-evaluation"
LOOKED_AT = 100  # images whose size, channels and file format stand for all


class ReferenceImages:
    """The images of a source, as samples are compared with them.

    Args:
        skip_broken: read the next image in place of one that cannot be read, as training does.

    Raises:
        RunError: from `image` and `pixels`, at an image that cannot be read.
    """

    def __init__(self, source: ImageSource, skip_broken: bool = False):
        self.source, self.skip_broken = source, skip_broken

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self, indices: Sequence[int]) -> str:
        return self.source.fingerprint(indices)

    def image(self, i: int) -> Image.Image:
        """Return image i, not yet decoded."""
        return self._read(i, open_image)

    def pixels(self, i: int, channels: int, height: int, width: int) -> torch.Tensor:
        """Return image i at this size, center-cropped: uint8, (channels, height, width)."""
        preprocessing = Preprocessing(channels, height, width, center_crop=True)
        loaded = self._read(i, lambda cell: read_image(cell, preprocessing))
        return to_bytes(preprocessing.finish(loaded, sample_key=0))

    def _read(self, i: int, read: Callable[[Any], Any]) -> Any:
        message = ""
        for index in range(i, i + (len(self) if self.skip_broken else 1)):
            try:
                return read(self.source[index % len(self)])
            except Exception as error:  # BrokenImageError, or almost anything from Pillow's decoders
                message = f"An image cannot be read: {self.source.name(index % len(self))}: {error}."
        raise RunError(f"{message} Repair or remove it.")


class Reference:
    """What samples are measured against; features are in the main process.

    Args:
        facts: where the images are from, how many they are and how they were prepared.
        features: of the images, if more than their mean and covariance is known.
        gaussian: their mean and covariance, where there are no features.
    """

    def __init__(self, facts: dict[str, Any], features: Features | None = None, gaussian: Gaussian | None = None):
        self.facts, self.features = facts, features
        self._gaussian, self._floors = gaussian, {}

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features."""
        if self._gaussian is None:
            self._gaussian = Gaussian.of(self.features["features"])
        return self._gaussian

    def floor(self, count: int) -> dict[str, MetricValue]:
        """`metrics.floor` for so many samples."""
        if count not in self._floors:
            self._floors[count] = metrics.floor(self.features["features"], count, self.features.get("logits"))
        return self._floors[count]


def measure_reference(
    images: ReferenceImages,
    name: str,
    split: str,
    size: tuple[int, int],
    extractor: FeatureExtractor,
    batch_size: int,
    accelerator: Accelerator,
    cache_dir: Path = CACHE_DIR,
    count: int | None = None,
    channels: int | None = None,
) -> Reference:
    """Features of images at the size of the samples, kept under a hash of all that they depend on.

    Called by every process.

    Args:
        size: height and width.
        count: so many of the images, drawn at random; None takes all.
        channels: 1 or 3; None leaves grey images grey and others in colour.
    """
    count = min(count or len(images), len(images))
    chosen = some_of(len(images), count)
    seen = look([images.image(chosen[i]) for i in spread(count)])
    seen["channels"] = channels or seen["channels"]
    contents = [images.fingerprint(chosen) if accelerator.is_main_process else None]  # which reads them once
    broadcast_object_list(contents)
    height, width = size
    as_they_are = seen["size"] == f"{width}x{height}"
    facts = {
        "name": name,
        "split": split,
        "contents": contents[0],
        "images": count,
        "of": len(images),
        **seen,
        "measured_at": f"{width}x{height}",
        "preparation": "as they are" if as_they_are else f"cropped at the centre, to {width}x{height}, {RESIZE}",
    }

    def measure(indices: range) -> Features:
        return extractor(torch.stack([images.pixels(chosen[i], seen["channels"], height, width) for i in indices]))

    # a GPU's features differ in what it rounds
    protocol = {**facts, **extractor.protocol, "device": accelerator.device.type}
    path = cache_dir / f"{name.replace('/', '-')}-{split}-{fingerprint(protocol)}.safetensors"
    description = f"measuring {name}, {split}"
    return Reference(facts, cached_features(path, protocol, count, batch_size, measure, accelerator, description))


def some_of(total: int, count: int) -> list[int]:
    """Numbers of so many of all images, drawn at random, the same each time."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values.tolist()


def spread(count: int) -> list[int]:
    """Numbers of some images, spread evenly."""
    return sorted({round(i) for i in np.linspace(0, count - 1, LOOKED_AT)})


def look(pictures: list[Image.Image]) -> dict[str, Any]:
    """Size, channels and file format of pictures, in words where they differ."""
    sizes = {f"{picture.width}x{picture.height}" for picture in pictures}
    return {
        "size": sizes.pop() if len(sizes) == 1 else "of different sizes",
        "channels": max(color_channels(picture) for picture in pictures),
        "format": " and ".join(sorted({picture.format or "8-bit pixels" for picture in pictures})),
    }
