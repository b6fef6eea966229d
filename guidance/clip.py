"""Guidance towards text or images by the embedding of a pretrained CLIP model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine, horizontal_flip, resized_crop

from ..core.errors import InputError
from ..core.extras import missing_extra
from ..core.locations import hub_problem
from ..data.preprocessing import Preprocessing
from ..sampling.loading import realign_parameters
from .arguments import DEFAULT_MODEL
from .losses import GuidanceLoss

# the defaults of torchvision's RandomResizedCrop, which CLIP guidance has always used
CUT_AREA = (0.08, 1.0)
CUT_RATIO = (3 / 4, 4 / 3)
CUT_DEGREES = 5.0
# norm to which the gradient of an embedding is scaled in float16, so that gradients of single pixels stay above 6e-5,
# the smallest normal number
HALF_GRADIENT_NORM = 2.0**8

Prompt = str | Image.Image


class CLIPLoss(GuidanceLoss):
    """Squared great-circle distance between the embeddings of random cutouts of an image and those of prompts.

    On the unit sphere this is the squared angle, 4 arcsin^2(|u - v| / 2). It is twice the "spherical distance loss" of
    the notebooks by Katherine Crowson that introduced CLIP guidance, so halve guidance scales taken from there. Each
    cutout is a random resized crop (8% to 100% of the image), rotated and sheared by up to 5 degrees, mirrored with
    probability 1/2, and normalized by the model's statistics. The loss is the mean over the cutouts, which depend only
    on `seed` and the step and are the same for all images of a batch.

    Args:
        prompt (`str`, `PIL.Image.Image`, or a list of these or of `(prompt, weight)` pairs):
            The prompts. Weights are divided by the sum of their absolute values; a negative weight guides away from a
            prompt.
        model (`str`, defaults to `"openai/clip-vit-base-patch32"`):
            Hub ID or folder of a Transformers model with image and text features (CLIP, SigLIP, ...); or, for
            open_clip, `"hf-hub:<id>"`, `"local-dir:<folder>"` or, with `pretrained`, the name of an architecture.
        pretrained (`str`, *optional*): Pretrained tag of open_clip, such as `"laion2b_s34b_b79k"`, or a weights file.
        n_cuts (`int`, defaults to 4): Number of cutouts per image and step.
        seed (`int`, defaults to 0): Seed of the cutouts.
        device (`str` or `torch.device`, *optional*, defaults to the first GPU if there is one):
            Device of the model, which runs in float16 on a GPU. A model is loaded once and shared by all losses that
            use it.

    Raises:
        `InputError`: If there is no prompt, a text is empty or longer than the model reads, all weights are zero or
            one is not finite, `n_cuts` is below 1, or the model cannot be loaded or has no image and text features.
    """

    def __init__(
        self,
        prompt: Prompt | Sequence[Prompt | tuple[Prompt, float]],
        model: str = DEFAULT_MODEL,
        pretrained: str | None = None,
        n_cuts: int = 4,
        seed: int = 0,
        device: str | torch.device | None = None,
    ):
        prompts = [prompt] if isinstance(prompt, Prompt) else list(prompt)
        weighted = [prompt if isinstance(prompt, tuple) else (prompt, 1.0) for prompt in prompts]
        total = sum(abs(weight) for _, weight in weighted)
        if not 0 < total < math.inf:
            raise InputError(
                "CLIPLoss needs a prompt: a text or an image, or several of them with weights other than 0."
            )
        if any(isinstance(prompt, str) and not prompt.strip() for prompt, _ in weighted):
            raise InputError("A prompt is empty: describe the images you want.")
        if n_cuts < 1:
            raise InputError(f"`n_cuts` is {n_cuts}, but must be at least 1.")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.n_cuts, self.seed = n_cuts, seed
        self.encoder = load_encoder(model, pretrained, str(device))
        with torch.no_grad():
            self.targets = torch.cat([self._embed(prompt) for prompt, _ in weighted])
        self.weights = self.targets.new_tensor([weight / total for _, weight in weighted])

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, step])
        pixels = _as_rgb(images.to(self.encoder.device, torch.float32))
        cuts = torch.cat([random_cut(pixels, self.encoder.size, rng) for _ in range(self.n_cuts)])
        distances = squared_great_circle(self.encoder.embed_images(cuts), self.targets)
        return (distances @ self.weights).view(self.n_cuts, len(images)).mean(0).to(images.device)

    def _embed(self, prompt: Prompt) -> torch.Tensor:
        if isinstance(prompt, str):
            return self.encoder.embed_text(prompt)
        height, width = self.encoder.size
        image = Preprocessing(3, height, width, center_crop=True).fit(prompt)
        return self.encoder.embed_images(image[None].to(self.encoder.device))


def squared_great_circle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return the squared angle between each row of `u` and each row of `v`.

    The angle of unit vectors is computed as 2 atan2(|u - v|, |u + v|), which is accurate and has a finite gradient
    even near 0 and pi.

    Args:
        u: Vectors of shape `(n, d)`.
        v: Vectors of shape `(m, d)`.

    Returns:
        Squared angles of shape `(n, m)`, from 0 to pi^2.
    """
    u, v = F.normalize(u), F.normalize(v)
    difference, total = u[:, None] - v, u[:, None] + v
    angle = 2 * torch.atan2(torch.linalg.vector_norm(difference, dim=2), torch.linalg.vector_norm(total, dim=2))
    return angle.square()


def random_cut(images: torch.Tensor, size: tuple[int, int], rng: np.random.Generator) -> torch.Tensor:
    """Cut the same random region out of all images `(N, C, H, W)` and resize it to `size` (height, width)."""
    height, width = images.shape[2:]
    area = rng.uniform(*CUT_AREA) * height * width
    ratio = math.exp(rng.uniform(*np.log(CUT_RATIO)))
    h = min(max(round(math.sqrt(area / ratio)), 1), height)
    w = min(max(round(math.sqrt(area * ratio)), 1), width)
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    cut = resized_crop(images, top, left, h, w, list(size), InterpolationMode.BICUBIC, antialias=True)
    angle, *shear = rng.uniform(-CUT_DEGREES, CUT_DEGREES, 3).tolist()
    cut = affine(cut, angle, [0, 0], 1.0, shear, InterpolationMode.BILINEAR)
    return horizontal_flip(cut) if rng.random() < 0.5 else cut


@lru_cache(maxsize=2)
def load_encoder(model: str, pretrained: str | None, device: str) -> "Encoder":
    """Load a CLIP model, cached by its arguments; see [`CLIPLoss`] for these.

    Raises:
        InputError: If the model cannot be loaded, or does not embed both images and text.
    """
    is_open_clip = pretrained is not None or model.startswith(("hf-hub:", "local-dir:"))
    repo_id = model.removeprefix("hf-hub:")
    is_on_hub = repo_id != model or not (is_open_clip or Path(model).exists())
    if is_on_hub and (problem := hub_problem(repo_id)):
        raise InputError(f"The CLIP model {model} cannot be loaded: there is no such folder, and {problem}")
    try:
        if is_open_clip:
            return OpenClipEncoder(model, pretrained, torch.device(device))
        return TransformersEncoder(model, torch.device(device))
    except InputError:
        raise
    except Exception as error:  # from the libraries, or from the unpickler of a weights file
        name = f"{model} ({pretrained})" if pretrained else model
        if "trust_remote_code" in str(error):
            raise InputError(
                f"The CLIP model {name} contains custom Python code, which is not run. Use a model of Transformers or "
                f"open_clip without code of its own, such as {DEFAULT_MODEL}."
            ) from error
        raise InputError(
            f"The CLIP model {name} cannot be loaded. Use the Hub ID or folder of a Transformers model "
            f"({DEFAULT_MODEL}), or for open_clip hf-hub:<id> or an architecture with its pretrained tag (ViT-B-32 "
            f"laion2b_s34b_b79k). {'open_clip' if is_open_clip else 'Transformers'} reports: "
            f"{shorten(str(error), 300)}"
        ) from error


class Encoder(ABC):
    """A frozen model that embeds images and text in the same space, in half precision on a GPU.

    Attributes:
        size: Height and width of its input images.
        device: Device of the model.
        dtype: Data type of the model.
    """

    def __init__(self, model: torch.nn.Module, size, mean: Sequence[float], std: Sequence[float], device):
        self.model: Any = model.eval().requires_grad_(False)
        realign_parameters(model)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        self.device = device
        self.dtype = half_on_gpu(device)

    @abstractmethod
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalized images, `(n, 3, *size)`, as vectors `(n, d)`; both in the model's dtype."""

    @abstractmethod
    def embed_text(self, text: str) -> torch.Tensor:
        """Embed a text as a float32 vector `(1, d)`."""

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Embed float32 images `(n, 3, *size)` in [-1, 1] as float32 vectors `(n, d)`."""
        images = (images / 2 + 0.5 - self.mean) / self.std
        features = self.image_features(images.to(self.dtype)).float()
        if images.requires_grad and self.dtype != torch.float32:
            scale: torch.Tensor  # factor of each image's gradient within the model, against underflow

            def scale_gradient(gradient):
                nonlocal scale
                scale = HALF_GRADIENT_NORM / gradient.norm(dim=1).clamp(min=1e-30)
                return gradient * scale[:, None]

            features.register_hook(scale_gradient)
            images.register_hook(lambda gradient: gradient / scale.view(-1, 1, 1, 1))
        return features


class TransformersEncoder(Encoder):
    """A Transformers model with `get_image_features` and `get_text_features`."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        # otherwise Transformers asks on the terminal whether to run code that comes with a model
        trusted = {"trust_remote_code": False}
        model = AutoModel.from_pretrained(name, dtype=half_on_gpu(device), **trusted).to(device)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise InputError(f"{name} is a {type(model).__name__}, which does not embed both images and text.")
        processor = AutoImageProcessor.from_pretrained(name, **trusted)
        size = model.config.vision_config.image_size
        super().__init__(model, size, processor.image_mean, processor.image_std, device)
        self.tokenizer = AutoTokenizer.from_pretrained(name, **trusted)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.get_image_features(pixel_values=images)
        return getattr(features, "pooler_output", features)  # a plain tensor before Transformers 5

    def embed_text(self, text: str) -> torch.Tensor:
        # padded to full length, as in the training of SigLIP
        length = self.model.config.text_config.max_position_embeddings
        if len(self.tokenizer(text).input_ids) > length:
            raise _too_long(text, length)
        tokens = self.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.device))
        return getattr(features, "pooler_output", features).float()


class OpenClipEncoder(Encoder):
    """An open_clip model."""

    def __init__(self, name: str, pretrained: str | None, device: torch.device):
        try:
            import open_clip
        except ImportError:
            raise InputError(
                f"The CLIP model {name} needs a package: {missing_extra('open-clip-torch', 'clip')}. Or use a "
                f"Transformers model ({DEFAULT_MODEL})."
            ) from None
        precision = "fp16" if half_on_gpu(device) == torch.float16 else "fp32"
        model = open_clip.create_model(name, pretrained, precision=precision, device=device, require_pretrained=True)
        preprocessing = open_clip.get_model_preprocess_cfg(model)
        super().__init__(model, preprocessing["size"], preprocessing["mean"], preprocessing["std"], device)
        self.tokenizer = open_clip.get_tokenizer(name)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(images)

    def embed_text(self, text: str) -> torch.Tensor:
        length = self.tokenizer.context_length
        assert length is not None  # that of the model
        beyond = self.tokenizer([text], context_length=2 * length)[0, length:]
        if (beyond != beyond[-1]).any():  # more than padding, which repeats one token
            raise _too_long(text, length)
        return self.model.encode_text(self.tokenizer([text]).to(self.device)).float()


def _too_long(text: str, length: int) -> InputError:
    return InputError(
        f"The prompt {shorten(text, 60)!r} is longer than the {length} tokens that the CLIP model reads. Shorten it, "
        "or pass several prompts."
    )


def half_on_gpu(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Return the colors of images: gray ones (1 or 2 channels) in all three channels; transparency is left out."""
    return images[:, :1].expand(-1, 3, -1, -1) if images.shape[1] < 3 else images[:, :3]
