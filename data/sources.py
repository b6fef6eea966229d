"""Image sources: folders, idx files, datasets."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.mnist import FashionMNIST

from ..core.errors import InputError
from ..core.files import fingerprint
from ..core.run_files import is_run_folder
from .images import IMAGE_SUFFIXES, file_bytes

EMBEDDED_DATASET = Path(__file__).parent.parent / "examples" / "data" / "twemoji-32"
_MOST_UNUSED = 10  # labels up to so many times those that occur are classes; more are years, say, or identifiers
_FEW_CLASSES = 100  # so many may be classes in any case


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
    return is_run_folder(folder)


class FolderImages:
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


class IdxImages:
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


class DatasetImages:
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


def open_images(args: Any):
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
            return FolderImages(folder)
        if args.split not in ("train", "test"):
            raise InputError(f"{arrays[0].parent} has no split {args.split}: its splits are train and test.")
        if len(arrays) > 1:
            sets = ", ".join(sorted(str(path.parent.parent) for path in arrays))
            raise InputError(f"--train_data_dir {folder} holds several sets of images. Name one of them: {sets}.")
        return IdxImages(arrays[0])
    dataset = _load_dataset(args)
    if args.streaming:
        return dataset
    if len(dataset) == 0:
        raise InputError(f"The dataset {args.dataset_name}, split {args.split}, is empty.")
    return DatasetImages(dataset, args.image_column)


def _load_dataset(args: Any):
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
