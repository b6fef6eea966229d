"""What the Space draws, within which limits, and what it says of it; app.py is the page around this."""

import itertools
import os
import sys
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from ddgan import ClassConditionalPipeline, CLIPLoss, DDGANPipeline, GuidanceLoss, GuidedPipeline
from ddgan.core.errors import InputError, RunError
from ddgan.guidance.clip import DEFAULT_MODEL
from ddgan.hub.upload import SPACE_VARIABLE
from ddgan.sampling.generation import sample
from ddgan.sampling.grids import steps_strip
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler
from ddgan.sampling.traces import DenoisingTrace, Step, trace_steps

CLIP_VARIABLE = "DDGAN_CLIP"  # the environment variable that names the CLIP model
EMBEDDED = Path(__file__).resolve().parents[1] / "models"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

MAX_PICTURES = 16
MAX_STEPS = 200
MAX_SEED = 2**31 - 1
MAX_SENTENCE = 200  # letters
MAX_SECONDS = 120  # of drawing, for one visitor
STEPS = 40
CLASS_GUIDANCE = 1.5  # towards the class, where it was trained for
STRIP_STEPS = 8
LEGIBLE_SIDE = 256

IN_TURN = -1  # in the place of a class: one after the other


@dataclass(frozen=True)
class Model:
    """A pipeline that visitors can choose, on the page called `name`."""

    name: str
    pipe: DiffusionPipeline

    @property
    def channels(self) -> int:
        return self.pipe.unet.config.in_channels

    @property
    def is_in_color(self) -> bool:
        return self.channels >= 3

    @property
    def is_ddgan(self) -> bool:
        return isinstance(self.pipe, DDGANPipeline)

    @property
    def classes(self) -> list[str]:
        """Their names, or else their numbers; none of a network that is not told the class."""
        conditional = ClassConditionalPipeline(self.pipe.unet, self.pipe.scheduler)
        try:
            count = conditional.num_classes
        except ValueError:
            return []
        names = {label: name for name, label in conditional.labels.items()}
        return [names.get(label, str(label)) for label in range(count)]

    @property
    def takes_class_guidance(self) -> bool:
        return isinstance(self.pipe, ClassConditionalPipeline) and self.pipe.has_null_class

    @property
    def schedulers(self) -> list[str]:
        """Those that can sample it, the best choice first."""
        known = [name for name, scheduler in SCHEDULERS.items() if scheduler in self.pipe.scheduler.compatibles]
        return sorted([*known, "as-saved"], key=lambda name: name != "ddim")

    @property
    def max_steps(self) -> int:
        return min(MAX_STEPS, self.pipe.scheduler.config.num_train_timesteps)

    @property
    def steps(self) -> int:
        return min(STEPS, self.max_steps)

    def describe(self) -> str:
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        colors = {1: "grey", 3: "colour", 4: "colour, transparent"}.get(self.channels, f"{self.channels} channels")
        parameters = sum(parameter.numel() for parameter in self.pipe.unet.parameters()) / 1e6
        classes = f" · {len(self.classes)} classes" if self.classes else ""
        kind = "Denoising Diffusion GAN" if self.is_ddgan else "Diffusion model"
        trained = self.pipe.scheduler.config.num_train_timesteps
        return f"{kind} of {trained} steps · {width}×{height}, {colors}{classes} · {parameters:.1f} M parameters"


@dataclass(frozen=True)
class Wanted:
    """What a visitor asks for, whatever it is pulled towards. `label` is a class of the model, or `IN_TURN`.

    Raises:
        InputError: for what was left empty.
    """

    pictures: int
    steps: int
    scheduler: str
    seed: int
    label: int | None = IN_TURN

    def __post_init__(self):
        for name, value in (("number of pictures", self.pictures), ("steps", self.steps), ("seed", self.seed)):
            if value is None:
                raise InputError(f"The {name} is empty: give a whole number.")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.pictures)

    def labels(self, model: Model) -> list[int] | None:
        """A class for each picture, where the model draws by class."""
        if not model.classes:
            return None
        if self.label in (IN_TURN, None):
            return [i % len(model.classes) for i in range(self.pictures)]
        return [self.label] * self.pictures


@dataclass(frozen=True)
class Drawn:
    """Pictures, the way to the first of them as one picture, and the seconds that it took."""

    pictures: list[Image.Image]
    strip: Image.Image
    seconds: float


class Watch:
    """
    Tells the page how far drawing is, and ends it when it takes too long.

    Args:
        progress: called with the step and the number of steps, and what is drawn.
        seconds: from now on, for all that is watched.
    """

    def __init__(self, progress: Callable[[tuple[int, int], str], Any], seconds: float = MAX_SECONDS):
        self.progress, self.seconds, self.end = progress, seconds, time.monotonic() + seconds

    def see(self, step: Step, what: str) -> None:
        """Raises:
        RunError: if the time is over.
        """
        self.progress((step.number + 1, step.total), what)
        if time.monotonic() > self.end:
            raise RunError(
                f"This was stopped after {self.seconds:g} seconds, at step {step.number + 1} of {step.total} "
                f"({what}). Ask for fewer pictures or fewer steps."
            )


def load_models() -> dict[str, Model]:
    """
    What `DDGAN_PIPELINE` names, folders or Hub repositories with commas between them, or else the embedded pipelines.

    Those that draw in colour come first.

    Raises:
        InputError: if there is none, and for one that cannot be shown.
    """
    named = [place.strip() for place in os.environ.get(SPACE_VARIABLE, "").split(",") if place.strip()]
    places = named or sorted(str(index.parent) for index in EMBEDDED.glob("*/model_index.json"))
    if not places:
        raise InputError(
            f"There is nothing to draw with: set the environment variable {SPACE_VARIABLE} to a pipeline folder or a "
            "repository on the Hub."
        )
    models = [load_model(place, name) for name, place in by_name(places).items()]
    return {model.name: model for model in sorted(models, key=lambda model: not model.is_in_color)}


def by_name(places: list[str]) -> dict[str, str]:
    """Each place once: a folder by its own name, with as many of those above it as tell all apart, or a Hub id."""
    parts = {Path(place).resolve().parts if Path(place).is_dir() else (place,): place for place in places}
    for depth in itertools.count(1):
        named = {Path(*each[-depth:]).as_posix(): place for each, place in parts.items()}
        if len(named) == len(parts):
            return named


def load_model(place: str, name: str) -> Model:
    model = Model(name, load_pipeline(place, device=DEVICE))
    try:
        GuidedPipeline.from_pipe(with_scheduler(model.pipe, model.schedulers[0]))
    except (AttributeError, ValueError) as error:
        raise InputError(f"{place} cannot be shown here: {error}") from error
    # the first drawing takes longer than all others, and shows whether there will be any
    draw(model, Wanted(pictures=1, steps=1, scheduler=model.schedulers[0], seed=0), Watch(lambda *_: None))
    return model


def find_clip() -> tuple[str | None, str]:
    """
    The CLIP model that sentences pull with: what `DDGAN_CLIP` names, or the usual one where it is in the Hub's cache.

    Returns:
        What `CLIPLoss` takes, or None and the reason for the page.
    """
    name = os.environ.get(CLIP_VARIABLE)
    try:
        name = name or snapshot_download(DEFAULT_MODEL, local_files_only=True)
        CLIPLoss("a picture", name, device=DEVICE)
    except LocalEntryNotFoundError:
        return None, (
            "Sentences pull by a CLIP model, whose weights are not here. Whoever runs this app can name one in the "
            f"environment variable `{CLIP_VARIABLE}`, such as `{DEFAULT_MODEL}` (600 MB)."
        )
    except InputError as error:
        print(error, file=sys.stderr)
        return None, "Sentences pull by a CLIP model, and that of this app cannot be loaded: its log says why."
    return name, ""


def draw(model: Model, wanted: Wanted, watch: Watch, class_guidance: float = 1.0) -> Drawn:
    """
    Draw what is wanted, without a pull.

    Args:
        class_guidance: the scale of classifier-free guidance, of a model that was trained for it.

    Raises:
        InputError: for what the model does not take.
        RunError: if it takes too long.
    """
    if isinstance(model.pipe, GuidedPipeline):
        return draw_pulled(model, wanted, watch, lambda images: images.mean((1, 2, 3)), 0.0, "sample", "unguided")
    guidance = {"guidance_scale": class_guidance} if model.takes_class_guidance else {}
    return _draw(model, with_scheduler(model.pipe, wanted.scheduler), wanted, watch, "unguided", **guidance)


def draw_pulled(
    model: Model,
    wanted: Wanted,
    watch: Watch,
    loss: Callable[[torch.Tensor], torch.Tensor],
    scale: float,
    gradient: str,
    what: str = "guided",
) -> Drawn:
    """Draw what is wanted, towards what a loss asks for; `scale` and `gradient` as of `GuidedPipeline`.

    Raises:
        InputError, RunError: as of `draw`.
    """
    try:
        pipe = GuidedPipeline.from_pipe(with_scheduler(model.pipe, wanted.scheduler))
    except ValueError as error:
        raise InputError(str(error)) from error
    pipe.set_progress_bar_config(disable=True)
    return _draw(model, pipe, wanted, watch, what, loss=loss, guidance_scale=scale, gradient=gradient)


def _draw(model: Model, pipe: DiffusionPipeline, wanted: Wanted, watch: Watch, what: str, **options: Any) -> Drawn:
    way = DenoisingTrace(STRIP_STEPS)

    def see(step: Step) -> None:
        way.record(step)
        watch.see(step, what)

    start = time.perf_counter()
    with trace_steps(pipe, see):
        pictures = sample(pipe, wanted.seeds, wanted.steps, wanted.labels(model), **options)
    seconds = time.perf_counter() - start
    return Drawn(pictures, steps_strip(way.timesteps, way.noisy, way.clean), seconds)


def sentence_loss(sentence: str, clip: str) -> CLIPLoss:
    """Raises:
    InputError: for none, and for one that is too long.
    """
    if not sentence.strip():
        raise InputError("Write a sentence first: what shall the pictures be like?")
    if len(sentence) > MAX_SENTENCE:
        raise InputError(f"The sentence has {len(sentence)} letters, and at most {MAX_SENTENCE} can be taken.")
    return CLIPLoss(sentence, clip, device=DEVICE)


def mean_loss(pictures: list[Image.Image], loss: GuidanceLoss) -> float:
    images = torch.stack([pil_to_tensor(picture) for picture in pictures]) / 127.5 - 1
    with torch.no_grad():
        return loss(images).mean().item()


def in_words(error: Exception) -> str:
    """What went wrong, as the page says it; what is not in our own words stays in the log."""
    if isinstance(error, (InputError, RunError)):
        return str(error)
    traceback.print_exception(error)
    return "Something went wrong here that is not your doing. The log of this app says what."


def legible(picture: Image.Image) -> Image.Image:
    """A small picture enlarged by a whole factor, so that browsers do not blur it."""
    factor = max(1, LEGIBLE_SIDE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def save_zip(path: Path, model: Model, wanted: Wanted, drawn: Drawn) -> None:
    """The pictures in their own size, named by model and seed, and the way to the first."""
    name = model.name.rpartition("/")[2]
    with zipfile.ZipFile(path, "w") as archive:
        for seed, picture in zip(wanted.seeds, drawn.pictures, strict=True):
            with archive.open(f"{name}-seed-{seed}.png", "w") as file:
                picture.save(file, "PNG")
        with archive.open(f"{name}-seed-{wanted.seed}-steps.png", "w") as file:
            drawn.strip.save(file, "PNG")


def rival(ddgan: Model, others: list[Model]) -> Model:
    """Of several models the one that is most like a DDGAN: by classes, by channels."""
    return max(others, key=lambda model: (model.classes == ddgan.classes, model.channels == ddgan.channels))
