"""Images for training: where they come from, how they become tensors, and which process trains on which when."""

import hashlib
import io
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import signature
from itertools import islice
from math import ceil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torchvision.datasets.mnist import FashionMNIST
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from ..errors import InputError, RunError
from ..evaluation.features import fingerprint
from ..evaluation.images import file_bytes, open_picture, to_bytes
from .arguments import DataArguments, LabelArguments
from .randomness import key

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
EMBEDDED_DATASET = Path(__file__).parent.parent / "examples" / "data" / "twemoji-32"
CHANNEL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_TURNS = {  # what sets a picture upright, by its orientation in EXIF; at 1 it is
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SHUFFLE_BLOCK = 1000  # rows of a stream that are shuffled among one another, and held in memory undecoded
_CHECKED_IMAGES = 1000  # images that are read once before a run starts, so that a broken one is found early
_MOST_UNUSED = 10  # labels up to so many times those that occur are classes; more are years, say, or identifiers
_FEW_CLASSES = 100  # so many may be classes in any case


class BrokenImageError(Exception):
    """An image of the data cannot be read; the message says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Sources: `len(source)`, `source[i]` -> a cell that `read_image` reads, `source.name(i)` for messages,
# `source.fingerprint(chosen)`, and where they are asked for `source.labels(column)` -> `Labels`


@dataclass(frozen=True)
class Labels:
    """The class of each image.

    Attributes:
        classes: names of the classes, in order of their numbers.
        numbers: class of image i; None for a stream, whose rows carry theirs.
    """

    classes: list[str]
    numbers: Sequence[int] | None


def _fingerprint(cells: Iterable[Any]) -> str:
    """A fingerprint of images in their order; copies of them, wherever they are, have the same."""
    return fingerprint([hashlib.blake2b(file_bytes(cell), digest_size=12).hexdigest() for cell in cells])


def _image_files(folder: Path) -> list[Path]:
    """Image files below a folder and in folders linked into it; none that are hidden, none of runs in sub-folders."""
    found = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _is_left_out(Path(here, name))]
        found += [Path(here, name) for name in files if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _is_left_out(folder: Path) -> bool:
    if folder.name.startswith("."):
        return True
    if folder.is_symlink() and any(part.resolve().is_relative_to(folder.resolve()) for part in folder.parents):
        return True  # the link leads back to a folder that it lies in
    # a run, whose grids of samples are no images to train on
    return (folder / "config.yaml").is_file() and any((folder / n).exists() for n in ("samples", "model_index.json"))


class ImageFolder:
    """
    The image files below a folder, in the order of their paths. Links to folders are followed; hidden files and
    folders and the folders of runs are left out.

    Raises:
        InputError: if there are none.
    """

    def __init__(self, folder: Path):
        self.folder, self.paths = folder, _image_files(folder)
        if not self.paths:
            raise InputError(
                f"There is no image in {folder} or its sub-folders. Files that end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))} count, and torchvision's raw/train-images-idx3-ubyte."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Path:
        return self.paths[i]

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def fingerprint(self, chosen: Sequence[int]) -> str:
        """Tells these of the images from others, by the bytes of their files."""
        return _fingerprint(self.paths[i] for i in chosen)

    def labels(self, column: str | None) -> Labels:
        """A class for each sub-folder, in the order of their names."""
        names = [path.relative_to(self.folder).parts[0] for path in self.paths]
        classes = sorted(set(names))
        if any((self.folder / name).is_file() for name in classes):
            raise InputError(
                f"The images in {self.folder} have no class labels: {self.paths[0]} is in no sub-folder. Put the "
                "images of each class into a sub-folder that bears its name."
            )
        numbers = {name: number for number, name in enumerate(classes)}
        return Labels(classes, [numbers[name] for name in names])


def _read_idx(path: Path) -> np.ndarray:
    """The bytes in a file of MNIST's idx format, (N, ...), left on the disk.

    Raises:
        InputError: for a file that is cut off, or empty.
    """
    try:
        with open(path, "rb") as file:  # two zeros, the kind of number, the number of dimensions, the dimensions
            shape = [int.from_bytes(file.read(4), "big") for _ in range(file.read(4)[3])]
            values = np.memmap(path, np.uint8, "r", file.tell(), tuple(shape))
    except (IndexError, ValueError):
        values = np.empty(0)
    if not values.size:
        raise InputError(f"{path} is cut off or empty: download it again.")
    return values


class ImageArray:
    """
    Images (N, H, W) or (N, H, W, C) from a file in MNIST's idx format, as torchvision lays them out.

    Raises:
        InputError: for a file that is cut off, or holds no images.
    """

    def __init__(self, path: Path):
        self.path = path
        self.images = _read_idx(path)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"image {i} of {self.path}"

    def fingerprint(self, chosen: Sequence[int]) -> str:
        """Tells these of the images from others, by their contents."""
        return hashlib.blake2b(self.images[chosen].tobytes(), digest_size=12).hexdigest()

    def labels(self, column: str | None) -> Labels:
        """From the file of labels beside the images."""
        path = self.path.with_name(self.path.name.replace("images-idx3", "labels-idx1"))
        if not path.is_file():
            raise InputError(f"The images in {self.path} have no class labels: there is no {path.name} beside them.")
        numbers = _read_idx(path).tolist()
        if len(numbers) != len(self):
            raise InputError(f"{self.path} has {len(self)} images, but {path.name} beside it {len(numbers)} labels.")
        names = FashionMNIST.classes if self.path.parent.parent.name == "FashionMNIST" else range(max(numbers) + 1)
        return Labels([str(name) for name in names], numbers)


class ImageTable:
    """The image column of a dataset of the `datasets` library."""

    def __init__(self, dataset, column: str | None):
        self.table, self.column = dataset, _image_column(dataset, column)
        self.dataset = _undecoded(dataset, [self.column])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        return self.dataset[i][self.column]

    def name(self, i: int) -> str:
        return f"row {i} ({_file_name(self[i])})"

    def fingerprint(self, chosen: Sequence[int]) -> str:
        """Tells these of the images from others, by the bytes of their files."""
        return _fingerprint(row[self.column] for row in self.dataset.select(chosen))

    def labels(self, column: str | None) -> Labels:
        """From the label column: class labels, or integers from 0 on, or names.

        Raises:
            InputError: there is no such column, or a label in it is missing or cannot be a class.
        """
        column = _label_column(self.table.features, column)
        values = self.table[column][:]
        classes = getattr(self.table.features[column], "names", None)
        if classes is None and all(isinstance(value, str) for value in values):
            classes = sorted(set(values))
            numbers = {name: number for number, name in enumerate(classes)}
            return Labels(classes, [numbers[value] for value in values])
        wrong = [value for value in values if not isinstance(value, int) or value < 0]
        if wrong:
            raise InputError(
                f"The label column {column!r} must hold a class for every image: a name, or an integer from 0 on. It "
                f"holds {None if None in wrong else wrong[0]!r}."
            )
        distinct = len(set(values))
        if classes is None and max(values) >= max(_FEW_CLASSES, _MOST_UNUSED * distinct):
            raise InputError(
                f"The label column {column!r} holds {distinct} different labels, up to {max(values)}. Labels must "
                f"count from 0, here to {distinct - 1}: number them anew, or give them as names."
            )
        classes = classes or [str(number) for number in range(max(values) + 1)]
        if max(values) >= len(classes):
            raise InputError(
                f"The label column {column!r} holds the label {max(values)}, but names {len(classes)} classes, whose "
                f"labels are 0 to {len(classes) - 1}."
            )
        return Labels(classes, [int(value) for value in values])  # of a column of booleans too


def open_images(args: DataArguments):
    """Open what the arguments name: an image source, or with `--streaming` an iterable dataset.

    Raises:
        InputError: what is named is not found, holds no image or several sets of them, or has no such split,
            configuration or column.
    """
    if args.train_data_dir:
        folder = Path(args.train_data_dir)
        if not folder.is_dir():
            raise InputError(f"--train_data_dir {folder}: there is no such folder (looked for at {folder.resolve()}).")
        part = "t10k" if args.split == "test" else "train"
        arrays = [*folder.glob(f"raw/{part}-images-idx3-ubyte"), *folder.glob(f"*/raw/{part}-images-idx3-ubyte")]
        if not arrays:
            return ImageFolder(folder)
        if args.split not in ("train", "test"):
            raise InputError(f"{arrays[0].parent} has no split {args.split}: its splits are train and test.")
        if len(arrays) > 1:
            sets = ", ".join(sorted(str(path.parent.parent) for path in arrays))
            raise InputError(f"--train_data_dir {folder} holds several sets of images. Name one of them: {sets}.")
        return ImageArray(arrays[0])
    dataset = _load_dataset(args)
    if args.streaming:
        return dataset
    if len(dataset) == 0:
        raise InputError(f"The dataset {args.dataset_name}, split {args.split}, is empty.")
    return ImageTable(dataset, args.image_column)


def _load_dataset(args: DataArguments):
    try:
        import datasets
    except ImportError:
        raise InputError(
            "Reading a dataset needs the package `datasets`: pip install 'diffusers-ddgan[train]'. A folder of images "
            "can be read without it: --train_data_dir FOLDER."
        ) from None
    name = args.dataset_name or str(EMBEDDED_DATASET)
    try:
        return datasets.load_dataset(name, args.dataset_config, split=args.split, streaming=args.streaming)
    except Exception as error:  # the library raises ValueError, OSError, its own and its builders' errors
        looked = f"local folder {Path(name).resolve()}: {'there' if Path(name).exists() else 'not there'}"
        raise InputError(
            f"The dataset {name} (split {args.split}) could not be loaded. Looked for: {looked}; then {name} on the "
            f"Hugging Face Hub. The datasets library says: {type(error).__name__}: {error}"
        ) from error


def _undecoded(dataset, columns: list[str]):
    """These columns of the dataset, images as encoded bytes."""
    from datasets import Image as ImageFeature

    for column in columns:
        if dataset.features and isinstance(dataset.features[column], ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    return dataset.select_columns(columns)


def _image_column(dataset, column: str | None) -> str:
    from datasets import Image as ImageFeature

    features = dataset.features or dict.fromkeys(next(iter(dataset), {}))
    found = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    found += [name for name in ("image", "img") if name in features and name not in found]
    column = column or (found[0] if found else None)
    if column not in features:
        raise InputError(
            f"The dataset has no {'image column' if column is None else f'column {column!r}'}. Its columns are: "
            f"{', '.join(features) or 'none (it is empty)'}. Name the one with the images with --image_column."
        )
    return column


def _label_column(features, column: str | None) -> str:
    """The column with the class labels.

    Raises:
        InputError: if there is none.
    """
    from datasets import ClassLabel

    found = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    found += [name for name in ("label", "labels") if name in features and name not in found]
    column = column or (found[0] if found else None)
    if column not in features:
        raise InputError(
            f"The dataset has no {'column of class labels' if column is None else f'column {column!r}'}. Its columns "
            f"are: {', '.join(features)}. Name the one with the labels with --label_column."
        )
    return column


def _stream_labels(dataset, column: str) -> Labels:
    names = getattr((dataset.features or {}).get(column), "names", None)
    if names is None:
        raise InputError(
            f"The column {column!r} of the stream does not say which classes there are: a stream needs a column of "
            "type ClassLabel. Without --streaming, names and integers do as well."
        )
    return Labels(names, None)


def _file_name(cell: Any) -> str:
    return (isinstance(cell, dict) and cell["path"]) or "no file name"


# ---------------------------------------------------------------------------------------------------------------------
# From an image to a tensor


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes what the network takes: (channels, height, width) in [-1, 1], for 1 to 4 channels."""

    channels: int
    height: int
    width: int
    center_crop: bool = False
    random_flip: bool = False

    def load(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        """Decode, convert and resize: uint8 (channels, h, w) that covers (height, width) with one side equal."""
        pixels = torch.from_numpy(np.array(self._convert(image)))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        h, w = pixels.shape[1:]
        scale = max(self.height / h, self.width / w)
        size = [max(self.height, round(h * scale)), max(self.width, round(w * scale))]
        return TF.resize(pixels, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)

    def finish(self, pixels: torch.Tensor, sample_key: int) -> torch.Tensor:
        """Crop, flip and scale a loaded image to [-1, 1]; what is random is drawn from the sample's key."""
        random = Random(sample_key)
        spare = (pixels.shape[1] - self.height, pixels.shape[2] - self.width)
        top, left = (s // 2 if self.center_crop else random.randint(0, s) for s in spare)
        pixels = pixels[:, top : top + self.height, left : left + self.width]
        if self.random_flip and random.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)

    def _convert(self, image: Image.Image | np.ndarray) -> Image.Image:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        image = _upright(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits, or floats in 0..1 or 0..255
            values = np.asarray(image, dtype=np.float64)
            wide = image.mode.startswith("I;16") or values.max() > 255
            scale = 255 / 65535 if wide else 255 if image.mode == "F" and values.max() <= 1 else 1
            image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
        if self.channels in (1, 3) and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(CHANNEL_MODES[self.channels])


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its camera was held; one whose EXIF cannot be read counts as upright."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's readers of metadata raise whatever they stumble over
        return image
    return image if turn is None else image.transpose(turn)


def read_image(cell: Any, preprocessing: Preprocessing) -> torch.Tensor:
    """Read and load an image from its path, its encoded bytes (a cell of `datasets`), or its pixels.

    Raises:
        BrokenImageError: if it cannot be read.
    """
    try:
        if isinstance(cell, dict):
            cell = io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]
        return preprocessing.load(Image.open(cell) if isinstance(cell, (str, Path, io.BytesIO)) else np.asarray(cell))
    except Exception as error:  # Pillow's readers raise whatever they stumble over
        raise BrokenImageError(str(error)) from error


class ComparedImages:
    """The images of a source as samples are compared with them, the `ReferenceImages` of `evaluation/`.

    Args:
        skip_broken: where an image cannot be read, take the next one in its place, as training does.

    Raises:
        RunError: from its methods, at an image that cannot be read.
    """

    def __init__(self, source, skip_broken: bool = False):
        self.source, self.skip_broken = source, skip_broken

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self, chosen: Sequence[int]) -> str:
        return self.source.fingerprint(chosen)

    def picture(self, i: int) -> Image.Image:
        """Image i, not yet decoded."""
        return self._readable(i, open_picture)

    def pixels(self, i: int, channels: int, height: int, width: int) -> torch.Tensor:
        """Image i at this size, cropped at its centre: uint8, (channels, height, width)."""
        preprocessing = Preprocessing(channels, height, width, center_crop=True)
        loaded = self._readable(i, lambda cell: read_image(cell, preprocessing))
        return to_bytes(preprocessing.finish(loaded, sample_key=0))

    def _readable(self, i: int, read: Callable[[Any], Any]) -> Any:
        for number in range(i, i + (len(self) if self.skip_broken else 1)):
            try:
                return read(self.source[number % len(self)])
            except Exception as error:  # BrokenImageError, or what Pillow's readers stumble over
                said = f"An image cannot be read: {self.source.name(number % len(self))}: {error}."
        raise RunError(f"{said} Repair or remove it.")


# ---------------------------------------------------------------------------------------------------------------------
# Which samples make which optimizer step


@dataclass(frozen=True)
class Plan:
    """How the samples of a run are dealt out to optimizer steps, micro-batches and processes.

    An epoch is a permutation of the images, cut into windows of `images_per_step`; the last window of an epoch may be
    shorter. Everything is computed from the step, so a run can be taken up at any of them.

    Args:
        num_images: images in an epoch; None for a stream, which is one endless epoch.
    """

    num_images: int | None
    batch_size: int
    accumulation: int
    processes: int
    seed: int

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int | None:
        return None if self.num_images is None else ceil(self.num_images / self.images_per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete after `step` optimizer steps (0 throughout for a stream)."""
        if self.num_images is None:
            return 0.0
        whole, part = divmod(step, self.steps_per_epoch)
        return whole + min(1.0, part * self.images_per_step / self.num_images)

    def window(self, step: int) -> tuple[int, int, int]:
        """Epoch, position of the first sample in it, and number of samples of the optimizer step with index `step`."""
        if self.num_images is None:
            return 0, step * self.images_per_step, self.images_per_step
        epoch, part = divmod(step, self.steps_per_epoch)
        start = part * self.images_per_step
        return epoch, start, min(self.images_per_step, self.num_images - start)

    def images_seen(self, step: int) -> int:
        """Samples that `step` optimizer steps have trained on."""
        epoch, start, _ = self.window(step)
        return epoch * (self.num_images or 0) + start

    def micro_batches(self, step: int) -> int:
        """Micro-batches that each process trains on in a step."""
        return ceil(self.window(step)[2] / (self.batch_size * self.processes))

    def share(self, step: int, micro_batch: int, rank: int) -> range:
        """Positions in the window that a process trains on in a micro-batch; a short one is shared out evenly."""
        start = micro_batch * self.batch_size * self.processes
        count = min(self.batch_size * self.processes, self.window(step)[2] - start)
        return range(start + count * rank // self.processes, start + count * (rank + 1) // self.processes)

    def sample_key(self, step: int, position: int) -> int:
        return key(self.seed, step, position)

    def image_index(self, step: int, position: int) -> int:
        epoch, start, _ = self.window(step)
        return int(_permutation(self.num_images, key(self.seed, epoch))[start + position])


@lru_cache(maxsize=2)
def _permutation(length: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


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
        self, source, labels: Labels | None, preprocessing: Preprocessing, plan: Plan, rank: int, args: DataArguments
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
        share = self.plan.share(step, micro_batch, self.rank)
        positions = share or range(share.start, share.start + 1)
        images, labels, keys, broken = [], [], [], []
        for position in positions:
            sample_key = self.plan.sample_key(step, position)
            index = self.plan.image_index(step, min(position, self.plan.window(step)[2] - 1))
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
        plan: Plan,
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
                for position in self.plan.share(step, micro_batch, self.rank):
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
                Random(key(self.plan.seed, self.rank, here["pass"], here["block"])).shuffle(order)
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
        plan: batch_size, accumulation, processes and seed of the `Plan`.
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
        self.plan = Plan(None if args.streaming else len(opened), **plan)
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

    def __init__(self, plan: Plan, start: int, stop: int):
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
