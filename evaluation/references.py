"""References that samples are compared with: features of images, cached, or saved mean and covariance."""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..core.errors import RunError
from ..core.files import fingerprint
from ..data.images import RESIZE, color_channels, open_image, to_bytes, upright_size
from ..data.preprocessing import Preprocessing, low_contrast, read_image
from ..data.sources import ImageSource
from .arguments import CACHE_DIR
from .extractors import FeatureExtractor
from .facts import ImageProperties, ReferenceFacts
from .features import Features, cached_features
from .metrics import Gaussian, MetricValue, reference_baseline

logger = logging.getLogger(__name__)

INSPECTED_IMAGES = 100  # images whose size, channels and file format stand for all


class ReferenceImages:
    """The images of a source that samples are compared with; several threads can read them.

    Args:
        skip_broken: read the next image in place of one that cannot be read, as training does.
        value_range: see `Preprocessing`.

    Raises:
        RunError: from `image` and `pixels`, if the image cannot be read.
    """

    def __init__(self, source: ImageSource, skip_broken: bool = False, value_range: tuple[float, float] | None = None):
        self.source, self.skip_broken, self.value_range = source, skip_broken, value_range
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self, indices: Sequence[int], accelerator: Accelerator) -> str:
        """Return a hash of the contents of these images, which one process reads; every process must call this."""
        contents = [self.source.fingerprint(indices) if accelerator.is_main_process else ""]
        return broadcast_object_list(contents)[0]

    def image(self, i: int) -> Image.Image:
        """Return image i, not yet decoded."""
        return self._read(i, open_image)

    def pixels(self, i: int, channels: int, height: int, width: int) -> torch.Tensor:
        """Return image i at this size, center-cropped: uint8, (channels, height, width)."""
        preprocessing = Preprocessing(channels, height, width, center_crop=True, value_range=self.value_range)
        loaded = self._read(i, lambda cell: read_image(cell, preprocessing))
        return to_bytes(preprocessing.finish(loaded, sample_key=0))

    def _read(self, i: int, read: Callable[[Any], Any]) -> Any:
        message = ""
        for index in range(i, i + (len(self) if self.skip_broken else 1)):
            try:
                with self.lock:
                    return read(self.source[index % len(self)])
            except Exception as error:  # BrokenImageError, or almost anything from Pillow's decoders
                message = f"An image cannot be read: {self.source.name(index % len(self))}: {error}."
        raise RunError(f"{message} Repair or remove it.")


class Reference:
    """The reference that samples are compared with; features are in the main process only.

    Args:
        facts: where the images are from, their number and how they were prepared.
        features: features of the images, if more than their mean and covariance is known.
        gaussian: their mean and covariance, where there are no features.
    """

    def __init__(self, facts: ReferenceFacts, features: Features | None = None, gaussian: Gaussian | None = None):
        self.facts, self.features = facts, features
        self._gaussian = gaussian
        self._baselines: dict[tuple[int, str | None, bool], dict[str, MetricValue]] = {}

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features."""
        if self._gaussian is None:
            assert self.features is not None  # one of the two is given
            self._gaussian = Gaussian.of(self.features["features"])
        return self._gaussian

    def baseline(self, count: int, logits_input: str | None, is_clip: bool) -> dict[str, MetricValue]:
        """Return the `reference_baseline` for `count` samples.

        Args:
            logits_input: see `FeatureExtractor.logits_input`; None leaves out the score of the logits.
            is_clip: see `FeatureExtractor.is_clip`.
        """
        key = count, logits_input, is_clip
        if key not in self._baselines:
            assert self.features is not None
            logits = self.features.get("logits") if logits_input else None
            features = self.features["features"]
            self._baselines[key] = reference_baseline(features, count, logits, logits_input, is_clip)
        return self._baselines[key]


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
    threads: int = 1,
) -> Reference:
    """Extract the features of images at the size of the samples, cached under a hash of everything they depend on.

    Called by every process.

    Args:
        name: name of the data set.
        split: its split.
        size: height and width.
        count: number of images in a random subset; None means all.
        channels: 1 or 3; None keeps gray images gray and others in color.
        threads: see `extract_features`.
    """
    count = min(count or len(images), len(images))
    indices = random_subset(len(images), count)
    properties = describe_images([images.image(indices[i]) for i in evenly_spaced(count)])
    properties = replace(properties, channels=channels or properties.channels)
    height, width = size
    measured_at = f"{width}x{height}"
    facts = ReferenceFacts(
        name=name,
        split=split,
        contents=images.fingerprint(indices, accelerator),
        images=count,
        of=len(images),
        size=properties.size,
        channels=properties.channels,
        format=properties.format,
        value_range=images.value_range and f"{images.value_range[0]:g} to {images.value_range[1]:g}",
        measured_at=measured_at,
        # part of the cache key and the results: do not reword it, or existing ones no longer match
        preparation="as they are"
        if properties.size == measured_at
        else f"cropped at the center, to {measured_at}, {RESIZE}",
    )

    def extract(batch: range) -> Features:
        pixels = torch.stack([images.pixels(indices[i], properties.channels, height, width) for i in batch])
        if batch.start == 0 and (warning := low_contrast(pixels / 127.5 - 1)):
            logger.warning(f"{name}: {warning}")
        return extractor(pixels)

    # the device is included because rounding differs between a GPU and a CPU
    protocol = {**facts.as_dict(), **extractor.facts.as_dict(), "device": accelerator.device.type}
    readable_name = re.sub(r"[^\w.-]+", "-", f"{name}-{split}")  # a slice, such as train[:10%], is no valid file name
    path = cache_dir / f"{readable_name}-{fingerprint(protocol)}.safetensors"
    features = cached_features(
        path, protocol, count, batch_size, extract, accelerator, f"measuring {name}, {split}", threads
    )
    return Reference(facts, features)


def random_subset(total: int, count: int) -> list[int]:
    """Return a random subset of `count` of the indices 0 .. total-1, sorted; it is the same in every call."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values.tolist()


def evenly_spaced(count: int) -> list[int]:
    """Return at most `INSPECTED_IMAGES` of the indices 0 .. count-1, evenly spaced."""
    return sorted({round(i) for i in np.linspace(0, count - 1, INSPECTED_IMAGES)})


def describe_images(images: list[Image.Image]) -> ImageProperties:
    """Describe the size, channels and file format of images."""
    sizes = {"{}x{}".format(*upright_size(image)) for image in images}
    return ImageProperties(
        size=sizes.pop() if len(sizes) == 1 else "of different sizes",
        channels=max(color_channels(image) for image in images),
        format=" and ".join(sorted({image.format or "8-bit pixels" for image in images})),
    )
