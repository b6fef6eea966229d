"""The wheel has all that the commands need outside a clone."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from tiny import ROOT

MAX_BYTES = 24_500_000  # README.md and CHANGELOG.md state 24 MB
FLAGS = "--max_train_steps 1 --num_samples 1 --sample_steps 1 --report_to none --output_dir tuned"
# one process, because most of the time is that of imports
COMMANDS = f"""
from pathlib import Path

from ddgan.__main__ import dispatch
from ddgan.core.locations import EXAMPLES
from ddgan.hub.publication import space_snapshot

dispatch("demo {FLAGS}".split())
dispatch("generate --pipeline tuned --num_inference_steps 1 --num_images 1".split())
dispatch("generate --pipeline examples/models/mnist-28 --class_labels 5 --num_inference_steps 2 --num_images 12 "
         "--output_dir fives".split())
dispatch("evaluate --images fives/images --classifier examples/classifiers/mnist --class_labels 5 "
         "--cache_dir cache".split())
with space_snapshot(EXAMPLES / "space", "user/model") as space:
    assert {{"app.py", "ddgan"}} <= {{path.name for path in Path(space).iterdir()}}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the files that belong to it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shutil.copytree(ROOT / "examples", source / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    files = [ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    folders = [Path(*package.split(".")[1:]) for package in project["tool"]["setuptools"]["packages"]]
    for file in [*files, *(file for folder in folders for file in (ROOT / folder).glob("*.py"))]:
        target = source / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(output)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = output.iterdir()
    return wheel


def test_the_wheel_has_every_package_and_is_small(wheel):
    names = set(ZipFile(wheel).namelist())
    inits = [file.relative_to(ROOT) for file in ROOT.glob("[!.]*/**/__init__.py")]
    inits = [file for file in inits if file.parts[0] not in ("build", "tests")]
    assert inits and {f"ddgan/{file.as_posix()}" for file in inits} <= names
    excluded = ("noto-emoji-classes-32", "ddgan-emoji-32", "__pycache__")
    assert not [name for name in names if any(part in name for part in excluded)]
    assert wheel.stat().st_size < MAX_BYTES


@pytest.mark.slow
def test_the_commands_run_from_the_wheel_in_an_empty_folder(wheel, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # those of this environment
    install = [sys.executable, "-m", "pip", "--python", environment, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)

    folder = tmp_path / "empty"
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = {"cwd": folder, "env": variables, "capture_output": True, "text": True}
    listed = subprocess.run([environment / "bin" / "ddgan"], **run)
    assert "train-class-conditional" in listed.stdout
    where = subprocess.run([environment / "bin" / "python", "-c", "import ddgan; print(ddgan.__file__)"], **run)
    assert Path(where.stdout.strip()) == packages / "ddgan" / "__init__.py"
    done = subprocess.run([environment / "bin" / "python", "-c", COMMANDS], **run)
    assert done.returncode == 0, done.stderr
    assert (folder / "tuned" / "before_after.png").exists() and (folder / "generated" / "images").exists()
    assert "class accuracy" in done.stdout
