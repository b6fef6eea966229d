"""Measuring what a run draws, while it goes: against its own training images, without a trace in what is trained."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..core.errors import InputError, RunError
from ..core.files import fingerprint
from ..data.preprocessing import Preprocessing
from ..evaluation import report
from ..evaluation.extractors import INCEPTION, ClassifierFeatures, load_extractor
from ..evaluation.features import Features, extract_features
from ..evaluation.metrics import MIN_IMAGES, MetricValue
from ..evaluation.references import CACHE_DIR, ReferenceImages, measure_reference
from ..evaluation.results import Results, evaluate
from ..sampling.pipelines import sample_in_full_batches
from .arguments import EvaluationArguments, RunArguments
from .loading import TrainingData

AT_ONCE = 64  # pictures that are drawn at once at most
REFERENCE_IMAGES = 100_000  # training images that are measured at most, drawn at random; their features are in memory


@dataclass
class Evaluation:
    """What was measured at a step of a run.

    Attributes:
        measures: keyed `name@images`.
        floors: what halves of the training images give, keyed by name.
        protocol: what the numbers depend on, in words.
        alike: fingerprint of it all but the name and the step: numbers with the same one compare.
        dataset: name of the training images.
        split: of the dataset.
        warnings: what to mind when comparing the numbers.
    """

    step: int
    measures: dict[str, MetricValue]
    floors: dict[str, MetricValue]
    protocol: dict[str, str]
    alike: str
    dataset: str
    split: str
    warnings: list[str]

    @property
    def fid(self) -> float:
        return next(measure.value for key, measure in self.measures.items() if key.startswith("fid@"))

    def values(self) -> dict[str, float]:
        return {key: measure.value for key, measure in self.measures.items()}

    def in_words(self) -> str:
        """The numbers that tell most, with their floors."""
        keys = {key.partition("@")[0]: key for key in self.measures}
        return ", ".join(
            f"{report.title(keys[name])} {report.number(self.measures[keys[name]])}"
            + (f" (floor {report.number(self.floors[name])})" if name in self.floors else "")
            for name in ("fid", "kid", "class_accuracy")
            if name in keys
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Evaluation":
        parts = ("measures", "floors")
        return cls(**values | {part: {k: MetricValue(**m) for k, m in values[part].items()} for part in parts})


@dataclass
class EvaluationHistory:
    """What a run knows of its evaluations; the same in every process, and kept in checkpoints.

    Attributes:
        last: the newest.
        best: the one with the lowest FID of those that compare with the newest.
        since: the step of the first of those that compare with the newest.
        count: how many there were.
        seconds: how long they took together.
    """

    last: Evaluation | None = None
    best: Evaluation | None = None
    since: int = 0
    count: int = 0
    seconds: float = 0.0

    def add(self, found: Evaluation, seconds: float) -> bool:
        """Whether it is the best so far."""
        self.last, self.count, self.seconds = found, self.count + 1, self.seconds + seconds
        compares = self.best is not None and self.best.alike == found.alike
        is_best = not compares or found.fid < self.best.fid
        if not compares:
            self.since = found.step
        if is_best:
            self.best = found
        return is_best

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "EvaluationHistory":
        parts = ("last", "best")
        return cls(**values | {part: Evaluation.from_json(values[part]) for part in parts if values.get(part)})


class Evaluator:
    """Measures pictures of a run against its training images.

    Their features are computed, or taken from where scripts/evaluate.py keeps them, when this is made: what cannot be
    measured is said before training starts. Made and called by every process.

    Args:
        args: how often, how many pictures, and by which features.
        run: the run's settings; picture i is drawn from the seed `run.seed` + i.
        data: the training images; where they have classes, these are drawn in turn.

    Raises:
        InputError: if the features cannot be had, or the training images cannot be measured.
        RunError: at a training image that cannot be read.
    """

    def __init__(self, args: EvaluationArguments, run: RunArguments, data: TrainingData, accelerator: Accelerator):
        if data.source is None:
            raise InputError(
                "--eval_every measures against the training images, which a stream does not hold. Leave it out, and "
                "measure the finished model with scripts/evaluate.py; or train without --streaming."
            )
        if len(data.source) < MIN_IMAGES:
            raise InputError(
                f"--eval_every measures against the training images, of which there must be at least {MIN_IMAGES}; "
                f"{data.name} has {len(data.source)}."
            )
        self.args, self.run, self.accelerator = args, run, accelerator
        self.at_once = min(run.batch_size, AT_ONCE)
        self.channels = 1 if data.preprocessing.channels <= 2 else 3  # transparency does not count
        self.size = data.preprocessing.height, data.preprocessing.width
        try:
            with accelerator.main_process_first():  # the others find what it has downloaded
                self.extractor = load_extractor(args.feature_extractor or INCEPTION, args.extractor_weights)
            images = ReferenceImages(data.source, data.args.skip_broken_images)
            with self._extractor_on_the_device():
                self.reference = measure_reference(
                    *(images, data.name, data.source.split, self.size, self.extractor, AT_ONCE, accelerator),
                    cache_dir=CACHE_DIR,
                    count=REFERENCE_IMAGES,
                    channels=self.channels,
                )
            if accelerator.is_main_process:
                self.reference.floor(args.eval_images)
        except (ValueError, ImportError) as error:
            raise InputError(f"--eval_every: {error}") from error
        classes = data.classes
        self.labels = list(range(len(classes))) if classes else None
        told_apart = isinstance(self.extractor, ClassifierFeatures) and self.extractor.network.class_names == classes
        self.judge = self.extractor if told_apart else None

    def due(self, step: int, last: int, known: EvaluationHistory) -> bool:
        """Whether a step is to be evaluated and has not been yet."""
        wanted = step > 0 and (step == last or step % self.args.eval_every == 0)
        return wanted and (known.last is None or known.last.step != step)

    def measure(
        self,
        draw: Callable[[list[int], list[int] | None], list[Image.Image]],
        step: int,
        drawn: dict[str, Any],
        between: Callable[[], None],
    ) -> Evaluation:
        """Draw pictures, a part in each process, and measure them.

        Args:
            draw: a picture for each seed and, where there are classes, its class; all processes draw at once.
            drawn: how, for the protocol.
            between: as of `collect`.

        Returns:
            the same in every process.
        """
        count = self.args.eval_images
        # sharded networks are called by all processes together, so each draws equally many whole batches
        whole = self.at_once * self.accelerator.num_processes if self.accelerator.is_fsdp2 else 1
        preprocessing = Preprocessing(self.channels, *self.size)

        def pictures(numbers: list[int]) -> list[Image.Image]:
            labels = [self.labels[i % len(self.labels)] for i in numbers] if self.labels else None
            return draw([self.run.seed + i for i in numbers], labels)

        def measured(numbers: range) -> Features:
            drawn = sample_in_full_batches(pictures, numbers, self.at_once)
            found = self.extractor(torch.stack([preprocessing.load(picture) for picture in drawn]))
            return {**found, "classes": found["logits"].argmax(1)} if self.judge else found

        with self._extractor_on_the_device():
            rounded_up = -(-count // whole) * whole
            features = extract_features(
                *(rounded_up, self.at_once, measured, self.accelerator), description="evaluating", between=between
            )
        found = [None]
        if self.accelerator.is_main_process:
            samples = {
                **drawn,
                "images": count,
                "seeds": f"{self.run.seed} to {self.run.seed + count - 1}",
                "class_labels": self.labels and f"0 to {self.labels[-1]} in turn",
                "device": self.accelerator.device.type,
                "drawn_at_once": self.at_once,
                "size": f"{self.size[1]}x{self.size[0]}",
                "channels": self.channels,
                "format": "8-bit pixels",
            }
            of = {"pipeline": self.run.model_save_name, "step": step}
            features = {name: tensor[:count] for name, tensor in features.items()}
            results = self._results(samples, features)
            facts = results.facts
            found[0] = Evaluation(
                step=step,
                measures=results.measures,
                floors=results.floors,
                protocol=report.protocol(facts | {"samples": {**of, **samples}}),
                alike=fingerprint([samples, facts["reference"], facts["extractor"]]),
                dataset=facts["reference"]["name"],
                split=facts["reference"]["split"],
                warnings=facts["warnings"],
            )
        broadcast_object_list(found)
        return found[0]

    def _results(self, samples: dict[str, Any], features: Features) -> Results:
        try:
            return evaluate(
                samples, features, self.extractor, self.reference, judge=self.judge, class_labels=self.labels
            )
        except ValueError as error:
            raise RunError(f"The pictures of this run cannot be measured: {error}") from error

    @contextmanager
    def _extractor_on_the_device(self):
        """Between evaluations it leaves the accelerator's memory to the training."""
        self.extractor.to(self.accelerator.device)
        try:
            yield
        finally:
            self.extractor.to("cpu")


def open_evaluator(
    args: EvaluationArguments, run: RunArguments, data: TrainingData, accelerator: Accelerator
) -> Evaluator | None:
    """The evaluator that the arguments ask for, if they do."""
    return Evaluator(args, run, data, accelerator) if args.eval_every else None
