"""The cost of a checkpoint: its size, its time, and the share of training time at the default cadence.

    python benchmarks/bench_checkpoints.py

fine-tunes the model of the demo, and trains a UNet of about 50 million parameters from scratch, for a few steps each,
and times how long the training loop waits for each checkpoint.
"""

import argparse
import shutil
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from common import MODELS, hardware
from diffusers import UNet2DModel

from ddgan import finetune_model
from ddgan.core.files import format_size
from ddgan.training.arguments import RunArguments
from ddgan.training.checkpoints import Checkpoints
from ddgan.training.loop import Trainer

LARGE = {"sample_size": 32, "block_out_channels": [128, 256, 256, 384], "layers_per_block": 2}
BLOCKS = {"down_block_types": ["DownBlock2D"] * 4, "up_block_types": ["UpBlock2D"] * 4}


def timed(owner: type, name: str) -> list[float]:
    """Record the seconds of each call of a method."""
    seconds, method = [], getattr(owner, name)

    def call(self: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(self, *arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    setattr(owner, name, call)
    return seconds


def measure(name: str, model: list, folder: Path, steps: int, saves: list[float], trained: list[float]) -> str:
    """Return a row of the table."""
    shutil.rmtree(folder, ignore_errors=True)
    saves.clear()
    trained.clear()
    options = {"output_dir": folder, "max_train_steps": steps, "checkpointing_steps": 2, "report_to": "none"}
    options |= {"num_samples": 1, "sample_steps": 1, "log_samples_every": 0, "save_model_every": 0}
    finetune_model.main([*map(str, model), *(str(t) for k, v in options.items() for t in (f"--{k}", v))])
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    step, save, every = median(trained[1:]), median(saves), RunArguments().checkpointing_steps
    share = save / (every * step + save)
    limit = save / every / 0.02  # of the time of a step, below which the share is above 2 %
    return f"| {name} | {format_size(size)} | {save:.2f} s | {step:.2f} s | {share:.2%} | {1000 * limit:.0f} ms |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    temporary = TemporaryDirectory()
    folder = args.work_dir or Path(temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    saves, trained = timed(Checkpoints, "save"), timed(Trainer, "_train_step")
    network = UNet2DModel(**LARGE, **BLOCKS)  # pyright: ignore[reportArgumentType]
    network.to_json_file(folder / "large.json")
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    del network
    models = {
        "demo, 32x32, batch 16": ["--start_model", MODELS / "noto-emoji-32"],
        f"{parameters:.0f} M parameters, 32x32, batch 16": ["--model_config", folder / "large.json"],
    }
    rows = [measure(name, model, folder / "run", args.steps, saves, trained) for name, model in models.items()]
    print(f"\n{hardware()}\n")
    print(f"| | size | time | step | share at every {RunArguments().checkpointing_steps} steps | 2 % at steps of |")
    print("|---|--:|--:|--:|--:|--:|")
    print("\n".join(rows))
