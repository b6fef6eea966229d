"""Claims about uploads by the real client, over HTTP, to a local stand-in for the Hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, SpaceCard
from tiny import contents, ended, tiny_pipeline, wait_until

from ddgan import DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.core.errors import InputError, RunError
from ddgan.hub import upload
from ddgan.hub.publication import pipeline_files, snapshot
from ddgan.hub.upload import BackgroundUpload, Repository, sample_standalone, upload_space, who_am_i
from ddgan.training.run_folder import RunFolder

COMMIT = "POST /api/models/ann/model/commit/"
STORE = "PUT /storage/"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline folder with code, a card and an image, and with other files that such a folder may contain."""
    folder = tmp_path_factory.mktemp("pipeline") / "my-model"
    torch.manual_seed(0)
    unet = NCSNpp(
        sample_size=8,
        block_out_channels=(8, 12),
        layers_per_block=1,
        attention_resolutions=(4,),
        latent_dim=5,
        latent_embed_dim=8,
        latent_mapping_layers=1,
    )
    DDGANPipeline(unet.eval(), DDGANScheduler()).save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: mit\n---\n# model\n\n![grid](samples/step-2.png) ![one](../secret.png) "
        '![far](https://x.y/z.png) <img src="x.png">\n\n'
        '```python\npipe = DiffusionPipeline.from_pretrained("my-model", trust_remote_code=True)\n```\n'
    )
    (folder.parent / "secret.png").write_bytes(b"secret")
    private = (
        "config.yaml token .env README.md~ .README.md.swp notes.txt metrics.csv nohup.out unet/optimizer.bin "
        "unet/token.txt unet/#config.json# unet/optimizer.safetensors checkpoints/step-1/model.safetensors "
        "checkpoints/step-1/optimizer.bin logs/events.out wandb/run.json samples/step-1.png .git/config "
        "__pycache__/pipeline.pyc old_pipeline.py unet/.tmp-1-config.json .tmp-files/model_index.json "
        "unet/api_key_config.json scheduler/api_key_config.json unet/key.safetensors.index.json "
        "unet/diffusion_pytorch_model_key.safetensors"
    )
    for name in (*private.split(), "samples/step-2.png", "x.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"secret {name}")
    return folder


@pytest.fixture
def folder(pipeline, tmp_path) -> Path:
    """A folder to upload: a small text and two large files."""
    folder = tmp_path / "to_upload"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# model\n")
    (folder / "large.bin").write_bytes(os.urandom(400_000))
    (folder / "weights.safetensors").write_bytes(os.urandom(3_000))
    return folder


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between attempts, which take no time."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def opened(**options) -> Repository:
    repository = Repository("ann/model", **options)
    repository.open()
    return repository


def there(hub, ref="main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files("ann/model", ref).items() if name != ".gitattributes"}


# ---- selection of files


def test_only_the_pipeline_its_code_its_card_and_its_images_are_published(pipeline):
    code = [f"{name}.py" for name in ("pipeline_ddgan", "scheduler/scheduling_ddgan", "unet/unet_ncsnpp")]
    rest = ["README.md", "model_index.json", "samples/step-2.png", "scheduler/scheduler_config.json", "x.png"]
    rest += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    names = [name if not name.endswith(".py") else f"{name[:-16]}.py" for name in pipeline_files(pipeline)]
    assert sorted(names) == sorted(code + rest)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_and_variants_of_weights_are_published(tmp_path, variant):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    shards = [f"unet/diffusion_pytorch_model{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weights = ["unet/config.json", f"unet/diffusion_pytorch_model.safetensors.index{variant}.json", *shards]
    (tmp_path / "unet").mkdir()
    for name in weights:
        (tmp_path / name).write_text("{}")
    assert pipeline_files(tmp_path) == sorted(["model_index.json", *weights])


def test_weights_in_pickles_alone_are_refused_with_what_to_do(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "run", safe_serialization=False)
    with pytest.raises(
        InputError, match=r"unet/diffusion_pytorch_model\.bin holds weights as a pickle.*save_pretrained"
    ):
        pipeline_files(tmp_path / "run")


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE", "README.md", "x.png", "unet", "unet/config.json", "."])
def test_files_behind_symbolic_links_are_not_published(run, tmp_path, name):
    if name == ".":  # a folder of the Hub's cache, where every file is a link
        elsewhere, name = tmp_path / "blobs", "README.md"
        shutil.copytree(run, elsewhere)
        for file in filter(Path.is_file, elsewhere.rglob("*")):
            (run / file.relative_to(elsewhere)).unlink()
            (run / file.relative_to(elsewhere)).symlink_to(file)
    else:
        elsewhere = tmp_path / "elsewhere"
        os.rename(run / name, elsewhere) if (run / name).exists() else elsewhere.write_text("a private key")
        (run / name).symlink_to(elsewhere)
    with pytest.raises(InputError, match=rf"run/{name} is a symbolic link to .*, but only files of the folder itself"):
        snapshot(run, "ann/model")
    assert not list(run.glob(".tmp-upload-*"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"../.docker": ["diffusers", "UNet2DModel"]}, r"names a component '\.\./\.docker', which is not the"),
        ({"..": ["diffusers", "UNet2DModel"]}, r"names a component '\.\.'"),
        ({"/etc": ["diffusers", "UNet2DModel"]}, "names a component '/etc'"),
        ({"unet": ["../../evil", "UNet2DModel"]}, r"names a module '\.\./\.\./evil', which is neither"),
        ({"unet": [".hidden", "UNet2DModel"]}, r"names a module '\.hidden'"),
        ({"_class_name": ["../evil", "P"]}, r"names a module '\.\./evil'"),
        ({"_class_name": [5, "P"]}, "names a module 5"),
        ({"_class_name": []}, "is not a pipeline folder"),
        ({"_class_name": ["a"]}, "is not a pipeline folder"),
        ({"unet": None}, "for the component unet, whose folder exists, it has None instead of the names of"),
        ({"scheduler": [None, None]}, r"for the component scheduler, .* it has \[None, None\] instead"),
        ({"unet": "UNet2DModel"}, "for the component unet, .* it has 'UNet2DModel' instead"),
    ],
)
def test_an_index_that_leaves_the_folder_or_lacks_a_component_is_refused(run, entry, message):
    (run.parent / ".docker").mkdir()
    (run.parent / ".docker" / "config.json").write_text('{"auths": "secret"}')
    index = json.loads((run / "model_index.json").read_text())
    (run / "model_index.json").write_text(json.dumps(index | entry))
    with pytest.raises(InputError, match=message):
        snapshot(run, "ann/model")


def test_a_snapshot_is_not_touched_by_the_next_save_and_leaves_the_folder_as_it_was(pipeline):
    before = contents(pipeline)
    with snapshot(pipeline, "ann/model") as copy:
        names, weights = pipeline_files(pipeline), "unet/diffusion_pytorch_model.safetensors"
        assert sorted(contents(Path(copy))) == names
        assert os.path.samefile(Path(copy, weights), pipeline / weights), "a copy, where links would do"
        (pipeline / "new").write_bytes(b"another save")
        os.replace(pipeline / "new", pipeline / weights)
        assert Path(copy, weights).read_bytes() == before[weights]
        (pipeline / weights).write_bytes(before[weights])
    assert contents(pipeline) == before


def test_the_published_card_loads_the_repository_and_no_file_contains_a_local_path(pipeline, tmp_path):
    DDGANPipeline.from_pretrained(pipeline).unet.save_pretrained(tmp_path / "unet")
    index = json.loads((pipeline / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_name_or_path": str(pipeline)}))
    with snapshot(tmp_path, "ann/model") as copy:
        assert "_name_or_path" not in (Path(copy, "model_index.json").read_text())
        assert str(pipeline.parent) not in Path(copy, "unet", "config.json").read_text()
        card = ModelCard.load(Path(copy, "README.md"))
        assert "A `DDGANPipeline` of `DDGANScheduler` (scheduler) and `NCSNpp` (unet)." in card.text
        assert 'from_pretrained("ann/model"' in card.text and "| | |" not in card.text
    with snapshot(pipeline, "ann/model") as copy:
        assert 'from_pretrained("ann/model", trust' in Path(copy, "README.md").read_text()


def test_snapshots_of_killed_commands_are_removed_and_those_in_use_are_kept(pipeline, run):
    code = (
        "import os, sys; from pathlib import Path; from ddgan.core.locks import LockedTemporaryDirectory\n"
        "directory = LockedTemporaryDirectory(Path(sys.argv[1]), '.tmp-upload-')\n"
        "Path(directory.name, 'weights').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, run])
    (run / ".tmp-upload-k3x_9abc" / "unet").mkdir(parents=True)  # of an earlier version
    assert len(list(run.glob(".tmp-upload-*/*"))) == 2
    with snapshot(run, "ann/model") as first:
        assert {path.parent for path in run.glob(".tmp-upload-*/*")} == {Path(first)}
        RunFolder(run).remove_leftovers()
        with snapshot(run, "ann/model"):
            assert sorted(contents(Path(first))) == pipeline_files(pipeline)
    assert not list(run.glob(".tmp-upload-*"))


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"not a pipeline folder: it has no model_index\.json"):
        snapshot(tmp_path, "ann/model")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", "# Größe".encode("latin-1"), "is not UTF-8 text: save it in that encoding"),
        ("README.md", b"---\nlicense: [mit\n---\n", r"The metadata of the existing README\.md cannot be read: "),
        ("model_index.json", b"{bad", r"is damaged: it is not valid JSON \(.* line 1 column 2 .*\)\. Save the"),
        ("model_index.json", b"[]", "is damaged: it is not a JSON object"),
        ("model_index.json", b"{}", "is damaged: it is an empty JSON object"),
        ("model_index.json", b'{"a": 1}', "not a pipeline folder: it has no .* that names a pipeline's class"),
        ("unet/config.json", b'{"sample_size": 8', r"is damaged: it is not valid JSON \("),
        ("scheduler/scheduler_config.json", b"{}", "is damaged: it is an empty JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(run, name, content, message):
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        snapshot(run, "ann/model")
    assert name in str(error.value)


@pytest.mark.parametrize("path", ["run", "runs/../run", "{run}"])
@pytest.mark.parametrize(
    ("call", "published"),
    [
        ('DDGANPipeline.from_pretrained("run")', 'DDGANPipeline.from_pretrained("ann/model")'),
        ('DDGANPipeline.from_pretrained("{run}")', 'DDGANPipeline.from_pretrained("ann/model")'),
        ('diffusers.DDPMPipeline.from_pretrained("old-name")', 'diffusers.DDPMPipeline.from_pretrained("ann/model")'),
        ('NCSNpp.from_pretrained("{run}/unet")', 'NCSNpp.from_pretrained("ann/model", subfolder="unet")'),
        ('NCSNpp.from_pretrained("./run/unet/", x=1)', 'NCSNpp.from_pretrained("ann/model", subfolder="unet", x=1)'),
        ('NCSNpp.from_pretrained("run", subfolder="unet")', 'NCSNpp.from_pretrained("ann/model", subfolder="unet")'),
        ('AutoTokenizer.from_pretrained("gpt2")', None),
        ('DDPMPipeline.from_pretrained("google/ddpm-cat-256")', None),
        ('UNet2DModel.from_pretrained("google/ddpm-cat-256", subfolder="unet")', None),
        ('UNet2DModel.from_pretrained("../other/unet")', None),
    ],
)
def test_a_published_card_loads_from_the_repository(run, monkeypatch, path, call, published):
    monkeypatch.chdir(run.parent)
    call, path = call.replace("{run}", str(run)), path.replace("{run}", str(run))
    (run.parent / "runs").mkdir()
    (run / "README.md").write_text(f"# Mine\n\n```python\nx = {call}\n```\n")
    with snapshot(Path(path), "ann/model") as copy:
        assert Path(copy, "README.md").read_text() == f"# Mine\n\n```python\nx = {published or call}\n```\n"


@pytest.mark.parametrize(
    ("link", "file"),
    [
        ("![a](my%20grid.png)", "my grid.png"),
        ("![a](<my grid.png>)", "my grid.png"),
        ('![a](grid.png "caption")', "grid.png"),
        ("<img width='9' src='grid.png'>", "grid.png"),
        ('<img src="it\'s.png">', "it's.png"),
        ("![a](<../secret.png>)", None),
        ("![a](%2E%2E/secret.png)", None),
        ("![a](../run/grid.png)", None),
        ("<img src='{run}/grid.png'>", None),
        ("<img src='token'>", None),
    ],
)
def test_the_images_of_a_card_are_published_whatever_the_form_of_the_link(run, monkeypatch, link, file):
    monkeypatch.chdir(run.parent)
    for name in ("../secret.png", "my grid.png", "grid.png", "it's.png"):
        (run / name).write_bytes(b"image")
    (run / "README.md").write_text(f"# Mine\n{link.replace('{run}', str(run))}\n")
    images = [name for name in pipeline_files(Path("run")) if name.endswith(".png")]
    assert images == ([file] if file else [])


def test_the_check_before_an_upload_has_no_access_to_secrets(run, monkeypatch):
    environments = []

    def check(command, env, **_):
        environments.append(env)
        Path(command[4]).write_bytes(b"image")
        return subprocess.CompletedProcess(command, 0)

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setattr(subprocess, "run", check)
    assert sample_standalone(str(run)) == b"image"
    assert environments[0]["HF_HUB_OFFLINE"] == "1" and environments[0]["PATH"] == os.environ["PATH"]
    assert "secret" not in environments[0].values()


# ---- permissions


def test_uploaded_files_are_read_back(local_hub, folder):
    repository = opened()
    done = repository.upload(folder, "first")
    assert there(local_hub) == contents(folder)
    assert done == (local_hub.repos["model", "ann/model"].refs["main"][-1], f"{repository.url}/commit/{done.commit}")
    assert set(local_hub.large) == {
        info.lfs.sha256 for info in HfApi().list_repo_tree("ann/model", recursive=True) if info.lfs
    }
    (folder / "large.bin").write_bytes(b"small now")
    second = repository.upload(folder, "second")
    assert there(local_hub) == contents(folder) and there(local_hub, done.commit) != contents(folder)
    assert repository.upload(folder, "again") == second
    assert local_hub.asked(COMMIT) == 2 and local_hub.asked(STORE) == 2


def test_a_private_repository_is_visible_to_its_owner_alone(local_hub, folder, monkeypatch):
    repository = Repository("ann/model")
    repository.open(private=True)
    repository.upload(folder, "first")
    assert HfApi().model_info("ann/model").private
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert not HfApi().repo_exists("ann/model")
    with pytest.raises(InputError, match="no write access to ann/model"):
        opened()


def test_a_public_repository_is_not_accepted_as_a_private_one(local_hub):
    opened()
    with pytest.raises(InputError, match=r"ann/model already exists and is public"):
        Repository("ann/model").open(private=True)


def test_a_missing_login_and_missing_write_access_are_reported(local_hub, folder, monkeypatch):
    repository = opened()
    assert who_am_i() == "ann"
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    for refused in (lambda: repository.upload(folder, "mine now"), Repository("ann/other").open):
        with pytest.raises(InputError, match=r"You have no write access to ann/\w+: You do not have the rights"):
            refused()
    monkeypatch.setenv("HF_TOKEN", "hf_ann_reads")
    with pytest.raises(InputError, match=r"The token of ann is read-only: create one .* using `hf auth login`"):
        who_am_i()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for refused in (who_am_i, lambda: repository.upload(folder, "mine now"), repository.open):
        with pytest.raises(InputError, match=r"rejects this token: log in again with `hf auth login`"):
            refused()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match=r"You are not logged in .* run `hf auth login`, or set HF_TOKEN"):
        who_am_i()
    assert not local_hub.asked(COMMIT)


def test_offline_mode_is_reported_at_once(local_hub, monkeypatch, waits):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set: unset it"):
        who_am_i()
    assert not waits


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "datasets/ann/model",
            "datasets/ann/model names one of the Hub's datasets, but a pipeline is uploaded to a model",
        ),
        ("model", "model has no owner: name it user/model"),
        ("ann/mod el", "'ann/mod el' cannot be the name of a repository"),
        ("ann/taken", r"The name ann/taken is taken: ann/taken is a dataset\. Choose another one"),
        ("ann/kept", r"The name ann/kept is taken: the Hub has reserved it\. Choose another one"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(local_hub, name, message):
    local_hub.add("ann/taken", "dataset")
    local_hub.shares_names = True
    if name == "ann/kept":
        local_hub.fail("POST /api/repos/create", instead=409)
    with pytest.raises(InputError, match=message):
        Repository(name).open()


def test_a_card_that_the_hub_rejects_is_reported_before_anything_is_uploaded(local_hub, folder):
    (folder / "README.md").write_text("---\nlicense: my own\n---\n")
    with pytest.raises(InputError, match='"license" must be one of the known ones, not my own'):
        opened().upload(folder, "first")
    assert not local_hub.large and not local_hub.asked(COMMIT)


# ---- errors on the way


@pytest.mark.parametrize(
    "pattern",
    [
        "GET /api/models/ann/model",
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        ".*/preupload/",
        ".*/objects/batch",
        STORE,
        COMMIT,
    ],
)
@pytest.mark.parametrize("how", [{"instead": 503}, {"halved": True}, {"lost": True}], ids=str)
def test_transient_errors_are_retried(local_hub, folder, waits, pattern, how):
    local_hub.fail(pattern, times=2, **how)
    opened().upload(folder, "first")
    assert there(local_hub) == contents(folder)
    assert waits and local_hub.faults[0].times < 2
    assert len(local_hub.repos["model", "ann/model"].refs["main"]) == 2, "more than one commit"


def test_a_commit_whose_response_was_lost_is_found_and_not_repeated(local_hub, folder, waits):
    local_hub.fail(COMMIT, lost=True)
    done = opened().upload(folder, "first")
    assert done.commit == local_hub.repos["model", "ann/model"].refs["main"][-1]
    assert local_hub.asked(COMMIT) == 1 and waits == [1]


def test_a_commit_that_somebody_else_made_in_between_is_kept(local_hub, folder, waits):
    repository, repo = opened(), local_hub.repos["model", "ann/model"]
    take_other_fault = local_hub.take_fault

    def take_fault(request):
        if request.startswith(COMMIT) and len(repo.refs["main"]) == 1:
            local_hub.commit(repo, "main", {**local_hub.files("ann/model"), "theirs": b"theirs"})
        return take_other_fault(request)

    local_hub.take_fault = take_fault
    repository.upload(folder, "first")
    assert there(local_hub) == {**contents(folder), "theirs": b"theirs"}
    assert local_hub.asked(COMMIT) == 2


@pytest.mark.parametrize("headers", [{"Retry-After": "40"}, {"RateLimit": '"api";r=0;t=40'}], ids=str)
@pytest.mark.parametrize("pattern", ["GET /api/models/ann/model", STORE, COMMIT])
def test_the_wait_that_the_hub_asks_for_is_respected(local_hub, folder, waits, pattern, headers):
    local_hub.fail(pattern, instead=429, headers=headers)
    opened().upload(folder, "first")
    assert there(local_hub) == contents(folder)
    assert len(waits) == 1 and 40 <= waits[0] <= 41


@pytest.mark.parametrize("pattern", ["HEAD .*/resolve/", "GET .*/resolve/", "GET /api/models/ann/model/"])
@pytest.mark.parametrize("how", [{"instead": 503}, {"halved": True}, {"lost": True}], ids=str)
def test_downloads_are_retried(local_hub, folder, waits, tmp_path, pattern, how):
    repository = opened()
    done = repository.upload(folder, "first")
    local_hub.fail(pattern, times=2, **how)
    downloaded = repository.download(done, ["README.md", "large.bin", "missing"], tmp_path / "cache")
    assert contents(downloaded).items() < contents(folder).items() and downloaded.name == done.commit
    assert (downloaded / "large.bin").read_bytes() == (folder / "large.bin").read_bytes()
    assert local_hub.faults[0].times == 0


def test_a_hub_that_goes_down_after_the_upload_is_not_reported_as_a_bad_upload(local_hub, folder, waits, tmp_path):
    repository = opened()
    done = repository.upload(folder, "first")
    local_hub.stop()
    with pytest.raises(
        RunError, match=r"commit/\w+ contains all files, but they could not be downloaded to check .*Rep"
    ):
        repository.download(done, ["README.md"], tmp_path / "cache")
    assert 16 in waits, "not retried like an upload"


def test_waits_grow_and_end(local_hub, folder, waits):
    repository = opened()
    local_hub.fail(COMMIT, times=100, instead=503)
    with pytest.raises(RunError, match=r"The upload to ann/model failed: .*This does not work just now"):
        repository.upload(folder, "first")
    assert waits == [1, 2, 4, 8, 16] and not there(local_hub)
    local_hub.faults.clear()
    local_hub.fail(COMMIT, instead=429, headers={"Retry-After": "3000"})
    with pytest.raises(RunError, match="The upload to ann/model failed"):
        repository.upload(folder, "first")
    assert len(waits) == 5


def test_an_upload_can_be_repeated_after_the_hub_went_down_in_the_middle(local_hub, folder, waits, monkeypatch):
    repository = opened()
    local_hub.fail(STORE, dies=1_000)
    with pytest.raises(RunError, match="The upload to ann/model failed"):
        repository.upload(folder, "first")
    assert not local_hub.up

    slept = len(waits)
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append(seconds) or (local_hub.up or local_hub.start()))
    repository.upload(folder, "first")
    assert there(local_hub) == contents(folder) and len(waits) > slept


def test_a_silent_connection_counts_as_lost(local_hub, folder, waits, monkeypatch):
    monkeypatch.setattr(upload, "_READ_TIMEOUT", 0.2)
    repository = opened()
    local_hub.fail(COMMIT, late=1)
    repository.upload(folder, "first")
    assert there(local_hub) == contents(folder)
    assert local_hub.asked(COMMIT) == 1 and waits == [1]


# ---- branches, pull requests, Spaces


def test_a_branch_is_created_and_main_stays_unchanged(local_hub, folder):
    opened(revision="v2").upload(folder, "first")
    assert there(local_hub, "v2") == contents(folder) and not there(local_hub)
    opened(revision="v2").upload(folder, "first")
    assert local_hub.asked("POST .*/branch/") == 1


@pytest.mark.parametrize("fault", [None, (COMMIT, {"lost": True}), (".*/paths-info/", {"instead": 503})], ids=str)
def test_a_pull_request_is_created_once(local_hub, folder, monkeypatch, waits, fault):
    opened()
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    if fault:
        local_hub.fail(fault[0], **fault[1])
    repository = opened(create_pr=True)
    done = repository.upload(folder, "better")
    assert done.url == f"{repository.url}/discussions/1" and not there(local_hub)
    assert there(local_hub, "refs/pr/1") == there(local_hub, done.commit) == contents(folder)
    assert repository.upload(folder, "better") == done
    assert local_hub.asked(COMMIT) == 1
    (folder / "new").write_text("new")
    assert repository.upload(folder, "better still").url.endswith("/discussions/2")


def test_a_space_shows_the_model(local_hub, tmp_path):
    with pytest.raises(InputError, match="There is no Space to upload"):
        upload_space(tmp_path, "ann/model")
    (tmp_path / "README.md").write_text(
        "---\ntitle: Samples\nsdk: gradio\nsdk_version: 6.0.0\napp_file: app.py\n---\nShows samples.\n"
    )
    for name in ("app.py", "requirements.txt", ".env", "app.py~", "__pycache__/app.pyc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    done = upload_space(tmp_path, "ann/model", private=True)
    space = local_hub.repos["space", "ann/model"]
    assert done.url == f"{local_hub.url}/spaces/ann/model/commit/{done.commit}"
    files = local_hub.files("ann/model", kind="space")
    of_app = {name for name in files if not name.startswith("ddgan/")}
    assert of_app == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    package = {"__init__.py", "LICENSE", "core/errors.py", "data/images.py", "sampling/loading.py"}
    package |= {"training/objectives/__init__.py", "training/objectives/adversarial.py"}
    assert {f"ddgan/{name}" for name in package} <= set(files) - of_app
    scripts = ("ddgan/train_", "ddgan/finetune_", "ddgan/setup.py")
    assert not [name for name in files if "test" in name or name.startswith(scripts)]
    assert space.private and space.settings["sdk"] == "gradio"
    assert space.variables == {"DDGAN_PIPELINE": {"value": "ann/model"}}
    card = SpaceCard(files["README.md"].decode())
    assert (card.data.title, card.data.models, card.data.app_file) == ("model", ["ann/model"], "app.py")
    assert "Generate images with the model `ann/model`." in card.text and "Shows samples." not in card.text
    assert "models" not in (tmp_path / "README.md").read_text()


# ---- in the background


def step(folder: Path, number: int) -> None:
    """Save as a training run does: new weights replace the old ones."""
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    (folder / "new").write_bytes(number.to_bytes(4, "big") + weights.read_bytes()[4:])
    os.replace(folder / "new", weights)


@pytest.fixture
def run(pipeline, tmp_path) -> Path:
    return Path(shutil.copytree(pipeline, tmp_path / "run"))


def uploaded(hub) -> list[int]:
    repo = hub.repos["model", "ann/model"]
    commits = [repo.commits[commit] for commit in repo.refs["main"][1:]]
    return [int.from_bytes(files["unet/diffusion_pytorch_model.safetensors"][:4], "big") for files in commits]


def test_saves_are_uploaded_as_they_were_and_only_the_newest_of_those_that_wait(local_hub, run):
    opened()
    local_hub.fail(COMMIT, late=1)
    before, start = contents(run), time.perf_counter()
    background = BackgroundUpload(run, "ann/model")
    step(run, 1)
    background.push("one")
    wait_until(lambda: local_hub.asked(COMMIT))
    for number in (2, 3, 4):
        step(run, number)
        background.push(str(number))
    assert time.perf_counter() - start < 1, "push blocked the caller"
    step(run, 5)
    done = background.finish("last")
    assert uploaded(local_hub) in ([1, 5], [1, 4, 5])
    assert done.commit == local_hub.repos["model", "ann/model"].refs["main"][-1]
    assert contents(run).keys() == before.keys(), "something was left in the run folder"


def test_a_failed_upload_does_not_affect_the_next(local_hub, run, waits, caplog, monkeypatch):
    opened()
    background = BackgroundUpload(run, "ann/model")
    local_hub.fail(COMMIT, instead=403)
    background.push("one")
    wait_until(lambda: background.outcome)
    assert "upload of this save failed" in caplog.text
    with monkeypatch.context() as full:
        full.setattr(upload, "snapshot", disk_full)
        background.push("two")
        wait_until(lambda: not background.states.qsize() and isinstance(background.outcome, OSError))
    step(run, 3)
    background.finish("three")
    assert uploaded(local_hub) == [3]


def test_a_folder_that_cannot_be_published_does_not_stop_the_caller(local_hub, run, waits):
    opened()
    (run / "LICENSE").symlink_to(run / "README.md")
    background = BackgroundUpload(run, "ann/model")
    background.push("one")
    wait_until(lambda: background.outcome)
    assert "LICENSE is a symbolic link" in str(background.outcome)
    (run / "LICENSE").unlink()
    background.finish("two")
    assert uploaded(local_hub)


def disk_full(*_):
    raise OSError("no space left on device")


def test_a_last_upload_that_failed_is_raised(local_hub, run, waits):
    opened()
    local_hub.fail(COMMIT, instead=403)
    with pytest.raises(InputError, match="no write access to ann/model"):
        BackgroundUpload(run, "ann/model").finish("last")


def test_a_process_can_exit_during_an_upload(local_hub, run):
    opened()
    local_hub.fail(COMMIT, late=200)
    code = (
        "import signal, sys, time; from pathlib import Path; from ddgan.hub.upload import BackgroundUpload\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs start without it
        f"BackgroundUpload(Path({str(run)!r}), 'ann/model').push('one'); time.sleep(float(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "1000"])
    with ended([process]):
        wait_until(lambda: local_hub.asked(COMMIT))
        process.send_signal(signal.SIGINT)
        process.wait(60)  # long before the response
