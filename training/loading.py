"""Micro-batches of training images, from image sources or streams."""

import logging
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from inspect import signature
from itertools import islice
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm.auto import tqdm

from ..core.errors import InputError, RunError
from ..core.files import location_name
from ..core.locations import InMemory
from ..data.images import BrokenImageError
from ..data.preprocessing import Preprocessing, low_contrast, read_image
from ..data.sources import (
    EMBEDDED_DATASET,
    ImageSource,
    ImageStream,
    ImageSubset,
    Labels,
    check_dataset_options,
    file_name,
    locate,
    open_source,
    open_stream,
)
from ..hub.cards import license_of
from .arguments import DataArguments, LabelArguments, RunArguments, ValidationArguments
from .plan import BatchPlan, ValidationPlan
from .randomness import fold_in
from .stopping import STOP_SIGNALS

logger = logging.getLogger(__name__)

_SHUFFLE_BLOCK = 1000  # stream rows that are shuffled together, held in memory undecoded
_CHECKED_IMAGES = 1000  # images read once before training starts, to find broken ones early
_MIN_VALIDATION_SAMPLES = 256  # in a validation loss; fewer held-out images are used with several timesteps and noises
_FIXED_SEED = 0  # of the held-out images and the random numbers of their loss, the same in all runs
_REMEDY = "Repair or replace it, or pass --skip_broken_images to skip and count such images."


@dataclass
class Batch:
    """A micro-batch of one process.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        labels: their classes, (B,); None in a run without labels.
        keys: the key of each sample, which seeds all its random numbers.
        weight: 1, or 0 if the global batch has no sample left for this process, which then repeats one.
        broken: names of unreadable images that were skipped.
        position: for a stream, where to resume after this batch.
        error: why a loader failed, in its last batch, which has no `images`.
    """

    images: torch.Tensor | None
    labels: torch.Tensor | None
    keys: list[int]
    weight: float
    broken: list[str]
    position: dict | None = None
    error: str | None = None

    def pin_memory(self) -> "Batch":
        return self if self.images is None else replace(self, images=self.images.pin_memory())


def _batch(images: list[torch.Tensor], labels: list[int | None], *rest: Any) -> Batch:
    return Batch(torch.stack(images), None if labels[0] is None else torch.tensor(labels), *rest)


def _error_batch(error: Exception) -> Batch:
    """Return a batch that carries an error out of a worker process, since exceptions may not be picklable."""
    message = str(error)
    if not isinstance(error, RunError):
        message = (
            f"The images cannot be read: {type(error).__name__}: {error}. Once the cause is fixed, resume with "
            "--resume_from_checkpoint latest."
        )
    return Batch(None, None, [], 0.0, [], error=message)


class TrainingImages(torch.utils.data.Dataset):
    """The micro-batches of one process, from an image source; the items are (step, micro-batch)."""

    def __init__(
        self,
        source: ImageSource,
        labels: Labels | None,
        preprocessing: Preprocessing,
        plan: BatchPlan,
        rank: int,
        args: DataArguments,
    ):
        self.source, self.preprocessing, self.plan, self.rank = source, preprocessing, plan, rank
        self.labels = labels and labels.numbers
        self.skip_broken = args.skip_broken_images
        self.cache = None
        if args.cache_images:
            indices = tqdm(range(len(source)), "decoding images", leave=False, disable=rank > 0)
            self.cache = [self._read(i) for i in indices]

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        try:
            return self._micro_batch(*item)
        except Exception as error:
            return _error_batch(error)

    def _micro_batch(self, step: int, micro_batch: int) -> Batch:
        shard = self.plan.shard(step, micro_batch, self.rank)
        positions = shard or range(shard.start, shard.start + 1)
        images, labels, keys, broken = [], [], [], []
        for position in positions:
            sample_key = self.plan.sample_key(step, position)
            index = self.plan.image_index(step, min(position, self.plan.global_batch(step)[2] - 1))
            pixels, index, names = self.cache[index] if self.cache else self._read(index)
            if pixels is None:
                raise RunError(f"An image cannot be read: {names[-1]}. {_REMEDY}")
            images.append(self.preprocessing.finish(pixels, sample_key))
            labels.append(self.labels and self.labels[index])
            keys.append(sample_key)
            broken += names
        return _batch(images, labels, keys, float(len(shard) > 0), broken)

    def _read(self, index: int) -> tuple[torch.Tensor | None, int, list[str]]:
        """Read an image, or the next one that is not broken if broken images are skipped.

        Returns:
            its pixels (None if no image can be read), its index, and the names of the broken images before it.
        """
        broken = []
        for _ in range(len(self.source) if self.skip_broken else 1):
            try:
                return read_image(self.source[index], self.preprocessing), index, broken
            except BrokenImageError as error:
                broken.append(f"{self.source.name(index)}: {error}")
                index = (index + 1) % len(self.source)
        return None, index, broken


class StreamedImages(torch.utils.data.IterableDataset):
    """The endless micro-batches of one process, which reads its own part of a stream.

    Rows are shuffled within blocks, shards reshuffled in each pass. A position is the state of the stream at the start
    of a block and the number of rows of the block already used, which is enough to resume exactly.

    Args:
        label_column: the column with the labels; None for a run without them.
        class_of: the class of each label in that column.
    """

    def __init__(
        self,
        stream: ImageStream,
        label_column: str | None,
        class_of: Sequence[int],
        preprocessing: Preprocessing,
        plan: BatchPlan,
        rank: int,
        args: DataArguments,
    ):
        from datasets.distributed import split_dataset_by_node

        self.columns = [stream.image_column] if label_column is None else [stream.image_column, label_column]
        self.folder = stream.folder
        rows = stream.select(self.columns)
        # shuffles only the shards; `_rows` shuffles the rows. Newer versions would interleave several shards
        interleaves = "max_buffer_input_shards" in signature(rows.shuffle).parameters
        options: dict[str, Any] = {"max_buffer_input_shards": 1} if interleaves else {}
        rows = rows.shuffle(seed=plan.seed, buffer_size=1, **options)
        self.stream = split_dataset_by_node(rows, rank, plan.processes)
        self.preprocessing, self.plan, self.rank = preprocessing, plan, rank
        self.class_of = class_of
        self.skip_broken = args.skip_broken_images
        self.start_step, self.position = 0, None

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._batches()
        except Exception as error:
            yield _error_batch(error)

    def _batches(self) -> Iterator[Batch]:
        rows = self._rows(self.position)
        step = self.start_step
        while True:
            for micro_batch in range(self.plan.accumulation):
                images, labels, keys, broken = [], [], [], []
                for position in self.plan.shard(step, micro_batch, self.rank):
                    sample_key = self.plan.sample_key(step, position)
                    pixels, label, next_position = self._next(rows, broken)
                    images.append(self.preprocessing.finish(pixels, sample_key))
                    labels.append(label)
                    keys.append(sample_key)
                yield _batch(images, labels, keys, 1.0, broken, next_position)
            step += 1

    def _next(self, rows: Iterator, broken: list[str]) -> tuple[torch.Tensor, int | None, dict]:
        first_pass = None
        while True:
            (cell, *label), position = next(rows)  # endless
            first_pass = position["pass"] if first_pass is None else first_pass
            if position["pass"] > first_pass + 1:
                raise RunError(f"No image could be read in a whole pass over the stream; the last one: {broken[-1]}")
            try:
                if label and label[0] not in range(len(self.class_of)):
                    raise BrokenImageError(f"its class is {label[0]}, not one of 0 to {len(self.class_of) - 1}")
                pixels = read_image(locate(cell, self.folder), self.preprocessing)
                return pixels, self.class_of[label[0]] if label else None, position
            except BrokenImageError as error:
                broken.append(f"a row of the stream, column {self.columns[0]!r} ({file_name(cell)}): {error}")
                if not self.skip_broken:
                    raise RunError(f"An image cannot be read: {broken[-1]}. {_REMEDY}") from None

    def _rows(self, position: dict | None) -> Iterator[tuple[list[Any], dict]]:
        """Iterate over the rows from a position: the cells of `columns`, and the position after the row."""
        position = position or {"pass": 0, "block": 0, "state": None, "used": 0}
        while True:
            self.stream.set_epoch(position["pass"])
            if position["state"] is not None:
                self.stream.load_state_dict(position["state"])
            rows = iter(self.stream)
            while block := list(islice(rows, _SHUFFLE_BLOCK)):
                order = list(range(len(block)))
                Random(fold_in(self.plan.seed, self.rank, position["pass"], position["block"])).shuffle(order)
                for i in order[position["used"] :]:
                    position = {**position, "used": position["used"] + 1}
                    yield [block[i][column] for column in self.columns], position
                state = self.stream.state_dict()
                position = {**position, "block": position["block"] + 1, "state": state, "used": 0}
            if position["block"] == 0:
                raise RunError(
                    "The stream has no rows for this process: it is empty, or has fewer rows than there are processes."
                )
            position = {"pass": position["pass"] + 1, "block": 0, "state": None, "used": 0}


class TrainingData:
    """The training images of a run, in micro-batches, and the images held out for its validation loss.

    Args:
        args: the images to use.
        preprocessing: their conversion to tensors.
        rank: number of this process.
        label_args: where the class labels are; None for a run without them.
        source: the images, if they are only a subset of those in `args`; not for a stream.
        classes: class names of a pretrained model, in the order of its labels. The labels of the images are converted
            to those of the model.
        validation: which share of the images to hold out, and how often they are used.
        plan: the batch_size, accumulation, processes and seed of the `BatchPlan`.

    Attributes:
        source: the images to train on; None for a stream.
        validation_plan: which held-out images make up each batch of a validation loss; None if none are held out.
        validation_every: optimizer steps between validation losses.

    Raises:
        InputError: if there are no such images or labels, the classes are not those of the pretrained model, an
            image cannot be read, or images are to be held out from a stream.
    """

    def __init__(
        self,
        args: DataArguments,
        preprocessing: Preprocessing,
        rank: int,
        label_args: LabelArguments | None = None,
        source: ImageSource | None = None,
        classes: Sequence[str] | None = None,
        validation: ValidationArguments | None = None,
        **plan: int,
    ):
        self.args, self.preprocessing, self.rank = args, preprocessing, rank
        self.source: ImageSource | None = None
        self.labels: Labels | None = None
        self.validation_plan: ValidationPlan | None = None
        self.validation_every = validation.validation_every if validation else 0
        fraction = validation.validation_fraction if validation else 0.0
        if args.streaming:
            if fraction:
                raise InputError(
                    f"--validation_fraction {fraction:g} holds out a share of the images, and a stream has no known "
                    "number of images. Omit it, or train without --streaming."
                )
            self.plan = BatchPlan(None, **plan)
            self.images = self._stream(label_args, rank, classes)
            return
        self.source = open_training_source(args) if source is None else source
        held_out = None
        if fraction:
            self.source, held_out = hold_out(self.source, fraction)
        self.plan = BatchPlan(len(self.source), **plan)
        self.labels = self._labels(self.source, label_args, classes)
        if rank == 0 and not args.skip_broken_images:
            _check_readable(self.source, preprocessing)
        self.images = TrainingImages(self.source, self.labels, preprocessing, self.plan, rank, args)
        if held_out:
            labels = self._labels(held_out, label_args, classes)
            if rank == 0 and not args.skip_broken_images:
                _check_readable(held_out, preprocessing)
            preprocessing = replace(preprocessing, center_crop=True, random_flip=False)
            self.validation_plan = ValidationPlan(len(held_out), **{**plan, "seed": _FIXED_SEED})
            self.validation_images = TrainingImages(held_out, labels, preprocessing, self.validation_plan, rank, args)

    def _labels(
        self, source: ImageSource, label_args: LabelArguments | None, classes: Sequence[str] | None
    ) -> Labels | None:
        if not label_args:
            return None
        labels = source.labels(label_args.label_column)
        names, class_of = match_classes(labels.classes, classes, self.name)
        assert labels.numbers is not None  # only streams have none
        return Labels(names, [class_of[number] for number in labels.numbers])

    def _stream(self, label_args: LabelArguments | None, rank: int, classes: Sequence[str] | None) -> StreamedImages:
        args, label_column, class_of = self.args, None, []
        stream = open_stream(_location(args), args.split, config=args.dataset_config, image_column=args.image_column)
        if label_args:
            label_column = stream.label_column(label_args.label_column)
            names, class_of = match_classes(stream.labels(label_column).classes, classes, self.name)
            self.labels = Labels(names, None)
        return StreamedImages(stream, label_column, class_of, self.preprocessing, self.plan, rank, args)

    @property
    def name(self) -> str:
        """The name of the data on the model card: the Hub name of a dataset, or the base name of a local path."""
        return location_name(_location(self.args))

    @property
    def license(self) -> str | None:
        """The license on the dataset card of a local folder, as the Hub's identifier, if it has one."""
        location = _location(self.args)
        is_folder = isinstance(location, str) and Path(location).is_dir()
        return license_of(location).get("license") if is_folder else None

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None in a run without labels."""
        return self.labels and self.labels.classes

    def total_steps(self, run: RunArguments) -> int:
        """Return the number of optimizer steps of a run on these images.

        Raises:
            InputError: if they are a stream and the run is given in epochs.
        """
        steps = run.max_train_steps or run.num_epochs * (self.plan.steps_per_epoch or 0)
        if not steps:
            raise InputError("A stream has no known length: set the number of steps with --max_train_steps.")
        return steps

    def batches(self, start: int, stop: int, position: dict | None) -> Generator[Batch, None, None]:
        """Iterate over the micro-batches of this process for optimizer steps start .. stop-1.

        Args:
            position: for a stream, the position of the last batch before `start` when a run resumes.

        Raises:
            RunError: at an image that cannot be read, unless broken images are skipped, or if the source fails.
        """
        workers = self.args.dataloader_num_workers
        if self.args.streaming:
            self.images.start_step, self.images.position = start, position
            sampler, workers = None, min(workers, 1)  # only one worker keeps the rows of a stream in order
        else:
            sampler = MicroBatchSampler(self.plan, start, stop)
        unseen = self.rank == 0
        with closing(_load(self.images, sampler, workers)) as batches:
            for batch in batches:
                if unseen and batch.images is not None and (warning := low_contrast(batch.images)):
                    logger.warning(warning)
                unseen = False
                yield batch

    @property
    def validation_samples(self) -> int:
        """Number of samples in a validation loss: the held-out images, several times if they are few."""
        assert self.validation_plan is not None and self.validation_plan.num_images is not None
        count = self.validation_plan.num_images
        return count * ceil(_MIN_VALIDATION_SAMPLES / count)

    def validation_batches(self) -> Generator[Batch, None, None]:
        """Iterate over the micro-batches of this process for a validation loss, as many in every process.

        Raises:
            RunError: at an image that cannot be read, unless broken images are skipped.
        """
        plan = self.validation_plan
        assert plan is not None and plan.num_images is not None and plan.steps_per_epoch is not None
        steps = self.validation_samples // plan.num_images * plan.steps_per_epoch
        yield from _load(self.validation_images, MicroBatchSampler(plan, 0, steps), self.args.dataloader_num_workers)


def _load(
    images: torch.utils.data.Dataset, sampler: "MicroBatchSampler | None", workers: int
) -> Generator[Batch, None, None]:
    """Iterate over micro-batches; closing the generator ends the workers.

    Raises:
        RunError: if a batch carries an error.
    """
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )
    iterator = iter(loader)
    processes = getattr(iterator, "_workers", [])
    try:
        for batch in iterator:
            if batch.error:
                raise RunError(batch.error)
            yield batch
    finally:
        if processes:
            iterator._shutdown_workers()  # otherwise torch reports the workers killed below as crashed
        for process in processes:
            if process.is_alive():
                process.kill()  # it ignores SIGTERM


def match_classes(found: list[str], expected: Sequence[str] | None, name: str) -> tuple[list[str], list[int] | range]:
    """Match the classes of training images with those of a pretrained model, by name.

    Classes whose names are just numbers, 0 to N-1, have no names. If those on one side have none, the numbers are
    matched.

    Args:
        found: class names of the images, in the order of their labels.
        expected: those of the model, in the order of its labels; None if there is no model, and any classes fit.
        name: the name of the images, for messages.

    Returns:
        The names in the order of the labels to train on, and the label to train on for each label of the images.

    Raises:
        InputError: if the two have different classes.
    """
    if expected is None:
        return found, range(len(found))
    numbers = [str(number) for number in range(len(expected))]
    if set(found) == set(expected):
        names = list(expected)
    elif set(found) == set(numbers):
        return list(expected), [int(number) for number in found]
    elif list(expected) == numbers and len(found) == len(numbers):
        names = found
    else:
        differences = {
            f"{name} has no": [label for label in expected if label not in found],
            "the model has no": [label for label in found if label not in expected],
        }
        raise InputError(
            f"The classes of {name} are not the {len(expected)} classes of the start model: "
            f"{', and '.join(f'{which} {_quoted(missing)}' for which, missing in differences.items() if missing)}. "
            "Give the classes (subfolders, or labels of the dataset) the names that the model has, or name another "
            "column with --label_column."
        )
    return names, [names.index(label) for label in found]


def _quoted(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(map(repr, names[:limit]))}{more}"


def open_training_source(args: DataArguments) -> ImageSource:
    """Open the images to train on, by default the embedded dataset (see `open_source`).

    `--train_data_dir` reads a folder as image files, `--dataset_name` with the `datasets` library.

    Raises:
        InputError: if they cannot be opened.
    """
    source = open_source(
        _location(args),
        args.split,
        config=args.dataset_config,
        image_column=args.image_column,
        folder_as="images" if args.train_data_dir else "dataset",
    )
    options = {"image_column": args.image_column, "dataset_config": args.dataset_config}
    check_dataset_options([(_location(args), source)], options)
    return source


def hold_out(source: ImageSource, fraction: float, seed: int = _FIXED_SEED) -> tuple[ImageSubset, ImageSubset]:
    """Split images at random into training and held-out images, by default in the same way in every run on them.

    Raises:
        InputError: if there is no image to train on.
    """
    count = max(1, round(fraction * len(source)))
    if count >= len(source):
        raise InputError(
            f"Holding out {count} of {len(source)} images leaves none to train on: use more images, or hold out fewer."
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
    labels: dict[str | None, Labels] = {}
    return ImageSubset(source, sorted(order[count:]), labels), ImageSubset(source, sorted(order[:count]), labels)


def _location(args: DataArguments) -> str | InMemory:
    return args.train_data_dir or args.dataset_name or str(EMBEDDED_DATASET)


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and other requests to stop to the main process, which finishes its step first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class MicroBatchSampler(torch.utils.data.Sampler):
    """Yields the items (step, micro-batch) of optimizer steps start .. stop-1."""

    def __init__(self, plan: BatchPlan, start: int, stop: int):
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start, self.stop):
            for micro_batch in range(self.plan.micro_batches(step)):
                yield step, micro_batch


def _check_readable(source: ImageSource, preprocessing: Preprocessing) -> None:
    """Read images spread over the source, to report broken ones before training starts."""
    for i in range(0, len(source), ceil(len(source) / _CHECKED_IMAGES)):
        try:
            read_image(source[i], preprocessing)
        except BrokenImageError as error:
            raise InputError(f"An image cannot be read: {source.name(i)}: {error}. {_REMEDY}") from None
