"""Load pipelines in a process of its own, with Diffusers alone or with the package; test_export.py runs this.

    python in_a_fresh_process.py without_package|with_package <folder of pipeline folders> <folder to save in>

Beside each pipeline folder `name` lies `name.pt`, the images that it is expected to generate. `user/name` on the Hub
is the same pipeline.
"""

import re
import sys
from pathlib import Path

import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar


def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    needed = {
        "ClassConditionalPipeline": {"class_labels": [0, 1]},
        "GuidedPipeline": {"loss": lambda images: images.square().mean((1, 2, 3))},
    }
    arguments = {**needed.get(type(pipe).__name__, {}), "generator": torch.Generator().manual_seed(0)}
    if "_num_inference_steps" not in pipe.scheduler.config:  # a few-step pipeline knows its number of steps
        arguments["num_inference_steps"] = 2
    return pipe(batch_size=2, output_type="pt", **arguments).images


def load(kind: type, place: str | Path, **options):
    """Load with `trust_remote_code`, and retry while another process is overwriting the code.

    Diffusers copies a folder's code to the same place at each load, and the file has no class while it is empty.
    """
    for _ in range(20):
        try:
            return kind.from_pretrained(place, trust_remote_code=True, **options)
        except AttributeError as error:
            if not re.match(r"module 'diffusers_modules\.\S+' has no attribute", str(error)):
                raise
    raise AssertionError(f"the code of {place} remains empty")


def refusal(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError("the code was run without trust")


def without_package(folders: list[Path], output: Path):
    sys.modules["ddgan"] = None
    expected = {folder.name: torch.load(folder.with_suffix(".pt")) for folder in folders}
    loaded = {}
    for folder in folders:
        assert "trust_remote_code=True" in refusal(DiffusionPipeline.from_pretrained, folder)
        loaded[folder.name] = load(DiffusionPipeline, folder)
        source = folder
        for generation in ("second", "third"):
            pipe = load(DiffusionPipeline, source)
            assert torch.equal(sample(pipe), expected[folder.name]), (folder, generation)
            source = output / generation / folder.name
            pipe.save_pretrained(source)

    pipe = next(pipe for pipe in loaded.values() if type(pipe).__name__ == "ClassConditionalPipeline")
    arguments = {"class_labels": [0, 1], "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}
    plain, guided = (
        pipe(generator=torch.Generator().manual_seed(0), guide=pipe, guidance_interval=interval, **arguments).images
        for interval in ((1e8, 1e9), None)
    )
    assert torch.allclose(plain, guided, atol=1e-5)

    # pipelines loaded at the start still run their own code
    for name, pipe in loaded.items():
        assert torch.equal(sample(pipe), expected[name]), name

    weights = loaded["ddgan"].unet.state_dict()
    ddgan = next(folder for folder in folders if folder.name == "ddgan")
    for place, subfolder in ((str(ddgan), "unet"), (str(ddgan / "unet"), None), ("user/ddgan", "unet")):
        assert "trust_remote_code=True" in refusal(AutoModel.from_pretrained, place, subfolder=subfolder)
        unet = load(AutoModel, place, subfolder=subfolder)
        assert type(unet).__name__ == "NCSNpp"
        assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())

    assert "trust_remote_code=True" in refusal(DiffusionPipeline.from_pretrained, "user/ddgan")
    pipe = load(DiffusionPipeline, "user/ddgan", revision="main")
    assert torch.equal(sample(pipe), expected["ddgan"])
    pipe.save_pretrained(output / "from_the_hub")
    placed = load(DiffusionPipeline, ddgan, device_map="cpu")
    assert torch.equal(sample(placed), expected["ddgan"])
    unet = load(AutoModel, str(ddgan / "unet"), device_map={"": "cpu"})
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())


def with_package(folders: list[Path], output: Path):
    from ddgan import DDGANPipeline, DDGANScheduler, NCSNpp
    from ddgan.sampling.loading import load_pipeline

    def check(pipe, expected):
        assert (type(pipe), type(pipe.unet), type(pipe.scheduler)) == (DDGANPipeline, NCSNpp, DDGANScheduler)
        assert pipe.config._name_or_path == "user/ddgan"
        assert torch.equal(sample(pipe), expected)

    expected = torch.load(folders[0].parent / "ddgan.pt")
    here = {"cache_dir": output / "cache", "revision": "main"}
    variant = DDGANPipeline.from_pretrained("user/ddgan", variant="ema", **here)
    check(variant, torch.load(folders[0].parent / "ema.pt"))
    assert [file.name for file in output.rglob("*.safetensors")] == ["diffusion_pytorch_model.ema.safetensors"]
    check(DDGANPipeline.from_pretrained("user/ddgan", **here), expected)
    check(DDGANPipeline.from_pretrained("user/ddgan", local_files_only=True, **here), expected)
    assert DDGANPipeline.from_pretrained("user/ddgan", dtype=torch.float16, **here).unet.dtype == torch.float16
    load_pipeline("user/ddgan")
    assert not [name for name in sys.modules if name.startswith("diffusers_modules")], "remote code was run"


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bar()
    folders = sorted(path for path in Path(sys.argv[2]).iterdir() if path.is_dir())
    {"without_package": without_package, "with_package": with_package}[sys.argv[1]](folders, Path(sys.argv[3]))
