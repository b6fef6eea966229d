"""Claims about scripts/choose_ema.py, through its command line."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT, finetune_flags, run_ranks, tiny_unet, write_images

from ddgan import finetune_model
from ddgan.commands import evaluate as evaluate_command
from ddgan.core.errors import InputError
from ddgan.sampling import groups
from ddgan.scripts import choose_ema, evaluate
from ddgan.training.posthoc_ema import EMASnapshots
from ddgan.training.run_folder import RunFolder

LENGTHS = ("0.03", "0.1", "0.2")
SAMPLING = ("--scheduler", "ddim", "--num_inference_steps", 2, "--num_images", 20, "--seed", 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, images) -> Path:
    """A run with EMA snapshots, evaluations and a card."""
    run = tmp_path_factory.mktemp("runs") / "my-run"
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ["--posthoc_ema", "--max_train_steps", 16, "--log_samples_every", 0]
    flags += ["--eval_every", 16, "--eval_images", 12, "--feature_extractor", "pixels-8x8"]
    finetune_model.main(finetune_flags(tiny_model, images, run, *flags))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "my-run")


@pytest.fixture(scope="module")
def measurement(tmp_path_factory) -> tuple:
    folder = tmp_path_factory.mktemp("measurement")
    write_images(folder / "reference", 40)
    cache = ("--cache_dir", folder / "cache")
    return ("--reference", folder / "reference", "--feature_extractor", "pixels-8x8", *cache, *SAMPLING)


def choose(run: Path, *flags) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    choose_ema.main([str(flag) for flag in ("--run", run, *flags)])
    return json.loads((run / "posthoc" / "ema_lengths.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(DDPMPipeline.from_pretrained(folder).unet.named_parameters())


def test_the_best_length_is_saved_beside_the_weights_of_the_run(run, measurement, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = choose(run, "--lengths", *LENGTHS, *measurement)
    assert all(path.read_bytes() == content for path, content in before.items())
    fids = {name: metrics["fid@20"]["value"] for name, metrics in outcome["metrics"].items()}
    assert fids.keys() == {"as saved", *(f"length {length}" for length in LENGTHS)}
    assert len(set(fids.values())) == 4
    assert fids[f"length {outcome['length']}"] == min(value for name, value in fids.items() if name != "as saved")

    posthoc, computed = run / "posthoc", EMASnapshots.open(RunFolder(run)).weights(outcome["length"])
    saved = weights(posthoc)
    assert saved.keys() == computed.keys() and all(torch.equal(saved[name], computed[name]) for name in saved)
    for image in ("ema_lengths.png", "samples.png"):
        Image.open(posthoc / image).load()
    printed = capsys.readouterr().out
    assert f"length {outcome['length']} *" in printed and "warning: Too few samples: 20." in printed

    # plain DDPM and DDIM folders, so they are measured like any other
    results = tmp_path / "evaluation.json"
    for folder, name in ((posthoc, f"length {outcome['length']}"), (run, "as saved")):
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate.main([str(flag) for flag in ("--pipeline", folder, *measurement, "--output", results)])
        assert json.loads(results.read_text())["metrics"]["fid@20"]["value"] == fids[name]


@pytest.mark.slow
def test_two_processes_choose_like_one(run, trained, measurement, tmp_path):
    flags = ("--lengths", "0.05", "0.2", *measurement, "--cache_dir", tmp_path / "cache")
    one = choose(run, *flags)
    shutil.rmtree(tmp_path / "cache")
    two = shutil.copytree(trained, tmp_path / "two" / "my-run")
    output = run_ranks(
        ROOT / "scripts" / "choose_ema.py", "--run", two, *flags, output=tmp_path / "output.txt", machines=2
    )
    assert json.loads((two / "posthoc" / "ema_lengths.json").read_text())["metrics"] == one["metrics"]
    assert output.count("length 0.05: FD@20") == 1


def test_the_card_states_the_length_and_only_what_is_true_of_its_weights(run, measurement):
    assert "## Evaluation" in (run / "README.md").read_text()  # of the weights that the run has saved
    outcome = choose(run, "--lengths", "0.05", *measurement)
    text = (run / "posthoc" / "README.md").read_text()
    assert "\n# my-run, EMA length 0.05\n" in text
    assert 'from_pretrained("posthoc")' in text and 'from_pretrained("my-run")' not in text
    links = re.findall(r"!\[[^]]*]\(([^)]*)\)", text)
    assert links == ["samples.png", "ema_lengths.png"]
    assert "@12" not in text and "| trained for | 16 of 16 optimizer steps" in text and "All settings" in text
    value = outcome["metrics"]["length 0.05"]["fid@20"]["value"]
    assert f"| length 0.05 | {value:.4g} (chosen) |" in text
    assert "This length was selected by FD@20 (pixels-8x8) among" in text
    card = ModelCard(text)
    assert {result.metric_type for result in card.data.eval_results} >= {"fd-pixels-8x8"}
    assert [r.metric_value for r in card.data.eval_results if r.metric_type == "fd-pixels-8x8"] == pytest.approx(
        [value], rel=1e-4
    )
    assert card.data.model_name == "my-run, EMA length 0.05"


def test_a_run_without_a_card_gets_one_too(run, measurement):
    (run / "README.md").unlink()
    choose(run, "--lengths", "0.05", *measurement)
    card = ModelCard.load(run / "posthoc" / "README.md")
    assert "# my-run, EMA length 0.05" in card.text and card.data.eval_results


def test_lengths_that_were_measured_are_not_sampled_again(run, measurement, tmp_path, monkeypatch):
    seeds_seen, sample = [], evaluate_command.sample

    def recorded(pipe, seeds, *rest, **options):
        seeds_seen.append(len(seeds))
        return sample(pipe, seeds, *rest, **options)

    for module in (evaluate_command, groups):
        monkeypatch.setattr(module, "sample", recorded)
    own = (*measurement, "--cache_dir", tmp_path / "cache")
    choose(run, "--lengths", "0.05", *own)
    first = choose(run, "--lengths", "0.05", "0.1", *own)
    seeds_seen.clear()
    again = choose(run, "--lengths", "0.1", "0.05", *own)
    assert again == first
    assert sum(count > 1 for count in seeds_seen) == 1  # only the grid, besides the first image of each length
    best = choose(run, "--lengths", "0.05", "0.1", *own, "--best_metric", "density")
    density = {name: metrics["density@20"]["value"] for name, metrics in best["metrics"].items()}
    assert density[f"length {best['length']}"] == max(density["length 0.05"], density["length 0.1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "0.001", "0.05"], r"--lengths 0.001: the 16 EMA snapshots .* determine only EMAs with lengths"),
        (["--lengths", "0.285"], r"from about 0\.0\d+ to 0\.2\d+\. Pass --lengths in this range"),
        (["--lengths", "0.3"], "--lengths is 0.3; it must be less than 0.28"),
        (["--best_metric", "class_accuracy"], "which cannot be measured with these flags and pixels-8x8"),
        (["--best_metric", "fids"], "--best_metric is fids; it must be one of fid"),
        (["--feature_extractor", "nowhere"], "--feature_extractor nowhere does not exist"),
    ],
)
def test_what_cannot_be_measured_is_reported_at_once(run, measurement, flags, message):
    with pytest.raises(InputError, match=message):
        choose(run, "--lengths", "0.05", *measurement, *flags)
    assert not (run / "posthoc").exists()


def test_a_metric_that_statistics_do_not_allow_is_reported_before_sampling(run, measurement, tmp_path):
    features = np.random.default_rng(0).normal(size=(500, 192))
    np.savez(tmp_path / "statistics.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    flags = [*measurement, "--reference", tmp_path / "statistics.npz", "--cache_dir", tmp_path / "cache"]
    with pytest.raises(InputError, match="--best_metric is kid, which cannot be measured with the mean and cov"):
        choose(run, "--lengths", "0.05", *flags, "--best_metric", "kid")
    assert not (tmp_path / "cache").exists()


def test_the_grid_has_as_many_images_wherever_its_seeds_begin(run, measurement):
    choose(run, "--lengths", "0.05", *measurement, "--seed", "31")  # the last of a group
    width, height = Image.open(run / "posthoc" / "samples.png").size
    assert width == height > 4 * 8


def test_a_run_without_usable_snapshots_is_reported(run, measurement, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"other is not the folder of a training run: it has no config\.yaml"):
        choose(tmp_path / "other", *measurement)
    with pytest.raises(InputError, match="Pass the run and the images to measure against"):
        choose(run)
    (run / "posthoc").mkdir()
    (run / "posthoc" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"posthoc, where the pipeline .* was not written by this command: rename it"):
        choose(run, *measurement)
    shutil.rmtree(run / "posthoc")
    newest = run / "ema_snapshots" / "step-00000016.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    with pytest.raises(InputError, match=r"step-00000016\.safetensors is damaged\. Move it out of the folder"):
        choose(run, *measurement)
    shutil.rmtree(run / "ema_snapshots")
    with pytest.raises(InputError, match=r"has no EMA snapshots, .* train the model with --posthoc_ema"):
        choose(run, *measurement)


def test_snapshots_of_another_network_are_reported(run, measurement):
    tiny = DDPMPipeline.from_pretrained(run)
    DDPMPipeline(tiny_unet(block_out_channels=(8, 32)), tiny.scheduler).save_pretrained(run)
    with pytest.raises(InputError, match=r"are of another network than the pipeline in .* has the shape"):
        choose(run, *measurement)
