"""Claims about evaluation during training: it does not affect the run, is exact, and keeps the best pipeline."""

import json
import re
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, finetune_flags, make_dataset, run_ranks, write_images
from tiny_clip import save_clip

from ddgan import train_class_conditional, train_ddgan
from ddgan.core.errors import InputError, RunError
from ddgan.core.files import replace_folder
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.extractors import ClassifierFeatures
from ddgan.evaluation.metrics import MetricValue
from ddgan.scripts import evaluate
from ddgan.training.checkpoints import load_state
from ddgan.training.evaluator import EvaluationHistory
from ddgan.training.run_folder import RunFolder
from ddgan.training.tracking import read_metrics

NAMES = ("fid", "kid", "precision", "recall", "density", "coverage", "near_copies", "classifier_score")
COLUMNS = {f"{name}@13" for name in NAMES}
SHORT = "--image_size 8 --batch_size 4 --max_train_steps 6 --num_samples 3 --report_to none"
NETWORK = "--block_out_channels 8 16 --layers_per_block 1"
MAPPING = "--latent_dim 4 --latent_embed_dim 8 --latent_mapping_layers 1"
DDGAN = f"{SHORT} {NETWORK} {MAPPING} --attention_resolutions 4 --discriminator_channels 2 --lazy_reg 2 --dropout 0.1"
CLASSES = (
    f"{SHORT} {NETWORK} --attention_levels 1 --norm_num_groups 4 --sample_steps 2 --cache_images false --ema_decay 0.9"
)


def write_classifier(folder: Path, channels: int, names: str) -> Path:
    torch.manual_seed(channels)
    network = ImageClassifier(8, channels, len(names), (8, 16), dict(enumerate(names)))
    network.head.weight.data *= 100  # so that it predicts all classes
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A classifier of color images."""
    return write_classifier(tmp_path_factory.mktemp("classifiers") / "color", 3, "xyz")


@pytest.fixture(scope="module")
def gray_images(tmp_path_factory) -> tuple[Path, Path]:
    """13 gray images in three class folders, and a classifier of them."""
    root = tmp_path_factory.mktemp("gray")
    for i, path in enumerate(sorted(write_images(root / "all", 13).iterdir())):
        (root / "images" / "abc"[i % 3]).mkdir(exist_ok=True, parents=True)
        Image.open(path).convert("L").save(root / "images" / "abc"[i % 3] / path.name)
    return root / "images", write_classifier(root / "classifier", 1, "abc")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of cached features of references."""
    monkeypatch.setattr("ddgan.training.evaluator.CACHE_DIR", tmp_path / "cache")
    return tmp_path / "cache"


def every(steps: int, classifier: Path, *more) -> list:
    return ["--eval_every", steps, "--eval_images", 13, "--feature_extractor", classifier, *more]


def evaluated(run: Path) -> dict[int, dict[str, float]]:
    """The metrics of each evaluated step."""
    rows = read_metrics(run / "metrics.csv")
    return {row["step"]: {k: v for k, v in row.items() if "@" in k} for row in rows if row["fid@13"] == row["fid@13"]}


def state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors that training changes, from the newest checkpoint."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    tensors = {}
    for path in newest.glob("*.safetensors"):
        tensors |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}
    for path in newest.glob("optimizer*.bin"):
        for i, values in torch.load(path, weights_only=True)["state"].items():
            tensors |= {f"{path.name}/{i}/{name}": value for name, value in values.items()}
    assert all(any(name.startswith(part) for name in tensors) for part in ("ema", "optimizer"))
    return tensors


def assert_same_training(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [
        [{k: v for k, v in row.items() if "@" not in k} for row in read_metrics(r / "metrics.csv")] for r in (a, b)
    ]
    assert str(rows[0]) == str(rows[1])  # as text, since missing values are NaN


def assert_same_folder(a: Path, b: Path) -> None:
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.*")) for folder in (a, b)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.suffix in (".safetensors", ".json"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def train(script, flags: str, images: Path, output: Path, *more) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    script.main([str(flag) for flag in ["--train_data_dir", images, "--output_dir", output, *flags.split(), *more]])
    return output


# ---------------------------------------------------------------------------------------------------------------------
# Training is unaffected, and resuming is exact


def test_fine_tuning_with_and_without_evaluation_end_bit_identical(finetune, classifier):
    plain = finetune("plain")
    run = finetune("run", *every(3, classifier))
    assert_same_training(plain, run)
    assert list(evaluated(run)) == [3, 4]  # the last step always
    assert all(values.keys() == COLUMNS for values in evaluated(run).values())
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert (plain / unet).read_bytes() == (run / unet).read_bytes()


@pytest.mark.parametrize(
    ("script", "flags"),
    [(train_ddgan, f"{DDGAN} --class_conditional --image_channels 1"), (train_class_conditional, CLASSES)],
)
def test_class_conditional_training_with_and_without_evaluation_ends_bit_identical(
    gray_images, tmp_path, script, flags
):
    images, classifier = gray_images
    plain = train(script, flags, images, tmp_path / "plain")
    run = train(script, flags, images, tmp_path / "run", *every(3, classifier))
    assert_same_training(plain, run)
    assert list(evaluated(run)) == [3, 6]
    for values in evaluated(run).values():
        assert values.keys() == COLUMNS | {"class_accuracy@13"}
        assert 13 * values["class_accuracy@13"] == pytest.approx(round(13 * values["class_accuracy@13"]))
    assert "class accuracy@13" in (run / "README.md").read_text()
    assert (run / "best" / "model_index.json").exists()


def test_a_resumed_run_measures_the_same_and_keeps_its_best(finetune, classifier):
    flags = ("--num_epochs", 4, "--checkpointing_steps", 2, "--checkpoints_total_limit", 0, *every(3, classifier))
    straight = finetune("straight", *flags)
    run = finetune("run", *flags)
    for step in (6, 4, 2):  # with and without an evaluation before the checkpoint
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        finetune("run", *flags, "--resume_from_checkpoint", checkpoint)
        assert_same_training(straight, run)
        assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
        assert_same_folder(straight / "best", run / "best")
        histories = [load_state(sorted((r / "checkpoints").iterdir())[-1])["evaluations"] for r in (straight, run)]
        for evaluations in histories:
            evaluations.pop("seconds")
            for name in ("last", "best"):
                evaluations[name]["protocol"].pop("samples")  # has the run's name
        assert histories[0] == histories[1]


def test_a_run_that_was_stopped_before_an_evaluation_catches_up(finetune, classifier):
    """Because it stopped at that step, or started without evaluation."""
    flags = ("--lr_scheduler", "constant", "--max_train_steps")
    straight = finetune("straight", *flags, 6, *every(3, classifier))
    run = finetune("run", *flags, 3)
    assert "fid@13" not in (run / "metrics.csv").read_text()
    finetune("run", *flags, 6, *every(3, classifier), "--resume_from_checkpoint", "latest")
    assert list(evaluated(run)) == [3, 6]
    assert (straight / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def test_a_signal_ends_an_evaluation_and_the_resumed_run_repeats_it(finetune, classifier, monkeypatch):
    """Once at the first evaluation of the run, and once in the evaluation of the resumed run."""
    flags = ("--max_train_steps", 3, *every(2, classifier))
    straight = finetune("straight", *flags)
    extract = ClassifierFeatures.extract
    sampled = []

    def stopped_at_the_first_sample(self, images):
        sampled.append(len(images))
        signal.raise_signal(signal.SIGTERM)
        return extract(self, images)

    for more in ((), ("--resume_from_checkpoint", "latest")):
        with monkeypatch.context() as patches, pytest.raises(SystemExit, match="143"):
            patches.setattr(ClassifierFeatures, "extract", stopped_at_the_first_sample)
            finetune("run", *flags, *more)
    assert sampled == [8, 8], "images were generated after the signal"
    run = finetune("run", *flags, "--resume_from_checkpoint", "latest")
    assert_same_training(straight, run)
    assert evaluated(run) == evaluated(straight)
    assert_same_folder(straight / "best", run / "best")


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(finetune, classifier, tiny_model, images, tmp_path):
    still = ("--learning_rate", 0, "--batch_size", 4, "--max_train_steps", 2, *every(1, classifier))
    one, two = finetune("one", *still), tmp_path / "two"
    script, flags = ROOT / "finetune_model.py", finetune_flags(tiny_model, images, two, *still)
    output = run_ranks(script, *flags, output=tmp_path / "output.txt", machines=2)
    assert evaluated(two) == evaluated(one)
    assert DDPMPipeline.from_pretrained(two / "best")
    assert output.count("step 2: FD@13") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Numbers, cards and the best pipeline


@pytest.fixture
def run(finetune, classifier) -> Path:
    """Evaluated after each of six steps that are too large to improve the model."""
    flags = ("--num_epochs", 3, "--learning_rate", 0.1, "--ema_decay", 0.5, "--log_samples_every", 1)
    return finetune("run", *flags, *every(1, classifier))


def test_the_best_pipeline_is_kept_and_scripts_evaluate_finds_its_numbers(run, images, classifier, cache, capsys):
    fids = {step: values["fid@13"] for step, values in evaluated(run).items()}
    best = min(fids, key=fids.get)
    assert list(fids) == [1, 2, 3, 4, 5, 6] and best != 6
    flags = ["--pipeline", run / "best", "--scheduler", "ddim", "--num_inference_steps", 2, "--num_images", 13]
    flags += ["--reference", images, "--feature_extractor", classifier, "--cache_dir", cache]
    evaluate.main([str(flag) for flag in [*flags, "--output", run / "evaluation.json"]])
    values = {
        name: entry["value"] for name, entry in json.loads((run / "evaluation.json").read_text())["metrics"].items()
    }
    assert values == pytest.approx(evaluated(run)[best], rel=1e-2, abs=1e-3)  # in batches of another size
    assert values["fid@13"] != pytest.approx(fids[6], rel=0.05)
    assert len(list(cache.glob("thirteen-*.safetensors"))) == 1, "the reference was measured twice"


def test_the_cards_have_the_numbers_with_their_protocol(run, classifier):
    measured = evaluated(run)
    best = min(measured, key=lambda step: measured[step]["fid@13"])
    for folder, step in ((run, 6), (run / "best", best)):
        card = ModelCard.load(folder / "README.md")
        written = {result.metric_name: result for result in card.data.eval_results}
        fid = f"FD@13 ({classifier.name})"
        assert written[fid].metric_type == f"fd-{classifier.name}"
        assert written[fid].metric_value == pytest.approx(measured[step]["fid@13"], rel=1e-5)
        assert len(written) == len(NAMES)
        samples = written[fid].metric_args["samples"]
        for text in (f"step {step},", "weights averaged (EMA)", "seeds 0 to 12", "DDIMScheduler", "batch size 8"):
            assert text in samples
        assert "images 13" in written[fid].metric_args["reference"]
        assert f"pipeline run, step {step}, weights" in card.content
        assert "**Warning:** Too few samples: 13." in card.text and f"| FD@13 ({classifier.name}) | " in card.text
        assert str(run.parent) not in card.content
    card = ModelCard.load(run / "README.md").content
    assert f"after {best} steps: `best/`" in card and "![Evaluations during training.](eval.png)" in card
    assert "| evaluations | 6, " in card
    best_card = (run / "best" / "README.md").read_text()
    assert "# run, best checkpoint" in best_card and 'from_pretrained("best")' in best_card
    assert f"{best} of 6 optimizer steps" in best_card
    assert f"![Samples after {best} optimizer steps.](samples/step-{best:08d}.png)" in best_card
    assert Image.open(run / "eval.png").width > 500


def test_evaluations_are_printed_and_tracked(finetune, classifier, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = finetune("run", "--report_to", "tensorboard", *every(2, classifier))
    output = "".join(capsys.readouterr())
    assert re.search(r"step 2: FD@13 \S+ \(floor \S+\), KD@13 \S+ ± \S+ \(floor \S+ ± \S+\)", output)
    assert "the best so far; it took" in output
    assert output.count("warning: Too few samples: 13.") == 1
    assert "Evaluations: 2, " in output and f"best model     {run / 'best'}: step " in output
    events = next(path for path in (run / "logs").rglob("events*") if path.parent.name == "run")
    tracked = EventAccumulator(str(events)).Reload()
    fids = {event.step: event.value for event in tracked.Scalars("fid@13")}
    assert fids == pytest.approx({step: values["fid@13"] for step, values in evaluated(run).items()})
    assert len(tracked.Scalars("evaluation_seconds")) == 2


def test_a_failed_write_of_the_best_pipeline_keeps_the_previous_one(tmp_path):
    def write(folder: Path, weights: str, files: int) -> None:
        for i in range(3):
            if i == files:
                raise OSError("No space left on device")
            (folder / "unet").mkdir(parents=True, exist_ok=True)
            (folder / "unet" / f"{i}.txt").write_text(weights)

    best = tmp_path / "best"
    for weights, files in (("first", 3), ("second", 3), ("third", 2)):
        with nullcontext() if files == 3 else pytest.raises(OSError):
            replace_folder(best, lambda folder, weights=weights, files=files: write(folder, weights, files))
    assert {path.read_text() for path in (best / "unet").iterdir()} == {"second"}
    RunFolder(tmp_path).remove_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_the_reference_is_measured_once(finetune, classifier, monkeypatch):
    calls, extract = [], ClassifierFeatures.extract
    monkeypatch.setattr(
        ClassifierFeatures, "extract", lambda self, images: calls.append(len(images)) or extract(self, images)
    )
    finetune("first", "--max_train_steps", 1, *every(1, classifier))
    assert sum(calls) == 13 + 13
    calls.clear()
    finetune("second", "--max_train_steps", 1, *every(1, classifier))
    assert sum(calls) == 13


def test_best_metric_decides_which_step_is_the_best(finetune, classifier):
    """The direction is that of the metric: the lowest FID, but the highest score."""
    flags = ("--num_epochs", 3, "--learning_rate", 0.1, "--ema_decay", 0.5, *every(1, classifier))
    by_fid = finetune("fid", *flags)
    by_score = finetune("score", *flags, "--best_metric", "classifier_score")
    measured = evaluated(by_fid)
    assert evaluated(by_score) == measured
    lowest_fid = min(measured, key=lambda step: measured[step]["fid@13"])
    highest_score = max(measured, key=lambda step: measured[step]["classifier_score@13"])
    assert lowest_fid != highest_score
    for run, step in ((by_fid, lowest_fid), (by_score, highest_score)):
        assert f"{step} of 6 optimizer steps" in (run / "best" / "README.md").read_text()
    saved = load_state(by_score / "checkpoints" / "step-00000006")["evaluations"]
    assert "Inception score with a classifier@13" in EvaluationHistory.from_json(saved).best.summary()


def test_the_best_step_by_cmmd(finetune, tmp_path):
    torch.manual_seed(0)
    save_clip(tmp_path / "clip")
    flags = ("--num_epochs", 3, "--learning_rate", 0.1, "--ema_decay", 0.5, "--best_metric", "cmmd")
    run = finetune("run", *flags, *every(1, "clip-vit-l-14-336px", "--extractor_weights", tmp_path / "clip"))
    distances = {step: values["cmmd@13"] for step, values in evaluated(run).items()}
    best = min(distances, key=distances.get)
    assert best != 6 and f"{best} of 6 optimizer steps" in (run / "best" / "README.md").read_text()
    written = {result.metric_name for result in ModelCard.load(run / "README.md").data.eval_results}
    assert {"CMMD@13 (clip (clip))", "FD@13 (clip (clip))", "KD@13 (clip (clip))"} <= written


def test_a_metric_that_a_run_does_not_measure_is_rejected_before_training(finetune, classifier, tmp_path):
    with pytest.raises(InputError, match=r"--best_metric is class_accuracy, which this run does not measure.* fid,"):
        finetune("run", *every(1, classifier), "--best_metric", "class_accuracy")
    with pytest.raises(InputError, match=r"--best_metric is cmmd, which this run does not measure with color\."):
        finetune("run", *every(1, classifier), "--best_metric", "cmmd")
    assert not (tmp_path / "run").exists()


def test_evaluations_of_earlier_versions_are_read():
    metric = {"value": 2.0, "spread": None, "protocol": {"estimated_bias": 0.5}}
    saved = {"step": 3, "measures": {"fid@13": metric}, "floors": {"fid": metric}, "protocol": {"samples": "seeds 0"}}
    saved |= {"alike": "abc", "dataset": "images", "split": "all", "warnings": []}
    history = EvaluationHistory.from_json({"last": saved, "best": saved, "since": 3, "count": 1, "seconds": 1.5})
    assert history.best.metrics["fid@13"].value == 2.0 and history.best.comparison_key == "abc"
    assert history.best.best_metric == "fid"
    assert history.to_json()["last"] == saved | {"best_metric": "fid"}
    better = replace(history.best, step=4, metrics={"fid@13": MetricValue(1.0)})
    worse = replace(history.best, step=5, metrics={"fid@13": MetricValue(3.0)})
    assert history.add(better, 1.0) and not history.add(worse, 1.0)
    assert (history.best.step, history.since, history.count) == (4, 3, 3)
    by_kid = replace(worse, step=6, best_metric="kid")  # the best of the earlier steps is unknown
    assert history.add(by_kid, 1.0) and (history.best.step, history.since) == (6, 3)


def test_the_best_is_chosen_among_comparable_evaluations(finetune, classifier, tmp_path):
    flags = ("--lr_scheduler", "constant", "--max_train_steps")
    run = finetune("run", *flags, 2, *every(1, classifier))
    other = write_classifier(tmp_path / "other", 3, "wxyz")
    finetune("run", *flags, 3, *every(3, other), "--resume_from_checkpoint", "latest")
    history = load_state(run / "checkpoints" / "step-00000003")["evaluations"]
    assert (history["best"]["step"], history["since"]) == (3, 3)
    assert "3 of 3 optimizer steps" in (run / "best" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Errors before training


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_every", -1], "eval_every is -1; it must be at least 0"),
        (["--eval_every", 1, "--eval_images", 11], "at least 12"),
        (["--best_metric", "fidelity"], "best_metric is fidelity; it must be one of fid, kid, cmmd, precision"),
        (
            ["--eval_every", 1, "--feature_extractor", "nowhere"],
            r"--feature_extractor nowhere does not exist in .* one of the extractors inception",
        ),
        (
            ["--eval_every", 1, "--extractor_weights", "nowhere.pth"],
            "--eval_every: The file nowhere.pth does not hold",
        ),
    ],
)
def test_errors_are_reported_before_training(finetune, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        finetune("run", *flags)
    assert not (tmp_path / "run").exists()


def test_too_few_training_images_are_reported_before_training(finetune, classifier, tmp_path):
    few = write_images(tmp_path / "few", 9)
    with pytest.raises(InputError, match="of which there must be at least 12; few has 9"):
        finetune("run", "--train_data_dir", few, *every(1, classifier))


def test_a_stream_is_rejected_as_reference(finetune, classifier, tmp_path):
    flags = ("--dataset_name", make_dataset(tmp_path / "data", 20), "--streaming")
    with pytest.raises(InputError, match=r"which a stream cannot provide.*ddgan evaluate"):
        finetune("run", *flags, "--max_train_steps", 2, *every(1, classifier))
    assert not (tmp_path / "run").exists()


def test_broken_training_images_are_left_out_of_the_reference_as_in_training(
    finetune, classifier, tmp_path, monkeypatch
):
    monkeypatch.setattr("ddgan.training.loading._CHECKED_IMAGES", 1)
    folder = write_images(tmp_path / "images", 14)
    (folder / "013.png").write_bytes(b"not an image")
    with pytest.raises(RunError, match=r"cannot be read: .*013\.png"):
        finetune("run", "--train_data_dir", folder, *every(1, classifier))
    flags = ("--train_data_dir", folder, "--skip_broken_images", "--max_train_steps", 1)
    assert evaluated(finetune("run", *flags, *every(1, classifier)))
