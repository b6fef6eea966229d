"""Features of many images: computed by all processes, resumable, and cached."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..core.errors import write_problem
from ..core.files import digest_tensors, remove_temporary_files, replace_file
from ..core.threads import run_in_threads
from ..sampling.groups import split_into_groups

PART_IMAGES = 1024  # approximate number of images between two saves

Features = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)


def extract_features(
    count: int,
    batch_size: int,
    extract: Callable[[range], Features],
    accelerator: Accelerator,
    folder: Path | None = None,
    description: str = "",
    before_batch: Callable[[], None] = lambda: None,
    offset: int = 0,
    threads: int = 1,
) -> Features | None:
    """Extract features of images 0 .. count-1 in batches, distributed over all processes; called by every process.

    A batch always has the same images, whichever process and thread computes it, so that the result does not depend on
    their number.

    Args:
        extract: maps the indices of a batch to tensors with one row per image; called in several threads if `threads`
            is above 1.
        folder: where intermediate results are saved, to resume from after an interruption; the caller removes it. If
            it cannot be written, they are not saved.
        description: label of the progress bar.
        before_batch: called by all processes together before each of their batches; an exception in it ends the loop.
        offset: position of image 0 in its batch, less than `batch_size`.
        threads: number of batches that each process computes at a time.

    Returns:
        The tensors with a row for each image, in the main process; None in the others.

    Raises:
        ValueError: if the features of an image are not finite.
    """
    is_main = accelerator.is_main_process
    batches = split_into_groups(count, batch_size, offset)
    # parts with other batches would leave gaps between these
    prefix = f"part-{batch_size}" + (f"+{offset}" if offset else "")
    paths = sorted(folder.glob(f"{prefix}-*.safetensors")) if is_main and folder else []
    parts = [part for path in paths if (part := _read_features(path)) is not None]
    completed = [{image for part in parts for image in part["image"].tolist()}]
    broadcast_object_list(completed)
    missing = [batch for batch in batches if batch.start not in completed[0]]
    processes, rank = accelerator.num_processes, accelerator.process_index
    workers = processes * threads
    batches_per_part = workers * max(1, PART_IMAGES // (batch_size * workers))
    progress = tqdm(
        total=count, initial=len(completed[0]), unit="image", desc=description, leave=None, disable=not is_main
    )

    def extract_shard(part_batches: list[range]) -> list[Features]:
        results = []

        def extract_batch(i: int) -> Features | None:
            before_batch()  # also by processes without a batch in the last round
            return _extract_checked(part_batches[i], extract) if i < len(part_batches) else None

        def add(features: Features | None) -> None:
            if features is not None:
                results.append(features)
                progress.update(min(len(features["image"]) * processes, progress.total - progress.n))

        run_in_threads(extract_batch, range(rank, rank + len(part_batches), processes), threads, add)
        return results

    with progress:
        for start in range(0, len(missing), batches_per_part):
            results = gather_object(extract_shard(missing[start : start + batches_per_part]))
            if is_main:
                part = _concatenate(results)
                parts.append(part)
                if folder and not _cache(folder / f"{prefix}-{missing[start].start:09d}.safetensors", part):
                    folder = None
    if not is_main:
        return None
    features = _concatenate(parts)
    order = features.pop("image").argsort()
    return {name: tensor[order] for name, tensor in features.items()}


def cached_features(
    path: Path,
    protocol: dict[str, Any],
    count: int,
    batch_size: int,
    extract: Callable[[range], Features],
    accelerator: Accelerator,
    description: str = "",
    threads: int = 1,
) -> Features | None:
    """Return the features in the file `path`, or extract them and write the file with its protocol.

    A damaged file is written again. If another command is extracting the same features, or the file cannot be written,
    this one extracts them but does not save them.
    """
    features = _read_features(path) if accelerator.is_main_process and path.exists() else None
    is_cached = [features is not None]
    broadcast_object_list(is_cached)
    if is_cached[0]:
        return features
    with locked_parts(path.with_suffix(".parts"), accelerator) as parts:
        if parts:
            remove_temporary_files(path.parent, path.name)
        features = extract_features(count, batch_size, extract, accelerator, parts, description, threads=threads)
        if features is not None and parts:
            _cache(path, features, protocol)
            shutil.rmtree(parts, ignore_errors=True)
    return features


@contextmanager
def locked_parts(folder: Path, accelerator: Accelerator) -> Iterator[Path | None]:
    """Yield a folder for the intermediate results of `extract_features` in the main process; elsewhere None.

    If another command holds its lock or it cannot be written, the main process gets None, too, so that it computes the
    same without saving.
    """
    lock = None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock", timeout=0)
            lock.acquire()
        except (Timeout, FileNotFoundError):  # another command holds it, or has just removed the folder
            lock = None
        except (OSError, NotImplementedError) as error:  # it cannot be written, or the file system has no locks
            _warn_not_cached(folder, error)
            lock = None
    try:
        yield folder if lock else None
    finally:
        if lock:
            lock.release()


def write_features(path: Path, features: Features, protocol: dict[str, Any] | None = None) -> None:
    """Write features and their protocol to a safetensors file, atomically."""
    tensors = {name: tensor.contiguous() for name, tensor in features.items()}
    metadata = {"protocol": json.dumps(protocol or {}), "digest": digest_tensors(tensors)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))


def _cache(path: Path, features: Features, protocol: dict[str, Any] | None = None) -> bool:
    """Write features unless the file system rejects them; return whether they were written."""
    try:
        write_features(path, features, protocol)
    except (OSError, SafetensorError) as error:
        _warn_not_cached(path.parent, error)
        return False
    return True


def _warn_not_cached(folder: Path, error: Exception) -> None:
    logger.warning(
        f"Features are not cached: {folder} cannot be written ({write_problem(error)}). Choose another folder with "
        "--cache_dir or, in a training run, with the environment variable HF_HOME."
    )


def _read_features(path: Path) -> Features | None:
    """Read the features in a file; if it is damaged, remove it and return None."""
    with suppress(OSError, ValueError, SafetensorError):
        return load_features(path)
    logger.warning("%s is damaged; its features are extracted again.", path)
    with suppress(OSError):  # in a cache that cannot be written
        path.unlink()
    return None


def load_features(path: Path) -> Features:
    """Load the features in a file.

    Raises:
        OSError, ValueError, SafetensorError: if it cannot be read, or its contents have changed.
    """
    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get("digest")
    features = load_file(path)
    if not features or digest not in (None, digest_tensors(features)):  # earlier versions wrote no digest
        raise ValueError("its contents do not match their digest")
    return features


def read_protocol(path: Path) -> dict[str, Any]:
    """Read the protocol of the features in a file."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("protocol", "{}"))


def _extract_checked(batch: range, extract: Callable[[range], Features]) -> Features:
    features = extract(batch)
    for name, tensor in features.items():
        broken = (~tensor.isfinite()).reshape(len(batch), -1).any(1).nonzero()
        if len(broken):
            raise ValueError(
                f"The {name} of image {batch[int(broken[0])]} are not finite. The image or the network is broken: "
                "check the image, and compute in float32."
            )
    return {**features, "image": torch.tensor(batch)}


def _concatenate(parts: list[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
