"""Micro-batches of training images, from image sources or streams."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from inspect import signature
from itertools import islice
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from ..core.errors import InputError, RunError
from ..data.images import BrokenImageError
from ..data.preprocessing import Preprocessing, read_image
from ..data.sources import (
    EMBEDDED_DATASET,
    Labels,
    _file_name,
    _image_column,
    _label_column,
    _stream_labels,
    _undecoded,
    open_images,
)
from .arguments import DataArguments, LabelArguments
from .plan import BatchPlan
from .randomness import fold_in

_SHUFFLE_BLOCK = 1000  # rows of a stream that are shuffled among one another, and held in memory undecoded
_CHECKED_IMAGES = 1000  # images that are read once before a run starts, so that a broken one is found early


@dataclass
class Batch:
    """A micro-batch of one process.

    Attributes:
        images: (B, C, H, W) in [-1, 1].
        labels: their classes, (B,), where the run has them.
        keys: one integer a sample, from which all that is random about it is drawn.
        weight: 1, or 0 where the process only stands in because the window has no sample left for it.
        broken: images that cannot be read and were left out.
        position: of a stream, where it can be taken up after this batch.
        error: why there are no `images`, and none will follow.
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


def _failed(error: Exception) -> Batch:
    """What a process that reads images hands over in place of an exception, which may not be one that can be sent."""
    said = (
        f"The images cannot be read: {type(error).__name__}: {error}. When the cause is removed, go on with "
        "--resume_from_checkpoint latest."
    )
    return Batch(None, None, [], 0.0, [], error=str(error) if isinstance(error, RunError) else said)


class TrainingImages(torch.utils.data.Dataset):
    """Micro-batches from an image source: item (step, micro-batch) is what this process trains on there."""

    def __init__(
        self,
        source,
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
            progress = tqdm(range(len(source)), "decoding images", leave=False, disable=rank > 0)
            self.cache = [self._read(i) for i in progress]

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        try:
            return self._micro_batch(*item)
        except Exception as error:
            return _failed(error)

    def _micro_batch(self, step: int, micro_batch: int) -> Batch:
        share = self.plan.shard(step, micro_batch, self.rank)
        positions = share or range(share.start, share.start + 1)
        images, labels, keys, broken = [], [], [], []
        for position in positions:
            sample_key = self.plan.sample_key(step, position)
            index = self.plan.image_index(step, min(position, self.plan.global_batch(step)[2] - 1))
            pixels, index, names = self.cache[index] if self.cache else self._read(index)
            if pixels is None:
                raise RunError(f"An image cannot be read: {names[-1]}. {_WHAT_TO_DO}")
            images.append(self.preprocessing.finish(pixels, sample_key))
            labels.append(self.labels and self.labels[index])
            keys.append(sample_key)
            broken += names
        return _batch(images, labels, keys, float(len(share) > 0), broken)

    def _read(self, index: int) -> tuple[torch.Tensor | None, int, list[str]]:
        """The image and its index, or where it is broken and may be left out the next one's; the broken ones."""
        broken = []
        for _ in range(len(self.source) if self.skip_broken else 1):
            try:
                return read_image(self.source[index], self.preprocessing), index, broken
            except BrokenImageError as error:
                broken.append(f"{self.source.name(index)}: {error}")
                index = (index + 1) % len(self.source)
        return None, index, broken


class StreamedImages(torch.utils.data.IterableDataset):
    """Micro-batches from a stream, which each process reads its own part of, for ever, from a given position on.

    Rows are shuffled within blocks, shards anew in each pass. A position is the state of the stream at the start of a
    block and the number of rows of the block that were used, so that a run can be taken up exactly.
    """

    def __init__(
        self,
        stream,
        columns: list[str],
        labels: Labels | None,
        preprocessing: Preprocessing,
        plan: BatchPlan,
        rank: int,
        args: DataArguments,
    ):
        from datasets.distributed import split_dataset_by_node

        # the order of the shards; rows: see `_rows`. Newer versions would read several shards at once, row by row
        one_shard = "max_buffer_input_shards" in signature(stream.shuffle).parameters
        options = {"max_buffer_input_shards": 1} if one_shard else {}
        stream = stream.shuffle(seed=plan.seed, buffer_size=1, **options)
        self.stream = split_dataset_by_node(stream, rank, plan.processes)
        self.columns, self.preprocessing, self.plan, self.rank = columns, preprocessing, plan, rank
        self.numbers = range(len(labels.classes)) if labels else None
        self.skip_broken = args.skip_broken_images
        self.start_step, self.position = 0, None

    def __iter__(self) -> Iterator[Batch]:
        try:
            yield from self._batches()
        except Exception as error:
            yield _failed(error)

    def _batches(self) -> Iterator[Batch]:
        rows = self._rows(self.position)
        step = self.start_step
        while True:
            for micro_batch in range(self.plan.accumulation):
                images, labels, keys, broken = [], [], [], []
                for position in self.plan.shard(step, micro_batch, self.rank):
                    sample_key = self.plan.sample_key(step, position)
                    pixels, label, where = self._next(rows, broken)
                    images.append(self.preprocessing.finish(pixels, sample_key))
                    labels.append(label)
                    keys.append(sample_key)
                yield _batch(images, labels, keys, 1.0, broken, where)
            step += 1

    def _next(self, rows: Iterator, broken: list[str]) -> tuple[torch.Tensor, int | None, dict]:
        began = None
        for (cell, *label), where in rows:
            began = where["pass"] if began is None else began
            if where["pass"] > began + 1:
                raise RunError(f"A whole pass over the stream had no image that can be read; the last: {broken[-1]}")
            try:
                if label and label[0] not in self.numbers:
                    raise BrokenImageError(f"its class is {label[0]}, not one of 0 to {self.numbers[-1]}")
                return read_image(cell, self.preprocessing), label[0] if label else None, where
            except BrokenImageError as error:
                broken.append(f"a row of the stream ({_file_name(cell)}): {error}")
                if not self.skip_broken:
                    raise RunError(f"An image cannot be read: {broken[-1]}. {_WHAT_TO_DO}") from None

    def _rows(self, position: dict | None) -> Iterator[tuple[Any, dict]]:
        """Cells of the columns with the image and, where the run has them, its label; and the position after them."""
        here = position or {"pass": 0, "block": 0, "state": None, "used": 0}
        while True:
            self.stream.set_epoch(here["pass"])
            if here["state"] is not None:
                self.stream.load_state_dict(here["state"])
            rows = iter(self.stream)
            while block := list(islice(rows, _SHUFFLE_BLOCK)):
                order = list(range(len(block)))
                Random(fold_in(self.plan.seed, self.rank, here["pass"], here["block"])).shuffle(order)
                for i in order[here["used"] :]:
                    here = {**here, "used": here["used"] + 1}
                    yield [block[i][column] for column in self.columns], here
                here = {**here, "block": here["block"] + 1, "state": self.stream.state_dict(), "used": 0}
            if here["block"] == 0:
                raise RunError("The stream has no rows for this process: it is empty, or has too few for so many.")
            here = {"pass": here["pass"] + 1, "block": 0, "state": None, "used": 0}


class TrainingData:
    """The images of a run and the order in which they are trained on.

    Args:
        args: which images.
        preprocessing: how they become tensors.
        rank: this process.
        label_args: where the class labels are; None for a run without them.
        plan: batch_size, accumulation, processes and seed of the `BatchPlan`.
    """

    def __init__(
        self,
        args: DataArguments,
        preprocessing: Preprocessing,
        rank: int,
        label_args: LabelArguments | None = None,
        **plan: int,
    ):
        self.args, self.preprocessing, self.labels = args, preprocessing, None
        self.source = opened = open_images(args)
        self.plan = BatchPlan(None if args.streaming else len(opened), **plan)
        if args.streaming:
            columns = [_image_column(opened, args.image_column)]
            if label_args:
                columns.append(_label_column(opened.features or {}, label_args.label_column))
                self.labels = _stream_labels(opened, columns[1])
            stream = _undecoded(opened, columns)
            self.images = StreamedImages(stream, columns, self.labels, preprocessing, self.plan, rank, args)
        else:
            if label_args:
                self.labels = opened.labels(label_args.label_column)
            if rank == 0 and not args.skip_broken_images:
                _check(opened, preprocessing)
            self.images = TrainingImages(opened, self.labels, preprocessing, self.plan, rank, args)

    @property
    def name(self) -> str:
        """How the model card names the data: a dataset by its name on the Hub, a folder by its own name."""
        given = self.args.train_data_dir or self.args.dataset_name or str(EMBEDDED_DATASET)
        return Path(given).resolve().name if Path(given).exists() else given

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in order of their numbers, where the run has labels."""
        return self.labels and self.labels.classes

    def batches(self, start: int, stop: int, position: dict | None) -> Iterator[Batch]:
        """The micro-batches of this process for optimizer steps start .. stop-1.

        Args:
            position: of a stream, the last batch's position where a run is taken up.

        Raises:
            RunError: at an image that cannot be read, unless such are to be left out, or where the source fails.
        """
        workers = self.args.dataloader_num_workers
        if self.args.streaming:
            self.images.start_step, self.images.position = start, position
            sampler, workers = None, min(workers, 1)  # the rows of a stream come in one order
        else:
            sampler = _Items(self.plan, start, stop)
        loader = torch.utils.data.DataLoader(
            self.images,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_signals_to_the_parent,
        )
        iterator = iter(loader)
        readers = getattr(iterator, "_workers", [])
        try:
            for batch in iterator:
                if batch.error:
                    raise RunError(batch.error)
                yield batch
        finally:
            if readers:
                iterator._shutdown_workers()  # else torch takes a reader that is killed below for one that broke down
            for reader in readers:
                if reader.is_alive():
                    reader.kill()  # it does not listen to the signal that would end it


def _leave_signals_to_the_parent(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Items(torch.utils.data.Sampler):
    """(step, micro-batch) for every micro-batch from one optimizer step up to another."""

    def __init__(self, plan: BatchPlan, start: int, stop: int):
        self.plan, self.start, self.stop = plan, start, stop

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start, self.stop):
            for micro_batch in range(self.plan.micro_batches(step)):
                yield step, micro_batch


_WHAT_TO_DO = "Repair or replace it, or give --skip_broken_images to leave such images out and count them."


def _check(source, preprocessing: Preprocessing) -> None:
    """Read images spread over the source once, so that a broken one is named before training starts."""
    for i in range(0, len(source), ceil(len(source) / _CHECKED_IMAGES)):
        try:
            read_image(source[i], preprocessing)
        except BrokenImageError as error:
            raise InputError(f"An image cannot be read: {source.name(i)}: {error}. {_WHAT_TO_DO}") from None
