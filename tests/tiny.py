"""Tiny components for the tests, and functions that run scripts on them."""

import io
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import datasets
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from ddgan import ClassConditionedUnet

ROOT = Path(__file__).parent.parent

# imported once by the process from which the ranks are forked
multiprocessing.set_forkserver_preload(["ddgan.commands.finetune", "ddgan.commands.train_ddgan"])


def tiny_unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**{**config, **changes})


def tiny_classes(**changes) -> ClassConditionedUnet:
    """Return a network for gray images of the classes c, a and b."""
    torch.manual_seed(0)
    config = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    config |= {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    names = {"num_classes": 3, "id2label": ["c", "a", "b"]}
    return ClassConditionedUnet(**{**config, **names, **changes})


def tiny_pipeline(scheduler: SchedulerMixin | None = None, **unet) -> DDPMPipeline:
    pipe = DDPMPipeline(tiny_unet(**unet).eval(), scheduler or DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def few_step_scheduler(*num_inference_steps: int) -> DDPMScheduler:
    """Return a scheduler as few-step fine-tuning saves it."""
    config = {"timestep_spacing": "trailing", "variance_type": "fixed_small", "clip_sample": False}
    scheduler = DDPMScheduler(prediction_type="v_prediction", **config)
    scheduler.register_to_config(_num_inference_steps=list(num_inference_steps))
    return scheduler


def write_images(folder: Path, count: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Write RGB noise images of `size` (width, height), named by their number."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(pixels.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes in MNIST's idx format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files below a folder, by their relative paths."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until a condition is true.

    Raises:
        TimeoutError: if it is not after this time.
    """
    waiting, end = Event(), time.monotonic() + seconds  # tests replace time.sleep
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        waiting.wait(0.02)


@contextmanager
def ended(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Kill those processes, and what they have started in their sessions, that still run after the block."""
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                (os.killpg if os.getpgid(process.pid) == process.pid else os.kill)(process.pid, signal.SIGKILL)
            process.wait(60)


def write_class_folders(folder: Path, count: int = 13) -> Path:
    """Write gray images in the subfolders a, b and c; all pixels of image i have the value 20 i."""
    for i in range(count):
        (folder / "abc"[i % 3]).mkdir(exist_ok=True, parents=True)
        Image.new("L", (8, 8), 20 * i).save(folder / "abc"[i % 3] / f"{i}.png")
    return folder


def make_dataset(folder: Path, count: int, shards: int = 1) -> Path:
    """Write a dataset folder of Parquet files in which all pixels of image i have the value i."""
    (folder / "data").mkdir(parents=True)
    for shard in range(shards):
        rows = [Image.new("L", (8, 8), i) for i in range(shard, count, shards)]
        features = datasets.Features({"number": datasets.Value("int64"), "picture": datasets.Image()})
        table = datasets.Dataset.from_dict({"number": range(len(rows)), "picture": rows}, features=features)
        table.to_parquet(folder / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet")
    return folder


def write_shard(archive: Path, values: range) -> Path:
    """Write a WebDataset shard of gray images, with the parity of their value as the class."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as file:
        for value in values:
            encoded = io.BytesIO()
            Image.new("L", (8, 8), value).save(encoded, "PNG")
            for suffix, content in (("png", encoded.getvalue()), ("cls", str(value % 2).encode())):
                member = tarfile.TarInfo(f"{value:05d}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return archive


def finetune_flags(model: Path, images: Path, output: Path, *flags) -> list[str]:
    """Return the flags of a very short run; later flags override earlier ones, and `--dataset_name` the images."""
    short = "--report_to none --sample_steps 2 --num_samples 2 --batch_size 8 --num_epochs 2 --learning_rate 1e-2"
    data = [] if "--dataset_name" in flags else ["--train_data_dir", images]
    start = ["--start_model", model, *data, "--output_dir", output, *short.split()]
    return [str(flag) for flag in [*start, *flags]]


def command(*args, launcher: Sequence = ()) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that run a script without a GPU.

    Args:
        args: the script and its arguments.
        launcher: the module of a launcher, and its arguments.
    """
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    module = ["-m", *launcher] if launcher else []
    return [sys.executable, *map(str, [*module, *args])], environment


def run_script(*args, **options) -> subprocess.CompletedProcess:
    """Run a script in its own process and wait for it."""
    arguments, environment = command(*args)
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, **options)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(script: Path, *args, output: Path, machines: int = 1) -> str:
    """Run a script as two ranks without the launcher; write the output of both to `output` and return it.

    Args:
        machines: number of machines on which the ranks believe to be, 1 or 2.

    Raises:
        AssertionError: If a rank fails or they take more than five minutes; the message is their output.
    """
    _, environment = command()
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment["LOCAL_WORLD_SIZE"] = str(2 // machines)
    arguments = [str(arg) for arg in (script, *args)]
    ranks = start_processes(_rank, (arguments, environment, output), 2, join=False, start_method="forkserver")
    end = time.monotonic() + 300
    try:
        while not ranks.join(end - time.monotonic()):
            assert time.monotonic() < end, output.read_text()
    except (ProcessExitedException, ProcessRaisedException) as error:
        raise AssertionError(output.read_text()) from error
    finally:
        for process in ranks.processes:
            process.kill()
    return output.read_text()


def _rank(rank: int, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank % int(environment["LOCAL_WORLD_SIZE"])))
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights (not the EMA weights) in the latest checkpoint of a run."""
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def level_difference(a: Image.Image, b: Image.Image) -> int:
    """Return the largest difference between the pixel values of two images, 0 to 255."""
    assert a.mode == b.mode and a.size == b.size
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()
