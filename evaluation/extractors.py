"""Feature extractors: the networks in whose feature space distributions of images are compared."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..core.errors import naming_file
from ..core.extras import missing_extra
from ..core.locations import hub_problem
from ..data.images import RESIZE, resized, with_channels
from ..sampling.loading import check_complete, realign_parameters
from .arguments import DINOV2, INCEPTION, PIXELS
from .classifier import ImageClassifier
from .facts import ExtractorFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DINOV2_WEIGHTS = "facebook/dinov2-large"  # the model of arXiv 2306.04675
_OFFLINE = (
    f"or use --feature_extractor {PIXELS}, which needs no weights, or the folder of a classifier, such as "
    "examples/classifiers/mnist or one of your own images (ddgan train-classifier)."
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(nn.Module):
    """A network that maps images to features and, if it is a classifier, to logits.

    Images are `(N, C, H, W)`, uint8, C = 1 or 3, of any size; features `(N, D)` and logits `(N, classes)` are float32.

    Attributes:
        name: name of the network.
        digest: fingerprint of its weights.
        channels: 1 or 3; gray images are repeated for 3, color images converted to gray for 1.
        resize: how images are resized to the input of the network.
        logits_input: attribute of `MetricInputs` that takes its logits; None if it has none.
    """

    logits_input: str | None = None

    def __init__(self, name: str, network: nn.Module, channels: int, resize: str):
        super().__init__()
        self.name, self.channels, self.resize = name, channels, resize
        realign_parameters(network)
        self.network = network.eval().requires_grad_(False)
        self.digest = weights_digest(network)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `features` and, from a classifier, `logits`, on the CPU."""
        weights = next(self.network.parameters(), None)
        images = with_channels(images, self.channels).to("cpu" if weights is None else weights.device)
        return {name: tensor.float().cpu() for name, tensor in self.extract(images).items()}

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute `features` and, in a classifier, `logits` of images with `channels` channels, uint8."""
        raise NotImplementedError

    @property
    def facts(self) -> ExtractorFacts:
        """The facts in which two sets of features must agree to be comparable."""
        return ExtractorFacts(self.name, self.digest, self.resize)


class InceptionV3Compat(FeatureExtractor):
    """The Inception network of the original FID, from torch-fidelity: 2,048 pool3 features and 1,008 logits."""

    logits_input = "inception_logits"

    def __init__(self, network: nn.Module):
        super().__init__(INCEPTION, network, 3, "to 299x299, bilinear like TensorFlow 1, not antialiased")

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("features", "logits"), self.network(images), strict=True))


class Dinov2(FeatureExtractor):
    """A DINOv2 transformer; its features are the normalized class token."""

    def __init__(self, network: "PreTrainedModel", name: str):
        self.size = 16 * network.config.patch_size
        super().__init__(f"{DINOV2} ({name})", network, 3, f"to {self.size}x{self.size}, {RESIZE}")

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        images = resized(images, self.size, self.size).float() / 255
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        return {"features": self.network((images - mean) / std).pooler_output}


class Pixels8x8(FeatureExtractor):
    """The image itself at 8x8, RGB in [0, 1], averaged over areas: 192 features, without weights to download.

    Distances in this space are comparable with one another, but not with a published FID.
    """

    def __init__(self):
        super().__init__(PIXELS, nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten()), 3, "to 8x8, area-averaged")

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.network(images.float() / 255)}


class ClassifierFeatures(FeatureExtractor):
    """The penultimate layer and the logits of an `ImageClassifier`."""

    logits_input = "classifier_logits"
    network: ImageClassifier

    def __init__(self, network: ImageClassifier, name: str):
        self.size = network.config.sample_size
        super().__init__(name, network, network.config.in_channels, f"to {self.size}x{self.size}, {RESIZE}")

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.network.features(resized(images, self.size, self.size).float() / 127.5 - 1)
        return {"features": features, "logits": self.network.head(features)}


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_extractor(name: str, weights: str | None = None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load a feature extractor.

    Args:
        name: a key of `EXTRACTORS`, or the folder of an `ImageClassifier`.
        weights:
            For inception-v3-compat a file (.pth or .safetensors) with torch-fidelity's weights, instead of downloading
            them; for dinov2 a folder or repository, instead of facebook/dinov2-large.

    Raises:
        ValueError: if there is no such extractor, or its weights cannot be loaded or do not fit.
    """
    if name in EXTRACTORS:
        return EXTRACTORS[name](weights).to(device)
    return ClassifierFeatures(load_classifier(name), Path(name).resolve().name).to(device)


def load_classifier(folder: str) -> ImageClassifier:
    """Load the `ImageClassifier` in a folder.

    Raises:
        InputError: if it cannot be read.
        ValueError: if there is none.
    """
    config = Path(folder) / "config.json"
    with naming_file(config, AttributeError):
        class_name = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
    if class_name != ImageClassifier.__name__:
        raise ValueError(
            f"{folder} is neither one of the extractors {', '.join(EXTRACTORS)} nor the folder of a classifier that "
            "ddgan train-classifier wrote "
            f"({f'it holds a {class_name}' if class_name else f'there is no {config}'})."
        )
    with naming_file(folder, Exception):  # damaged configs and weights make Diffusers raise almost anything
        classifier = ImageClassifier.from_pretrained(folder)
    check_complete(classifier, f"The classifier in {folder}")
    return classifier


def weights_digest(network: nn.Module) -> str:
    """Return a fingerprint of a network's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_inception(weights: str | None) -> InceptionV3Compat:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(f"{INCEPTION} needs a package: {missing_extra('torch-fidelity', 'eval')}.") from None
    layers = ["2048", "logits_unbiased"]
    try:
        if weights is None:
            return InceptionV3Compat(FeatureExtractorInceptionV3(INCEPTION, layers, verbose=False))
        # torch-fidelity would unpickle anything, so it only gets a copy of tensors that were loaded safely
        tensors = io.BytesIO()
        torch.save(_load_tensors(weights), tensors)
        tensors.seek(0)
        return InceptionV3Compat(
            FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=tensors)
        )
    except Exception as error:  # from the download, the unpickler, or weights that do not fit
        reason = str(error).strip().splitlines()[0]
        if weights is None:
            raise ValueError(
                f"The weights of {INCEPTION} could not be downloaded: {reason}. Download "
                "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases on a machine with network "
                f"access and pass the file with --extractor_weights; {_OFFLINE}"
            ) from error
        raise ValueError(f"The file {weights} does not hold the weights of {INCEPTION}: {reason}") from error


def _load_tensors(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_dinov2(weights: str | None) -> Dinov2:
    from transformers import Dinov2Model

    source = weights or DINOV2_WEIGHTS
    if not Path(source).exists() and (problem := hub_problem(source)):
        raise ValueError(
            f"The DINOv2 model {source} cannot be loaded: there is no such folder, and {problem} Another model can be "
            f"named with --extractor_weights; {_OFFLINE}"
        )
    try:
        network = Dinov2Model.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The DINOv2 model {source} could not be loaded: {reason}. Pass the folder or repository of one with "
            f"--extractor_weights; {_OFFLINE}"
        ) from error
    return Dinov2(network, Path(source).name)


def _load_pixels(weights: str | None) -> Pixels8x8:
    if weights is not None:
        raise ValueError(f"{PIXELS} has no weights: leave out --extractor_weights.")
    return Pixels8x8()


EXTRACTORS: dict[str, Callable[[str | None], FeatureExtractor]] = {
    INCEPTION: _load_inception,
    DINOV2: _load_dinov2,
    PIXELS: _load_pixels,
}
