"""Evaluation during training: measure samples against the training images without affecting training."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from ..core.accelerator import one_process_first
from ..core.errors import InputError, RunError
from ..core.files import fingerprint
from ..data.preprocessing import Preprocessing
from ..evaluation.arguments import CACHE_DIR, INCEPTION, MIN_IMAGES
from ..evaluation.extractors import ClassifierFeatures, load_extractor
from ..evaluation.facts import ImageProperties, SampleFacts
from ..evaluation.features import Features, extract_features
from ..evaluation.metrics import METRICS, MetricValue, available_metrics
from ..evaluation.references import ReferenceImages, measure_reference
from ..evaluation.reporting import format_value, metric_title
from ..evaluation.results import compute_results
from ..sampling.generation import sample_in_full_batches
from .arguments import EvaluationArguments, RunArguments
from .loading import TrainingData

MAX_BATCH_SIZE = 64  # images sampled at a time
MAX_REFERENCE_IMAGES = 100_000  # larger datasets are randomly subsampled, since features are kept in memory


@dataclass
class Evaluation:
    """The evaluation of a run at a step.

    Attributes:
        metrics: keyed `name@images`.
        floors: the real-vs-real baseline, between halves of the training images, keyed by name.
        protocol: descriptions of everything that the metrics depend on.
        comparison_key: fingerprint of the protocol without the name and the step; evaluations with the same one are
            comparable.
        dataset: name of the training images.
        split: split of the dataset.
        warnings: caveats for comparing the metrics.
        best_metric: the metric that selects the best evaluation of the run.
    """

    step: int
    metrics: dict[str, MetricValue]
    floors: dict[str, MetricValue]
    protocol: dict[str, str]
    comparison_key: str
    dataset: str
    split: str | None
    warnings: list[str]
    best_metric: str = "fid"

    def is_better(self, other: "Evaluation") -> bool:
        values = [evaluation.by_name()[self.best_metric][1].value for evaluation in (self, other)]
        return METRICS[self.best_metric].is_better(*values)

    @property
    def extractor(self) -> str:
        """Name of the feature extractor, which also predicts classes if it is a classifier."""
        return self.protocol.get("extractor", INCEPTION).partition(", extractor digest ")[0]

    def values(self) -> dict[str, float]:
        return {key: metric.value for key, metric in self.metrics.items()}

    def summary(self) -> str:
        """Return the headline metrics and `best_metric`, with their floors, in one line."""
        return ", ".join(
            f"{metric_title(key, self.extractor)} {format_value(metric)}"
            + (f" (floor {format_value(self.floors[name])})" if name in self.floors else "")
            for name, (key, metric) in self.by_name().items()
            if METRICS[name].is_headline or name == self.best_metric
        )

    def by_name(self) -> dict[str, tuple[str, MetricValue]]:
        """Return each metric with its key, by its name in `METRICS`."""
        return {key.partition("@")[0]: (key, metric) for key, metric in self.metrics.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "measures": {key: metric.to_json() for key, metric in self.metrics.items()},
            "floors": {name: metric.to_json() for name, metric in self.floors.items()},
            "protocol": self.protocol,
            "alike": self.comparison_key,
            "dataset": self.dataset,
            "split": self.split,
            "warnings": self.warnings,
            "best_metric": self.best_metric,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Evaluation":
        return cls(
            step=values["step"],
            metrics={key: MetricValue.from_json(metric) for key, metric in values["measures"].items()},
            floors={name: MetricValue.from_json(metric) for name, metric in values["floors"].items()},
            protocol=values["protocol"],
            comparison_key=values["alike"],
            dataset=values["dataset"],
            split=values["split"],
            warnings=values["warnings"],
            best_metric=values.get("best_metric", "fid"),  # missing in earlier versions
        )


@dataclass
class EvaluationHistory:
    """The evaluations of a run, saved in checkpoints; the same in every process, but for `seconds`.

    Attributes:
        last: the newest evaluation.
        best: the best of those that are comparable with the newest.
        since: step of the first evaluation that is comparable with the newest.
        count: number of evaluations.
        seconds: their total time.
    """

    last: Evaluation | None = None
    best: Evaluation | None = None
    since: int = 0
    count: int = 0
    seconds: float = 0.0

    def add(self, evaluation: Evaluation, seconds: float) -> bool:
        """Add an evaluation and return whether it is the best so far."""
        self.last, self.count, self.seconds = evaluation, self.count + 1, self.seconds + seconds
        best = self.best
        if best is None or best.comparison_key != evaluation.comparison_key:
            best, self.since = None, evaluation.step
        # after a change of --best_metric, the best of the earlier steps is unknown
        is_best = best is None or best.best_metric != evaluation.best_metric or evaluation.is_better(best)
        if is_best:
            self.best = evaluation
        return is_best

    def to_json(self) -> dict[str, Any]:
        return {
            "last": self.last and self.last.to_json(),
            "best": self.best and self.best.to_json(),
            "since": self.since,
            "count": self.count,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "EvaluationHistory":
        evaluations = {name: Evaluation.from_json(values[name]) for name in ("last", "best") if values.get(name)}
        return cls(**{**values, **evaluations})


class Evaluator:
    """Measures samples of a run against its training images.

    The constructor computes the features of the training images, or reads them from the cache that it shares with
    ddgan evaluate, so that problems are reported before training starts. Every process constructs and calls an
    evaluator.

    Args:
        args: when to evaluate, on how many samples, and with which features.
        run: the run's settings; sample i has the seed `run.seed` + i.
        data: the training images; if they have classes, the samples cycle through them.

    Raises:
        InputError: if the features are not available, the training images cannot be measured, or the run does not
            measure `args.best_metric`.
        RunError: if a training image cannot be read.
    """

    def __init__(self, args: EvaluationArguments, run: RunArguments, data: TrainingData, accelerator: Accelerator):
        if data.source is None:
            raise InputError(
                "--eval_every measures against the training images, which a stream cannot provide. Omit it and "
                "measure the finished model with ddgan evaluate, or train without --streaming."
            )
        if len(data.source) < MIN_IMAGES:
            raise InputError(
                f"--eval_every measures against the training images, of which there must be at least {MIN_IMAGES}; "
                f"{data.name} has {len(data.source)}."
            )
        self.args, self.run, self.accelerator = args, run, accelerator
        self.batch_size = min(run.batch_size, MAX_BATCH_SIZE)
        self.channels = 1 if data.preprocessing.channels <= 2 else 3  # transparency is ignored
        self.size = data.preprocessing.height, data.preprocessing.width
        self.labels = list(range(len(data.classes))) if data.classes else None
        try:
            with one_process_first(accelerator):  # of those that download the weights
                self.extractor = load_extractor(args.feature_extractor or INCEPTION, args.extractor_weights)
            self.classifier = None
            if isinstance(self.extractor, ClassifierFeatures) and self.extractor.network.class_names == data.classes:
                self.classifier = self.extractor
            self._require_best_metric()
            images = ReferenceImages(data.source, data.args.skip_broken_images, data.preprocessing.value_range)
            with self._extractor_on_device():
                self.reference = measure_reference(
                    images,
                    data.name,
                    data.source.split,
                    self.size,
                    self.extractor,
                    MAX_BATCH_SIZE,
                    accelerator,
                    CACHE_DIR,
                    count=MAX_REFERENCE_IMAGES,
                    channels=self.channels,
                )
            if accelerator.is_main_process:
                self.reference.baseline(args.eval_images, self.extractor.logits_input, self.extractor.is_clip)
        except InputError:
            raise
        except (ValueError, ImportError) as error:
            raise InputError(f"--eval_every: {error}") from error

    def _require_best_metric(self) -> None:
        measured = available_metrics(self.extractor.metric_inputs | ({"confusion"} if self.classifier else set()))
        if self.args.best_metric not in measured:
            raise InputError(
                f"--best_metric is {self.args.best_metric}, which this run does not measure with "
                f"{self.extractor.name}. It measures {', '.join(measured)}."
            )

    def due(self, step: int, last: int, history: EvaluationHistory) -> bool:
        """Return whether a step is scheduled for evaluation and has not been evaluated yet."""
        assert self.args.eval_every
        is_scheduled = step > 0 and (step == last or step % self.args.eval_every == 0)
        return is_scheduled and (history.last is None or history.last.step != step)

    def measure(
        self,
        sample: Callable[[list[int], list[int] | None], list[Image.Image]],
        step: int,
        sampling_protocol: dict[str, Any],
        before_batch: Callable[[], None],
    ) -> Evaluation:
        """Generate samples, a shard in each process, and measure them.

        Args:
            sample: returns an image for each seed and, where there are classes, class label; all processes call it
                together.
            step: number of training steps so far.
            sampling_protocol: how `sample` generates images, for the protocol.
            before_batch: see `extract_features`.

        Returns:
            The evaluation, the same in every process.
        """
        count = self.args.eval_images
        # all processes must call a sharded network together, so each generates the same number of whole batches
        multiple = self.batch_size * self.accelerator.num_processes if self.accelerator.is_fsdp2 else 1
        preprocessing = Preprocessing(self.channels, *self.size)

        def sample_indices(indices: list[int]) -> list[Image.Image]:
            labels = [self.labels[i % len(self.labels)] for i in indices] if self.labels else None
            return sample([self.run.seed + i for i in indices], labels)

        def extract(indices: range) -> Features:
            images = sample_in_full_batches(sample_indices, indices, self.batch_size)
            features = self.extractor(torch.stack([preprocessing.load(image) for image in images]))
            return {**features, "classes": features["logits"].argmax(1)} if self.classifier else features

        with self._extractor_on_device():
            features = extract_features(
                -(-count // multiple) * multiple,
                self.batch_size,
                extract,
                self.accelerator,
                description="evaluating",
                before_batch=before_batch,
            )
        evaluation: list[Any] = [None]
        if features is not None:
            samples = SampleFacts(
                count=count,
                properties=ImageProperties(f"{self.size[1]}x{self.size[0]}", self.channels, "8-bit pixels"),
                origin=sampling_protocol,
                settings={
                    "seeds": f"{self.run.seed} to {self.run.seed + count - 1}",
                    "class_labels": self.labels and f"0 to {self.labels[-1]} in turn",
                    "device": self.accelerator.device.type,
                    "batch_size": self.batch_size,
                },
            )
            evaluation[0] = self._evaluation(
                step, samples, {name: tensor[:count] for name, tensor in features.items()}
            )
        broadcast_object_list(evaluation)
        return evaluation[0]

    def _evaluation(self, step: int, samples: SampleFacts, features: Features) -> Evaluation:
        try:
            results = compute_results(
                samples,
                features,
                self.extractor,
                self.reference,
                classifier=self.classifier,
                class_labels=self.labels,
            )
        except ValueError as error:
            raise RunError(f"The samples of this run cannot be measured: {error}") from error
        protocol, reference = results.protocol, self.reference.facts
        checkpoint = {"pipeline": self.run.model_save_name, "step": step}
        described = replace(protocol, samples=replace(samples, origin=checkpoint | samples.origin))
        comparable = [samples.as_dict(), reference.as_dict(), protocol.extractor.as_dict()]
        return Evaluation(
            step=step,
            metrics=results.metrics,
            floors=results.floors,
            protocol=described.descriptions(),
            comparison_key=fingerprint(comparable),
            dataset=reference.name,
            split=reference.split,
            warnings=results.warnings,
            best_metric=self.args.best_metric,
        )

    @contextmanager
    def _extractor_on_device(self):
        """Keep the extractor on the device only within the context, to leave the memory to training."""
        self.extractor.to(self.accelerator.device)
        try:
            yield
        finally:
            self.extractor.to("cpu")
