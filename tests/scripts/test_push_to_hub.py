"""Claims about scripts/push_to_hub.py, against a Hub on this machine."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT, tiny_unet

from ddgan import DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.core.errors import InputError, RunError
from ddgan.hub.export import draw_samples, is_unwritten
from ddgan.scripts import push_to_hub

SCRIPT = ROOT / "scripts" / "push_to_hub.py"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pipeline folder that brings code, beside a token and a checkpoint."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 12), "layers_per_block": 1, "attention_resolutions": (4,)}
    unet = NCSNpp(**sizes, latent_dim=5, latent_embed_dim=8, latent_mapping_layers=1)
    DDGANPipeline(unet.eval(), DDGANScheduler()).save_pretrained(tmp_path / "my-model")
    for name in ("token", "checkpoints/step-1/optimizer.bin"):
        (tmp_path / "my-model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my-model" / name).write_text("secret")
    return tmp_path / "my-model"


@pytest.fixture
def drawn(monkeypatch) -> list:
    """What was to be drawn in processes of their own; nothing is."""
    places = []
    monkeypatch.setattr(push_to_hub, "sample_standalone", lambda *place, **_: places.append(place) or b"the same")
    return places


def flags(folder, *more) -> list[str]:
    return ["--folder", str(folder), "--repo_id", "ann/model", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_pipeline_with_code_is_published(local_hub, folder):
    before = contents(folder)
    command = [sys.executable, SCRIPT, *flags(folder, "--private")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    drawing, sizes, steps = done.stdout.split("\n\n")
    assert drawing == "drawing        nine pictures for the card"
    assert f"{len(before[WEIGHTS]) / 1000:.1f} kB  {WEIGHTS}" in sizes and "in 9 files" in sizes
    assert sizes.endswith("stays here: checkpoints, token")
    assert [line.split(" ")[0] for line in steps.splitlines()] == ["uploading", "uploaded", "published"]
    assert f"published      {local_hub.url}/ann/model" in steps
    assert contents(folder) == before, "something local was changed"
    assert local_hub.repos["model", "ann/model"].private
    there = local_hub.files("ann/model")
    assert there.keys() - before.keys() == {".gitattributes", "README.md", "card_samples.png"}
    assert "](card_samples.png)" in there["README.md"].decode()
    assert Image.open(io.BytesIO(there["card_samples.png"])).size == (3 * 96, 3 * 96)
    assert before.keys() - there.keys() == {"token", "checkpoints/step-1/optimizer.bin"}


def test_a_repository_that_draws_another_picture_is_not_called_published(local_hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(push_to_hub, "sample_standalone", lambda place, *revision, **_: f"{place} {revision}".encode())
    with pytest.raises(RunError, match=r"/ann/model/commit/\w+ holds all files, but .* another picture for seed 0"):
        push_to_hub.main(flags(folder))
    said = capsys.readouterr().out
    assert "uploaded" in said and "published" not in said


@pytest.mark.slow
def test_what_would_not_load_for_others_is_not_uploaded(local_hub, tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(RunError, match="What was to be uploaded cannot be loaded and sampled with Diffusers alone: "):
        push_to_hub.main(flags(tmp_path))
    assert not local_hub.repos


def test_a_command_that_failed_is_finished_by_giving_it_again(local_hub, folder, drawn, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    local_hub.fail("POST .*/commit/", times=100, instead=503)
    with pytest.raises(RunError, match="The upload to ann/model failed: "):
        push_to_hub.main(flags(folder))
    large = dict(local_hub.large)
    assert large and drawn == [drawn[0]]
    local_hub.faults.clear()
    push_to_hub.main(flags(folder))
    push_to_hub.main(flags(folder))
    assert local_hub.large == large and local_hub.asked("PUT /storage") == len(large)
    commits = local_hub.repos["model", "ann/model"].refs["main"]
    assert len(commits) == 2 and drawn[-1] == ("ann/model", commits[-1])
    assert capsys.readouterr().out.count("published") == 2


@pytest.mark.parametrize("card", [b"# Ann's own words\n", "# Größe\n".encode("latin-1")])
def test_a_folder_without_a_card_leaves_the_one_that_is_there(local_hub, folder, drawn, card):
    local_hub.add("ann/model", **{"README.md": card})
    push_to_hub.main(flags(folder))
    there = local_hub.files("ann/model")
    assert there["README.md"] == card and WEIGHTS in there
    (folder / "README.md").write_text("# Other words\n")
    push_to_hub.main(flags(folder))
    assert local_hub.files("ann/model")["README.md"] == b"# Other words\n"


@pytest.mark.parametrize("where", ["repository", "folder"])
def test_a_licence_that_was_chosen_before_there_was_a_card_is_on_each_later_one(local_hub, folder, drawn, where):
    licence = b"---\nlicense: mit\ntags:\n- mine\n---\n"
    if where == "repository":
        local_hub.add("ann/model", **{"README.md": licence})
    else:
        (folder / "README.md").write_bytes(licence)
    for pipe in (DDGANPipeline, DDPMPipeline):
        push_to_hub.main(flags(folder))
        card = ModelCard(local_hub.files("ann/model")["README.md"].decode())
        assert card.data.license == "mit" and card.data.tags == ["diffusers", "unconditional-image-generation"]
        assert f"A `{pipe.__name__}` of" in card.text and is_unwritten(str(card))
        DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    push_to_hub.main(flags(folder))
    assert len(local_hub.repos["model", "ann/model"].refs["main"]) == 3, "the same was committed again"


def test_pictures_for_a_card_go_where_a_card_shows_them(local_hub, folder, monkeypatch):
    def draw(place, *revision, samples=None):
        if samples:
            draw_samples(DDGANPipeline.from_pretrained(place), Path(samples))
        return b"the same"

    monkeypatch.setattr(push_to_hub, "sample_standalone", draw)
    push_to_hub.main(flags(folder))
    first = local_hub.files("ann/model")
    assert "](card_samples.png)" in first["README.md"].decode()

    changed = first["README.md"].decode().replace("look them up", "ask Ann")
    local_hub.commit(local_hub.repos["model", "ann/model"], "main", {**first, "README.md": changed.encode()})
    pipe = DDGANPipeline.from_pretrained(folder)
    torch.nn.init.normal_(pipe.unet.conv_out.weight)
    pipe.save_pretrained(folder)
    push_to_hub.main(flags(folder))
    then = local_hub.files("ann/model")
    assert then["README.md"].decode() == changed and then["card_samples.png"] != first["card_samples.png"]

    local_hub.add("ann/other", **{"README.md": b"# Ann's own words\n"})
    push_to_hub.main(["--folder", str(folder), "--repo_id", "ann/other"])
    assert "card_samples.png" not in local_hub.files("ann/other")


def test_branches_pull_requests_and_spaces(local_hub, folder, drawn, capsys, tmp_path, monkeypatch):
    push_to_hub.main(flags(folder, "--revision", "v2"))
    push_to_hub.main(flags(folder, "--create_pr"))
    repo = local_hub.repos["model", "ann/model"]
    assert repo.refs.keys() == {"main", "v2", "refs/pr/1"} and list(local_hub.files("ann/model")) == [".gitattributes"]
    said = capsys.readouterr().out
    assert f"uploaded       {local_hub.url}/ann/model/discussions/1" in said
    for place in ("tree/v2", "discussions/1"):
        assert f"published      {local_hub.url}/ann/model/{place}: loaded from there" in said
    assert drawn[-1] == ("ann/model", repo.refs["refs/pr/1"][-1])

    monkeypatch.setattr(push_to_hub, "SPACE_FOLDER", tmp_path / "nothing")
    with pytest.raises(InputError, match="There is no Space to upload"):
        push_to_hub.main(flags(folder, "--space"))
    assert "kB" not in capsys.readouterr().out
    monkeypatch.setattr(push_to_hub, "SPACE_FOLDER", ROOT / "examples" / "space")
    push_to_hub.main(flags(folder, "--space"))
    said = capsys.readouterr().out
    assert f"Space          {local_hub.url}/spaces/ann/model/commit/" in said and "HF_TOKEN" not in said
    assert {"app.py", "generation.py", "ddgan/__init__.py"} <= set(local_hub.files("ann/model", kind="space"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "Say what to publish, and where: --folder my-model --repo_id user/my-model"),
        (("--folder", "."), "Say what to publish, and where"),
        (
            ("--folder", "nowhere", "--repo_id", "ann/model"),
            "nowhere is not a pipeline folder: it has no",
        ),
        (("--folder", "f", "--repo_id", "ann/model", "--create_pr", "--revision", "v2"), "leave --revision out"),
        (("--folder", "f", "--repo_id", "ann/model", "--space", "--create_pr"), "a Space that loads .* main branch"),
        (("--folder", "f", "--repo_id", "ann/model", "--space", "--revision", "v2"), "or leave --space out"),
        (("--folder", "f", "--repo_id", "datasets/ann/model"), "is one of the Hub's datasets"),
    ],
)
def test_what_cannot_be_published_is_refused_before_the_hub_is_asked(local_hub, more, said):
    with pytest.raises(InputError, match=said):
        push_to_hub.main(list(more))
    assert not local_hub.requests


def test_who_is_not_logged_in_is_told_how_to(local_hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"Nobody is logged in .* run `hf auth login`"):
        push_to_hub.main(flags(folder))
