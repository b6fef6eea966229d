"""Everything that needs a GPU in one command: tests, benchmarks, and two short training runs.

    python benchmarks/report_gpu.py --mnist path/to/MNIST --fashion_mnist path/to/FashionMNIST

takes about 25 minutes and writes the folder gpu-report: the output of each part, both run folders, and README.md with
the tables for benchmarks/README.md. It needs a clone of this repository, and a Python environment with a CUDA build of
PyTorch and the extras [train] and [eval]; the tests also need [dev]. A part that fails or runs out of time does not
stop the others. Without a GPU, `--quick` checks the command itself with tiny settings.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from common import CLASSIFIER, DEVICE, ROOT, hardware

TINY = (
    "--block_out_channels 8 16 --layers_per_block 1 --latent_dim 4 --latent_embed_dim 8 --latent_mapping_layers 1 "
    "--discriminator_channels 2 --batch_size 4 --num_samples 4 --max_train_steps 4"
)
GRACE_SECONDS = 60  # for a run to save its state after SIGTERM


@dataclass
class Part:
    """A section of the report: a command, and how long it may take.

    Attributes:
        title: heading.
        command: its arguments, after the Python interpreter.
        minutes: after which it is stopped with SIGTERM.
        stops: whether being stopped is how it ends, as a training run does.
    """

    title: str
    command: list[str]
    minutes: float
    stops: bool = False

    def run(self, log: Path) -> str:
        """Run the command and return how it ended; its output goes to the log."""
        start = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *self.command],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
                start_new_session=True,
            )
            try:
                code = process.wait(self.minutes * 60)
                end = "finished" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_SECONDS)
                with suppress(ProcessLookupError):  # what it has started and not ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                end = "stopped as planned" if self.stops else "stopped: out of time"
        return f"{end} after {(time.perf_counter() - start) / 60:.1f} minutes"


def environment() -> dict[str, str]:
    """Return the environment of the commands, in which `ddgan` is the package of this clone."""
    paths = [str(ROOT.parent)] if ROOT.name == "ddgan" else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} if paths else dict(os.environ)


def training(name: str, recipe: str, data: Path, evaluation: list[str], args: argparse.Namespace) -> list[Part]:
    """Return a run of a recipe that is stopped after `--minutes`, and its evaluation."""
    run = args.output / "runs" / name
    train = [
        "-m",
        "ddgan",
        "train-ddgan",
        "--config",
        f"examples/recipes/{recipe}.yaml",
        "--train_data_dir",
        str(data),
    ]
    train += ["--output_dir", str(run), "--report_to", "none"]
    train += TINY.split() if args.quick else ["--mixed_precision", "bf16", "--channels_last"]
    count = 64 if args.quick else 25_600
    evaluate = ["-m", "ddgan", "evaluate", "--pipeline", str(run), "--num_images", str(count), *evaluation]
    evaluate += ["--output", str(args.output / f"{name}.json")]
    return [
        Part(f"Training {name}", train, args.minutes, stops=True),
        Part(f"Evaluation of {name}", evaluate, 3),
    ]


def parts(args: argparse.Namespace) -> list[Part]:
    """Return the parts of the report."""
    rounds = "1" if args.quick else "5"
    tests = ["tests/models"] if args.quick else ["tests/models", "tests/pipelines", "tests/test_train_ddgan.py"]
    result = [Part("Tests", ["-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *tests], 3)]
    if args.quick:
        variant = ["--variant", "small", "float32", "--rounds", rounds]
        result.append(Part("DDGAN", ["benchmarks/bench_ddgan.py", *variant], 3))
    else:
        result.append(Part("DDGAN", ["benchmarks/bench_ddgan.py", "--rounds", rounds], 5))
        result.append(Part("Fine-tuning", ["benchmarks/bench_finetune.py", "--rounds", "1", "--steps", "20"], 5))
    if args.mnist:
        stacked = args.output / "stacked-mnist"
        count = "64" if args.quick else "128000"
        make = ["examples/data/make_stacked_mnist.py", str(args.mnist), str(stacked), "--num_images", count]
        result.append(Part("StackedMNIST", make, 1))
        coverage = ["--stacked_mnist", "--classifier", str(CLASSIFIER)]
        result += training("stacked-mnist", "ddgan_stacked_mnist", stacked, coverage, args)
    if args.fashion_mnist:
        reference = ["--reference", str(args.fashion_mnist), "--feature_extractor", "pixels-8x8"]
        result += training("fashion-mnist", "ddgan_mnist_28", args.fashion_mnist, reference, args)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), help="new folder for the report")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's raw/ (default: no StackedMNIST run)")
    parser.add_argument("--fashion_mnist", type=Path, help="folder with FashionMNIST's raw/ (default: no such run)")
    parser.add_argument("--minutes", type=float, default=8, help="length of each training run")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to check the command itself")
    args = parser.parse_args()
    if DEVICE != "cuda" and not args.quick:
        parser.error("there is no GPU. --quick checks the command itself on a CPU")
    for name in ("output", "mnist", "fashion_mnist"):
        if path := getattr(args, name):
            setattr(args, name, path.resolve())
    if args.output.exists():
        parser.error(f"--output {args.output} already exists: choose another folder")
    args.output.mkdir(parents=True)
    report = args.output / "README.md"
    memory = "" if DEVICE == "cpu" else f", {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    report.write_text(f"# GPU report\n\n{hardware()}{memory}\n")
    for i, part in enumerate(parts(args)):
        log = args.output / f"{i:02d}-{part.title.lower().replace(' ', '-')}.txt"
        print(f"{part.title}: at most {part.minutes:g} minutes ...", flush=True)
        end = part.run(log)
        print(f"{part.title}: {end}", flush=True)
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        tables = [line for line in lines if line.startswith("|")] or [f"    {line}" for line in lines[-8:]]
        command = shlex.join(part.command)
        with report.open("a") as file:
            file.write(f"\n## {part.title}\n\n    python {command}\n\n{end}\n\n" + "\n".join(tables) + "\n")
    print(f"The report is in {args.output}")


if __name__ == "__main__":
    main()
