"""Messages about packages that are not installed."""

import importlib.metadata
import re

import pytest

from ddgan.core.errors import run_command
from ddgan.core.extras import missing_extra, missing_import

REQUIREMENTS = ["numpy>=1", *(f'{name}; extra == "train"' for name in ("numpy>=1", "lost-1>=1.1", "lost-2>=1.2"))]


@pytest.fixture(autouse=True)
def requirements(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)


def test_the_command_installs_all_that_is_missing_of_an_extra():
    message = "lost-1 (of the extra [train]) is not installed. Run pip install 'lost-1>=1.1' 'lost-2>=1.2'"
    assert missing_extra("lost-1", "train") == message
    assert missing_import(ModuleNotFoundError(name="lost_1.part")) == f"{message}."
    assert missing_extra("trackio") == "trackio is not installed. Run pip install trackio"


def test_the_command_names_the_package_where_this_one_is_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert missing_extra("lost-1", "train").endswith("Run pip install lost-1")
    assert missing_import(ModuleNotFoundError(name="lost_1")) is None


def test_the_requirements_of_this_package_name_its_extras(monkeypatch):
    monkeypatch.undo()
    assert re.search(r"pip install .*'wandb>=[\d.]+'$", missing_extra("wandb", "wandb"))
    assert "'accelerate>=" in (missing_import(ModuleNotFoundError(name="accelerate.utils")) or "")


def test_a_command_without_its_extra_ends_with_one_paragraph(capsys):
    def main():
        raise ModuleNotFoundError("No module named 'lost_2'", name="lost_2")

    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert capsys.readouterr().err.startswith(
        "\nerror: This command needs a package: lost-2 (of the extra [train]) is not installed. Run "
    )
