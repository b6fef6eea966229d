"""Arguments from flags, files and recipes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ddgan.core.cli import option, parse_arguments, require_above, require_at_least, write_config
from ddgan.core.errors import InputError


@dataclass
class Length:
    _alternatives = ({"epochs", "steps"},)

    epochs: int = option(1, "passes over the data")
    steps: int | None = option(None, "optimizer steps")
    sizes: list[int] | None = option(None, "height and width")
    shuffle: bool = option(True, "shuffle the data")


@dataclass
class Other:
    precision: Literal["no", "bf16"] | None = option(None, "number format")
    channels: Literal[1, 3] = option(3, "channels")
    size: str = option("small", "size of the network", choices={"small": 1, "large": 2})
    output_dir: str = option("run", "folder")
    resume_from_checkpoint: str | None = option(None, "checkpoint")


def parse(*argv: str, **options) -> tuple[Length, Other]:
    return parse_arguments(Length, Other, argv=list(argv), **options)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_flags_override_a_file_which_overrides_a_recipe(tmp_path):
    recipes = {"short": Path(write(tmp_path / "short.yaml", "epochs: 2\nsizes: [1, 2]\noutput_dir: a\n"))}
    config = write(tmp_path / "config.yaml", "epochs: 3\nsizes: [3, 4]\n")
    length, other = parse("--recipe", "short", "--config", config, "--epochs", "4", recipes=recipes)
    assert (length.epochs, length.sizes, other.output_dir) == (4, [3, 4], "a")
    assert parse("--sizes")[0].sizes == []


@pytest.mark.parametrize("flag", ["--steps=5", "--steps"])
def test_a_flag_overrides_its_alternatives_in_a_file(tmp_path, flag):
    config = write(tmp_path / "config.yaml", "epochs: 3\nsizes: [3, 4]\n")
    length, _ = parse("--config", config, *([flag] if "=" in flag else [flag, "5"]))
    assert (length.epochs, length.steps, length.sizes) == (1, 5, [3, 4])
    both = write(tmp_path / "both.yaml", "epochs: 3\nsteps: 7\n")
    assert parse("--config", both)[0] == Length(3, 7)


def test_values_have_the_types_of_their_fields():
    length, other = parse("--channels", "1", "--size", "large", "--precision", "bf16", "--no_shuffle")
    assert (length.shuffle, other) == (False, Other("bf16", 1, "large"))
    assert [parse("--shuffle", text)[0].shuffle for text in ("true", "No", "1", "f")] == [True, False, True, False]
    assert parse("--no-shuffle", "--shuffle")[0].shuffle is True


def test_an_unquoted_no_is_a_choice(tmp_path):
    assert parse("--config", write(tmp_path / "config.yaml", "precision: no\n"))[1].precision == "no"


def test_a_written_config_is_read_back_without_what_resumes_a_run(tmp_path):
    length, other = parse("--epochs", "3", "--sizes", "4", "5", "--resume_from_checkpoint", "latest")
    write_config(tmp_path / "config.yaml", length, other)
    other.resume_from_checkpoint = None
    assert parse("--config", str(tmp_path / "config.yaml")) == (length, other)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], r"Unknown flag --epoch\. Did you mean --epochs\?"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'.* --help lists the flags"),
        (["--shuffle", "maybe"], "--shuffle: maybe is neither true nor false"),
        (["--channels", "2"], r"--channels: invalid choice: 2 \(choose from 1, 3\)"),
        (["--size", "tiny"], "--size: invalid choice: 'tiny'"),
        (["--config", "missing.yaml"], r"missing\.yaml does not exist"),
        (["--config", "key.yaml"], r"key\.yaml: Unknown flag --epoch\. Did you mean --epochs\?"),
        (["--config", "list.yaml"], "must contain one `flag: value` per line"),
        (["--config", "broken.yaml"], "is not valid YAML"),
        (["--output_dir", "ddgan"], "Python would import a folder of that name"),
    ],
)
def test_unusable_arguments_are_refused(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "key.yaml", "epoch: 3\n")
    write(tmp_path / "list.yaml", "- 3\n")
    write(tmp_path / "broken.yaml", "epochs: [3\n")
    with pytest.raises(InputError, match=message):
        parse(*argv)


def test_help_names_each_flag_and_its_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: ") and "[flags]" in text
    assert "--output_dir OUTPUT_DIR" in text and "--output-dir" not in text
    assert "(default: run)" in text and "(default: None)" not in text
    assert "shuffle the data (default: True)" in text and "turn off --shuffle" in text
    assert parse("--output-dir", "other")[1].output_dir == "other"


def test_numbers_are_bounded_alone_and_in_lists():
    require_at_least(1, Length(epochs=1, sizes=[1, 2]), "epochs", "steps", "sizes")
    with pytest.raises(InputError, match="--sizes is 0; it must be at least 1"):
        require_at_least(1, Length(sizes=[1, 0]), "epochs", "sizes")
    with pytest.raises(InputError, match="--epochs is nan; it must be at least 1"):
        require_at_least(1, Length(epochs=float("nan")), "epochs")
    with pytest.raises(InputError, match="--epochs is 0; it must be greater than 0"):
        require_above(0, Length(epochs=0), "epochs")
