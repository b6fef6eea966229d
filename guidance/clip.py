"""CLIP as a loss: how far pictures are from sentences or other pictures, in the embedding of a pretrained model."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from textwrap import shorten

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import affine, horizontal_flip, pil_to_tensor, resized_crop

from ..core.errors import InputError
from .losses import GuidanceLoss

DEFAULT_MODEL = "openai/clip-vit-base-patch32"
# the defaults of torchvision's RandomResizedCrop, which CLIP guidance has been done with from the start
CUT_AREA = (0.08, 1.0)
CUT_RATIO = (3 / 4, 4 / 3)
CUT_DEGREES = 5.0
# length of the gradient of an embedding in float16: with respect to single pixels it stays well above 6e-5 then
HALF_GRADIENT_NORM = 2.0**8

Prompt = str | Image.Image


class CLIPLoss(GuidanceLoss):
    """
    Squared great-circle distance between the embeddings of random cut-outs of an image and those of prompts.

    On the unit sphere that is the square of the angle, 4 arcsin^2(|u - v| / 2): twice the "spherical distance loss"
    of the notebooks by Katherine Crowson that brought CLIP guidance up, whose scales are to be halved here. Each
    cut-out is a random resized crop (8 to 100 % of the picture), rotated and sheared by up to 5 degrees, mirrored half
    of the time, and normalised by the model's own statistics. The loss is the mean over the cut-outs. They are drawn
    from `seed` and the step alone, the same for all images of a batch.

    Args:
        prompt (`str`, `PIL.Image.Image`, or a list of them or of pairs of one and its weight):
            What the image shall be like. Weights are divided by the sum of their absolute values; a negative one
            pushes away.
        model (`str`, defaults to `"openai/clip-vit-base-patch32"`):
            Hub id or folder of a Transformers model with image and text features (CLIP, SigLIP, ...); or, for
            open_clip, `"hf-hub:<id>"`, `"local-dir:<folder>"` or, with `pretrained`, the name of an architecture.
        pretrained (`str`, *optional*): open_clip's tag of weights, or a file with them: `"laion2b_s34b_b79k"`.
        n_cuts (`int`, defaults to 4): cut-outs of each image at each step.
        seed (`int`, defaults to 0): seed of the cut-outs.
        device (`str` or `torch.device`, *optional*, defaults to the first GPU if there is one):
            Where the model computes: on a GPU in float16. It is loaded once and shared by all losses that name it.

    Raises:
        `InputError`: for no prompt, weights that are all zero, fewer than one cut, a model that is not found, and one
        without image and text features.
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
        prompts = [each if isinstance(each, tuple) else (each, 1.0) for each in prompts]
        total = sum(abs(weight) for _, weight in prompts)
        if total == 0:
            raise InputError("CLIPLoss needs a prompt: a sentence or a picture, or several with weights.")
        if n_cuts < 1:
            raise InputError(f"`n_cuts` is {n_cuts}, but must be at least 1.")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.n_cuts, self.seed = n_cuts, seed
        self.encoder = load_encoder(model, pretrained, str(device))
        with torch.no_grad():
            self.targets = torch.cat([self._embed(each) for each, _ in prompts])
        self.weights = self.targets.new_tensor([weight / total for _, weight in prompts])

    def __call__(self, images: torch.Tensor, step: int = 0) -> torch.Tensor:
        random = np.random.default_rng([self.seed, step])
        pixels = _as_rgb(images.to(self.encoder.device, torch.float32))
        cuts = torch.cat([random_cut(pixels, self.encoder.size, random) for _ in range(self.n_cuts)])
        distances = squared_great_circle(self.encoder.embed_images(cuts), self.targets)
        return (distances @ self.weights).view(self.n_cuts, len(images)).mean(0).to(images.device)

    def _embed(self, prompt: Prompt) -> torch.Tensor:
        if isinstance(prompt, str):
            return self.encoder.embed_text(prompt)
        height, width = self.encoder.size
        fitted = ImageOps.fit(prompt.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        return self.encoder.embed_images(pil_to_tensor(fitted)[None].to(self.encoder.device) / 127.5 - 1)


def squared_great_circle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """
    The squared angle between each of `u` and each of `v`: shapes (n, d) and (m, d) give (n, m), values 0 to pi^2.

    As 2 atan2(|u - v|, |u + v|) of unit vectors the angle is exact, with a finite gradient, also near 0 and pi.
    """
    u, v = F.normalize(u), F.normalize(v)
    apart, together = u[:, None] - v, u[:, None] + v
    angle = 2 * torch.atan2(torch.linalg.vector_norm(apart, dim=2), torch.linalg.vector_norm(together, dim=2))
    return angle.square()


def random_cut(images: torch.Tensor, size: tuple[int, int], random: np.random.Generator) -> torch.Tensor:
    """One cut-out of `size` (height, width), drawn from `random`, of all images (batch_size, channels, H, W) alike."""
    height, width = images.shape[2:]
    area = random.uniform(*CUT_AREA) * height * width
    ratio = math.exp(random.uniform(*np.log(CUT_RATIO)))
    h = min(max(round(math.sqrt(area / ratio)), 1), height)
    w = min(max(round(math.sqrt(area * ratio)), 1), width)
    top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
    cut = resized_crop(images, top, left, h, w, list(size), InterpolationMode.BICUBIC, antialias=True)
    angle, *shear = random.uniform(-CUT_DEGREES, CUT_DEGREES, 3).tolist()
    cut = affine(cut, angle, [0, 0], 1.0, shear, InterpolationMode.BILINEAR)
    return horizontal_flip(cut) if random.random() < 0.5 else cut


@lru_cache(maxsize=2)
def load_encoder(model: str, pretrained: str | None, device: str) -> "Encoder":
    """A CLIP model, loaded once for all that ask for the same on the same device; arguments as of [`CLIPLoss`].

    Raises:
        InputError: where there is none, or one that embeds not both images and text.
    """
    is_open_clip = pretrained is not None or model.startswith(("hf-hub:", "local-dir:"))
    try:
        if is_open_clip:
            return OpenClipEncoder(model, pretrained, torch.device(device))
        return TransformersEncoder(model, torch.device(device))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        name = f"{model} ({pretrained})" if pretrained else model
        raise InputError(
            f"The CLIP model {name} cannot be loaded. Possible are a Hub id or folder of a Transformers model "
            f"({DEFAULT_MODEL}), and for open_clip an architecture with its "
            "pretrained tag (ViT-B-32 and laion2b_s34b_b79k) or hf-hub:<id>. "
            f"{'open_clip' if is_open_clip else 'Transformers'} says: {shorten(str(error), 300)}"
        ) from error


class Encoder(ABC):
    """A model that embeds images and text in one space, frozen, in half precision on a GPU.

    Attributes:
        size: height and width of the images that it takes.
        device: where it computes.
    """

    def __init__(self, model: torch.nn.Module, size, mean: Sequence[float], std: Sequence[float], device):
        self.model = model.eval().requires_grad_(False)
        # on a CPU the weights still lie in the file, at odd addresses, for which kernels sum in another order
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.mean, self.std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (mean, std))
        self.device = device
        self.dtype = half_on_gpu(device)

    @abstractmethod
    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, d) of images that are normalised already; both in the model's dtype."""

    @abstractmethod
    def embed_text(self, text: str) -> torch.Tensor:
        """The embedding, float32 (1, d), of a sentence."""

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 (n, d), of float32 images (n, 3, *size) in [-1, 1]."""
        images = (images / 2 + 0.5 - self.mean) / self.std
        features = self.image_features(images.to(self.dtype)).float()
        if images.requires_grad and self.dtype != torch.float32:
            lift = None

            def lift_gradient(gradient):
                nonlocal lift
                lift = HALF_GRADIENT_NORM / gradient.norm(dim=1).clamp(min=1e-30)
                return gradient * lift[:, None]

            features.register_hook(lift_gradient)
            images.register_hook(lambda gradient: gradient / lift.view(-1, 1, 1, 1))
        return features


class TransformersEncoder(Encoder):
    """Any model of Transformers that has `get_image_features` and `get_text_features`."""

    def __init__(self, name: str, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(name, dtype=half_on_gpu(device)).to(device)
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise InputError(f"{name} holds a {type(model).__name__}, which embeds not both images and text.")
        statistics = AutoImageProcessor.from_pretrained(name)
        size = model.config.vision_config.image_size
        super().__init__(model, size, statistics.image_mean, statistics.image_std, device)
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.get_image_features(pixel_values=images)
        return getattr(features, "pooler_output", features)  # a plain tensor before Transformers 5

    def embed_text(self, text: str) -> torch.Tensor:
        # padded to full length, as SigLIP was trained
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        features = self.model.get_text_features(**tokens.to(self.device))
        return getattr(features, "pooler_output", features).float()


class OpenClipEncoder(Encoder):
    """Any model of open_clip."""

    def __init__(self, name: str, pretrained: str | None, device: torch.device):
        try:
            import open_clip
        except ImportError:
            raise InputError(
                f"The CLIP model {name} needs the package open_clip: pip install 'diffusers-ddgan[clip]'. Models of "
                f"Transformers ({DEFAULT_MODEL}) do without."
            ) from None
        precision = "fp16" if half_on_gpu(device) == torch.float16 else "fp32"
        model = open_clip.create_model(name, pretrained, precision=precision, device=device, require_pretrained=True)
        preprocessing = open_clip.get_model_preprocess_cfg(model)
        super().__init__(model, preprocessing["size"], preprocessing["mean"], preprocessing["std"], device)
        self.tokenizer = open_clip.get_tokenizer(name)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(images)

    def embed_text(self, text: str) -> torch.Tensor:
        return self.model.encode_text(self.tokenizer([text]).to(self.device)).float()


def half_on_gpu(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _as_rgb(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
