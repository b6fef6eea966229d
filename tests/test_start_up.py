"""Commands print their help and reject arguments before they import PyTorch."""

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "matplotlib", "numpy"]
TRAINING = [
    ("--batch_size 0", "--batch_size is 0"),
    ("--train_data_dir nowhere", "--train_data_dir nowhere does not exist"),
    ("--dataset_name ./nowhere", "--dataset_name ./nowhere: there is no such file"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere does not exist"),
    ("--config nowhere.yaml", "--config nowhere.yaml does not exist"),
]
EVALUATION = [
    ("--best_metric fidelity", "it must be one of fid, kid"),
    ("--feature_extractor nowhere", "--feature_extractor nowhere does not exist"),
]
LABELED = "--dataset_name user/labeled"
MODEL = "--pipeline examples/models/mnist-28"
WRONG = {  # script -> flags and the message about them
    "finetune_model": [*TRAINING, *EVALUATION, ("--start_model nowhere", "--start_model nowhere: there is no such")],
    "finetune_few_step": [*TRAINING[:1], ("--start_model nowhere", "form user/name"), ("", "with --start_model")],
    "train_ddgan": [*TRAINING, *EVALUATION, ("--diffaug blur", "choose from color")],
    "train_class_conditional": [*TRAINING, *EVALUATION, ("--dataset cifar10", "choose from 'mnist'")],
    "scripts.train_classifier": [*TRAINING[:4], (f"{LABELED} --widths 9", "multiples of 8")],
    "scripts.generate": [
        ("--pipeline nowhere", "there is no such"),
        (f"{MODEL} --scheduler euller", "choose from 'as-saved'"),
        (f"{MODEL} --color teel", "'teel' is not a known color"),
        (f"{MODEL} --towards color:teel", "'color:teel' is invalid: 'teel' is not a known color"),
        (f"{MODEL} --towards colour:teal", "there is no loss 'colour'"),
        (f"{MODEL} --towards reference:nowhere.png", "there is no file nowhere.png"),
    ],
    "scripts.evaluate": [
        (f"{MODEL} --reference nowhere.npz", "--reference nowhere.npz: there is no such"),
        (f"{MODEL} --feature_extractor inception", "one of the extractors inception-v3-compat"),
        (f"{MODEL} --classifier nowhere", "--classifier nowhere does not exist"),
    ],
    "scripts.convert_ddgan_checkpoint": [("--checkpoint_path nowhere.pth --output_dir out", "does not exist")],
    "scripts.push_to_hub": [
        ("--folder nowhere --repo_id user/model", "--folder nowhere does not exist"),
        ("--folder . --repo_id model", "has no owner"),
    ],
}
CODE = """
import contextlib, importlib, io, json, sys

from ddgan.core.errors import InputError

calls, answers = json.load(sys.stdin), []
for script, flags in calls:
    module = importlib.import_module(f"ddgan.{script}")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            module.main(flags.split())
        except (InputError, SystemExit) as error:
            answers.append(f"{error}{printed.getvalue()}")
print(json.dumps([answers, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> tuple[dict[tuple[str, str], str], list[str]]:
    """What each script answers to each of its wrong flags, and the modules that are imported for all of them."""
    calls = [(script, flags) for script, cases in WRONG.items() for flags, _ in cases]
    calls += [(script, flags) for script in WRONG for flags in ("--help", "--no_such_flag")]
    process = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("empty"),
    )
    answers, modules = json.loads(process.stdout)
    return dict(zip(calls, answers, strict=True)), modules


@pytest.mark.parametrize("script", WRONG)
def test_wrong_arguments_are_rejected(answered, script):
    answers, _ = answered
    for flags, message in WRONG[script]:
        assert message in answers[script, flags]
    assert "Unknown flag --no_such_flag" in answers[script, "--no_such_flag"]
    assert "[flags]" in answers[script, "--help"]


def test_for_these_answers_no_heavy_package_is_imported(answered):
    _, modules = answered
    assert "ddgan.commands.arguments" in modules and not set(HEAVY) & set(modules)
