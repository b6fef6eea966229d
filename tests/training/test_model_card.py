"""Claims about the model cards of runs, and their uploads to a local Hub server."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT

from ddgan import DDGANPipeline, train_class_conditional, train_ddgan
from ddgan.commands import push
from ddgan.core.errors import InputError
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.hub.publication import pipeline_files
from ddgan.scripts import convert_ddgan_checkpoint, push_to_hub

COMMIT = "POST /api/models/ann/run/commit/"
SHORT = "--image_size 8 --batch_size 4 --max_train_steps 2 --num_samples 3 --report_to none --push_to_hub"
NETWORK = "--block_out_channels 8 16 --layers_per_block 1"
MAPPING = "--latent_dim 4 --latent_embed_dim 8 --latent_mapping_layers 1"
DDGAN = f"{MAPPING} --attention_resolutions 4 --discriminator_channels 2"
CLASSES = "--attention_levels 1 --norm_num_groups 4 --sample_steps 2"


@pytest.fixture
def kinds(tmp_path) -> Path:
    """Six gray images in three subfolders."""
    for i in range(6):
        (tmp_path / "kinds" / "abc"[i % 3]).mkdir(exist_ok=True, parents=True)
        Image.new("L", (8, 8), 40 * i).save(tmp_path / "kinds" / "abc"[i % 3] / f"{i}.png")
    return tmp_path / "kinds"


def python_of(card: str) -> str:
    """The Python snippet on a card."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.fixture
def measured(tmp_path, monkeypatch) -> list:
    """Flags of a run that is evaluated at steps without a sample grid."""
    monkeypatch.setattr("ddgan.training.evaluator.CACHE_DIR", tmp_path / "cache")
    ImageClassifier(8, 3, 2, (8, 16), dict(enumerate("xy"))).save_pretrained(tmp_path / "classifier")
    flags = ["--eval_every", 3, "--eval_images", 13, "--feature_extractor", tmp_path / "classifier"]
    return [*flags, "--log_samples_every", 2]


def convert(folder: Path) -> None:
    """Convert a small checkpoint of the published kind to a pipeline folder."""
    golden = np.load(ROOT / "tests/fixtures/golden/generator_a.npz", allow_pickle=False)
    prefix = "state_dict/"
    state = {key.removeprefix(prefix): torch.from_numpy(golden[key]) for key in golden.files if prefix in key}
    torch.save(state, folder.with_suffix(".pth"))
    folder.with_suffix(".json").write_text(str(golden["config_json"]))
    flags = {"checkpoint_path": ".pth", "config_path": ".json", "output_dir": ""}
    flags = [part for flag, suffix in flags.items() for part in (f"--{flag}", str(folder.with_suffix(suffix)))]
    convert_ddgan_checkpoint.main([*flags, "--num_samples", "1"])


def test_a_card_shows_the_newest_grid_and_names_its_step(finetune, measured):
    run = finetune("run", *measured)
    best = (run / "best" / "README.md").read_text()
    step = re.search(r"\| trained for \| (\d) of 4", best)[1]
    caption, grid = {
        "3": ("Samples after 2 optimizer steps; these weights are from step 3.", "samples/step-00000002.png"),
        "4": ("Samples after 4 optimizer steps.", "samples/step-00000004.png"),
    }[step]
    assert f"![{caption}]({grid})\n\n*{caption}*" in best
    assert grid in pipeline_files(run / "best")
    assert "![Samples after 4 optimizer steps.](samples/step-00000004.png)" in (run / "README.md").read_text()


def test_a_card_states_the_license_of_the_training_images(finetune, images, tmp_path):
    data = Path(shutil.copytree(images, tmp_path / "pictures"))
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    card = (finetune("run", "--train_data_dir", data) / "README.md").read_text()
    assert "The license of the training images, pictures, is `cc-by-4.0`, according to their dataset card" in card


@pytest.mark.slow
def test_the_snippet_on_every_card_runs_with_plain_diffusers(local_hub, finetune, measured, kinds, tmp_path):
    run = finetune("finetuned", "--push_to_hub", *measured)
    convert(tmp_path / "converted")
    for script, name, more in ((train_ddgan, "ddgan", DDGAN), (train_class_conditional, "classes", CLASSES)):
        AcceleratorState._reset_state(reset_partial_state=True)
        start = ["--train_data_dir", str(kinds), "--output_dir", str(tmp_path / name)]
        script.main([*start, *SHORT.split(), *NETWORK.split(), *more.split()])

    DDGANPipeline.from_pretrained(tmp_path / "ddgan").push_to_hub("ann/pushed")
    on_the_hub = [f"ann/{name}" for name in ("finetuned", "ddgan", "classes", "pushed")]
    assert "card_samples.png" in local_hub.files("ann/pushed")
    cards = [(tmp_path, local_hub.files(name)["README.md"].decode()) for name in on_the_hub]
    folders = [tmp_path / "converted", run / "best", ROOT / "examples" / "models" / "noto-emoji-32"]
    for folder in folders:
        place = ROOT if folder.is_relative_to(ROOT) else folder.parent
        cards.append((place, (folder / "README.md").read_text()))

    program = "import os, sys\nsys.modules['ddgan'] = None\n"
    for place, card in cards:
        program += f"os.chdir({str(place)!r})\nfound = {{}}\nexec({python_of(card)!r}, found)\n"
        program += "image = found.get('image') or found['pipe']().images[0]\nprint(image.width)\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.splitlines()] == [8, 8, 8, 8, 32, 8, 32]


def test_every_save_is_uploaded_and_the_last_one_is_complete(local_hub, finetune, capsys):
    run = finetune("run", "--push_to_hub", "--hub_private", "--save_model_every", 1)
    repo, output = local_hub.repos["model", "ann/run"], capsys.readouterr().out
    files = local_hub.files("ann/run")
    assert repo.private and 2 <= len(repo.refs["main"]) - 1 <= 4
    assert f"uploaded       {local_hub.url}/ann/run/commit/{repo.refs['main'][-1]}" in output
    assert files.keys() - {".gitattributes"} >= set(pipeline_files(run)) >= {"samples/step-00000000.png", "README.md"}
    card = (run / "README.md").read_text()
    assert files.pop("README.md").decode() == card.replace('from_pretrained("run")', 'from_pretrained("ann/run")')
    assert all(files[name] == (run / name).read_bytes() for name in pipeline_files(run) if name != "README.md")
    assert not [name for name in files if name.startswith(("checkpoints", "config", "metrics", "logs", "."))][1:]
    assert not list(run.glob(".tmp-*"))


def test_the_card_passes_the_hubs_validation(local_hub, finetune):
    finetune("run", "--push_to_hub")
    text = local_hub.files("ann/run")["README.md"].decode()
    card = ModelCard(text)
    card.validate()
    assert local_hub.asked("POST /api/validate-yaml") >= 2
    assert card.data.to_dict() == yaml.safe_load(text.split("---")[1]), "the client dropped some of it"
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    with pytest.raises(ValueError, match=r"license.* must be one of the known ones"):
        ModelCard(text.replace("library_name: ", "license: my own\nlibrary_name: ")).validate()


def test_failed_uploads_do_not_harm_a_run_that_prints_how_to_finish_them(local_hub, finetune, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    local_hub.fail(COMMIT, times=1000, instead=503)
    run = finetune(
        "my runs/model $1", "--push_to_hub", "--hub_private", "--save_model_every", 2, "--model_save_name", "run"
    )
    output = capsys.readouterr().out
    assert "The upload to ann/run failed: " in output and list(local_hub.files("ann/run")) == [".gitattributes"]
    command = shlex.split(re.search(r"ddgan push (.*)", output)[1])
    assert command == ["--folder", str(run), "--repo_id", "ann/run", "--private"]
    local_hub.faults.clear()
    monkeypatch.setattr(push, "sample_standalone", lambda *_, **__: b"generated elsewhere")
    push_to_hub.main(command)
    assert set(pipeline_files(run)) < local_hub.files("ann/run").keys()
    push_to_hub.main(["--folder", str(run), "--repo_id", "ann/again"])
    assert 'from_pretrained("ann/again")' in local_hub.files("ann/again")["README.md"].decode()


def test_problems_with_the_hub_are_reported_before_training(local_hub, finetune, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--push_to_hub: You have no write access to bob/mine"):
        finetune("run", "--push_to_hub", "--hub_model_id", "bob/mine")
    assert not (tmp_path / "run" / "config.yaml").exists()
    (tmp_path / "empty").mkdir()
    for flags in (
        ["--start_model", tmp_path / "empty"],
        ["--eval_every", 1, "--feature_extractor", tmp_path / "empty"],
    ):
        with pytest.raises(InputError, match="empty"):
            finetune("run", "--push_to_hub", *flags)
    assert not local_hub.repos, "a repository was created before the arguments were checked"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="--push_to_hub: The Hub rejects this token"):
        finetune("run", "--push_to_hub")
    assert not (tmp_path / "run").exists()
