"""The command `ddgan`: its list of commands, and the processes in which it runs them."""

import logging
import os
import re
import shlex
from importlib import import_module
from unittest.mock import patch

import pytest
from accelerate.state import AcceleratorState
from huggingface_hub import constants
from tiny import ROOT, finetune_flags

from ddgan import __version__
from ddgan.__main__ import COMMANDS, dispatch, main
from ddgan.core.errors import InputError
from ddgan.core.launch import LaunchArguments, launch

DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
# files and folders that users of the documented commands have, besides the outputs of other commands and path/to/...
FILES = ["netG_1200.pth", "rose.png", "my-run/config.yaml"]
FOLDERS = (
    "data/MNIST ddgan-stacked-mnist demo digits/best generated/images mnist MNIST my-run noto-emoji-32 "
    "my-worse-model second-run stacked-mnist untrained widened"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The environment of a shell: without the settings of launchers and tests, and unchanged by the test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with patch.dict(os.environ):
        for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
            os.environ.pop(name, None)
        yield


def documented_commands() -> list[str]:
    """Return the commands in the code blocks of the documentation."""
    commands = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        commands += re.findall(r"^(?:    )?(ddgan [a-z].*)$", text, re.MULTILINE)
    return commands


def test_without_a_command_it_lists_them(capsys):
    main([])
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed and command.summary in printed for name, command in COMMANDS.items())
    main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_an_unknown_command_is_reported_with_the_closest_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generat"])
    assert capsys.readouterr().err.startswith("\nerror: There is no command generat. Did you mean generate?")


def test_the_demo_resumes_its_run_and_reports_a_complete_one(tiny_model, images, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ddgan")
    for is_complete in (False, True):
        caplog.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        dispatch(["demo", *finetune_flags(tiny_model, images, tmp_path / "demo", "--num_epochs", 1)])
        assert "There is no checkpoint" not in caplog.text
        assert ("is complete: all 2 steps are done" in caplog.text) == is_complete


def test_every_documented_command_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = documented_commands()
    for folder in [*FOLDERS.split(), *re.findall(r"--output_dir (\S+)|(path/to/[\w./-]+)", "\n".join(commands))]:
        (tmp_path / "".join(folder)).mkdir(parents=True, exist_ok=True)
    for file in FILES:
        (tmp_path / file).touch()
    assert len(commands) > 40
    for text in commands:
        name, *flags = shlex.split(text, comments=True)[1:]
        command = COMMANDS[name]
        script = import_module(f"ddgan.{command.module}")
        script.parse([*command.flags, *flags], *([LaunchArguments] if command.launchable else []))


def test_examples_on_one_page_do_not_write_into_the_same_folder():
    for document in (ROOT / "README.md", ROOT / "docs" / "guidance.md"):
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        commands = re.findall(r"^    ddgan generate.*", text, re.MULTILINE)
        folders = [re.search(r"--output_dir (\S+)", command) for command in commands]
        assert len({folder and folder[1] for folder in folders}) == len(commands) > 1


def test_one_process_is_this_one_with_the_configuration_of_accelerate():
    calls = []
    launch(LaunchArguments(), ["demo"], lambda: calls.append(os.environ["ACCELERATE_MIXED_PRECISION"]))
    del os.environ["ACCELERATE_MIXED_PRECISION"]
    config = LaunchArguments(config_file="examples/accelerate/one_gpu.yaml")
    launch(config, ["demo"], lambda: calls.append(os.environ["ACCELERATE_MIXED_PRECISION"]))
    assert calls == ["no", "bf16"]


@pytest.mark.parametrize("text", ["mixed_precision: [1", "num_processes: many", "- 1", "a: {}"])
def test_a_damaged_configuration_of_accelerate_is_reported(tmp_path, text):
    file = tmp_path / "accelerate.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"cannot start the processes with --config_file {file}: .") as error:
        launch(LaunchArguments(config_file=str(file)), ["demo"], lambda: None)
    assert "\n" not in str(error.value)


def test_a_process_that_a_launcher_has_started_is_not_launched_again():
    os.environ["LOCAL_RANK"] = "0"
    calls = []
    launch(LaunchArguments(num_processes=2), ["demo"], lambda: calls.append("run"))
    assert calls == ["run"]


def test_the_error_of_several_processes_is_the_last_thing_on_the_screen(capfd):
    with pytest.raises(SystemExit, match="2"):
        launch(LaunchArguments(num_processes=2), ["generate", "--pipeline", "nowhere"], lambda: None)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"\nerror: --pipeline nowhere: there is no such .* user/name\.\n", captured.err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_machines", "2"], "--num_machines 2 needs --machine_rank, --main_process_ip, --main_process_port"),
        (["--num_machines", "0"], "--num_machines is 0"),
    ],
)
def test_processes_that_cannot_be_started_are_reported(capsys, flags, message):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--pipeline", "user/model", "--num_processes", "2", *flags])
    assert f"error: {message}" in capsys.readouterr().err


def test_flags_of_a_command_are_passed_to_it(monkeypatch):
    from ddgan.scripts import generate

    calls = []
    monkeypatch.setattr(generate, "run", calls.append)
    dispatch(["generate", "--pipeline", "user/model", "--num_images", "3"])
    assert (calls[0].pipeline, calls[0].num_images) == ("user/model", 3)
