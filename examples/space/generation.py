"""Models, generation and limits of the Space, independent of its page in app.py."""

import math
import os
import re
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ddgan import ClassConditionalPipeline, CLIPLoss, ColorLoss, DDGANPipeline, GuidanceLoss, GuidedPipeline
from ddgan.core.errors import InputError, RunError
from ddgan.guidance.arguments import DEFAULT_MODEL
from ddgan.hub.arguments import CARD_NAME
from ddgan.hub.upload import SPACE_VARIABLE
from ddgan.pipelines.pipeline_class_conditional import Autoguidance
from ddgan.sampling.generation import image_size, sample
from ddgan.sampling.grids import steps_strip
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler
from ddgan.sampling.steps import steps_warning, trained_steps
from ddgan.sampling.traces import DenoisingTrace, Step, trace_steps

CLIP_VARIABLE = "DDGAN_CLIP"  # environment variable that names the CLIP model
GUIDE_VARIABLE = "DDGAN_AUTOGUIDANCE"  # environment variable that names the guide of autoguidance
EMBEDDED_MODELS = Path(__file__).resolve().parents[1] / "models"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MAX_IMAGES = 16
MAX_STEPS = 200
MAX_SEED = 2**31 - 1
MAX_PROMPT_LENGTH = 200  # characters
MAX_SECONDS = 120  # for one request
DEFAULT_STEPS = 40
# guidance scales at that number of steps, with the gradient through the network; few-step models follow it less, see
# docs/guidance.md
DEFAULT_GUIDANCE, FEW_STEP_GUIDANCE = 10.0, 40.0
DEFAULT_CLASS_GUIDANCE = 1.5  # best on digits, see docs/class_conditional.md
MAX_CLASS_GUIDANCE = 10.0
MAX_AUTOGUIDANCE = 5.0
STRIP_STEPS = 8
MIN_DISPLAY_SIDE = 256  # pixels; smaller images are enlarged

ALL_CLASSES = -1  # the choice that cycles through the classes


@dataclass(frozen=True)
class Model:
    """A pipeline that visitors can choose.

    Attributes:
        name: its name on the page.
        card: the text of its model card without the metadata; empty if it has none.
        repo_id: its repository on the Hub, if it was loaded from there.
        guide: a worse version of it for autoguidance.
    """

    name: str
    pipe: DiffusionPipeline
    card: str = ""
    repo_id: str | None = None
    guide: DiffusionPipeline | None = None

    @property
    def channels(self) -> int:
        return self.pipe.unet.config.in_channels

    @property
    def is_color(self) -> bool:
        return self.channels >= 3

    @property
    def is_ddgan(self) -> bool:
        return isinstance(self.pipe, DDGANPipeline)

    @property
    def is_few_step(self) -> bool:
        return self.is_ddgan or bool(trained_steps(self.pipe))

    @property
    def few_step_counts(self) -> list[int]:
        """The numbers of steps that a few-step model was trained for, the default first."""
        return trained_steps(self.pipe) or [self.max_steps]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images in pixels."""
        return image_size(self.pipe.unet.config)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.pipe.unet.parameters())

    @property
    def classes(self) -> list[str]:
        """The class names, or the class numbers where there are no names; empty if not class-conditional."""
        conditional = ClassConditionalPipeline(self.pipe.unet, self.pipe.scheduler)
        try:
            count = conditional.num_classes
        except ValueError:
            return []
        names = {label: name for name, label in conditional.labels.items()}
        return [names.get(label, str(label)) for label in range(count)]

    @property
    def supports_class_guidance(self) -> bool:
        return isinstance(self.pipe, ClassConditionalPipeline) and self.pipe.has_null_class

    @property
    def class_guidance(self) -> float:
        """The scale of classifier-free guidance in the example on its card, or else 1.5, for a few-step model 1."""
        if scale := re.search(r"\bguidance_scale=(\d+(?:\.\d+)?)", self.card):
            return min(max(float(scale[1]), 1.0), MAX_CLASS_GUIDANCE)
        return 1.0 if self.is_few_step else DEFAULT_CLASS_GUIDANCE

    @property
    def guidance(self) -> float:
        """The default scale of guidance towards a color or a prompt."""
        return FEW_STEP_GUIDANCE if self.is_few_step else DEFAULT_GUIDANCE

    @property
    def schedulers(self) -> list[str]:
        """The names of the compatible schedulers, the default first."""
        compatible = [name for name, scheduler in SCHEDULERS.items() if scheduler in self.pipe.scheduler.compatibles]
        default = "as-saved" if trained_steps(self.pipe) else "ddim"
        return sorted([*compatible, "as-saved"], key=lambda name: name != default)

    @property
    def max_steps(self) -> int:
        return min(MAX_STEPS, self.pipe.scheduler.config.num_train_timesteps)

    @property
    def default_steps(self) -> int:
        steps, *_ = trained_steps(self.pipe) or [DEFAULT_STEPS]
        return min(steps, self.max_steps)

    def describe(self) -> str:
        """Return one line for the page: kind, timesteps, steps it was trained for, image size, classes, parameters."""
        height, width = self.size
        colors = {1: "grayscale", 3: "color", 4: "color with alpha"}.get(self.channels, f"{self.channels} channels")
        classes = f" · {len(self.classes)} classes" if self.classes else ""
        kind = "Denoising Diffusion GAN" if self.is_ddgan else "Diffusion model"
        timesteps = f"{self.pipe.scheduler.config.num_train_timesteps} timesteps"
        if trained := trained_steps(self.pipe):
            timesteps += f", few-step sampling ({' or '.join(map(str, trained))})"
        return f"{kind}, {timesteps} · {width}×{height}, {colors}{classes} · {self.parameters / 1e6:.1f} M parameters"

    def summary(self) -> str:
        """Return the first paragraph of its card without links, or an empty string."""
        paragraphs = re.split(r"\n\s*\n", self.card.strip())
        text = next((" ".join(paragraph.split()) for paragraph in paragraphs if paragraph[:1].isalpha()), "")
        return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)


@dataclass(frozen=True)
class GenerationRequest:
    """The settings of one request, except for its guidance.

    Attributes:
        num_images: number of images to generate.
        steps: number of denoising steps.
        scheduler: a key of `SCHEDULERS`, or `as-saved`.
        seed: seed of the first image; image i is generated from `seed + i`.
        label: a class of the model, or `ALL_CLASSES`.
        vary: for a DDGAN, what differs between the images, the latent z or all other noise; None for both. All images
            then have one class, the first one for `ALL_CLASSES`.
        autoguidance: scale of autoguidance, at least 1 (none); ignored by models without a guide.

    Raises:
        InputError: if a number was left empty, or a value is not one that the page offers: requests to its API may
            contain anything.
    """

    num_images: int
    steps: int
    scheduler: str
    seed: int
    label: int | None = ALL_CLASSES
    vary: Literal["z", "noise"] | None = None
    autoguidance: float = 1.0

    def __post_init__(self):
        numbers = (("number of images", self.num_images), ("number of steps", self.steps), ("seed", self.seed))
        for name, value in numbers:
            if value is None:
                raise InputError(f"The {name} is empty. Enter a whole number.")
            if not isinstance(value, int):
                raise InputError(f"The {name} is not a whole number.")
        if not isinstance(self.scheduler, str) or self.scheduler not in ("as-saved", *SCHEDULERS):
            raise InputError("There is no such scheduler.")
        if not isinstance(self.label, int | None):
            raise InputError("The class is not one of those on the page.")
        _check_scale(self.autoguidance)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_images)

    @property
    def seed_arguments(self) -> dict[str, Sequence[int]]:
        """The arguments of `sample` with the seeds."""
        if self.vary is None:
            return {"seeds": self.seeds}
        fixed = [self.seed] * self.num_images
        seeds, z_seeds = (fixed, self.seeds) if self.vary == "z" else (self.seeds, fixed)
        return {"seeds": seeds, "z_seeds": z_seeds}

    def labels(self, model: Model) -> list[int] | None:
        """Return one class per image, or None if the model is not class-conditional."""
        if not model.classes:
            return None
        if self.label in (ALL_CLASSES, None):
            if self.vary:
                return [0] * self.num_images
            return [i % len(model.classes) for i in range(self.num_images)]
        return [self.label] * self.num_images


@dataclass(frozen=True)
class GenerationResult:
    """Generated images.

    Attributes:
        strip: the denoising steps of the first image.
        seconds: the time that it took.
        warning: a sentence if the model was not trained for these steps.
    """

    images: list[Image.Image]
    strip: Image.Image
    seconds: float
    warning: str | None


class StepProgress:
    """Report each denoising step to the page, and stop a request that takes too long.

    Args:
        progress: called with (step, number of steps) and a description.
        seconds: the time limit, counted from the creation of this object.
    """

    def __init__(self, progress: Callable[[tuple[int, int], str], Any], seconds: float = MAX_SECONDS):
        self.progress, self.seconds, self.deadline = progress, seconds, time.monotonic() + seconds

    def report(self, step: Step, description: str) -> None:
        """Report one step.

        Raises:
            RunError: if the time limit has passed.
        """
        self.progress((step.number + 1, step.total), description)
        if time.monotonic() > self.deadline:
            raise RunError(
                f"Generation was stopped after {self.seconds:g} seconds, at step {step.number + 1} of {step.total} "
                f"({description}). Choose fewer images or fewer steps."
            )


def load_models() -> dict[str, Model]:
    """Load the pipelines in the environment variable `DDGAN_PIPELINE`, or the embedded ones.

    The variable holds comma-separated folders or Hub repositories. `DDGAN_AUTOGUIDANCE` may name a worse version of
    one or some of them.

    Returns:
        The models by name: color models before others; among these few-step models, which are fast, first; and among
        few-step models fine-tuned ones first, which are better than DDGANs of the same images (docs/few_step.md).

    Raises:
        InputError: if no pipeline is found, one of them cannot be used here, or the guide fits none of them.
    """
    named = [item.strip() for item in os.environ.get(SPACE_VARIABLE, "").split(",") if item.strip()]
    paths_or_repos = named or sorted(str(index.parent) for index in EMBEDDED_MODELS.glob("*/model_index.json"))
    if not paths_or_repos:
        raise InputError(
            f"No pipeline found. Set the environment variable {SPACE_VARIABLE} to a pipeline folder or a repository "
            "on the Hub."
        )
    models = [load_model(path_or_repo, name) for name, path_or_repo in unique_names(paths_or_repos).items()]
    if guide := os.environ.get(GUIDE_VARIABLE):
        models = with_guide(models, guide)
    return {model.name: model for model in sorted(models, key=_rank)}


def with_guide(models: list[Model], path_or_repo: str) -> list[Model]:
    """Load a worse version of one or some models, and return the models with it as the guide of these.

    Raises:
        InputError: if it cannot be loaded, or can guide none of the models.
    """
    guide = load_pipeline(path_or_repo, device=DEVICE)
    guided, reason = [], ""
    for model in models:
        try:
            Autoguidance(guide, model.pipe, scale=1.0)
            guided.append(replace(model, guide=guide))
        except ValueError as error:
            guided.append(model)
            reason = f"{model.name}: {error}"
    if not any(model.guide for model in guided):
        raise InputError(f"{path_or_repo} cannot guide any of the models. {reason}")
    return guided


def find_model(models: Mapping[str, Model], name: Any) -> Model:
    """Return the model of a name on the page.

    Raises:
        InputError: if there is none.
    """
    if not isinstance(name, str) or name not in models:
        raise InputError(f"No model of this page was chosen. Choose one of {', '.join(models)}.")
    return models[name]


def _rank(model: Model) -> tuple[bool, bool, bool]:
    return not model.is_color, not model.is_few_step, model.is_ddgan


def unique_names(paths_or_repos: list[str]) -> dict[str, str]:
    """Name each pipeline once: a Hub repository by its id, a folder by as many path components as make it unique."""
    by_parts = {Path(item).resolve().parts if Path(item).is_dir() else (item,): item for item in paths_or_repos}
    depth = 1
    while len(names := {Path(*parts[-depth:]).as_posix(): item for parts, item in by_parts.items()}) < len(by_parts):
        depth += 1
    return names


def load_model(path_or_repo: str, name: str) -> Model:
    """Load a pipeline and generate one image with it.

    Raises:
        InputError: if it cannot be loaded or does not support guidance.
    """
    is_folder = Path(path_or_repo).is_dir()
    pipe = load_pipeline(path_or_repo, device=DEVICE)
    model = Model(name, pipe, load_card(path_or_repo), None if is_folder else path_or_repo)
    try:
        GuidedPipeline.from_pipe(with_scheduler(model.pipe, model.schedulers[0]))
    except (AttributeError, ValueError) as error:
        raise InputError(f"{path_or_repo} cannot be used here: {error}") from error
    # a warm-up: the first image takes longest, and a pipeline that fails should do so before the page is served
    steps, *_ = trained_steps(model.pipe) or [1]
    request = GenerationRequest(num_images=1, steps=steps, scheduler=model.schedulers[0], seed=0)
    generate(model, request, StepProgress(lambda *_: None))
    return model


def load_card(path_or_repo: str) -> str:
    """Return the text of the model card of a folder or repository without its metadata; empty if it has none."""
    file = Path(path_or_repo, CARD_NAME)
    try:
        return ModelCard.load(file if file.parent.is_dir() else path_or_repo).text
    except Exception:  # no card or metadata that cannot be read: the page does without it
        return ""


def find_clip() -> tuple[str | None, str]:
    """Find the CLIP model for text guidance: that of `DDGAN_CLIP`, or the default one if it is in the Hub's cache.

    Returns:
        The `model` argument of `CLIPLoss` and an empty string, or None and the reason to show on the page.
    """
    name = os.environ.get(CLIP_VARIABLE)
    try:
        name = name or snapshot_download(DEFAULT_MODEL, local_files_only=True)
        CLIPLoss("an image", name, device=DEVICE)
    except LocalEntryNotFoundError:
        return None, (
            "Text guidance needs a CLIP model, and none is available here. Whoever runs this app can set the "
            f"environment variable `{CLIP_VARIABLE}` to one, such as `{DEFAULT_MODEL}` (600 MB)."
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return None, "Text guidance needs a CLIP model, and the one of this app cannot be loaded. See the app's log."
    return name, ""


def guidance_loss(kind: str, target: str, clip: str | None) -> GuidanceLoss:
    """Return the loss of a guidance tab.

    Args:
        kind: `color` or `prompt`.
        target: the color as text, or the prompt.
        clip: the `model` argument of `CLIPLoss`.

    Raises:
        InputError: if the kind is another one, or the target is empty, too long or not a color.
    """
    if kind not in ("color", "prompt"):
        raise InputError("The kind of guidance is not one of those on the page.")
    if not isinstance(target, str):
        raise InputError("The color or prompt is not a text.")
    if kind == "prompt":
        if not target.strip():
            raise InputError("The prompt is empty. Describe the images you want.")
        if len(target) > MAX_PROMPT_LENGTH:
            raise InputError(f"The prompt has {len(target)} characters; the limit is {MAX_PROMPT_LENGTH}.")
    return ColorLoss(target) if kind == "color" else CLIPLoss(target, clip, device=DEVICE)


def generate(
    model: Model, request: GenerationRequest, progress: StepProgress, class_guidance: float = 1.0
) -> GenerationResult:
    """Generate images without a guidance loss.

    Args:
        class_guidance: scale of classifier-free guidance; ignored by models that were not trained for it.

    Raises:
        InputError: if the model does not support a setting.
        RunError: if the time limit passes.
    """
    if isinstance(model.pipe, GuidedPipeline):
        return generate_guided(
            model, request, progress, lambda images: images.mean((1, 2, 3)), 0.0, "sample", "unguided"
        )
    options: dict[str, Any] = {"guidance_scale": class_guidance} if model.supports_class_guidance else {}
    if options:
        _check_scale(class_guidance)
    if model.guide and request.autoguidance > 1:
        options = {f"class_{name}": scale for name, scale in options.items()}
        options |= {"guide": model.guide, "guidance_scale": request.autoguidance}
    return _generate(
        model, with_scheduler(model.pipe, request.scheduler, request.steps), request, progress, "unguided", **options
    )


def generate_guided(
    model: Model,
    request: GenerationRequest,
    progress: StepProgress,
    loss: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    gradient: str,
    description: str = "guided",
) -> GenerationResult:
    """Generate images guided by a loss; for `loss` and `gradient` see `GuidedPipeline`.

    Args:
        scale: guidance scale at 40 steps; with fewer steps, each moves the sample by more, for the same effect.

    Raises:
        InputError, RunError: see `generate`.
    """
    _check_scale(scale)
    try:
        pipe = GuidedPipeline.from_pipe(with_scheduler(model.pipe, request.scheduler, request.steps))
    except ValueError as error:
        raise InputError(str(error)) from error
    pipe.set_progress_bar_config(disable=True)
    scale_per_step = scale * DEFAULT_STEPS / request.steps
    options: dict[str, Any] = {"loss": loss, "guidance_scale": scale_per_step, "gradient": gradient}
    if model.guide and request.autoguidance > 1:
        options |= {"guide": model.guide, "autoguidance_scale": request.autoguidance}
    return _generate(model, pipe, request, progress, description, **options)


def _check_scale(scale: float) -> None:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError("The guidance scale is not a number.")


def _generate(
    model: Model,
    pipe: DiffusionPipeline,
    request: GenerationRequest,
    progress: StepProgress,
    description: str,
    **options: Any,
) -> GenerationResult:
    trace = DenoisingTrace(STRIP_STEPS)

    def on_step(step: Step) -> None:
        trace.record(step)
        progress.report(step, description)

    start = time.perf_counter()
    with trace_steps(pipe, on_step):
        arguments = {"num_inference_steps": request.steps, "class_labels": request.labels(model), **options}
        images = sample(pipe, **request.seed_arguments, **arguments)
    seconds = time.perf_counter() - start
    strip = steps_strip(trace.timesteps, trace.noisy, trace.clean)
    return GenerationResult(images, strip, seconds, steps_warning(pipe, request.steps))


def mean_loss(images: list[Image.Image], loss: GuidanceLoss) -> float:
    tensor = torch.stack([pil_to_tensor(image) for image in images]) / 127.5 - 1
    with torch.no_grad():
        return loss(tensor).mean().item()


def user_message(error: Exception) -> str:
    """Return the message to show on the page; the details of unexpected errors only go to the log."""
    if isinstance(error, (InputError, RunError)):
        return str(error)
    traceback.print_exception(error)
    return "Something went wrong. Try other settings; the details are in the log of the app."


def enlarge(image: Image.Image) -> Image.Image:
    """Enlarge a small image by an integer factor, so that browsers do not blur it."""
    factor = max(1, MIN_DISPLAY_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_zip(path: Path, model: Model, request: GenerationRequest, result: GenerationResult) -> None:
    """Save the images at their original size, named by model and seed, and the denoising steps of the first one."""
    name = model.name.rpartition("/")[2]
    with zipfile.ZipFile(path, "w") as archive:
        for seed, image in zip(request.seeds, result.images, strict=True):
            with archive.open(f"{name}-seed-{seed}.png", "w") as file:
                image.save(file, "PNG")
        with archive.open(f"{name}-seed-{request.seed}-steps.png", "w") as file:
            result.strip.save(file, "PNG")


def most_similar(few_step: Model, others: list[Model]) -> Model:
    """Return the model to compare a few-step model with: the same classes, channels and sizes if possible."""

    def similarity(model: Model) -> tuple[bool, bool, bool, float]:
        difference = abs(math.log(model.parameters / few_step.parameters))
        same_classes, same_size = model.classes == few_step.classes, model.size == few_step.size
        return same_classes, model.channels == few_step.channels, same_size, -difference

    return max(others, key=similarity)
