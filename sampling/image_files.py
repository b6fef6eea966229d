"""Files of generated images: PNG files, or shards in .npz or WebDataset format.

A shard has a fixed number of consecutive images, so that the same files come out for any number of processes. Each is
written by one process, atomically.
"""

import io
import tarfile
import threading
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from ..core.errors import InputError
from ..core.files import replace_file
from ..data.sources import read_arrays
from .groups import split_into_groups

SHARD_IMAGES = 512  # a multiple of the sizes of groups on a CPU, so that shards do not divide groups
_SUFFIXES = {"png": ".png", "npz": ".npz", "webdataset": ".tar"}


class ImageFiles:
    """The files of images 0 .. count-1 in a folder; several threads can add images.

    Args:
        folder: their folder.
        file_format: png, npz or webdataset.
        count: number of images.
        class_label: returns the class of image i, or None without classes; PNG files do not store it.
        expected: mode and size of the images, if they are known.
    """

    def __init__(
        self,
        folder: Path,
        file_format: str,
        count: int,
        class_label: Callable[[int], int | str | None] = lambda i: None,
        expected: tuple[str, tuple[int, int]] | None = None,
    ):
        self.folder, self.count, self.class_label, self.expected = folder, count, class_label, expected
        self.suffix = _SUFFIXES[file_format]
        self.images_per_file = 1 if file_format == "png" else SHARD_IMAGES
        self._incomplete: dict[int, dict[int, Image.Image]] = {}  # the images so far of each file, by its first image
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    def path(self, i: int) -> Path:
        """Return the file that contains image i."""
        if self.images_per_file == 1:
            return self.folder / f"{i:06d}{self.suffix}"
        return self.folder / f"shard-{i // self.images_per_file:05d}{self.suffix}"

    def images_of(self, i: int) -> range:
        """Return the images in the file that contains image i."""
        first = i - i % self.images_per_file
        return range(first, min(first + self.images_per_file, self.count))

    def missing(self, size: int, offset: int, process: int, processes: int) -> tuple[int, list[list[int]]]:
        """Return the number of images of one process, and those that are missing among them, in groups.

        An image is missing if the file that contains it does not exist, is damaged, or has too few images or
        images of another mode or size.

        Args:
            size, offset: see `split_into_groups`.
            process: number of the process.
            processes: number of processes, which take turns with groups, or with shards.
        """
        parts = split_into_groups(self.count, *((size, offset) if self.images_per_file == 1 else (SHARD_IMAGES,)))
        own = parts[process::processes]
        files = [self.images_of(i) for part in own for i in part[:: self.images_per_file]]
        missing = [
            i
            for images in files
            if not is_complete(self.path(images.start), len(images), self.expected)
            for i in images
        ]
        return sum(map(len, own)), [list(group) for _, group in groupby(missing, lambda i: (i + offset) // size)]

    def add(self, indices: Sequence[int], images: Sequence[Image.Image]) -> None:
        """Add images, and write the files that are complete."""
        for i, image in zip(indices, images, strict=True):
            wanted = self.images_of(i)
            with self._lock:
                collected = self._incomplete.setdefault(wanted.start, {})
                collected[i] = image
                if len(collected) < len(wanted):
                    continue
                del self._incomplete[wanted.start]
            labels = [int(label) for index in wanted if (label := self.class_label(index)) is not None]
            write_images(self.path(i), wanted.start, [collected[index] for index in wanted], labels)


def existing_files(folder: Path) -> list[Path]:
    """Return the files of generated images in a folder, in all formats."""
    pngs = [path for path in folder.glob("*.png") if path.stem.isdecimal()]
    return pngs + [path for suffix in (".npz", ".tar") for path in folder.glob(f"shard-*{suffix}")]


def write_images(path: Path, first: int, images: Sequence[Image.Image], labels: Sequence[int] = ()) -> None:
    """Write consecutive images into one file, atomically.

    | file | images | labels |
    |---|---|---|
    | .png | one | not stored |
    | .npz | the array `arr_0`, uint8, (N, H, W) or (N, H, W, C) | the array `arr_1`, int64, (N,) |
    | .tar | a PNG file each, named by the number of the image | a file `.cls` each |

    Args:
        path: the file; its suffix is the format.
        first: the number of the first image.
        images: the images, all of one size.
        labels: their classes, or empty.
    """
    if path.suffix == ".png":
        replace_file(path, images[0].save)
    elif path.suffix == ".npz":
        arrays = [np.stack([np.asarray(image) for image in images])]
        if labels:
            arrays.append(np.asarray(labels, dtype=np.int64))
        replace_file(path, lambda temporary: np.savez(temporary, *arrays))  # as arr_0 and arr_1
    else:
        replace_file(path, lambda temporary: _write_tar(temporary, first, images, labels))


def _write_tar(path: Path, first: int, images: Sequence[Image.Image], labels: Sequence[int]) -> None:
    with tarfile.open(path, "w") as archive:
        for i, image in enumerate(images):
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            files = {"png": encoded.getvalue()} | ({"cls": str(labels[i]).encode()} if labels else {})
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{first + i:06d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def read_images(path: Path) -> list[Image.Image]:
    """Read the images in a file that `write_images` has written; those in PNG format are not decoded yet.

    Raises:
        OSError, SyntaxError, ValueError: if it is damaged.
    """
    if path.suffix == ".png":
        return [Image.open(io.BytesIO(path.read_bytes()))]
    if path.suffix == ".npz":
        return [Image.fromarray(image) for image in read_arrays(path)["arr_0"]]
    images = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".png") and (file := archive.extractfile(member)):
                    images.append(Image.open(io.BytesIO(file.read())))
    except tarfile.TarError as error:
        raise OSError(str(error)) from error
    return images


def is_complete(path: Path, count: int, expected: tuple[str, tuple[int, int]] | None = None) -> bool:
    """Return whether a file exists, matches the checksums of its format, and has at least `count` images.

    If their mode and size are known, all images must have these.
    """
    try:
        images = read_images(path)
        if path.suffix != ".npz":  # whose checksums were verified when it was read
            for image in images:
                image.verify()
    except (InputError, KeyError, OSError, SyntaxError, ValueError):  # Pillow's and NumPy's errors for a damaged file
        return False
    return len(images) >= count and (not expected or all((image.mode, image.size) == expected for image in images))
