"""Feature extractors: the networks in whose feature space distributions of images are compared."""

import hashlib
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants
from torch import nn

from ..core.errors import naming_file
from ..core.extras import missing_extra
from ..core.locations import hub_problem
from ..data.images import RESIZE, resized, with_channels
from ..sampling.loading import check_complete, realign_parameters
from .arguments import HUB_EXTRACTORS, INCEPTION, PIXELS
from .classifier import ImageClassifier
from .facts import ExtractorFacts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OFFLINE = (
    f"or use --feature_extractor {PIXELS}, which needs no weights, or the folder of a classifier, such as "
    "examples/classifiers/mnist or one of your own images (ddgan train-classifier)."
)


class FeatureExtractor(nn.Module):
    """A network that maps images to features and, if it is a classifier, to logits.

    Images are `(N, C, H, W)`, uint8, C = 1 or 3, of any size; features `(N, D)` and logits `(N, classes)` are float32.

    Attributes:
        name: name of the network.
        digest: fingerprint of its weights.
        channels: 1 or 3; gray images are repeated for 3, color images converted to gray for 1.
        resize: how images are resized to the input of the network.
        logits_input: attribute of `MetricInputs` that takes its logits; None if it has none.
        is_clip: whether the features are those of CLIP, which CMMD compares.
    """

    logits_input: str | None = None
    is_clip = False

    def __init__(self, name: str, network: nn.Module, channels: int, resize: str):
        super().__init__()
        self.name, self.channels, self.resize = name, channels, resize
        realign_parameters(network)
        self.network = network.eval().requires_grad_(False)
        self.digest = weights_digest(network)

    @property
    def metric_inputs(self) -> set[str]:
        """The attributes of `MetricInputs` that this network computes from samples and a reference."""
        more = {self.logits_input} if self.logits_input else set()
        more |= {"clip_features"} if self.is_clip else set()
        return {"features", "reference", "reference_gaussian"} | more

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


class VisionTransformer(FeatureExtractor):
    """A vision transformer of Transformers.

    Images are resized to a square without cropping, bicubic like in arXiv 2306.04675 and 2401.09603, whereas
    torch-fidelity resizes them like TensorFlow 1.

    Args:
        size: height and width of its input.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    output: str  # name of its output with the features

    def __init__(self, network: "PreTrainedModel", name: str, size: int):
        self.size = size
        super().__init__(name, network, 3, f"to {size}x{size}, {RESIZE}")

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        images = resized(images, self.size, self.size).float() / 255
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return {"features": self.network((images - mean) / std)[self.output]}


class Dinov2(VisionTransformer):
    """A DINOv2 model; its features are the normalized class token."""

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    output = "pooler_output"

    def __init__(self, network: "PreTrainedModel", name: str):
        super().__init__(network, name, 16 * network.config.patch_size)


class Clip(VisionTransformer):
    """A CLIP model; its features are the projected embeddings of images, which are not normalized."""

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    output = "image_embeds"
    is_clip = True

    def __init__(self, network: "PreTrainedModel", name: str):
        super().__init__(network, name, network.config.image_size)


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
            For inception-v3-compat a file (.pth or .safetensors) with torch-fidelity's weights; for DINOv2 and CLIP a
            folder or repository. By default they are downloaded. A model of another architecture than the named one
            has the name of its folder.

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
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(f"{INCEPTION} needs a package: {missing_extra('torch-fidelity', 'eval')}.") from None
    layers = ["2048", "logits_unbiased"]
    file = URL_INCEPTION_V3.rpartition("/")[2]
    try:
        if weights is None:
            cached = Path(torch.hub.get_dir(), "checkpoints", file)
            if constants.HF_HUB_OFFLINE and not cached.exists():
                raise OSError(f"HF_HUB_OFFLINE is set, and {cached} does not exist")
            return InceptionV3Compat(FeatureExtractorInceptionV3(INCEPTION, layers, verbose=False))
        # torch-fidelity would unpickle anything, so it only gets a copy of tensors that were loaded safely
        tensors = io.BytesIO()
        torch.save(_load_tensors(weights), tensors)
        tensors.seek(0)
        return InceptionV3Compat(
            FeatureExtractorInceptionV3(INCEPTION, layers, feature_extractor_weights_path=tensors)
        )
    except Exception as error:  # from the download, the unpickler, or weights that do not fit
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if weights is None:
            raise ValueError(
                f"The weights of {INCEPTION} could not be downloaded: {reason}. Download {file} from torch-fidelity's "
                "releases on a machine with network access and pass the file with --extractor_weights; "
                f"{_OFFLINE}"
            ) from error
        raise ValueError(f"The file {weights} does not hold the weights of {INCEPTION}: {reason}") from error


def _load_tensors(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_transformer(name: str, weights: str | None) -> VisionTransformer:
    from transformers import AutoConfig, CLIPVisionModelWithProjection, Dinov2Model
    from transformers.utils import logging

    source = weights or HUB_EXTRACTORS[name]
    family, model_type, network_class, extractor_class = ("dinov2", "dinov2", Dinov2Model, Dinov2)
    if name.startswith("clip-"):
        family, model_type = "clip", "clip_vision_model"
        network_class, extractor_class = CLIPVisionModelWithProjection, Clip
    if not Path(source).exists() and (problem := hub_problem(source)):
        raise ValueError(
            f"The weights of {name} cannot be loaded: there is no folder {source}, and {problem} A folder that was "
            f"copied from another machine is passed with --extractor_weights; {_OFFLINE}"
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if vision_config := getattr(config, "vision_config", None):  # of a model with a text encoder
            vision_config.projection_dim = getattr(config, "projection_dim", vision_config.projection_dim)
            config = vision_config
        if config.model_type != model_type:
            raise ValueError(f"it is a model of the type {config.model_type}")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # no table of the tensors of the text encoder, which is left out
        try:
            loaded: Any = network_class.from_pretrained(
                source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
        finally:
            logging.set_verbosity(verbosity)
        network, info = loaded
    except Exception as error:  # damaged configs and weights make Transformers raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The weights of {name}, {source}, could not be loaded: {reason.removesuffix('.')}. --extractor_weights "
            f"names a folder or repository such as {HUB_EXTRACTORS[name]}; {_OFFLINE}"
        ) from error
    mismatched = [key for key, *_ in info["mismatched_keys"]]
    if lacking := sorted([*info["missing_keys"], *mismatched]):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ValueError(
            f"The weights of {name}, {source}, do not fit their config: {lacking[0]}{more} missing or of another "
            f"shape. --extractor_weights names a folder or repository such as {HUB_EXTRACTORS[name]}."
        )
    is_named = all(getattr(network.config, key) == value for key, value in _architecture(name).items())
    return extractor_class(network, name if is_named else f"{family} ({Path(source).name})")


def _architecture(name: str) -> dict[str, int]:
    """Return the values of a model's config that distinguish it from the other sizes."""
    size, patch, *resolution = name.partition("-vit-")[2].split("-")
    width, layers = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "g": (1536, 40)}[size]
    architecture = {"hidden_size": width, "num_hidden_layers": layers, "patch_size": int(patch)}
    if name.startswith("clip-"):
        architecture["image_size"] = int(resolution[0].removesuffix("px")) if resolution else 224
    return architecture


def _load_pixels(weights: str | None) -> Pixels8x8:
    if weights is not None:
        raise ValueError(f"{PIXELS} has no weights: leave out --extractor_weights.")
    return Pixels8x8()


EXTRACTORS: dict[str, Callable[[str | None], FeatureExtractor]] = {
    INCEPTION: _load_inception,
    **{name: partial(_load_transformer, name) for name in HUB_EXTRACTORS},
    PIXELS: _load_pixels,
}
