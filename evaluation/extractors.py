"""Networks whose features stand for images when distributions of images are compared."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.images import RESIZE, resized, with_channels
from .classifier import ImageClassifier

INCEPTION, DINOV2 = "inception-v3-compat", "dinov2"
DINOV2_WEIGHTS = "facebook/dinov2-large"  # the one of arXiv 2306.04675


class FeatureExtractor(nn.Module):
    """
    Images `(N, C, H, W)`, uint8, C = 1 or 3, of any size, to their features `(N, D)` and, if it is a classifier, the
    logits `(N, classes)`, both float32.

    Attributes:
        name: which network.
        digest: fingerprint of its weights.
        channels: 1 or 3; grey images are repeated for 3, others turned grey for 1.
        resize: how images become as large as it needs them, in words.
    """

    def __init__(self, name: str, network: nn.Module, channels: int, resize: str):
        super().__init__()
        self.name, self.channels, self.resize = name, channels, resize
        self.network = network.eval().requires_grad_(False)
        self.digest = weights_digest(network)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`features` and, of a classifier, `logits`."""
        device = next(self.network.parameters()).device
        found = self.measure(with_channels(images, self.channels).to(device))
        return {name: tensor.float().cpu() for name, tensor in found.items()}

    def measure(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    @property
    def protocol(self) -> dict[str, Any]:
        """What has to be the same for two sets of features to be compared."""
        return {"extractor": self.name, "extractor_digest": self.digest, "resize": self.resize}


class InceptionV3Compat(FeatureExtractor):
    """The Inception network of the original FID, as torch-fidelity has it: pool3's 2,048 features, 1,008 logits."""

    def __init__(self, network: nn.Module):
        super().__init__(INCEPTION, network, 3, "to 299x299, bilinear like TensorFlow 1, not antialiased")

    def measure(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(("features", "logits"), self.network(images), strict=True))


class Dinov2(FeatureExtractor):
    """A DINOv2 transformer: its normalised class token."""

    def __init__(self, network: nn.Module, name: str):
        self.size = 16 * network.config.patch_size
        super().__init__(f"{DINOV2} ({name})", network, 3, f"to {self.size}x{self.size}, {RESIZE}")

    def measure(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        images = resized(images, self.size, self.size).float() / 255
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD))
        return {"features": self.network((images - mean) / std).pooler_output}


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ClassifierFeatures(FeatureExtractor):
    """The penultimate layer and the logits of an `ImageClassifier`."""

    def __init__(self, network: ImageClassifier, name: str):
        self.size = network.config.sample_size
        super().__init__(name, network, network.config.in_channels, f"to {self.size}x{self.size}, {RESIZE}")

    def measure(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.network.features(resized(images, self.size, self.size).float() / 127.5 - 1)
        return {"features": features, "logits": self.network.head(features)}


def load_extractor(name: str, weights: str | None = None, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load an extractor by its name.

    Args:
        name: `inception-v3-compat`, `dinov2`, or the folder of an `ImageClassifier`.
        weights:
            For the Inception network a file (.pth or .safetensors) with torch-fidelity's weights in place of their
            download; for DINOv2 a folder or repository in place of facebook/dinov2-large.

    Raises:
        ValueError: if there is no such network, or its weights cannot be had or do not fit.
    """
    if name == INCEPTION:
        extractor = InceptionV3Compat(_inception(weights))
    elif name == DINOV2:
        extractor = Dinov2(_dinov2(weights or DINOV2_WEIGHTS), Path(weights or DINOV2_WEIGHTS).name)
    else:
        extractor = ClassifierFeatures(load_classifier(name), Path(name).resolve().name)
    return extractor.to(device)


def load_classifier(folder: str) -> ImageClassifier:
    """The `ImageClassifier` of a folder.

    Raises:
        ValueError: if there is none.
    """
    config = Path(folder) / "config.json"
    found = json.loads(config.read_text()).get("_class_name") if config.is_file() else None
    if found != ImageClassifier.__name__:
        raise ValueError(
            f"{folder} is neither {INCEPTION} nor {DINOV2}, nor the folder of a classifier that "
            f"scripts/train_classifier.py wrote ({f'it holds a {found}' if found else f'there is no {config}'})."
        )
    return ImageClassifier.from_pretrained(folder)


def weights_digest(network: nn.Module) -> str:
    """A fingerprint of a network's weights."""
    found = hashlib.blake2b(digest_size=8)
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _inception(weights: str | None) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            f"{INCEPTION} is torch-fidelity's, which is not installed: pip install 'diffusers-ddgan[eval]'."
        ) from None
    layers = ["2048", "logits_unbiased"]
    try:
        if weights is None:
            return FeatureExtractorInceptionV3(INCEPTION, layers, verbose=False)
        # torch-fidelity would unpickle anything: what it is given has been read as tensors and nothing else
        safe = io.BytesIO()
        torch.save(_tensors(weights), safe)
        safe.seek(0)
        return FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=safe)
    except Exception as error:  # the network's, the unpickler's, or of weights that do not fit
        reason = str(error).strip().splitlines()[0]
        if weights is None:
            raise ValueError(
                f"The weights of {INCEPTION} could not be downloaded: {reason}. Download "
                "weights-inception-2015-12-05-6726825d.pth from torch-fidelity's releases where there is a network, "
                "and name that file with --extractor_weights; or measure with a classifier of your own."
            ) from error
        raise ValueError(f"The file {weights} does not hold the weights of {INCEPTION}: {reason}") from error


def _tensors(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _dinov2(weights: str) -> nn.Module:
    from transformers import Dinov2Model

    try:
        return Dinov2Model.from_pretrained(weights)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The DINOv2 model {weights} could not be loaded: {reason}. Name the folder or repository of one with "
            "--extractor_weights; or measure with a classifier of your own."
        ) from error
