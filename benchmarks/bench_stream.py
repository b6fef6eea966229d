"""Coverage, memory and speed of a stream that two processes read, and of training on it.

    python benchmarks/bench_stream.py --work_dir path/to/folder

writes 204,800 images of 8x8 pixels into 64 Parquet files and into 64 WebDataset shards, unless they exist, and reads
each set once with the data loading of the training scripts. Every image contains its number, so that the script can
check that the two processes read every image once, and that one that resumes in the middle of a shard reads the same
images as one that was not stopped.

    python benchmarks/bench_stream.py --work_dir path/to/folder --train_steps 3000

trains a tiny UNet with two processes on each set and on a folder of the same images, and resumes each run on a stream
from a checkpoint in the middle of a shard.
"""

import argparse
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import psutil
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file

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


def write_folder(path: Path, numbers: range) -> None:
    path.mkdir()
    for number in numbers:
        (path / f"{number:08d}.png").write_bytes(encoded(number))


FORMATS = {"parquet": write_parquet, "tar": write_tar}


def write_shards(folder: Path, kind: str, images: int) -> None:
    """Write the images, in shards or in as many subfolders, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = images // SHARDS
    for shard in range(SHARDS):
        name = f"{shard:05d}" if kind == "folder" else f"train-{shard:05d}-of-{SHARDS:05d}.{kind}"
        if not (folder / name).exists():
            WRITERS[kind](folder / name, range(shard * per_shard, (shard + 1) * per_shard))


WRITERS = {**FORMATS, "folder": write_folder}


def open_batches(folder: Path, rank: int, start: int, stop: int, position: dict | None):
    """Iterate over the numbers of the images in each batch, with the position after it."""
    args = DataArguments(dataset_name=str(folder), streaming=True)
    data = TrainingData(
        args,
        Preprocessing(3, SIZE, SIZE),
        rank,
        batch_size=BATCH_SIZE,
        accumulation=1,
        processes=PROCESSES,
        seed=0,
    )
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
    growth = [
        max(size for step, size in memory.items() if step >= SETTLED) - memory[SETTLED] for _, memory, _, _ in results
    ]
    settled = [memory[SETTLED] for _, memory, _, _ in results]
    speed = sum(result[2] for result in results)
    checks = f"{yes_or_no(once)} | {yes_or_no(all(result[3] for result in results))}"
    return f"| {folder.name} | {checks} | {max(settled):.0f} MiB | {max(growth):.1f} MiB | {speed:,.0f} |"


def train(data: list, run: Path, steps: int, *flags: object) -> tuple[dict[int, float], dict[int, float]]:
    """Train with two processes on the CPU.

    Returns:
        the resident memory of the larger process in MiB, and the time in seconds, by step.
    """
    options: dict[str, object] = {"num_processes": PROCESSES, "model_config": run.parent / "tiny.json"}
    options |= {"output_dir": run, "batch_size": 8, "max_train_steps": steps, "report_to": "none"}
    options |= {"num_samples": 1, "sample_steps": 1, "log_samples_every": 0, "save_model_every": 0}
    options |= {"checkpointing_steps": steps // 2 + 7, "checkpoints_total_limit": 0}  # in the middle of a shard
    arguments = [*data, *(text for name, value in options.items() for text in (f"--{name}", value)), *flags]
    command = [sys.executable, "-m", "ddgan", "finetune", *map(str, arguments)]
    memory, times = {}, {}
    with open(run.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.25)
            sizes = []
            with suppress(psutil.Error, OSError, IndexError, ValueError):
                step = int((run / "metrics.csv").read_text().splitlines()[-1].partition(",")[0])
                for child in psutil.Process(process.pid).children(recursive=True):
                    if "RANK" in child.environ():
                        sizes.append(child.memory_info().rss / 2**20)
                if len(sizes) == PROCESSES and step not in times:
                    memory[step], times[step] = max(sizes), time.perf_counter()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.with_suffix('.log').read_text()}")
    return memory, times


def measure_training(folder: Path, steps: int) -> str:
    """Return a row of the table of training."""
    runs = folder.parent / "runs"
    runs.mkdir(exist_ok=True)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    network = UNet2DModel(sample_size=SIZE, layers_per_block=1, norm_num_groups=4, **blocks)
    network.to_json_file(runs / "tiny.json")
    is_stream = folder.name in FORMATS
    data = ["--dataset_name", folder, "--streaming"] if is_stream else ["--train_data_dir", folder]
    straight, resumed = runs / folder.name, runs / f"{folder.name}-resumed"
    for run in (straight, resumed):
        shutil.rmtree(run, ignore_errors=True)
    memory, times = train(data, straight, steps)
    settled = next(step for step in memory if step >= SETTLED)
    later = [memory[step] for step in memory if step >= settled]
    speed = 8 * PROCESSES * (max(times) - settled) / (times[max(times)] - times[settled])
    is_same = ""
    if is_stream:
        shutil.copytree(straight, resumed)
        middle, last = sorted((resumed / "checkpoints").glob("step-*"))
        expected = load_file(last / "model.safetensors")
        train(data, resumed, steps, "--resume_from_checkpoint", middle)
        weights = load_file(last / "model.safetensors")  # written again
        is_same = yes_or_no(all(bool((weights[name] == expected[name]).all()) for name in expected))
    return (
        f"| {folder.name} | {memory[settled]:.0f} MiB | {max(later) - memory[settled]:.1f} MiB | {speed:,.0f} | "
        f"{is_same} |"
    )


if __name__ == "__main__":
    datasets.disable_progress_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, help="folder for the images, about 1 GB; it is kept")
    parser.add_argument("--images", type=int, default=204_800)
    parser.add_argument("--train_steps", type=int, help="train this many steps instead of only reading")
    args = parser.parse_args()
    if not args.work_dir:
        print("Pass a folder for the images with --work_dir. Skipping this benchmark.")
        raise SystemExit
    if (least := (SETTLED + 100) * PROCESSES * BATCH_SIZE) > args.images:
        parser.error(f"--images must be at least {least}, so that memory is measured after {SETTLED} steps")
    if args.train_steps and args.train_steps <= SETTLED:
        parser.error(f"--train_steps must be more than {SETTLED}, after which the growth of memory is measured")
    if args.train_steps:
        print("| | resident memory | growth after that | images per second | resumes exactly |")
        print("|---|--:|--:|--:|---|")
        for kind in WRITERS:
            write_shards(args.work_dir / kind, kind, args.images)
            print(measure_training(args.work_dir / kind, args.train_steps), flush=True)
        raise SystemExit
    print("| | every image once | resumes exactly | resident memory | growth after that | images per second |")
    print("|---|---|---|--:|--:|--:|")
    for suffix in FORMATS:
        write_shards(args.work_dir / suffix, suffix, args.images)
        print(measure(args.work_dir / suffix, args.images), flush=True)
