"""Features of many images: computed by all processes, taken up where they were cut off, kept for the next time."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

PART_IMAGES = 1024  # between two saves, about

Features = dict[str, torch.Tensor]


def extract_features(
    count: int,
    batch_size: int,
    measure: Callable[[range], Features],
    accelerator: Accelerator,
    folder: Path | None = None,
    description: str = "",
    between: Callable[[], None] = lambda: None,
) -> Features | None:
    """Measure images 0 .. count-1 in batches that are dealt out to all processes; called by every process.

    A batch always has the same images, whichever process measures it, so that the result does not depend on the
    number of processes.

    Args:
        measure: given the numbers of some images, gives tensors with one row for each.
        folder: where what is measured is kept, to go on with after an interruption; for the caller to remove.
        between: called by all processes together before each of their batches; what it raises ends the measuring.

    Returns:
        the tensors with a row for each image, in the main process; None in the others.

    Raises:
        ValueError: at an image with a feature that is not finite.
    """
    main = accelerator.is_main_process
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mark = f"part-{batch_size}"  # a part of other batches would leave holes between these
    parts = [load_file(path) for path in sorted(folder.glob(f"{mark}-*.safetensors"))] if main and folder else []
    done = [{image for part in parts for image in part["image"].tolist()}]
    broadcast_object_list(done)
    missing = [batch for batch in batches if batch.start not in done[0]]
    processes, rank = accelerator.num_processes, accelerator.process_index
    at_once = processes * max(1, PART_IMAGES // (batch_size * processes))
    with tqdm(
        total=count, initial=len(done[0]), unit="image", desc=description, leave=None, disable=not main
    ) as progress:
        for start in range(0, len(missing), at_once):
            mine, together = [], missing[start : start + at_once]
            for first in range(0, len(together), processes):
                between()
                if first + rank < len(together):
                    batch = together[first + rank]
                    mine.append(_measured(batch, measure))
                    progress.update(min(len(batch) * processes, progress.total - progress.n))
            found = gather_object(mine)
            if main:
                part = _joined(found)
                parts.append(part)
                if folder:
                    write_features(folder / f"{mark}-{missing[start].start:09d}.safetensors", part)
    if not main:
        return None
    whole = _joined(parts)
    order = whole.pop("image").argsort()
    return {name: tensor[order] for name, tensor in whole.items()}


def cached_features(
    path: Path,
    protocol: dict[str, Any],
    count: int,
    batch_size: int,
    measure: Callable[[range], Features],
    accelerator: Accelerator,
    description: str = "",
) -> Features | None:
    """`collect`, or what is in the file `path` already; it is written there with the protocol.

    Where another command is measuring the same, this one does too, and keeps nothing on the way.
    """
    there = [path.exists() if accelerator.is_main_process else None]
    broadcast_object_list(there)
    if there[0]:
        return load_file(path) if accelerator.is_main_process else None
    with _claimed(path.with_suffix(".parts"), accelerator) as parts:
        found = extract_features(count, batch_size, measure, accelerator, parts, description)
        if accelerator.is_main_process:
            write_features(path, found, protocol)
            if parts:
                shutil.rmtree(parts, ignore_errors=True)
    return found


@contextmanager
def _claimed(folder: Path, accelerator: Accelerator) -> Iterator[Path | None]:
    """The folder, in the main process, as long as no other command has it."""
    lock = None
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock", timeout=0)
            lock.acquire()
        except (Timeout, FileNotFoundError):  # the other one has it, or has just ended
            lock = None
    try:
        yield folder if lock else None
    finally:
        if lock:
            lock.release()


def write_features(path: Path, features: Features, protocol: dict[str, Any] | None = None) -> None:
    """Write features and what they were made with to a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    tensors = {name: tensor.contiguous() for name, tensor in features.items()}
    save_file(tensors, temporary, {"protocol": json.dumps(protocol or {})})
    os.replace(temporary, path)


def read_features(path: Path) -> Features:
    """The features in a file."""
    return load_file(path)


def read_protocol(path: Path) -> dict[str, Any]:
    """What the features in a file were made with."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("protocol", "{}"))


def _measured(batch: range, measure: Callable[[range], Features]) -> Features:
    found = measure(batch)
    for name, tensor in found.items():
        broken = (~tensor.isfinite()).reshape(len(batch), -1).any(1).nonzero()
        if len(broken):
            raise ValueError(
                f"The {name} of image {batch[broken[0].item()]} are not finite. The image or the network is broken: "
                "look at the image, and compute in float32."
            )
    return {**found, "image": torch.tensor(batch)}


def _joined(parts: list[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
