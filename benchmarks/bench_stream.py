"""Coverage, memory and speed of a stream that two processes read.

    python benchmarks/bench_stream.py --work_dir path/to/folder

writes 204,800 images of 8x8 pixels into 64 Parquet files and into 64 WebDataset shards, unless they exist, and reads
each set once with the data loading of the training scripts. Every image contains its number, so that the script can
check that the two processes read every image once, and that one that resumes in the middle of a shard reads the same
images as one that was not stopped.
"""

import argparse
import io
import json
import multiprocessing
import tarfile
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import psutil
from PIL import Image

from ddgan.data.preprocessing import Preprocessing
from ddgan.training.arguments import DataArguments
from ddgan.training.loading import TrainingData

SHARDS, SIZE, PROCESSES, BATCH_SIZE = 64, 8, 2, 32
SETTLED = 1000  # steps after which memory should no longer grow


def encoded(number: int) -> bytes:
    """Return a PNG file whose first pixel is a number below 2^24, in noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels[0, 0] = list(number.to_bytes(3, "big"))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, numbers: range) -> None:
    rows = [{"bytes": encoded(number), "path": None} for number in numbers]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(path)


def write_tar(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            content = encoded(number)
            member = tarfile.TarInfo(f"{number:08d}.png")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


FORMATS = {"parquet": write_parquet, "tar": write_tar}


def write_shards(folder: Path, suffix: str, images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = images // SHARDS
    for shard in range(SHARDS):
        path = folder / f"train-{shard:05d}-of-{SHARDS:05d}.{suffix}"
        if not path.exists():
            FORMATS[suffix](path, range(shard * per_shard, (shard + 1) * per_shard))


def open_batches(folder: Path, rank: int, start: int, stop: int, position: dict | None):
    """Iterate over the numbers of the images in each batch, with the position after it."""
    args = DataArguments(dataset_name=str(folder), streaming=True)
    plan: dict[str, int] = {"batch_size": BATCH_SIZE, "accumulation": 1, "processes": PROCESSES, "seed": 0}
    data = TrainingData(args, Preprocessing(3, SIZE, SIZE), rank, None, None, None, **plan)
    for batch in data.batches(start, stop, position):
        assert batch.images is not None
        values = ((batch.images[:, :, 0, 0] + 1) * 127.5).round().long()
        yield (values @ values.new_tensor([65536, 256, 1])).tolist(), batch.position


def read(folder: Path, rank: int, steps: int, queue: multiprocessing.Queue) -> None:
    """Read this process's part of an epoch, and report its numbers, memory and speed."""
    process, numbers, memory, saved = psutil.Process(), [], {}, None
    middle = steps // 2 + 7  # in the middle of a shard
    started = time.perf_counter()
    for step, (batch, position) in enumerate(islice(open_batches(folder, rank, 0, steps, None), steps), 1):
        numbers += batch
        if step % 100 == 0:
            memory[step] = process.memory_info().rss / 2**20
        if step == middle:
            saved = json.loads(json.dumps(position))
    seconds = time.perf_counter() - started
    rest = open_batches(folder, rank, middle, steps, saved)
    resumed = [number for batch, _ in islice(rest, 200) for number in batch]
    is_same = resumed == numbers[middle * BATCH_SIZE :][: len(resumed)]
    queue.put((numbers, memory, len(numbers) / seconds, is_same))


def yes_or_no(condition: bool) -> str:
    return "yes" if condition else "no"


def measure(folder: Path, images: int) -> str:
    """Return a row of the table."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    steps = images // (PROCESSES * BATCH_SIZE)
    processes = [context.Process(target=read, args=(folder, rank, steps, queue)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    numbers = [number for result in results for number in result[0]]
    once = sorted(numbers) == list(range(images))
    growth = [max(memory.values()) - memory[SETTLED] for _, memory, _, _ in results]
    settled = [memory[SETTLED] for _, memory, _, _ in results]
    speed = sum(result[2] for result in results)
    checks = f"{yes_or_no(once)} | {yes_or_no(all(result[3] for result in results))}"
    return f"| {folder.name} | {checks} | {max(settled):.0f} MiB | {max(growth):.1f} MiB | {speed:,.0f} |"


if __name__ == "__main__":
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=204_800)
    args = parser.parse_args()
    print("| | every image once | resumes exactly | resident memory | growth after that | images per second |")
    print("|---|---|---|--:|--:|--:|")
    for suffix in FORMATS:
        write_shards(args.work_dir / suffix, suffix, args.images)
        print(measure(args.work_dir / suffix, args.images), flush=True)
