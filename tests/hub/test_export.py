"""Claims about saved pipelines: they load anywhere, can be saved again, and the package runs none of their code."""

import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from huggingface_hub import ModelCard
from in_a_fresh_process import refusal, sample
from PIL import Image
from tiny import ROOT, ended, few_step_scheduler, tiny_unet

import ddgan
from ddgan import (
    ClassConditionalPipeline,
    ClassConditionedUnet,
    ContextUnet,
    DDGANPipeline,
    DDGANScheduler,
    GuidedPipeline,
    NCSNpp,
)
from ddgan.core.files import replace_tree
from ddgan.hub import export
from ddgan.hub.export import self_contained
from ddgan.hub.publication import snapshot
from ddgan.hub.samples import save_samples
from ddgan.sampling.loading import load_pipeline

SCRIPT = ROOT / "tests/in_a_fresh_process.py"
COMMIT = "1234567890" * 4
EXPORTED = sorted(file for part in ("models", "pipelines", "schedulers") for file in (ROOT / part).glob("[!_]*.py"))


def imported(file: Path, name: str):
    """Import a file as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pipeline(kind=DDGANPipeline, network=NCSNpp, seed=0):
    torch.manual_seed(seed)
    unet = network(
        sample_size=8,
        block_out_channels=(8, 12),
        layers_per_block=1,
        attention_resolutions=(4,),
        latent_dim=5,
        latent_embed_dim=8,
        latent_mapping_layers=1,
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return kind(unet.eval(), DDGANScheduler())


def other_version(source: Path, folder: Path, old: str, new: str):
    """Import a changed copy of a module, with the same file name and size."""
    text = source.read_text()
    assert old in text and len(old) == len(new)
    folder.mkdir(exist_ok=True)
    (folder / source.name).write_text(text.replace(old, new))
    return imported(folder / source.name, f"other_{source.stem}")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expect(folder: Path, pipe, name=None):
    torch.save(sample(pipe), folder.with_name(f"{name or folder.name}.pt"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Pipeline folders, and beside each the images that it is expected to generate."""
    home, code = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("code")
    pipeline(seed=1).save_pretrained(home / "ddgan", variant="ema")
    expect(home / "ddgan", DDGANPipeline.from_pretrained(home / "ddgan", variant="ema"), "ema")
    pipeline().save_pretrained(home / "ddgan")
    expect(home / "ddgan", DDGANPipeline.from_pretrained(home / "ddgan"))

    changed = other_version(ROOT / "pipelines/pipeline_ddgan.py", code, "images / 2", "images / 4")
    network = other_version(ROOT / "models/unet_ncsnpp.py", code, "eps=1e-8", "eps=1e-0")
    changed = pipeline(self_contained(changed.DDGANPipeline), network.NCSNpp)
    changed.save_pretrained(home / "other_version")
    expect(home / "other_version", changed)

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    by_class = ClassConditionalPipeline(ClassConditionedUnet(**sizes, **blocks), few_step_scheduler(3, 1))
    by_class.save_pretrained(home / "by_class")
    expect(home / "by_class", by_class := ClassConditionalPipeline.from_pretrained(home / "by_class"))
    assert by_class.num_timesteps == 3
    by_context = ClassConditionalPipeline(ContextUnet(n_feat=8, height=8), DDIMScheduler())
    by_context.save_pretrained(home / "by_context")
    expect(home / "by_context", ClassConditionalPipeline.from_pretrained(home / "by_context"))

    guided = GuidedPipeline(tiny_unet().eval(), DDIMScheduler())
    guided.save_pretrained(home / "guided")
    expect(home / "guided", GuidedPipeline.from_pretrained(home / "guided"))
    return home


@pytest.fixture(scope="module")
def hub(saved):
    """Serve each folder `name` as the read-only repository `user/name`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0]
            if match := re.fullmatch(r"/api/models/user/(\w+)(/revision/\w+)?", path):
                names = [{"rfilename": name} for name in files(saved / match[1])]
                self.answer(json.dumps({"id": f"user/{match[1]}", "sha": COMMIT, "siblings": names}).encode())
            elif match := re.fullmatch(r"/api/models/user/(\w+)/tree/\w+", path):
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": str(hash(content))}
                    for name, content in files(saved / match[1]).items()
                ]
                self.answer(json.dumps(entries).encode())
            elif match := re.fullmatch(r"/user/(\w+)/resolve/\w+/(.+)", path):
                file = saved / match[1] / match[2]
                self.answer(file.read_bytes() if file.is_file() else None)
            else:
                self.answer(None)

        do_HEAD = do_GET

        def answer(self, content):
            self.send_response(404 if content is None else 200)
            if content is None:
                content = b""
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_folders_load_save_and_load_in_fresh_processes_at_once(saved, hub, tmp_path):
    def start(how, output, home):
        environment = {**os.environ, "HF_HOME": str(tmp_path / home), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, SCRIPT, how, saved, tmp_path / output]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    running = [
        start("without_package", "one", "shared"),
        start("without_package", "two", "shared"),
        start("with_package", "three", "own"),
    ]
    with ended(running):
        for process in running:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            assert "not expected" not in errors and "Expected types" not in errors and "might require" not in errors

    for output in ("one", "two"):
        for folder in filter(Path.is_dir, saved.iterdir()):
            name, first = folder.name, files(folder)
            first.pop("unet/diffusion_pytorch_model.ema.safetensors", None)
            assert files(tmp_path / output / "second" / name) == first
            assert files(tmp_path / output / "third" / name) == first
        assert files(tmp_path / output / "from_the_hub") == files(tmp_path / output / "third" / "ddgan")


def test_names_of_code_files_depend_on_their_contents_alone(saved, tmp_path):
    def code(folder):
        return sorted(name for name in files(folder) if name.endswith(".py"))

    names = code(saved / "ddgan")
    assert [re.sub("_[0-9a-f]{12}.py", "", name) for name in names] == [
        "pipeline_ddgan",
        "scheduler/scheduling_ddgan",
        "unet/unet_ncsnpp",
    ]
    others = code(saved / "other_version")
    assert [a == b for a, b in zip(names, others, strict=True)] == [False, True, False]
    pipeline(seed=3).save_pretrained(tmp_path)
    assert code(tmp_path) == names


def test_components_of_diffusers_are_saved_without_code(saved, tmp_path):
    assert [Path(name).suffix for name in files(saved / "guided")].count(".py") == 1
    assert json.loads((saved / "guided/model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    assert not [name for name in files(tmp_path) if name.endswith(".py")]


def test_no_file_contains_the_path_that_something_was_loaded_from(saved, tmp_path):
    pipe = DDGANPipeline.from_pretrained(saved / "ddgan")
    assert str(saved) in str(pipe.config._name_or_path) and str(saved) in pipe.unet.config._name_or_path
    pipe.save_pretrained(tmp_path)
    for content in files(tmp_path).values():
        for place in (saved, tmp_path, ROOT, Path.home()):
            assert f"{place}/".encode() not in content


def test_with_the_package_a_folder_needs_no_trust_and_its_code_does_not_run(saved, tmp_path):
    (tmp_path / "pipe").mkdir()
    for name, content in files(saved / "ddgan").items():
        (tmp_path / "pipe" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "pipe" / name).write_bytes(b"raise SystemExit" if name.endswith(".py") else content)
    expected = torch.load(saved / "ddgan.pt")
    for pipe in (
        DDGANPipeline.from_pretrained(tmp_path / "pipe"),
        DDGANPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True),
        load_pipeline(str(tmp_path / "pipe")),
    ):
        assert (type(pipe), type(pipe.unet), type(pipe.scheduler)) == (DDGANPipeline, NCSNpp, DDGANScheduler)
        torch.testing.assert_close(sample(pipe), expected)  # load_pipeline copies the weights, see its comment

    half = DDGANPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.bfloat16, device_map="cpu")
    assert half.unet.dtype == torch.bfloat16
    unet = pipeline(seed=5).unet
    assert DDGANPipeline.from_pretrained(tmp_path / "pipe", unet=unet).unet is unet


def test_with_the_package_a_component_of_another_class_still_needs_trust(tmp_path):
    other = other_version(ROOT / "models/unet_ncsnpp.py", tmp_path / "code", "class NCSNpp(", "class OTHERs(")
    pipeline(network=other.OTHERs).save_pretrained(tmp_path / "pipe")
    assert "trust_remote_code=True" in refusal(DDGANPipeline.from_pretrained, tmp_path / "pipe")
    pipe = DDGANPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    assert type(pipe) is DDGANPipeline and type(pipe.unet).__name__ == "OTHERs"


def test_a_run_folder_can_be_loaded_at_every_instant_of_a_save_with_other_code(saved, tmp_path, monkeypatch):
    def missing_files():
        index = json.loads((tmp_path / "model_index.json").read_text())
        named = [tmp_path / f"{index.pop('_class_name')[0]}.py"]
        named += [tmp_path / name / f"{pair[0]}.py" for name, pair in index.items() if isinstance(pair, list)]
        if auto_map := json.loads((tmp_path / "unet/config.json").read_text()).get("auto_map"):
            named.append(tmp_path / "unet" / f"{auto_map['AutoModel'].partition('.')[0]}.py")
        return [file for file in named if not file.is_file()]

    old = DiffusionPipeline.from_pretrained(saved / "other_version", trust_remote_code=True)
    replace_tree(tmp_path, old.save_pretrained)
    before, replace, moves = files(tmp_path), os.replace, []

    def replace_and_check(source, target):
        replace(source, target)
        moves.append(missing_files())

    monkeypatch.setattr(os, "replace", replace_and_check)
    replace_tree(tmp_path, pipeline().save_pretrained)
    pipeline().save_pretrained(tmp_path)  # and without a temporary folder
    assert moves and not any(moves)
    assert before.keys() < files(tmp_path).keys()
    assert torch.equal(sample(DDGANPipeline.from_pretrained(tmp_path)), torch.load(saved / "ddgan.pt"))


def push(pipe, how, folder) -> None:
    if how == "push_to_hub":
        pipe.push_to_hub("ann/model")
    else:
        pipe.save_pretrained(str(folder), push_to_hub=True, repo_id="ann/model")


@pytest.mark.parametrize(
    ("name", "kind", "how"),
    [
        ("ddgan", DDGANPipeline, "push_to_hub"),
        ("ddgan", DDGANPipeline, "save_pretrained"),
        ("by_class", ClassConditionalPipeline, "push_to_hub"),
        ("guided", GuidedPipeline, "push_to_hub"),
    ],
)
def test_a_push_uploads_the_complete_folder_with_a_correct_card(saved, tmp_path, local_hub, name, kind, how):
    push(kind.from_pretrained(saved / name), how, tmp_path / "saved")
    uploaded = local_hub.files("ann/model")
    text = uploaded.pop("README.md").decode()
    del uploaded[".gitattributes"]
    grid = Image.open(io.BytesIO(uploaded.pop("card_samples.png")))
    assert grid.size == (3 * 96, 3 * 96) and len(np.unique(np.asarray(grid))) > 9
    expected = files(saved / name)
    expected.pop("unet/diffusion_pytorch_model.ema.safetensors", None)
    assert uploaded == expected

    card = ModelCard(text)
    card.validate()
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "unconditional-image-generation"],
    }
    assert card.text.startswith(f"\n# model\n\nA `{kind.__name__}` of ") and "[More" not in card.text
    assert 'DiffusionPipeline.from_pretrained("ann/model", trust_remote_code=True)' in card.text
    listed = dict(re.findall(r"^\| `(.+)` \| SHA-256 `(.+)` \|$", card.text, re.MULTILINE))
    code = {path: hashlib.sha256(content).hexdigest() for path, content in uploaded.items() if path.endswith(".py")}
    assert listed == code and code


def test_a_pushed_card_shows_samples_of_the_pipeline(saved, local_hub, monkeypatch):
    pipe = DDGANPipeline.from_pretrained(saved / "ddgan")
    pipe.push_to_hub("ann/model")
    there = local_hub.files("ann/model")
    card = there["README.md"].decode()
    assert "![Seeds 0 to 8, 4 steps; uncurated.](card_samples.png)" in card
    shown = Image.open(io.BytesIO(there["card_samples.png"])).crop((96, 96, 192, 192))
    expected = pipe(batch_size=9, generator=[torch.Generator().manual_seed(seed) for seed in range(9)]).images[4]
    assert shown.tobytes() == expected.convert("RGB").resize((96, 96), Image.Resampling.NEAREST).tobytes()

    # a card that somebody changed stays, and what it shows is of the weights beside it
    head = local_hub.repos["model", "ann/model"]
    local_hub.commit(head, "main", {**there, "README.md": card.replace("## Limits", "## Limits (ask Ann)").encode()})
    pipeline(seed=5).push_to_hub("ann/model")
    again = local_hub.files("ann/model")
    assert b"ask Ann" in again["README.md"] and again["card_samples.png"] != there["card_samples.png"]

    monkeypatch.setattr(pipe.unet, "forward", None)
    with pytest.warns(UserWarning, match="no sample images, because generating them failed"):
        pipe.push_to_hub("ann/failed")
    there = local_hub.files("ann/failed")
    assert "card_samples.png" not in there and "card_samples" not in there["README.md"].decode()


def test_sample_images_are_generated_in_evaluation_mode(tmp_path):
    torch.manual_seed(0)
    pipe = ClassConditionalPipeline(tiny_unet(dropout=0.5, num_class_embeds=3), DDPMScheduler(20))
    pipe.unet.train()
    save_samples(pipe, tmp_path)
    first = (tmp_path / "card_samples.png").read_bytes()
    assert Image.open(io.BytesIO(first)).info["Caption"] == ("Seeds 0 to 8, 20 steps, the classes in turn; uncurated.")
    save_samples(pipe, tmp_path)
    assert (tmp_path / "card_samples.png").read_bytes() == first
    assert all(module.training for module in pipe.unet.modules())

    Image.new("RGB", (8, 8)).save(tmp_path / "card_samples.png")  # somebody's own
    mine = (tmp_path / "card_samples.png").read_bytes()
    save_samples(pipe, tmp_path)
    assert (tmp_path / "card_samples.png").read_bytes() == mine


def test_sample_images_of_earlier_weights_are_not_published(saved, tmp_path):
    shutil.copytree(saved / "ddgan", tmp_path / "pipe")
    save_samples(pipeline(seed=5), tmp_path / "pipe")
    with snapshot(tmp_path / "pipe", "ann/model") as taken:
        assert not Path(taken, "card_samples.png").exists()
        assert "card_samples" not in Path(taken, "README.md").read_text()


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_a_card_is_replaced_until_somebody_edits_it(saved, tmp_path, local_hub, how):
    def card() -> str:
        return local_hub.files("ann/model")["README.md"].decode()

    push(DDGANPipeline.from_pretrained(saved / "ddgan"), how, tmp_path)
    first = card()
    push(GuidedPipeline.from_pretrained(saved / "guided"), how, tmp_path)
    assert "`DDGANPipeline` of" in first and "`GuidedPipeline` of" in card() and "pipeline_ddgan" not in card()

    written = card().replace("## Limits", "## Limits (ask Ann)")
    head = local_hub.repos["model", "ann/model"]
    local_hub.commit(head, "main", {**local_hub.files("ann/model"), "README.md": written.encode()})
    push(DDGANPipeline.from_pretrained(saved / "ddgan"), how, tmp_path)
    assert card() == written


def test_the_card_of_a_folder_is_pushed_and_an_empty_template_is_not(saved, tmp_path, local_hub):
    pipe = DDGANPipeline.from_pretrained(saved / "ddgan")
    pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Ann's model\n")
    push(pipe, "save_pretrained", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Ann's model\n"
    assert local_hub.files("ann/model")["README.md"] == b"# Ann's model\n"

    DDPMPipeline(tiny_unet(), few_step_scheduler(4, 2)).save_pretrained(
        str(tmp_path / "ddpm"), push_to_hub=True, repo_id="ann/ddpm"
    )
    assert "[More Information Needed]" in (tmp_path / "ddpm/README.md").read_text()
    with snapshot(tmp_path / "ddpm", "ann/ddpm") as taken:
        card = Path(taken, "README.md").read_text()
    assert "A `DDPMPipeline` of `DDPMScheduler` (scheduler) and `UNet2DModel` (unet)." in card
    assert "trained for `num_inference_steps=4 or 2`" in card and "[More" not in card
    assert 'from_pretrained("ann/ddpm")\nimage = pipe(num_inference_steps=4).images[0]' in card


def test_without_the_package_no_card_is_pushed_but_that_of_the_folder(saved, tmp_path, local_hub):
    pipe = DiffusionPipeline.from_pretrained(saved / "ddgan", trust_remote_code=True)
    assert type(pipe) is not DDGANPipeline
    pipe.push_to_hub("ann/model")
    expected = files(saved / "ddgan").keys() - {"unet/diffusion_pytorch_model.ema.safetensors"}
    assert local_hub.files("ann/model").keys() == expected | {".gitattributes"}

    local_hub.add("ann/written", **{"README.md": b"# Ann's model\n"})
    pipe.push_to_hub("ann/written")
    assert local_hub.files("ann/written")["README.md"] == b"# Ann's model\n"

    (tmp_path / "README.md").write_text("# My model\n")
    push(pipe, "save_pretrained", tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My model\n"
    assert local_hub.files("ann/model")["README.md"] == b"# My model\n"


def test_code_that_cannot_be_copied_is_refused(tmp_path):
    class Local(NCSNpp):
        pass

    Local.__module__ = "__main__"
    with pytest.raises(ValueError, match=r"Local cannot be saved with its code.* file of its own"):
        pipeline(network=Local).save_pretrained(tmp_path)

    source = ROOT / "models/unet_ncsnpp.py"
    relative = other_version(source, tmp_path / "code", "import math\n", "import math\n")
    (tmp_path / "code" / source.name).write_text("from .parts import x\n" + source.read_text())
    with pytest.raises(ValueError, match=r"NCSNpp cannot be saved .* unet_ncsnpp.py has relative imports"):
        pipeline(network=relative.NCSNpp).save_pretrained(tmp_path)


def test_every_pipeline_of_the_package_is_self_contained():
    for name in ddgan.__all__:
        exported = getattr(ddgan, name)
        if issubclass(exported, DiffusionPipeline):
            assert exported.to_json_file.__module__ == export.__name__, name
            assert "_dict_from_json_file" in vars(exported), name


@pytest.mark.parametrize("file", EXPORTED, ids=lambda file: file.stem)
def test_exported_files_need_nothing_of_the_package(file):
    """The pattern is Diffusers' own: it counts lines of docstrings too."""
    text = file.read_text()
    found = re.findall(r"^\s*(?:from|import)\s+(\S+?)(?:\s+import.*)?$", text, flags=re.MULTILINE)
    assert found and not [name for name in found if name.startswith(("ddgan", "."))]
    if file.parent.name == "pipelines":
        own = set(re.findall(r"^(?:def|class)\s+(\w+)|^(\w+)\s*=", text, flags=re.MULTILINE))
        added = set(re.findall(r"^(?:def|class)\s+(\w+)|^(\w+)\s*=", Path(export.__file__).read_text(), re.MULTILINE))
        assert not own & added


def test_code_that_another_process_is_copying_is_read_when_it_is_complete(saved, tmp_path):
    """Diffusers copies code files to one place at each load, and they are empty for a moment."""
    (file,) = (saved / "ddgan").glob("pipeline_ddgan_*.py")
    code = file.read_text()
    copied = tmp_path / file.name
    copied.write_text("")
    timer = threading.Timer(0.3, copied.write_text, [code])
    timer.start()
    assert export._read_code(copied) == code
    timer.join()
