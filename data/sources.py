"""Image sources: image folders, arrays, archives, and anything that the `datasets` library reads.

`open_source` serves training, evaluation and the classifier script alike. To add a kind of source, write a class with
the methods of `ImageSource` and a function that opens it, and add the function to `KINDS`.
"""

import json
import logging
import math
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path, PurePath, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import numpy as np
from torchvision.datasets.mnist import FashionMNIST

from ..core.errors import InputError, naming_file
from ..core.extras import missing_extra
from ..core.files import fingerprint, fingerprint_bytes, fingerprint_parts
from ..core.locations import EXAMPLES, InMemory, hub_problem, is_url
from ..core.run_files import is_run_folder
from .images import CHANNEL_MODES, IMAGE_SUFFIXES, BrokenImageError, encoded_or_path, file_bytes
from .remote import expand_ranges, local_copy, url_suffix

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

logger = logging.getLogger(__name__)

EMBEDDED_DATASET = EXAMPLES / "data" / "twemoji-32"

# folders in which network drives and desktops keep thumbnails, snapshots and deleted files, in lower case
_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "__macosx", "found.000"),
}
_SPLIT_NAMES = {  # folder names in lower case -> the split they stand for
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("eval", "evaluation"), "evaluation"),
}
_WHOLE = (None, "train", "all")  # requested splits that a source without splits can give
_IDX_UINT8 = 8  # code of the data type
_IDX_PREFIXES = {"train": "train", "test": "t10k"}  # split -> prefix of torchvision's files
_FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # of `datasets`, for single files
_METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of image folders, as read by `datasets`
_DATASET_SUFFIXES = {".parquet", ".arrow", ".jsonl", ".csv", ".tar"}  # files that make a folder a dataset
_ZIP_HEADER, _ZIP_NAME_LENGTH = 30, 26  # bytes of the header of a file in an archive; position of two lengths in it
_MAX_OTHER_FILES = 300_000  # files and folders in which there must be an image
_FEW_CLASSES = 100  # with more classes, they must have at least two images on average, or the labels are IDs


@dataclass(frozen=True)
class Labels:
    """The class of each image.

    Attributes:
        classes: names of the classes, in the order of their numbers.
        numbers: class of image i; None for a stream, whose rows carry their labels.
    """

    classes: list[str]
    numbers: Sequence[int] | None


class ImageSource(Protocol):
    """A sequence of images that are opened one by one.

    Attributes:
        split: the name of the split, or "all" if the source has no splits.
    """

    split: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any:
        """Return image i in a form that `images.open_image` accepts.

        Raises:
            BrokenImageError: if it cannot be read from storage.
        """
        ...

    def name(self, i: int) -> str:
        """Return the name of image i for messages."""
        ...

    def fingerprint(self, indices: Sequence[int]) -> str:
        """Return a hash of the contents of these images, independent of their location."""
        ...

    def labels(self, column: str | None) -> Labels:
        """Return the classes of the images.

        Args:
            column: the column with the labels, for sources that have columns; detected if None.

        Raises:
            InputError: if there are no labels, or they are not valid class labels.
        """
        ...


class ImageSubset:
    """A subset of the images of a source.

    Args:
        indices: the indices of these images in the source.
        labels: the labels of the source by column, as far as they have been read; subsets of one source share them.
    """

    def __init__(self, source: ImageSource, indices: Sequence[int], labels: dict[str | None, Labels] | None = None):
        self.source, self.indices, self.split = source, indices, source.split
        self._labels = {} if labels is None else labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        return self.source[self.indices[i]]

    def name(self, i: int) -> str:
        return self.source.name(self.indices[i])

    def fingerprint(self, indices: Sequence[int]) -> str:
        return self.source.fingerprint([self.indices[i] for i in indices])

    def labels(self, column: str | None) -> Labels:
        """Return the classes of these images; `classes` includes those without images in the subset."""
        if column not in self._labels:
            self._labels[column] = self.source.labels(column)
        labels = self._labels[column]
        assert labels.numbers is not None  # only streams have none
        return Labels(labels.classes, [labels.numbers[i] for i in self.indices])


class ListedImages:
    """A list of images from Python: PIL images, arrays of pixels, or paths."""

    split = "all"

    def __init__(self, images: Sequence[Any]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"image {i} of the list"

    def fingerprint(self, indices: Sequence[int]) -> str:
        return _fingerprint(self.images[i] for i in indices)

    def labels(self, column: str | None) -> Labels:
        raise InputError(
            "A list of images has no class labels. Pass a datasets.Dataset with them: "
            'Dataset.from_dict({"image": images, "label": labels}, features=Features(image=Image(), '
            "label=ClassLabel(names=names)))."
        )


class MissingSplitError(InputError):
    """Raised when a source has splits, but not the requested one."""


# ---------------------------------------------------------------------------------------------------------------------
# Folders and archives of image files


class FolderImages:
    """The image files below a folder, in the natural order of their paths; each subfolder is a class.

    Symbolic links to folders are followed. Hidden files, hidden folders, run folders, and the thumbnails and recycle
    bins of network drives are ignored; what else is ignored is logged.

    Raises:
        InputError: if there are none.
    """

    def __init__(self, folder: Path, split: str = "all"):
        self.folder, self.split = folder, split
        self.paths, ignored = _image_files(folder)
        if not self.paths:
            raise InputError(
                f"There are no images in {folder} or its subfolders. Image files end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; torchvision's raw/train-images-idx3-ubyte is also supported."
                + (f" Ignored: {_describe(ignored)}." if ignored else "")
            )
        if ignored and os.environ.get("RANK", "0") == "0":
            logger.info(f"{folder}: {len(self.paths)} images. Ignored: {_describe(ignored)}.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Path:
        return self.paths[i]

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def fingerprint(self, indices: Sequence[int]) -> str:
        return _fingerprint(self.paths[i] for i in indices)

    def labels(self, column: str | None) -> Labels:
        _require_no_column(column, self.folder)
        if metadata := next((path for name in _METADATA_FILES if (path := self.folder / name).is_file()), None):
            folder = shlex.quote(str(self.folder))
            raise InputError(
                f"{metadata} may contain the labels of the images, but --train_data_dir takes the classes from the "
                f"subfolders. Use --dataset_name {folder} and --label_column for its labels, or remove it."
            )
        return _folder_labels([path.relative_to(self.folder) for path in self.paths], self.folder)


class ZipImages:
    """The image files in a .zip archive, in the natural order of their paths; each folder is a class.

    Paths are relative to the deepest folder that contains all images, which may have a subfolder for each split.
    Images whose path leads out of the archive (`../`, `/`) are ignored, which is logged.

    Raises:
        InputError: if there are none, or the file is not an archive.
        MissingSplitError: if there is no such split.
    """

    def __init__(self, path: Path, split: str | None = None, default_split: str = "train"):
        self.path = path
        with naming_file(path), ZipFile(path) as archive:
            self.names = {PurePosixPath(name): name for name in archive.namelist()}  # `./a.png` is a.png
        images = [member for member in self.names if member.suffix.lower() in IMAGE_SUFFIXES]
        outside = {member for member in images if ".." in member.parts or member.is_absolute()}
        if outside and os.environ.get("RANK", "0") == "0":
            example = min(outside, key=natural_order)
            logger.warning(f"{path}: ignored {len(outside)} images with paths outside of it, such as {example}.")
        members = [m for m in images if m not in outside and not any(map(_is_left_out, m.parts))]
        if not members:
            raise InputError(f"There are no images in {path}. Image files end in {', '.join(sorted(IMAGE_SUFFIXES))}.")
        self.root = PurePosixPath(os.path.commonpath([member.parent for member in members]))
        folders = {parts[0] for m in members if len(parts := m.relative_to(self.root).parts) > 1}
        split_folder = _find_split(folders, split, default_split, path)
        self.split = split_folder or "all"
        self.root /= split_folder or ""
        self.members = sorted((m for m in members if m.is_relative_to(self.root)), key=natural_order)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            archive = _open_zip_file(self.path, os.getpid())
            return {"bytes": archive.read(self.names[self.members[i]]), "path": str(self.members[i])}
        except (BadZipFile, OSError, RuntimeError, zlib.error) as error:  # RuntimeError: the archive is encrypted
            raise BrokenImageError(str(error)) from error

    def name(self, i: int) -> str:
        return f"{self.members[i]} in {self.path}"

    def fingerprint(self, indices: Sequence[int]) -> str:
        return _fingerprint(self._cell_or_none(i) for i in indices)

    def labels(self, column: str | None) -> Labels:
        _require_no_column(column, self.path)
        return _folder_labels([member.relative_to(self.root) for member in self.members], self.path)

    def _cell_or_none(self, i: int) -> dict[str, Any] | None:
        with suppress(BrokenImageError):
            return self[i]
        return None


@lru_cache(maxsize=8)
def _open_zip_file(path: Path, _process: int) -> ZipFile:
    """Open an archive once per process: forked workers must not share a file position."""
    return ZipFile(path)


def _fingerprint(cells: Iterable[Any]) -> str:
    return fingerprint([fingerprint_bytes(file_bytes(cell)) for cell in cells])


def natural_order(name: str | PurePath) -> list[list[tuple[int, str, str]]]:
    """Sort key of a name or path that compares the numbers in it by value: 2.png before 10.png."""

    def key(text: str) -> tuple[int, str, str]:
        number = text.lstrip("0") if text.isdecimal() else ""
        return len(number), number, text

    parts = name.parts if isinstance(name, PurePath) else [name]
    return [[key(text) for text in re.split(r"(\d+)", part)] for part in parts]


def _image_files(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the images below a folder, and the number of ignored files by their suffix or system folder.

    Symbolic links whose target does not exist are ignored files, too.
    """
    paths, ignored, seen = [], Counter[str](), 0
    for root, folders, files in os.walk(folder, followlinks=True):
        seen += len(folders) + len(files)
        for name in folders:
            if name.lower() in _SYSTEM_FOLDERS and (count := _count_images(Path(root, name))):
                ignored[f"in {name}"] += count
        folders[:] = [name for name in folders if not _is_ignored(Path(root, name))]
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                if path.is_file():
                    paths.append(path)
                else:
                    ignored["broken links"] += 1
            else:
                ignored[path.suffix.lower() or "without a suffix"] += 1
        if not paths:
            _require_few(folder, seen)
    return sorted(paths, key=natural_order), ignored


def _require_few(folder: Path, count: int) -> None:
    """Stop the search for images in a folder in which none is among many files.

    Raises:
        InputError: if there are too many.
    """
    if count > _MAX_OTHER_FILES:
        raise InputError(
            f"There is no image among the first {_MAX_OTHER_FILES:,} files and folders in {folder}. Name the folder "
            "that contains the images."
        )


def _require_data_folder(folder: Path) -> None:
    """Check that a folder is not the home folder and does not contain it, as `/` does.

    Raises:
        InputError: if so.
    """
    with suppress(RuntimeError):  # there is no home folder
        if folder.is_dir() and Path.home().resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{folder} contains your home folder, with all your images: name the folder of the images to read."
            )


def _count_images(folder: Path) -> int:
    return sum(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, files in os.walk(folder) for name in files)


def _describe(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def _is_ignored(folder: Path) -> bool:
    if _is_left_out(folder.name):
        return True
    if folder.is_symlink() and any(parent.resolve().is_relative_to(folder.resolve()) for parent in folder.parents):
        return True  # a link to one of its own parent folders
    return is_run_folder(folder)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _find_split(folders: set[str], split: str | None, default_split: str, location: Path) -> str | None:
    """Return the subfolder that contains a split, or None if the subfolders are not splits.

    `train` and `test` may also be names of classes. Unless the caller names a split, subfolders are splits only if
    there are two different ones, or the only subfolder is that of the training images.

    Raises:
        MissingSplitError: if there is no such split.
    """
    splits = {name: _SPLIT_NAMES[name.lower()] for name in folders if name.lower() in _SPLIT_NAMES}
    has_splits = len(set(splits.values())) > 1 or (splits.keys() == folders and "train" in splits.values())
    requested = split or default_split
    kind = _SPLIT_NAMES.get(requested.lower())
    found = [requested] if requested in folders else [name for name in splits if splits[name] == kind]
    if len(found) == 1 and (has_splits or split):
        return found[0]
    if has_splits:
        raise MissingSplitError(f"{location} has no split {requested}: its splits are {', '.join(sorted(splits))}.")
    _require_no_split(split, location)
    return None


def _require_no_split(split: str | None, location: str | Path) -> None:
    """Check that no particular split was requested of a source without splits.

    Raises:
        MissingSplitError: if one was.
    """
    if split not in _WHOLE:
        raise MissingSplitError(f"{location} has no split {split}: it is not divided into splits.")


def _folder_labels(paths: Sequence[PurePath], location: Path) -> Labels:
    """Return one class per subfolder, in natural order; the paths are relative to `location`."""
    for path in paths:
        if len(path.parts) == 1:
            raise InputError(
                f"The images in {location} have no class labels: {path} is not in a subfolder. Put the images of each "
                "class into a subfolder named after the class."
            )
    names = [path.parts[0] for path in paths]
    for name in set(names):
        if name != name.encode(errors="replace").decode():  # model cards and configs are UTF-8
            raise InputError(f"The name of the folder {name!r} in {location} is not UTF-8: rename it.")
    return _named_labels(names)


def _named_labels(names: Sequence[str]) -> Labels:
    classes = sorted(set(names), key=natural_order)
    numbers = {name: number for number, name in enumerate(classes)}
    return Labels(classes, [numbers[name] for name in names])


def _require_no_column(column: str | None, location: Path) -> None:
    if column is not None:
        raise InputError(f"--label_column {column}: {location} has no columns. Only datasets have them.")


# ---------------------------------------------------------------------------------------------------------------------
# Arrays


class IdxImages:
    """Images in a file in MNIST's idx format, in torchvision's layout; the labels are in a file next to it.

    Raises:
        InputError: for a file that is truncated or has no images.
    """

    def __init__(self, path: Path, split: str = "train"):
        self.path, self.images, self.split = path, _read_idx(path, 3), split

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"image {i} of {self.path}"

    def fingerprint(self, indices: Sequence[int]) -> str:
        return fingerprint_bytes(self.images[indices].tobytes())

    def labels(self, column: str | None) -> Labels:
        _require_no_column(column, self.path)
        path = self.path.with_name(self.path.name.replace("images-idx3", "labels-idx1"))
        if not path.is_file():
            raise InputError(f"The images in {self.path} have no class labels: there is no {path.name} next to them.")
        labels = _read_idx(path, 1)
        _check_label_count(self.path, len(self), labels, path.name)
        numbers = labels.tolist()
        names = FashionMNIST.classes if self.path.absolute().parent.parent.name == "FashionMNIST" else None
        return _integer_labels(numbers, names, f"file {path}")


class NpzImages:
    """Images in the arrays `arr_0` of .npz files; their labels, if any, are the integers in `arr_1`.

    Arrays that are not compressed stay on disk and are mapped into memory, after a pass that verifies their checksum.

    Args:
        path: a file, or the folder of the files.
        files: the files, in order.

    Raises:
        InputError: if a file is damaged or has no such array.
    """

    split = "all"

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, files
        self.arrays = [_npz_images(file) for file in files]
        self.ends = np.cumsum([len(array) for array in self.arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        file, position = self._find(i)
        return self.arrays[file][position]

    def name(self, i: int) -> str:
        file, position = self._find(i)
        return f"image {position} of {self.files[file]}"

    def fingerprint(self, indices: Sequence[int]) -> str:
        """Return a hash of the pixels of these images, whatever files they are in."""
        return fingerprint_parts(np.ascontiguousarray(self[i]).data for i in indices)

    def labels(self, column: str | None) -> Labels:
        _require_no_column(column, self.path)
        numbers: list[int] = []
        for file, images in zip(self.files, self.arrays, strict=True):
            with naming_file(file), np.load(file) as arrays:
                array = arrays.get("arr_1")
            if array is None or array.ndim != 1 or array.dtype.kind not in "iu":
                raise InputError(
                    f"The images in {file} have no class labels: there is no array arr_1 of integers (N,)."
                )
            _check_label_count(file, len(images), array, "arr_1")
            numbers += array.tolist()
        return _integer_labels(numbers, None, f"array arr_1 of {self.path}")

    def _find(self, i: int) -> tuple[int, int]:
        """Return the file of image i, and its position in it."""
        file = int(np.searchsorted(self.ends, i, side="right"))
        return file, i - int(self.ends[file] - len(self.arrays[file]))


def _npz_images(path: Path) -> np.ndarray:
    with naming_file(path), open(path, "rb") as file:
        if not is_zipfile(file):  # NumPy would try to unpickle it
            raise ValueError("it is not an archive of arrays")
        images = _read_or_map(path, "arr_0.npy")
    channels = images.shape[3:] if images is not None else ()
    if images is None or images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
        raise InputError(f"{path} must contain images (N, H, W, C) as 8-bit integers in an array arr_0.")
    if channels and channels[0] not in CHANNEL_MODES:
        raise InputError(
            f"{path} has images of the shape {images.shape[1:]}; it must be (H, W, C) with 1 to 4 channels."
        )
    return images[..., 0] if channels == (1,) else images


def _read_or_map(path: Path, name: str) -> np.ndarray | None:
    """Return an array in an .npz file, memory-mapped if it is not compressed; None if there is none of this name."""
    with ZipFile(path) as archive:
        if name not in archive.namelist():
            return None
        member = archive.getinfo(name)
        with archive.open(member) as content:
            version = np.lib.format.read_magic(content)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, in_fortran_order, dtype = read_header[version](content)
            header_length = content.tell()
            if member.compress_type != ZIP_STORED or in_fortran_order or dtype.hasobject or not math.prod(shape):
                with np.load(path) as arrays:
                    return arrays[name]
            while content.read(2**20):  # verifies the checksum at the end
                pass
    with open(path, "rb") as file:
        file.seek(member.header_offset + _ZIP_NAME_LENGTH)
        lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
    offset = member.header_offset + _ZIP_HEADER + lengths + header_length
    return np.memmap(path, dtype, "r", offset, shape)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file.

    Raises:
        InputError: if it is damaged or not an .npz file.
    """
    with naming_file(path), open(path, "rb") as file:
        if not is_zipfile(file):  # NumPy would try to unpickle it
            raise ValueError("it is not an archive of arrays")
        with np.load(path) as arrays:
            return dict(arrays)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Memory-map a file of bytes in MNIST's idx format, (N, ...)."""
    with open(path, "rb") as file:  # two zeros, the data type, the number of dimensions, the dimensions
        magic = file.read(4)
        if len(magic) == 4 and magic != bytes([0, 0, _IDX_UINT8, dimensions]):
            raise InputError(
                f"{path} does not contain bytes in {dimensions} dimensions in MNIST's idx format. If it is "
                "compressed, unpack it; images of another type can be converted to an .npz file."
            )
        shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(dimensions))
        try:
            values = np.memmap(path, np.uint8, "r", file.tell(), shape)
        except (OSError, OverflowError, ValueError):
            values = np.empty(0)
    if not values.size:
        raise InputError(f"{path} is truncated or empty: download it again.")
    return values


def _check_label_count(path: Path, count: int, labels: np.ndarray, name: str) -> None:
    if len(labels) != count:
        raise InputError(f"{path} has {count} images, but there are {len(labels)} labels in {name}.")


# ---------------------------------------------------------------------------------------------------------------------
# Datasets of the `datasets` library


class DatasetImages:
    """The image column of a dataset of the `datasets` library.

    Args:
        column: the column with the images; detected if None.
        split: name of the split.
        folder: folder of a local dataset, which paths in the column are relative to.
    """

    def __init__(self, rows: "Dataset", column: str | None, split: str = "train", folder: Path | None = None):
        rows = rows.with_format(None)  # a format or transform of the user's would change the rows
        self.rows, self.split, self.folder = rows, split, folder
        self.column = _image_column(rows, column)
        self._encoded = _undecoded(rows, [self.column])

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, i: int) -> Any:
        return locate(self._encoded[i][self.column], self.folder)

    def name(self, i: int) -> str:
        return f"row {i} of the column {self.column!r} ({file_name(self._encoded[i][self.column])})"

    def fingerprint(self, indices: Sequence[int]) -> str:
        return _fingerprint(locate(row[self.column], self.folder) for row in self._encoded.select(indices))

    def labels(self, column: str | None) -> Labels:
        """Return the classes in the label column: a `ClassLabel`, or integers or names, in natural order.

        Raises:
            InputError: if there is no such column, or a label in it is missing or is not a valid class label.
        """
        column = _label_column(self.rows.features, column)
        values = self.rows[column][:]
        classes = getattr(self.rows.features[column], "names", None)
        if classes is None and all(isinstance(value, str) for value in values):
            _require_classes(values, f"label column {column!r}")
            return _named_labels(values)
        return _integer_labels(values, classes, f"label column {column!r}")


class ImageStream:
    """The rows of a dataset, read in order without a copy on disk.

    Args:
        image_column: the column with the images; detected if None.
        folder: see `DatasetImages`.
    """

    def __init__(self, rows: "IterableDataset", image_column: str | None, folder: Path | None = None):
        self.rows, self.image_column, self.folder = rows, _image_column(rows, image_column), folder

    def label_column(self, column: str | None) -> str:
        """Return the name of the column with the class labels; detected if None."""
        return _label_column(self.rows.features or {}, column)

    def labels(self, column: str) -> Labels:
        """Return the classes of a label column, without the labels of the rows.

        Raises:
            InputError: if it is not of type `ClassLabel`.
        """
        classes = getattr((self.rows.features or {}).get(column), "names", None)
        if classes is None:
            raise InputError(
                f"The column {column!r} of the stream does not declare its classes: a stream needs a column of type "
                "ClassLabel. Without --streaming, names and integers work too."
            )
        return Labels(classes, None)

    def select(self, columns: list[str]) -> "IterableDataset":
        """Return the rows with only these columns, images as encoded bytes."""
        return _undecoded(self.rows, columns)


def file_name(cell: Any) -> str:
    """Return the file name of a dataset cell, or a placeholder if it has none."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) and path else "no file name"


def locate(cell: Any, folder: Path | None) -> Any:
    """Return a dataset cell with a relative path in it resolved.

    Args:
        folder: the folder of a local dataset; None for one on the Hub, whose cells must be images.

    Raises:
        BrokenImageError: for a URL, or a path in a dataset on the Hub.
    """
    path = encoded_or_path(cell)
    if isinstance(path, bytes) or path is None or (path.is_absolute() and (folder or isinstance(cell, dict))):
        return cell
    if folder is None or "://" in file_name(cell):
        raise BrokenImageError(f"it holds {file_name(cell)!r}, not an image. Download the images it refers to")
    return folder / path


def _integer_labels(values: list[Any], classes: list[str] | None, place: str) -> Labels:
    """Check that labels are non-negative integers, and name the classes after them unless they have names.

    Without names, the classes are the labels that occur, so that labels 1 to 5 make five classes.
    """
    wrong = [value for value in values if not isinstance(value, int) or value < 0]
    if wrong:
        raise InputError(
            f"The {place} must contain a class for every image: a name, or an integer from 0. It contains "
            f"{None if None in wrong else wrong[0]!r}."
        )
    if classes is None:
        _require_classes(values, place)
        return _named_labels([str(int(value)) for value in values])  # booleans are labels too
    if max(values) >= len(classes):
        raise InputError(
            f"The {place} contains the label {max(values)}, but names {len(classes)} classes, whose labels are 0 to "
            f"{len(classes) - 1}."
        )
    return Labels(classes, [int(value) for value in values])


def _require_classes(values: Sequence[Any], place: str) -> None:
    """Check that labels are classes of several images, and not the IDs of the images."""
    distinct = len(set(values))
    if distinct > max(_FEW_CLASSES, len(values) / 2):
        raise InputError(
            f"The {place} contains {distinct} different labels for {len(values)} images: these are not classes. Use "
            "labels that several images share or, for a dataset, another --label_column."
        )


def _undecoded(rows: Any, columns: list[str]) -> Any:
    from datasets import Image as ImageFeature

    for column in columns:
        if rows.features and isinstance(rows.features[column], ImageFeature):
            rows = rows.cast_column(column, ImageFeature(decode=False))
    return rows.select_columns(columns)


def _image_column(rows: "Dataset | IterableDataset", column: str | None) -> str:
    from datasets import Image as ImageFeature

    features = rows.features or dict.fromkeys(next(iter(rows), {}))
    candidates = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    candidates += [name for name in ("image", "img") if name in features]
    column = column or next(iter(candidates), None)
    if column is None or column not in features:
        raise InputError(
            f"The dataset has no {'image column' if column is None else f'column {column!r}'}. Its columns are: "
            f"{', '.join(features) or 'none (it is empty)'}. Name the one with the images with --image_column."
        )
    return column


def _label_column(features: "Features | dict", column: str | None) -> str:
    from datasets import ClassLabel

    candidates = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    candidates += [name for name in ("label", "labels", "cls") if name in features]  # cls: in WebDataset
    column = column or next(iter(candidates), None)
    if column is None or column not in features:
        raise InputError(
            f"The dataset has no {'column of class labels' if column is None else f'column {column!r}'}. Its columns "
            f"are: {', '.join(features)}. Name the one with the labels with --label_column."
        )
    return column


# ---------------------------------------------------------------------------------------------------------------------
# Opening


@dataclass(frozen=True)
class _Request:
    """The arguments of `open_source`."""

    location: str
    split: str | None
    default_split: str
    config: str | None
    image_column: str | None
    folder_as: Literal["images", "dataset"] | None

    @property
    def path(self) -> Path:
        return Path(self.location)

    @property
    def folder(self) -> Path | None:
        """The folder of a local dataset."""
        return self.path if self.path.is_dir() else self.path.parent if self.path.exists() else None

    @cached_property
    def has_dataset_files(self) -> bool:
        """Whether the path is a folder with files that make it a dataset."""
        return _has_dataset_files(self.path)

    @property
    def split_or_default(self) -> str:
        """The split to read of a source that has splits."""
        return self.split or self.default_split


def open_source(
    location: str | InMemory,
    split: str | None = None,
    *,
    default_split: str = "train",
    config: str | None = None,
    image_column: str | None = None,
    folder_as: Literal["images", "dataset"] | None = None,
) -> ImageSource:
    """Open the images at a location.

    | location | images |
    |---|---|
    | an .npz file, or a folder of nothing else | the arrays `arr_0`, uint8, (N, H, W) or (N, H, W, C) |
    | a .zip file | its image files, of one split if it has a folder per split |
    | a .parquet, .arrow or .tar file | as read by `datasets`, a .tar file as WebDataset |
    | a URL of such a file | the same; .npz and .zip files are downloaded |
    | a URL with `*` or `{000..063}` of several .parquet, .arrow or .tar files | the same |
    | a folder from `Dataset.save_to_disk` or `DatasetDict.save_to_disk` | its rows |
    | a folder with `raw/train-images-idx3-ubyte`, or a subfolder that has it | MNIST's idx format |
    | a folder of images | its image files, of one split if it has a subfolder per split |
    | any other folder, or a name on the Hub | as read by `datasets.load_dataset` |
    | in memory, a `Dataset`, `DatasetDict` or list | its rows or items |

    Args:
        split: the split to read; datasets also accept slices such as `train[:10%]`. None: `default_split` of a source
            with splits, else all images.
        default_split: see `split`.
        config: configuration of a dataset that has several.
        image_column: the column of a dataset with the images; detected if None.
        folder_as: how to read a folder of both images and dataset files. "images": its image files. "dataset" or None:
            with `datasets` if it has .parquet, .arrow, .jsonl, .csv or .tar files or a dataset card with
            configurations, or if a configuration or a slice is requested; otherwise its image files. A folder without
            images is read with `datasets` if it has such files, or for "dataset".

    Raises:
        InputError: if the location does not exist, is damaged, has no images or several sets of them, or has no
            such configuration or column.
        MissingSplitError: if it does not have the requested split.
    """
    if isinstance(location, InMemory):
        return _open_in_memory(location.value, split, default_split, image_column)
    request = _Request(local_copy(location), split, default_split, config, image_column, folder_as)
    _require_data_folder(request.path)
    return next(source for open_kind in KINDS if (source := open_kind(request)) is not None)


def check_dataset_options(
    sources: Sequence[tuple[str | InMemory, ImageSource | None]], options: Mapping[str, str | None]
) -> None:
    """Check that options of datasets have an effect: that at least one of the sources is a dataset.

    Args:
        sources: the location of each source, and the source; None for a file that holds no images.
        options: values by flag; None if the flag was not passed.

    Raises:
        InputError: if none is; the message names the flag.
    """
    if any(isinstance(source, DatasetImages) for _, source in sources):
        return
    for flag, value in options.items():
        if value:
            locations = " and ".join(str(location) for location, _ in sources)
            raise InputError(f"--{flag} {value} is a setting of a dataset, not of {locations}: omit it.")


def open_stream(
    location: str | InMemory, split: str | None = None, *, config: str | None = None, image_column: str | None = None
) -> ImageStream:
    """Open a dataset on the Hub, or a local one (see `open_source`), to read its rows without a copy on disk.

    In memory it is an `IterableDataset`.

    Raises:
        InputError: if it is not found, is not a dataset, or has no such split, configuration or column.
    """
    if isinstance(location, InMemory):
        if not hasattr(location.value, "set_epoch"):
            raise InputError(f"{location} cannot be streamed: omit streaming, or pass a datasets.IterableDataset.")
        _require_no_split(split, str(location))
        return ImageStream(location.value, image_column)
    request = _Request(location, split, "train", config, image_column, "dataset")
    _require_data_folder(request.path)
    if (npz := _npz_files(request.path)) or _is_file(request.path, ".zip"):
        raise InputError(f"{location} cannot be streamed: read {'.npz' if npz else '.zip'} files without --streaming.")
    rows, _ = _load_dataset(request, streaming=True)
    return ImageStream(rows, image_column, request.folder)


def _open_in_memory(value: Any, split: str | None, default_split: str, image_column: str | None) -> ImageSource:
    """Open an object of the `datasets` library or a list of images; see `open_source`."""
    if isinstance(value, (list, tuple)):
        _require_no_split(split, "The list of images")
        if not value or isinstance(value[0], (dict, list, tuple)):
            raise InputError("Pass a list of images (PIL images, arrays or paths) with at least one.")
        return ListedImages(value)
    datasets = _import_datasets()
    if isinstance(value, datasets.IterableDataset):
        raise InputError("A datasets.IterableDataset is a stream: pass it with streaming=True and max_train_steps.")
    if isinstance(value, datasets.DatasetDict):
        name = split or default_split
        if name not in value:
            raise MissingSplitError(
                f"The datasets.DatasetDict has no split {name}: its splits are {', '.join(value)}."
            )
        return _open_rows(value[name], image_column, name)
    if not isinstance(value, datasets.Dataset):
        raise InputError(
            f"A {type(value).__name__} is not a set of images: pass a list of PIL images, a datasets.Dataset, or the "
            "path of a folder."
        )
    _require_no_split(split, "The datasets.Dataset")
    return _open_rows(value, image_column, "all")


def _open_rows(rows: "Dataset", image_column: str | None, split: str) -> ImageSource:
    if len(rows) == 0:
        raise InputError("The dataset is empty.")
    return DatasetImages(rows, image_column, split, Path())


def _open_npz(request: _Request) -> ImageSource | None:
    files = _npz_files(request.path)
    if not files:
        return None
    _require_no_split(request.split, request.location)
    return NpzImages(request.path, [_existing_file(file) for file in files])


def _open_zip(request: _Request) -> ImageSource | None:
    if not _is_file(request.path, ".zip"):
        return None
    return ZipImages(_existing_file(request.path), request.split, request.default_split)


def _open_idx_folder(request: _Request) -> ImageSource | None:
    folder = request.path
    if request.folder_as != "images" and request.has_dataset_files:
        return None
    files = {
        split: [*folder.glob(f"raw/{prefix}-images-idx3-ubyte"), *folder.glob(f"*/raw/{prefix}-images-idx3-ubyte")]
        for split, prefix in _IDX_PREFIXES.items()
    }
    if not any(files.values()):
        compressed = [*folder.glob("raw/*-idx3-ubyte.gz"), *folder.glob("*/raw/*-idx3-ubyte.gz")]
        if compressed:
            raise InputError(f"{compressed[0]} is compressed: unpack the files in {compressed[0].parent} with gunzip.")
        return None
    split = request.split_or_default
    paths = files.get(split)
    if not paths:
        raw = next(path.parent for paths in files.values() for path in paths)
        splits = [split for split, paths in files.items() if paths]
        raise MissingSplitError(f"{raw} has no split {split}: its splits are {' and '.join(splits)}.")
    if len(paths) > 1:
        sets = ", ".join(sorted(str(path.parent.parent) for path in paths))
        raise InputError(f"{request.location} contains several sets of images. Choose one of them: {sets}.")
    return IdxImages(paths[0], split)


def _open_image_folder(request: _Request) -> ImageSource | None:
    folder = request.path
    if request.folder_as == "images" and not folder.exists():
        place = "" if folder.is_absolute() else f" (looked for at {folder.resolve()})"
        raise InputError(f"{folder}: there is no such folder{place}.")
    if not folder.is_dir():
        return None
    if request.folder_as != "images" and (
        request.has_dataset_files or request.config or "[" in request.split_or_default
    ):
        return None
    subfolders = {child.name for child in folder.iterdir() if child.is_dir() and not _is_ignored(child)}
    split = _find_split(subfolders, request.split, request.default_split, folder)
    try:
        return FolderImages(folder / split, split) if split else FolderImages(folder)
    except InputError:
        if request.has_dataset_files or request.folder_as == "dataset":
            return None
        raise


def _open_dataset(request: _Request) -> ImageSource:
    rows, split = _load_dataset(request, streaming=False)
    if len(rows) == 0:
        raise InputError(f"The dataset {request.location}, split {split}, is empty.")
    return DatasetImages(rows, request.image_column, split, request.folder)


# tried in this order; each returns None for other kinds of locations
KINDS: tuple[Callable[[_Request], ImageSource | None], ...] = (
    _open_npz,
    _open_zip,
    _open_idx_folder,
    _open_image_folder,
    _open_dataset,
)


def _is_file(path: Path, *suffixes: str) -> bool:
    """Return whether a path names a file with one of these suffixes, existing or not."""
    return path.suffix.lower() in suffixes and not path.is_dir()


def _npz_files(path: Path) -> list[Path]:
    """Return the .npz file that a path names, existing or not, or those in a folder that holds nothing else."""
    if _is_file(path, ".npz"):
        return [path]
    files = [file for file in path.iterdir() if not _is_left_out(file.name)] if path.is_dir() else []
    return sorted(files, key=natural_order) if all(_is_file(file, ".npz") for file in files) else []


def _existing_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: there is no such file (looked for at {path.resolve()}).")
    return path


def _has_dataset_files(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    card = folder / "README.md"
    if card.is_file() and re.search(rb"^configs:", card.read_bytes(), re.MULTILINE):
        return True
    has_image, seen = False, 0
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_ignored(Path(root, name))]
        files = [name for name in files if not _is_left_out(name)]
        suffixes = {PurePath(name).suffix for name in (*folders, *files)}
        if suffixes & _DATASET_SUFFIXES:
            return True
        seen += len(folders) + len(files)
        has_image = has_image or any(suffix.lower() in IMAGE_SUFFIXES for suffix in suffixes)
        if not has_image:
            _require_few(folder, seen)
    return False


def _load_dataset(request: _Request, streaming: bool) -> tuple[Any, str]:
    """Load a dataset with `datasets`.

    Returns:
        the dataset and the name of its split; "all" for a single file and for a dataset saved without splits.
    """
    datasets = _import_datasets()
    path = request.path
    if is_url(request.location):
        if url_suffix(request.location) not in _FILE_BUILDERS:
            kinds = ", ".join((*_FILE_BUILDERS, ".npz", ".zip"))
            raise InputError(
                f"{request.location} is not the URL of files of images ({kinds}). `*` and ranges such as "
                "{000..063} stand for several files; a dataset on the Hub is named without hf://."
            )
        files = expand_ranges(request.location)
    elif _is_file(path, *_FILE_BUILDERS):
        files = [_existing_file(path)]
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():  # Dataset.save_to_disk
        files = _saved_files(path)
    elif (path / "dataset_dict.json").is_file() and not streaming:  # DatasetDict.save_to_disk
        _require_no_config(request)
        with naming_file(path, Exception):
            splits = datasets.load_from_disk(str(path))
        return _select_split(datasets, splits, request), request.split_or_default
    elif (path / "dataset_dict.json").is_file():
        _require_no_config(request)
        return _stream_saved_split(datasets, request), request.split_or_default
    else:
        return _load_by_name(datasets, request, streaming), request.split_or_default
    _require_no_config(request)
    if streaming:
        _require_no_split(request.split, path)
    with naming_file(request.location, Exception):  # the readers raise the errors of many libraries
        if path.is_dir() and not streaming:
            rows = datasets.load_from_disk(str(path))
        else:
            data_files = [str(file) for file in files]
            builder = _FILE_BUILDERS[url_suffix(data_files[0])]
            rows = datasets.load_dataset(builder, data_files=data_files, split="train", streaming=streaming)
    if request.split in _WHOLE:
        return rows, "all"
    return _select_split(datasets, {"train": rows}, request), request.split_or_default


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a dataset from `Dataset.save_to_disk`, without those that `datasets` has cached there."""
    with naming_file(folder / "state.json", KeyError, TypeError):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]


def _stream_saved_split(datasets: ModuleType, request: _Request) -> Any:
    """Open a split of a folder from `DatasetDict.save_to_disk` as a stream."""
    file, name = request.path / "dataset_dict.json", request.split_or_default
    with naming_file(file, KeyError):
        splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
    if name not in splits:
        raise MissingSplitError(f"{request.location} has no split {name}: its splits are {', '.join(splits)}.")
    with naming_file(request.location, Exception):
        files = [str(file) for file in _saved_files(request.path / name)]
        return datasets.load_dataset("arrow", data_files=files, split="train", streaming=True)


def _require_no_config(request: _Request) -> None:
    if request.config:
        raise InputError(
            f"{request.location} has no configuration {request.config}: it is a single file, or was saved with "
            "`save_to_disk`. Name the data that you want directly."
        )


def _select_split(datasets: ModuleType, splits: "Mapping[str, Dataset]", request: _Request) -> "Dataset":
    """Return the requested split or slice of a split."""
    lengths, split = {name: len(rows) for name, rows in splits.items()}, request.split_or_default
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except ValueError as error:
        names = ", ".join(lengths)
        raise MissingSplitError(f"{request.location} has no split {split}: its splits are {names}.") from error
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _load_by_name(datasets: ModuleType, request: _Request, streaming: bool) -> "Dataset | IterableDataset":
    location, path, split = request.location, request.path, request.split_or_default
    system_folders = [kind for kind in _image_files(path)[1] if kind.startswith("in ")] if path.is_dir() else []
    if system_folders:
        raise InputError(
            f"{location} has images {' and '.join(system_folders)}, folders of a network drive or desktop that the "
            "datasets library would read, too. Remove them, or read the folder with --train_data_dir, which ignores "
            "them."
        )
    if path.is_file():
        kinds = ", ".join((".npz", ".zip", *_FILE_BUILDERS))
        raise InputError(f"{location} is not a file of images that can be read ({kinds}): name one, or a folder.")
    if not path.exists() and (problem := hub_problem(location, "dataset")):
        raise InputError(
            f"{location}: there is no such file or folder (looked for at {path.resolve()}), and {problem}"
        )
    try:
        return datasets.load_dataset(location, request.config, split=split, streaming=streaming)
    except Exception as error:  # from `datasets`, the libraries behind its builders, or the Hub client
        kind = MissingSplitError if isinstance(error, ValueError) and _lacks_split(datasets, request) else InputError
        folder = path.resolve()
        place = folder if path.exists() else f"the Hugging Face Hub, since there is no local folder {folder}"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise kind(
            f"The dataset {location} (split {split}) could not be loaded from {place}. The datasets library "
            f"reports: {type(cause or error).__name__}: {cause or error}"
        ) from error


def _lacks_split(datasets: ModuleType, request: _Request) -> bool:
    with suppress(Exception):  # the split is not the problem then
        names = datasets.get_dataset_split_names(request.location, request.config)
        return request.split_or_default.partition("[")[0] not in names
    return False


def _import_datasets() -> ModuleType:
    try:
        import datasets
        import datasets.exceptions
    except ImportError:
        raise InputError(
            f"Reading a dataset needs a package: {missing_extra('datasets', 'train')}. Image folders can be read "
            "without it."
        ) from None
    return datasets
