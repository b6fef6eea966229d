"""CPU time until a command answers, relative to `import torch`.

    python benchmarks/bench_startup.py --rounds 5

Every round starts a fresh Python for each row, so that other work on the machine affects all rows alike. The times
include the start of Python.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = {
    "`import torch`": ["-c", "import torch"],
    "`import ddgan`": ["-c", "import ddgan"],
    "`finetune_model.py --help`": ["finetune_model.py", "--help"],
    "`finetune_model.py --batch_size 0`": ["finetune_model.py", "--batch_size", "0"],
    "`generate.py --pipeline nowhere`": ["scripts/generate.py", "--pipeline", "nowhere"],
    "the imports of Diffusers alone that a training run needs": [
        "-c",
        "from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel",
    ],
    "the imports of a training run": ["-c", "import ddgan.commands.finetune"],
}


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 2):  # 2: rejected arguments
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rounds = [{name: cpu_seconds(arguments) for name, arguments in ROWS.items()} for _ in range(args.rounds)]
    baseline, *others = ROWS
    print(f"`import torch` takes {statistics.median(r[baseline] for r in rounds):.2f} s of CPU time.\n")
    print("| | relative to `import torch` |\n|---|--:|")
    for name in others:
        print(f"| {name} | {statistics.median(r[name] / r[baseline] for r in rounds):.2f} |")
