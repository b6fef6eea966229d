"""Arguments from flags, files and recipes."""

import dataclasses
import importlib
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from ddgan.__main__ import COMMANDS
from ddgan.core.cli import Arguments, changed_values, option, parse_arguments, read_config, write_config
from ddgan.core.errors import InputError
from ddgan.training.arguments import RunArguments


@dataclass
class Length(Arguments):
    _alternatives = ({"epochs", "steps"},)
    _overrides: typing.ClassVar = {"share": ("rate", "widths")}

    epochs: int = option(1, "passes over the data", minimum=1)
    steps: int | None = option(None, "optimizer steps")
    sizes: list[int] | None = option(None, "height and width", minimum=1)
    widths: list[int] = option([8, 16], "channels")
    rate: float = option(1.0, "learning rate", above=0, below=2)
    share: float = option(0.0, "share", minimum=0, maximum=1)
    shuffle: bool = option(True, "shuffle the data")


@dataclass
class Other(Arguments):
    precision: Literal["no", "bf16"] | None = option(None, "number format")
    channels: Literal[1, 3] = option(3, "channels")
    size: str = option("small", "size of the network", choices={"small": 1, "large": 2})
    output_dir: str = option("run", "folder")
    names: list[str] | None = option(None, "names")
    labels: list[str | int] | None = option(None, "labels")
    images: str | None = option(None, "images", objects="a list of images")
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
    assert parse("--widths")[0].widths == []


@pytest.mark.parametrize("flag", ["--steps=5", "--steps"])
def test_a_flag_overrides_its_alternatives_in_a_file(tmp_path, flag):
    config = write(tmp_path / "config.yaml", "epochs: 3\nsizes: [3, 4]\n")
    length, _ = parse("--config", config, *([flag] if "=" in flag else [flag, "5"]))
    assert (length.epochs, length.steps, length.sizes) == (1, 5, [3, 4])
    both = write(tmp_path / "both.yaml", "epochs: 3\nsteps: 7\n")
    assert parse("--config", both)[0] == Length(3, 7)


def test_a_flag_overrides_others_in_a_file_but_they_do_not_override_it(tmp_path):
    config = write(tmp_path / "config.yaml", "share: 0.5\nrate: 0.1\nwidths: [4]\n")
    length = parse("--config", config, "--share", "0.25")[0]
    assert (length.share, length.rate, length.widths) == (0.25, 1.0, [8, 16])
    length = parse("--config", config, "--rate", "0.2")[0]
    assert (length.share, length.rate, length.widths) == (0.5, 0.2, [4])


def test_a_file_that_python_reads_may_use_every_spelling(tmp_path):
    config = write(tmp_path / "config.yaml", "output-dir: a\nno_shuffle: true\nsteps: 5\n")
    assert read_config(config, Length, Other) == {"output_dir": "a", "shuffle": False, "steps": 5}
    assert read_config(config, Length, Other, overriding=["epochs"]) == {"output_dir": "a", "shuffle": False}


def test_values_have_the_types_of_their_fields():
    length, other = parse("--channels", "1", "--size", "large", "--precision", "bf16", "--no_shuffle")
    assert (length.shuffle, other) == (False, Other("bf16", 1, "large"))
    assert [parse("--shuffle", text)[0].shuffle for text in ("true", "No", "1", "f")] == [True, False, True, False]
    assert parse("--no-shuffle", "--shuffle")[0].shuffle is True


def test_texts_and_integers_share_a_list():
    assert Other(labels=["0", 1, "Sandal"]).labels == ["0", 1, "Sandal"]
    assert parse("--labels", "0", "Sandal")[1].labels == ["0", "Sandal"]
    for value in (0.5, True, None, [1]):
        with pytest.raises(InputError, match=r"--labels has the type .*; it must be a string, a path or an int"):
            Other(labels=[0, value])


@pytest.mark.parametrize("value", [{}, {"a": 1}, set(), [], ()])
def test_what_cannot_be_an_object_of_an_argument_is_refused(value):
    with pytest.raises(InputError, match=r"--images (has the type|is an empty|is empty).* a list of images"):
        Other(images=value)


def test_a_value_in_a_file_may_begin_with_a_hyphen(tmp_path):
    config = write(tmp_path / "config.yaml", "output_dir: --epochs\nno_shuffle: true\nnames: [-5, a]\n")
    length, other = parse("--config", config)
    assert (other.output_dir, length.epochs, length.shuffle, other.names) == ("--epochs", 1, False, ["-5", "a"])
    assert parse("--config", write(tmp_path / "on.yaml", "no_shuffle: false\n"))[0].shuffle


def test_an_unquoted_no_is_a_choice(tmp_path):
    assert parse("--config", write(tmp_path / "config.yaml", "precision: no\n"))[1].precision == "no"


def test_a_written_config_is_read_back_without_what_resumes_a_run(tmp_path):
    length, other = parse("--epochs", "3", "--sizes", "4", "5", "--resume_from_checkpoint", "latest")
    write_config(tmp_path / "config.yaml", length, other)
    other.resume_from_checkpoint = None
    assert parse("--config", str(tmp_path / "config.yaml")) == (length, other)


def test_changed_values_are_named_also_where_an_earlier_file_lacks_a_flag(tmp_path):
    earlier = parse("--epochs", "3")
    write_config(tmp_path / "config.yaml", *earlier)
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    at = lines.index("widths:")
    write(tmp_path / "config.yaml", "\n".join(lines[:at] + lines[at + 3 :]))
    assert changed_values(tmp_path / "config.yaml", *earlier) == []
    assert changed_values(tmp_path / "config.yaml", *parse("--epochs", "4")) == ["--epochs 3 -> 4"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], r"Unknown flag --epoch\. Did you mean --epochs\?"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'.* --help lists the flags"),
        (["--shuffle", "maybe"], "--shuffle: maybe is neither true nor false"),
        (["--channels", "2"], r"--channels: invalid choice: 2 \(choose from 1, 3\)"),
        (["--size", "tiny"], "--size: invalid choice: 'tiny'"),
        (["--config", "missing.yaml"], r"missing\.yaml does not exist"),
        (["--config", "."], r"--config \. is a folder: name a YAML file"),
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs is 0; it must be at least 1"),
        ({"sizes": [1, 0]}, "--sizes is 0; it must be at least 1"),
        ({"steps": 2**31}, "--steps is 2147483648; it must be at most 2147483647"),
        ({"rate": float("nan")}, "--rate is nan; it must be a finite number"),
        ({"rate": float("-inf")}, "--rate is -inf; it must be a finite number"),
        ({"rate": 0.0}, "--rate is 0.0; it must be greater than 0"),
        ({"rate": 2.0}, "--rate is 2.0; it must be less than 2"),
        ({"share": 1.5}, "--share is 1.5; it must be at most 1"),
    ],
)
def test_numbers_must_be_finite_and_in_their_range(values, message):
    Length(epochs=1, sizes=[1, 2], rate=1.0, share=1.0)
    with pytest.raises(InputError, match=message):
        Length(**values)
    ((name, value),) = values.items()
    with pytest.raises(InputError, match=message):
        parse(f"--{name}", *map(str, value)) if isinstance(value, list) else parse(f"--{name}={value}")


def test_an_option_with_a_list_has_its_own_copy():
    Length().widths.append(3)
    assert Length().widths == [8, 16]


@pytest.mark.parametrize("value", ["", " ", "a\0b"])
def test_empty_texts_are_refused(value, tmp_path):
    with pytest.raises(InputError, match=r"--output_dir is empty|--output_dir contains a zero byte"):
        Other(output_dir=value)
    with pytest.raises(InputError, match=r"--names is empty|--names contains a zero byte"):
        Other(names=["a", value])
    config = write(tmp_path / "config.yaml", f"output_dir: {json.dumps(value)}\n")
    with pytest.raises(InputError, match=r"--output_dir is empty|--output_dir contains a zero byte"):
        parse("--config", config)


def test_an_empty_list_is_refused_unless_it_replaces_a_default():
    with pytest.raises(InputError, match=r"--sizes is empty\. Pass a value, or omit the flag"):
        parse("--sizes")


def test_an_empty_config_is_refused():
    with pytest.raises(InputError, match=r"--config is empty\. Pass a value"):
        parse("--config", "")


def test_the_home_folder_is_expanded_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = write(tmp_path / "config.yaml", "output_dir: ~/run\nnames: [~/a, b~/c, 'a ~ b']\n")
    expected = [f"{tmp_path}/a", "b~/c", "a ~ b"]
    for argv in (["--config", config], ["--config=~/config.yaml"]):
        other = parse(*argv)[1]
        assert (other.output_dir, other.names) == (f"{tmp_path}/run", expected)
    assert parse("--output_dir=~/run")[1].output_dir == f"{tmp_path}/run"
    assert Other(output_dir="~/run").output_dir == f"{tmp_path}/run"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("output_dir: caf\xe9\n".encode("latin-1"), "is not valid YAML in UTF-8"),
        (bytes(range(256)), "is not valid YAML in UTF-8"),
        (b"[" * 20_000, "is not valid YAML in UTF-8"),
        (b"sizes: " + b"[" * 20_000 + b"]" * 20_000, "is not valid YAML in UTF-8"),
        (b"x" * 2_000_000, "is too large"),
        (b"sizes: [[1, 2], 3]\n", "sizes must be a single value or a list of values"),
        (b"output_dir: {a: b}\n", "output_dir must be a single value or a list of values"),
        (b"output_dir: [1, 2]\n", r"output_dir takes a single value, not the list \[1, 2\]"),
        (b"epochs: [1]\n", r"epochs takes a single value, not the list \[1\]"),
        (b"names: [a, null]\n", "names must be a single value or a list of values"),
        (b"names: [a, --steps]\n", "names contains '--steps'; the texts in a list must not begin with a hyphen"),
        (b"names: [a, -x]\n", "names contains '-x'; the texts in a list must not begin with a hyphen"),
        (b"no_shuffle: [true]\n", r"no_shuffle takes a single value, not the list"),
        (b"no_shuffle: maybe\n", "no_shuffle is 'maybe'; it must be true or false"),
        (b"started: 2024-99-99\n", "is not valid YAML|Unknown flag"),
        (b"5: 3\n", "Unknown flag --5"),
    ],
)
def test_damaged_configs_are_reported(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message):
        parse("--config", str(tmp_path / "config.yaml"))


def test_aliases_that_multiply_are_refused_at_once(tmp_path):
    """30 levels of ten aliases each."""
    levels = ["&a0 [x]"] + [f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    config = write(tmp_path / "config.yaml", f"names: [{', '.join(levels)}]\n")
    with pytest.raises(InputError, match="names must be a single value or a list of values"):
        parse("--config", config)


EVERY_COMMAND = {
    "finetune_model": {},
    "finetune_few_step": {"start_model": "model"},
    "train_ddgan": {},
    "train_class_conditional": {},
    "scripts.train_classifier": {"train_data_dir": "images"},
    "scripts.generate": {"pipeline": "model"},
    "scripts.evaluate": {"pipeline": "model", "reference": "images"},
    "scripts.choose_ema": {"run": "my-run", "reference": "images"},
    "scripts.convert_ddgan_checkpoint": {"checkpoint_path": "a.pth", "output_dir": "out"},
    "scripts.push_to_hub": {"folder": "model", "repo_id": "a/b"},
    "scripts.space": {},
    "examples.guided_sampling": {},
}


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_number_and_text_of_every_command_is_checked(command):
    assert {known.module for known in COMMANDS.values()} <= EVERY_COMMAND.keys()
    module = importlib.import_module(f"ddgan.{command}")
    values = [kind for value in vars(module).values() for kind in (value if isinstance(value, tuple) else [value])]
    kinds = [kind for kind in values if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    kinds = [kind for kind in kinds if kind.__name__.endswith("Arguments")]
    assert kinds and all(issubclass(kind, Arguments) for kind in kinds)
    for kind in kinds:
        types = typing.get_type_hints(kind)
        names = {argument.name for argument in dataclasses.fields(kind)}
        for argument in dataclasses.fields(kind):
            for type_, value in ((float, float("nan")), (float, float("inf")), (int, 2**64), (str, "")):
                if type_ not in {types[argument.name], *typing.get_args(types[argument.name])}:
                    continue
                others = {name: text for name, text in EVERY_COMMAND[command].items() if name in names}
                with pytest.raises(InputError, match=f"--{argument.name} is"):
                    kind(**{**others, argument.name: value})


def test_a_folder_that_contains_a_run_is_reported_when_the_arguments_are_parsed(tmp_path):
    (tmp_path / "config.yaml").touch()
    flags = ["--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match="already contains a run"):
        parse_arguments(RunArguments, argv=flags)
    parse_arguments(RunArguments, argv=[*flags, "--resume_from_checkpoint", "latest"])
