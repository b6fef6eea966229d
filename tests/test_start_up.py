"""Commands print their help and reject arguments before they import PyTorch."""

import json
import subprocess
import sys

import pytest

LONG = 300 * "x"  # longer than a file name can be
HEAVY = ["torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets", "matplotlib", "numpy"]
TRAINING = [
    ("--batch_size 0", "--batch_size is 0"),
    ("--train_data_dir nowhere", "--train_data_dir nowhere does not exist"),
    ("--dataset_name ./nowhere", "--dataset_name ./nowhere: there is no such file"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere does not exist"),
    ("--config nowhere.yaml", "--config nowhere.yaml does not exist"),
    ("--num_process 2", "Did you mean --num_processes?"),
    ("--config_file nowhere.yaml", "--config_file nowhere.yaml does not exist"),
    ("--output_dir /dev/null/run", "--output_dir /dev/null/run cannot be created: Not a directory"),
    (f"--output_dir {LONG}", f"--output_dir {LONG} cannot be created: File name too long"),
    (f"--config {LONG}", f"--config {LONG} does not exist"),
    (f"--train_data_dir {LONG}", f"--train_data_dir {LONG} does not exist"),
    ("--report_to none --wandb_project p", "--wandb_project p has no effect with --report_to none"),
    ("--hub_private", "--hub_private True has no effect without --push_to_hub"),
    ("--machine_rank 1", "--machine_rank 1 is for runs on several machines"),
    ("--main_process_ip ::1", "--main_process_ip ::1 is for runs on several machines"),
]
EVALUATION = [
    ("--best_metric fidelity", "it must be one of fid, kid"),
    ("--feature_extractor nowhere", "--feature_extractor nowhere does not exist"),
    ("--best_metric kid", "--best_metric kid has no effect without --eval_every"),
    ("--eval_images 500", "--eval_images 500 has no effect without --eval_every"),
    ("--feature_extractor pixels-8x8", "--feature_extractor pixels-8x8 has no effect without --eval_every"),
]
DDGAN = [
    ("--block_out_channels", "--block_out_channels needs at least one width"),
    ("--beta_min 30", "--beta_min 30 is the lowest rate of the noise process, but greater than --beta_max 20"),
    ("--image_size 99999", "--image_size is 99999; it must be at most 16384"),
    ("--instance_noise 1e20", "--instance_noise is 1e+20; it must be at most 10"),
]
AUGMENTATION = [
    ("--diffaug blur", "choose from color"),
    ("--diffaug color,", "choose from color"),
    ("--diffaug color cutout,color", "--diffaug color cutout color names an augmentation twice"),
]
MODEL = "--pipeline examples/models/mnist-28"
WRONG = {  # command -> flags and the message about them
    "demo": [("--batch_size 0", "--batch_size is 0")],
    "finetune": [
        *TRAINING,
        *EVALUATION,
        ("--start_model nowhere", "--start_model nowhere: there is no such"),
        ("--validation_every 50", "--validation_every 50 has no effect without --validation_fraction"),
    ],
    "few-step": [TRAINING[0], ("--start_model nowhere", "form user/name"), ("", "with --start_model")],
    "train-ddgan": [*TRAINING, *EVALUATION, *AUGMENTATION, *DDGAN],
    "train-class-conditional": [
        *TRAINING,
        *EVALUATION,
        ("--dataset cifar10", "choose from 'mnist'"),
        ("--guidance_scale 0.5 --class_dropout 0.1", "--guidance_scale is 0.5; it must be at least 1"),
    ],
    "train-classifier": [
        *TRAINING[:4],
        ("--train_data_dir . --widths 9", "multiples of 8"),
        ("--train_data_dir . --widths", "least one"),
    ],
    "generate": [
        ("--pipeline nowhere", "there is no such"),
        (f"{MODEL} --scheduler euller", "choose from 'as-saved'"),
        (f"{MODEL} --color teel", "'teel' is not a known color"),
        (f"{MODEL} --towards color:teel", "'color:teel' is invalid: 'teel' is not a known color"),
        (f"{MODEL} --towards colour:teal", "there is no loss 'colour'"),
        (f"{MODEL} --towards reference:nowhere.png", "there is no file nowhere.png"),
        (f"{MODEL} --towards color", "'color' is invalid: it needs an argument: color:#BB2266"),
        (f"{MODEL} --towards 0*symmetry", "'0*symmetry' is invalid: with the weight 0 it has no effect"),
        (f"{MODEL} --color teal --guidance_scale 0", "With --guidance_scale 0 guidance has no effect"),
        (f"{MODEL} --color teal --guidance_scale 1e30", "--guidance_scale is 1e+30; it must be at most 1000000.0"),
        (
            f"{MODEL} --class_labels 0 --guidance_scale -1",
            "--guidance_scale is -1; for classifier-free guidance and autoguidance it",
        ),
        (f"{MODEL} --output_dir /dev/null/x", "--output_dir /dev/null/x cannot be created: Not a directory"),
        (f"{MODEL} --output_dir {LONG}", "cannot be created: File name too long"),
    ],
    "evaluate": [
        (f"{MODEL} --reference nowhere.npz", "--reference nowhere.npz: there is no such"),
        (f"{MODEL} --feature_extractor inception", "one of the extractors inception-v3-compat"),
        (f"{MODEL} --classifier nowhere", "--classifier nowhere does not exist"),
        (f"{MODEL} --classifier . --guidance_scale 0.5", "--guidance_scale is 0.5; it must be at least 1"),
        (f"{MODEL} --classifier . --value_range 0 9", "--value_range applies to image files"),
        ("--images . --classifier . --guidance_scale 2", "--guidance_scale 2.0 is for sampling a --pipeline"),
        (f"{MODEL} --classifier . --output /dev/null/x", "--output /dev/null/x cannot be created: Not a directory"),
        (f"{MODEL} --classifier . --output /dev/null", "/dev/null is not a regular file. Choose another file."),
        (f"{MODEL} --classifier . --save_images {LONG}", "cannot be created: File name too long"),
    ],
    "choose-ema": [
        ("--run my-run", "Pass the run and the images to measure against"),
        ("--run nowhere --reference .", "--run nowhere does not exist"),
        ("--run . --reference .", "--run . is not the folder of a training run"),
        ("--run . --reference . --lengths 0.3", "--lengths is 0.3; it must be less than 0.288"),
        ("--run . --reference . --best_metric fids", "--best_metric is fids; it must be one of fid"),
    ],
    "convert": [
        ("--checkpoint_path nowhere.pth --output_dir out", "does not exist"),
        ("--checkpoint_path . --output_dir /dev/null/x", "--output_dir /dev/null/x cannot be created"),
    ],
    "push": [
        ("--folder nowhere --repo_id user/model", "--folder nowhere does not exist"),
        ("--folder . --repo_id model", "has no owner"),
    ],
    "space": [(f"{MODEL} nowhere", "--pipeline nowhere: there is no such")],
}
CODE = """
import contextlib, io, json, sys

from ddgan.__main__ import COMMANDS, dispatch
from ddgan.core.errors import InputError

calls, answers = json.load(sys.stdin), []
for command, flags in calls:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            dispatch([command, *flags.split()])
        except (InputError, SystemExit) as error:
            answers.append(f"{error}{printed.getvalue()}")
print(json.dumps([list(COMMANDS), answers, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> tuple[list[str], dict[tuple[str, str], str], list[str]]:
    """All commands, what each answers to each of its wrong flags, and the modules imported for these answers."""
    calls = [(command, flags) for command, cases in WRONG.items() for flags, _ in cases]
    calls += [(command, flags) for command in WRONG for flags in ("--help", "--no_such_flag")]
    process = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path_factory.mktemp("empty"),
    )
    commands, answers, modules = json.loads(process.stdout)
    return commands, dict(zip(calls, answers, strict=True)), modules


@pytest.mark.parametrize("command", WRONG)
def test_wrong_arguments_are_rejected(answered, command):
    _, answers, _ = answered
    for flags, message in WRONG[command]:
        assert message in answers[command, flags]
    assert "Unknown flag --no_such_flag" in answers[command, "--no_such_flag"]
    assert f"usage: ddgan {command} [flags]" in answers[command, "--help"]


def test_for_these_answers_no_heavy_package_is_imported(answered):
    commands, _, modules = answered
    assert set(commands) == set(WRONG)
    assert "ddgan.commands.arguments" in modules and not set(HEAVY) & set(modules)
