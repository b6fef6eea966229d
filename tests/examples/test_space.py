"""Claims about the Space in examples/space: its page in a real browser, its images and its errors."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import httpx
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from gradio_client import Client
from gradio_client.utils import Status
from huggingface_hub import snapshot_download
from PIL import Image, ImageColor
from tiny import ROOT, ended, few_step_scheduler, free_port, tiny_unet
from tiny_clip import save_clip

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, ColorLoss, DDGANPipeline, GuidedPipeline
from ddgan.core.errors import InputError, RunError
from ddgan.core.locations import EXAMPLES
from ddgan.hub.upload import Repository, upload_space
from ddgan.sampling.generation import sample
from ddgan.sampling.loading import with_scheduler
from ddgan.scripts import space

SPACE = ROOT / "examples" / "space"
DDGAN = ROOT / "examples" / "models" / "ddgan-mnist-16"
CHROMIUM = shutil.which("chromium")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
TIMEOUT = 120  # seconds; generous, for a busy machine


def save_models(folder: Path) -> list[Path]:
    """Save two tiny pipelines: an unconditional color one, and a class-conditional one with names and a null class."""
    DDPMPipeline(tiny_unet().eval(), DDPMScheduler(prediction_type="v_prediction")).save_pretrained(
        folder / "rgb-model"
    )
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    names = {0: "cat", 1: "dog", 2: "wolf"}
    unet = ClassConditionedUnet(num_classes=3, class_dropout=0.1, id2label=names, **blocks, **sizes)
    for parameter in unet.parameters():  # with freshly initialized weights the class has hardly any effect
        torch.nn.init.normal_(parameter, std=0.2)
    ClassConditionalPipeline(unet.eval(), DDPMScheduler()).save_pretrained(folder / "class-conditional")
    (folder / "class-conditional" / "README.md").write_text(
        "# animals\n\n    pipe(class_labels=0, guidance_scale=3.0)\n"
    )
    return [folder / "rgb-model", folder / "class-conditional"]


@contextmanager
def serve(command: list, log_file: Path | None = None, **environment):
    """Run the app in another process and yield its address."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DDGAN_", "GRADIO_"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    with open(log_file, "w+") if log_file else TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        with ended([process]):
            address = next(
                (match[0] for line in process.stdout if (match := re.search(r"http://[\d.:]+", line))), None
            )
            log.seek(0)
            assert address, log.read()
            yield address
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    DDPMPipeline(tiny_unet(), few_step_scheduler(4, 2)).save_pretrained(folder / "few-step")
    torch.manual_seed(0)
    save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def address(models):
    pipelines = ",".join(
        map(str, (*(models / name for name in ("rgb-model", "class-conditional", "few-step")), DDGAN))
    )
    command = [sys.executable, "-m", "ddgan", "space", "--host", "127.0.0.1", "--port", str(free_port())]
    environment = {"DDGAN_PIPELINE": pipelines, "DDGAN_CLIP": str(models / "clip")}
    with serve(command, models / "log.txt", **environment) as address:
        assert address == f"http://127.0.0.1:{command[-1]}"
        yield address


def test_flags_of_the_command_are_settings_of_the_app(models, tmp_path, monkeypatch):
    for name in ("DDGAN_PIPELINE", "DDGAN_CLIP", "DDGAN_AUTOGUIDANCE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", ["ddgan"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    served = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: served.append((path, run_name)))
    rgb, few_step = models / "rgb-model", models / "few-step"
    flags = ["--pipeline", rgb, few_step, "--clip_model", models / "clip", "--autoguidance", rgb, "--port", 7861]
    space.main([str(flag) for flag in flags])
    assert served == [(str(EXAMPLES / "space" / "app.py"), "__main__")]
    assert os.environ["DDGAN_PIPELINE"] == f"{rgb},{few_step}"
    assert (os.environ["DDGAN_CLIP"], os.environ["DDGAN_AUTOGUIDANCE"]) == (str(models / "clip"), str(rgb))
    assert sys.argv[1:] == ["--port", "7861"]
    (tmp_path / "a,b").symlink_to(rgb)
    with pytest.raises(InputError, match=r"--pipeline .*/a,b: the web demo cannot use a folder with a comma"):
        space.main(["--pipeline", str(tmp_path / "a,b")])


@pytest.fixture(scope="module")
def browser():
    """A browser context with a desktop-sized window; the tests share its cache."""
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, part of .[dev]")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


@contextmanager
def open_page(context, address: str):
    """Open a new page, and check at the end that it sent requests to the app only."""
    page, urls = context.new_page(), []
    page.set_default_timeout(TIMEOUT * 1000)
    page.on("request", lambda request: urls.append(request.url))
    page.goto(address)
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in urls), urls
    page.close()


def click(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def choose(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).first.click()


def open_settings(page) -> None:
    page.get_by_role("button", name="Settings").click()


def fill(page, label: str, value: str) -> None:
    """Fill in a field, again if its value is lost: Gradio sets fields once more after it has shown them."""
    field = page.get_by_label(label)
    for _ in range(3):
        field.fill(value)
        page.wait_for_timeout(500)
        if field.input_value() == value:
            return
    raise AssertionError(f"{label}: {field.input_value()!r} instead of {value!r}")


def set_steps(page, count: int) -> None:
    open_settings(page)
    fill(page, "number input for Steps", str(count))


def open_guidance(page) -> None:
    page.get_by_role("tab", name="Guidance").click()


def images_in(page, gallery: str) -> list[Image.Image]:
    """Return the images that a gallery shows, at their original size."""
    elements = page.locator(f"#{gallery} .grid-container img")
    elements.first.wait_for()
    files = [page.request.get(element.get_attribute("src")).body() for element in elements.all()]
    enlarged = [Image.open(io.BytesIO(file)) for file in files]
    return [image.resize((image.width * 8 // 256,) * 2, Image.Resampling.NEAREST) for image in enlarged]


def color_distance(images: list[Image.Image], color: str) -> float:
    """Return the mean absolute difference between the mean color of the images and `color`, on the 0-255 scale."""
    mean = np.mean([np.asarray(image.convert("RGB")) for image in images], axis=(0, 1, 2))
    return np.abs(mean - ImageColor.getrgb(color)).mean()


def same_images(images: list[Image.Image], expected: list[Image.Image]) -> bool:
    """Compare up to one level, since rounding depends on the batch size."""
    pairs = zip(images, expected, strict=True)
    return all(
        np.abs(np.asarray(a.convert("RGB"), int) - np.asarray(b.convert("RGB"), int)).max() <= 1 for a, b in pairs
    )


def fits_window_width(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_color_guidance_moves_the_images_to_the_chosen_color(browser, address):
    with open_page(browser, address) as page:
        open_guidance(page)
        page.get_by_role("button", name="Color", exact=True).click()
        page.locator(".picker input").fill("#11aa44")
        page.locator(".picker input").press("Enter")
        page.get_by_role("heading", name="Diffusion models").click()
        fill(page, "number input for Guidance scale", "60")
        click(page, "Generate")
        guided, unguided = images_in(page, "guided-images"), images_in(page, "guided-unguided")
        assert len(guided) == len(unguided) == 4
        assert color_distance(guided, "#11aa44") < 20 < 50 < color_distance(unguided, "#11aa44")
        losses = re.search(r"color: ([\d.]+), unguided ([\d.]+)", page.locator("#guided-caption").inner_text())
        assert float(losses[1]) < float(losses[2]) / 2
        page.locator("#guided-strip img").wait_for()

        with page.expect_download() as download:
            click(page, "Download images")
        archive = zipfile.ZipFile(download.value.path())
        names = [f"rgb-model-seed-{seed}.png" for seed in range(4)]
        assert archive.namelist() == [*names, "rgb-model-seed-0-steps.png"]
        assert same_images([Image.open(archive.open(name)) for name in names], guided)


def test_example_buttons_fill_in_the_fields(browser, address):
    with open_page(browser, address) as page:
        open_guidance(page)
        scale, swatch = page.get_by_label("number input for Guidance scale"), page.locator(".picker .dialog-button")
        for color, value in (("#BB2266", "10"), ("#44CCAA", "15")):
            page.get_by_text(f"{color} at scale {value}").click()
            page.wait_for_function("([field, value]) => field.value == value", arg=[scale.element_handle(), value])
            assert swatch.evaluate("e => e.style.background") == "rgb({}, {}, {})".format(*ImageColor.getrgb(color))
        set_steps(page, 8)
        click(page, "#BB2266 at scale 10")
        click(page, "#44CCAA at scale 15")
        with page.expect_request("**/queue/join*") as request:  # right after, with the filled-in values
            click(page, "Generate")
        assert {"#44CCAA", 15} <= {x for x in request.value.post_data_json["data"] if isinstance(x, str | int)}
        guided, unguided = images_in(page, "guided-images"), images_in(page, "guided-unguided")
        assert color_distance(guided, "#44CCAA") < color_distance(unguided, "#44CCAA") - 3


def test_prompt_guidance_changes_the_images(browser, address):
    with open_page(browser, address) as page:
        open_guidance(page)
        choose(page, "Text prompt")
        assert not page.locator(".picker").is_visible()
        click(page, "Generate")
        page.get_by_text("The prompt is empty").wait_for()
        page.get_by_label("Prompt", exact=True).fill("a red rose")
        set_steps(page, 8)
        click(page, "Generate")
        assert not same_images(images_in(page, "guided-images"), images_in(page, "guided-unguided"))
        assert "Distance to the prompt" in page.locator("#guided-caption").inner_text()


def test_class_buttons_select_the_class(browser, address, models):
    pipe = ClassConditionalPipeline.from_pretrained(models / "class-conditional")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with open_page(browser, address) as page:
        assert not page.get_by_role("radio", name="wolf").is_visible()
        choose(page, "class-conditional")
        choose(page, "wolf")
        click(page, "Generate")  # with the class guidance of the model's card
        expected = sample(pipe, range(4), 40, ["wolf"] * 4, guidance_scale=3.0)
        assert same_images(images_in(page, "images"), expected)
        fill(page, "number input for Class guidance scale", "1")
        click(page, "Generate")
        page.get_by_text("seeds 0 to 3").wait_for()
        page.wait_for_url("**class_guidance=1&*")


def test_images_of_a_ddgan_may_differ_in_z_only(browser, address):
    pipe = DDGANPipeline.from_pretrained(DDGAN)
    pipe.set_progress_bar_config(disable=True)
    with open_page(browser, address) as page:
        assert not page.get_by_role("radio", name="z only").is_visible()
        choose(page, "ddgan-mnist-16")
        choose(page, "5")
        choose(page, "z only")
        click(page, "Generate")
        expected = [image.resize((8, 8), 0) for image in sample(pipe, [0] * 4, 4, [5] * 4, z_seeds=range(4))]
        assert same_images(images_in(page, "images"), expected)


def test_only_settings_with_an_effect_are_shown(browser, address):
    with open_page(browser, address) as page:
        choose(page, "ddgan-mnist-16")
        page.get_by_text("Denoising Diffusion GAN, 4 timesteps").wait_for()
        open_settings(page)
        page.get_by_label("number input for Steps").wait_for()
        assert not page.get_by_label("Scheduler").is_visible()  # there is one only
        assert not page.get_by_text("Class guidance scale").is_visible()
        assert not page.get_by_text("Guidance gradient").is_visible()
        open_guidance(page)
        page.get_by_role("radio", name="Text prompt").wait_for()
        choose(page, "ddgan-mnist-16")  # grayscale
        page.get_by_label("Prompt", exact=True).wait_for()
        assert not page.get_by_role("radio", name="Color").is_visible()
        assert not page.locator(".picker").is_visible()


def test_a_link_restores_the_settings(browser, address):
    with open_page(browser, address) as page:
        open_guidance(page)
        choose(page, "class-conditional")
        choose(page, "dog")
        page.get_by_label("Prompt", exact=True).fill("a dog & a wolf")
        open_settings(page)
        fill(page, "Seed of the first image", "7")
        page.get_by_label("Also generate the same seeds without guidance").uncheck()
        # last, because the choice of the model sets the steps as well, perhaps later than it shows the classes
        fill(page, "number input for Steps", "3")
        click(page, "Generate")
        images, link = images_in(page, "guided-images"), page.url
        caption = page.locator("#guided-caption").inner_text()
        assert "3 steps" in caption and "seeds 7 to 10" in caption
    with open_page(browser, address) as page:
        page.goto(link)
        page.get_by_role("radio", name="dog").wait_for()
        assert page.get_by_label("Prompt", exact=True).input_value() == "a dog & a wolf"
        click(page, "Generate")
        assert same_images(images_in(page, "guided-images"), images)
        assert not page.locator("#guided-unguided").is_visible()
        page.goto(
            f"{address}/?tab=generate&model=gone&steps=99999&seed=x&images=2&class=7"
        )  # what is unusable is ignored
        open_settings(page)
        page.wait_for_function("document.querySelector('[aria-label=\"number input for Images\"]')?.value == '2'")
        click(page, "Generate")
        page.get_by_text("4 steps in").wait_for()
        assert len(images_in(page, "images")) == 2


def test_a_few_step_model_is_compared_with_the_most_similar_model(browser, address):
    with open_page(browser, address) as page:
        page.get_by_role("tab", name="Few steps vs. many").click()
        open_settings(page)
        page.get_by_role("radio", name="2", exact=True).click()
        click(page, "Generate with both")
        few = page.locator("#few .grid-container img")
        few.first.wait_for()
        assert few.count() == page.locator("#many .grid-container img").count() == 10
        assert re.match(r"[\d.]+ s\s+2 steps of few-step", page.locator("#few-time").inner_text())
        assert re.match(r"[\d.]+ s\s+40 steps of rgb-model", page.locator("#many-time").inner_text())
        page.get_by_label("Few-step model").click()
        page.get_by_role("option", name="ddgan-mnist-16").click()
        page.wait_for_function("document.body.innerText.includes('3 classes')")
        assert page.get_by_label("Diffusion model", exact=True).input_value() == "class-conditional"


def test_errors_are_shown_without_paths(browser, address, models):
    with open_page(browser, address) as page:
        open_settings(page)
        fill(page, "Seed of the first image", "")
        click(page, "Generate")
        page.get_by_text("The seed is empty. Enter a whole number.").wait_for()
        fill(page, "Seed of the first image", "99999999999")
        click(page, "Generate")
        page.get_by_text("Value 99999999999 is greater than maximum value 2147483647").wait_for()
        config = page.request.get(f"{address}/config").text() + page.content()
        assert "rgb-model" in config
        assert not [path for path in (models, ROOT, Path.home()) if f"{path}/" in config]


def test_the_page_fits_a_phone(browser, address):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with open_page(browser.browser.new_context(**phone), address) as page:
        choose(page, "ddgan-mnist-16")
        click(page, "Generate")
        images_in(page, "images")
        assert fits_window_width(page)
        for image in page.locator("#images .grid-container img, #strip img").all():
            box = image.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        page.locator(".overflow-menu button").first.click()
        page.get_by_text("Few steps vs. many").last.click()
        page.get_by_role("button", name="Generate with both").wait_for()
        assert fits_window_width(page)


@pytest.mark.parametrize("route", ["upload", "upload/", "process_recording"])
def test_files_cannot_be_uploaded(address, route):
    response = httpx.post(f"{address}/gradio_api/{route}", files={"files": ("a.txt", b"text")})
    assert (response.status_code, response.text) == (404, "This app does not accept uploads.")


@pytest.mark.parametrize("route", ["queue/join", "call/generate_plain", "run/generate_plain", "cancel"])
@pytest.mark.parametrize("chunked", [False, True])
def test_large_requests_are_refused(address, route, chunked):
    body = json.dumps({"data": ["x" * 20_000]}).encode()
    content = iter([body[:10_000], body[10_000:]]) if chunked else body
    response = httpx.post(
        f"{address}/gradio_api/{route}", content=content, headers={"content-type": "application/json"}
    )
    assert (response.status_code, response.text) == (413, "The request is too large.")


def test_the_values_of_a_request_are_not_logged_whole(address, models):
    response = httpx.post(f"{address}/gradio_api/run/generate_plain", json={"data": ["x" * 5_000] * 3})
    assert response.status_code == 500
    log = (models / "log.txt").read_text()
    assert "Received inputs:" in log and max(map(len, log.splitlines())) < 600


# runs the app in a process whose only `ddgan` is the copy in the uploaded Space
STANDALONE_APP = """
import importlib.util, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("ddgan") is None
folder = sys.argv.pop()
sys.path.insert(0, folder)
runpy.run_path(folder + "/app.py", run_name="__main__")
"""


@pytest.mark.slow
def test_an_uploaded_space_is_self_contained(local_hub, browser, tmp_path):
    model, _ = save_models(tmp_path / "models")
    (model / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# model\n\n![a](a.png)\n\nSmall [emoji](x.md)\nof ours.\n\nMore.\n"
    )
    repository = Repository("ann/emoji")
    repository.open()
    repository.upload(model, "model")
    upload_space(SPACE, "ann/emoji")
    folder = snapshot_download("ann/emoji", repo_type="space", local_dir=tmp_path / "space")
    variables = {name: variable["value"] for name, variable in local_hub.repos["space", "ann/emoji"].variables.items()}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub"), "PYTHONPATH": ""}
    with (
        serve([sys.executable, "-P", "-c", STANDALONE_APP, folder], **variables, **home) as address,
        open_page(browser, address) as page,
    ):
        assert page.get_by_role("heading", level=1).inner_text() == page.title() == "emoji"
        page.get_by_text("Small emoji of ours.").wait_for()
        assert page.get_by_role("link", name="Model card").get_attribute("href").endswith("/ann/emoji")
        assert not page.get_by_text("ann/emoji").is_visible(), "nothing to choose: expected no choice of a model"
        assert page.get_by_role("tab").count() == 2, "nothing to compare: expected no comparison tab"
        click(page, "Generate")
        pipe = DDPMPipeline.from_pretrained(model)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert same_images(images_in(page, "images"), sample(pipe, range(4), 40))
        open_guidance(page)
        page.get_by_text("Text guidance needs a CLIP model, and none is available here.").wait_for()


def test_the_app_prints_help_instead_of_starting():
    command = [sys.executable, SPACE / "app.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 0, result.stderr
    assert "usage: app.py" in result.stdout and "DDGAN_PIPELINE" in result.stdout


def test_a_port_in_use_is_reported(address, models):
    command = [sys.executable, SPACE / "app.py", "--port", address.rpartition(":")[2]]
    environment = os.environ | {"DDGAN_PIPELINE": str(models / "rgb-model")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert result.returncode == 2
    assert f"--port {command[-1]}): the port is in use" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_its_card_and_requirements_match_the_package():
    text = (SPACE / "README.md").read_text()
    card = yaml.safe_load(text.split("---")[1])
    assert card["sdk"] == "gradio" and card["sdk_version"].startswith("6.") and (SPACE / card["app_file"]).is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={card['python_version']}"
    assert (SPACE / "requirements.txt").read_text().split() == project["dependencies"]


# ---------------------------------------------------------------------------------------------------------------------
# generation.py, without the page


@pytest.fixture(scope="module")
def generation() -> dict:
    return runpy.run_path(str(SPACE / "generation.py"), run_name="generation")


def test_a_request_beyond_the_time_limit_is_stopped(generation, models):
    model = generation["load_model"](str(models / "rgb-model"), "rgb-model")
    request = generation["GenerationRequest"](num_images=1, steps=200, scheduler="ddim", seed=0)
    with pytest.raises(RunError, match=r"stopped after 0 seconds, at step 1 of 200 .*Choose fewer"):
        generation["generate"](model, request, generation["StepProgress"](lambda *_: None, seconds=0))
    assert "step" not in vars(model.pipe.scheduler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": None}, "The number of images is empty. Enter a whole number"),
        ({"num_images": float("nan")}, "The number of images is not a whole number"),
        ({"seed": "1"}, "The seed is not a whole number"),
        ({"scheduler": ["ddim"]}, "There is no such scheduler"),
        ({"label": "a"}, "The class is not one of those on the page"),
        ({"autoguidance": None}, "The guidance scale is not a number"),
    ],
)
def test_a_request_to_the_api_with_other_values_than_the_page_offers_is_refused(generation, change, message):
    settings = {"num_images": 1, "steps": 2, "scheduler": "ddim", "seed": 0, "label": 0}
    generation["GenerationRequest"](**settings)
    with pytest.raises(InputError, match=message):
        generation["GenerationRequest"](**settings | change)


def test_targets_and_scales_of_other_types_are_refused(generation, models):
    with pytest.raises(InputError, match="The kind of guidance is not one of those on the page"):
        generation["guidance_loss"](None, "teal", None)
    for target in (["#BB2266"], {"a": 1}, 5):
        with pytest.raises(InputError, match="The color or prompt is not a text"):
            generation["guidance_loss"]("color", target, None)
    model = generation["load_model"](str(models / "rgb-model"), "rgb-model")
    request = generation["GenerationRequest"](num_images=1, steps=2, scheduler="ddim", seed=0)
    loss, progress = generation["guidance_loss"]("color", "teal", None), generation["StepProgress"](lambda *_: None)
    for scale in (float("nan"), float("inf"), None, "5"):
        with pytest.raises(InputError, match="The guidance scale is not a number"):
            generation["generate_guided"](model, request, progress, loss, scale, "sample")


def test_a_guided_pipeline_also_generates_without_guidance(generation, models):
    plain = DDPMPipeline.from_pretrained(models / "rgb-model")
    guided = generation["Model"]("guided", GuidedPipeline.from_pipe(plain))
    request = generation["GenerationRequest"](num_images=2, steps=5, scheduler="ddim", seed=0)
    progress = generation["StepProgress"](lambda *_: None)
    expected = generation["generate"](generation["Model"]("plain", plain), request, progress)
    assert same_images(generation["generate"](guided, request, progress).images, expected.images)


def test_the_scale_of_guidance_is_that_of_40_steps(generation, models):
    model = generation["load_model"](str(models / "rgb-model"), "rgb-model")
    request = generation["GenerationRequest"](num_images=2, steps=8, scheduler="ddim", seed=0)
    loss, progress = ColorLoss("teal"), generation["StepProgress"](lambda *_: None)
    guided = generation["generate_guided"](model, request, progress, loss, 20.0, "sample")
    pipe = GuidedPipeline.from_pipe(with_scheduler(model.pipe, "ddim", 8))
    expected = sample(pipe, [0, 1], 8, loss=loss, guidance_scale=100.0)
    assert same_images(guided.images, expected)
    assert not same_images(guided.images, sample(pipe, [0, 1], 8, loss=loss, guidance_scale=20.0))


def test_a_worse_model_guides_those_that_it_can_guide(generation, models, monkeypatch, tmp_path):
    unet = tiny_unet()
    unet.conv_out.weight.data *= 3
    guide = DDPMPipeline(unet.eval(), DDPMScheduler())
    guide.save_pretrained(tmp_path)
    monkeypatch.setenv("DDGAN_PIPELINE", f"{models / 'rgb-model'},{DDGAN}")
    monkeypatch.setenv("DDGAN_AUTOGUIDANCE", str(tmp_path))
    loaded = generation["load_models"]()
    assert loaded["ddgan-mnist-16"].guide is None
    model, progress = loaded["rgb-model"], generation["StepProgress"](lambda *_: None)
    request = generation["GenerationRequest"](num_images=2, steps=8, scheduler="ddim", seed=0, autoguidance=2.5)
    own = with_scheduler(model.pipe, "ddim", 8)
    expected = sample(own, [0, 1], 8, guide=guide, guidance_scale=2.5)
    assert same_images(generation["generate"](model, request, progress).images, expected)
    assert not same_images(expected, sample(own, [0, 1], 8))
    loss, pipe = ColorLoss("teal"), GuidedPipeline.from_pipe(own)
    expected = sample(pipe, [0, 1], 8, loss=loss, guidance_scale=100.0, guide=guide, autoguidance_scale=2.5)
    guided = generation["generate_guided"](model, request, progress, loss, 20.0, "sample")
    assert same_images(guided.images, expected)

    monkeypatch.setenv("DDGAN_PIPELINE", str(DDGAN))
    with pytest.raises(
        InputError, match=r"cannot guide any of the models\. ddgan-mnist-16: Autoguidance does not work"
    ):
        generation["load_models"]()


def test_autoguidance_and_class_guidance_add_up(generation, models):
    model = generation["load_model"](str(models / "class-conditional"), "animals")
    guide = ClassConditionalPipeline.from_pretrained(models / "class-conditional")
    for parameter in guide.unet.parameters():
        parameter.data *= 1.5
    model = generation["Model"](model.name, model.pipe, guide=guide)
    request = generation["GenerationRequest"](num_images=2, steps=4, scheduler="ddim", seed=0, autoguidance=2.5)
    generated = generation["generate"](model, request, generation["StepProgress"](lambda *_: None), 3.0)
    options = {"guide": guide, "guidance_scale": 2.5, "class_guidance_scale": 3.0}
    own = with_scheduler(model.pipe, "ddim", 4)
    assert same_images(generated.images, sample(own, [0, 1], 4, [0, 1], **options))


def test_a_request_without_a_model_is_refused(address):
    client, labels = Client(address, verbose=False), ("Model", "Few-step model", "Diffusion model")
    for endpoint in ("/generate_plain", "/generate_with_guidance", "/compare"):
        parameters = client.view_api(return_format="dict")["named_endpoints"][endpoint]["parameters"]
        empty = [p for p in parameters if p["label"] in labels or not p["parameter_has_default"]]
        with pytest.raises(Exception, match=r"No model of this page was chosen\. Choose one of .*rgb-model"):
            client.predict(**{p["parameter_name"]: None for p in empty}, api_name=endpoint)


def test_one_class_of_a_ddgan_is_varied(generation):
    model = generation["load_model"](str(DDGAN), "ddgan")
    request = generation["GenerationRequest"](num_images=2, steps=4, scheduler="as-saved", seed=7, vary="noise")
    generated = generation["generate"](model, request, generation["StepProgress"](lambda *_: None))
    assert same_images(generated.images, sample(model.pipe, [7, 8], 4, [0, 0], z_seeds=[7, 7]))


def test_a_few_step_model_offers_the_steps_it_was_trained_for(generation, tmp_path):
    DDPMPipeline(tiny_unet(), few_step_scheduler(3)).save_pretrained(tmp_path)
    model = generation["load_model"](str(tmp_path), "few")
    assert (model.default_steps, model.schedulers[0]) == (3, "as-saved")
    assert "1000 timesteps, few-step sampling (3)" in model.describe()

    def warning(**settings) -> str | None:
        request = generation["GenerationRequest"](num_images=1, seed=0, **settings)
        return generation["generate"](model, request, generation["StepProgress"](lambda *_: None)).warning

    assert warning(steps=3, scheduler="as-saved") is None
    assert "num_inference_steps=2 with DDIMScheduler may give worse images" in warning(steps=2, scheduler="ddim")


def test_the_embedded_models_are_the_default_with_few_steps_and_color_first(generation, monkeypatch):
    monkeypatch.delenv("DDGAN_PIPELINE", raising=False)
    models = generation["load_models"]()
    assert set(models) == {index.parent.name for index in (ROOT / "examples" / "models").glob("*/model_index.json")}
    ranks = [(model.is_color, model.is_few_step) for model in models.values()]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == (True, True)
    assert list(models)[:2] == ["twemoji-few-steps", "ddgan-emoji-32"]
    assert isinstance(models["ddgan-mnist-16"].pipe, DDGANPipeline)
    # the measured scales of guidance, and pairs of the same images and size
    assert models["twemoji-few-steps"].guidance == 4 * models["noto-emoji-32"].guidance
    assert models["mnist-28"].class_guidance == 1.5 and models["noto-emoji-classes-32"].class_guidance == 3
    many = [model for model in models.values() if not model.is_few_step]
    pairs = {
        model.name: generation["most_similar"](model, many).name for model in models.values() if model.is_few_step
    }
    assert pairs == {
        "twemoji-few-steps": "noto-emoji-32",
        "ddgan-emoji-32": "noto-emoji-32",
        "ddgan-mnist-16": "mnist-28",
    }


def test_folders_with_the_same_name_are_listed_with_their_parents(generation, monkeypatch, models, tmp_path):
    for run in ("a", "b"):
        shutil.copytree(models / "rgb-model", tmp_path / run / "best")
    monkeypatch.chdir(models / "rgb-model")

    def names(*places) -> list[str]:
        monkeypatch.setenv("DDGAN_PIPELINE", ",".join(map(str, places)))
        return list(generation["load_models"]())

    assert names(".") == names(".", models / "rgb-model") == ["rgb-model"]
    assert names(tmp_path / "a" / "best", tmp_path / "b" / "best") == ["a/best", "b/best"]


def test_a_folder_without_a_pipeline_is_reported_at_start(generation, monkeypatch, tmp_path):
    monkeypatch.setenv("DDGAN_PIPELINE", str(tmp_path))
    with pytest.raises(InputError, match="holds no pipeline"):
        generation["load_models"]()


def test_unexpected_errors_are_logged_and_not_shown(generation, capsys):
    user_message = generation["user_message"]
    assert user_message(InputError("Not a color.")) == "Not a color."
    assert user_message(RunError("Too long.")) == "Too long."
    assert "/home" not in user_message(OSError("/home/me/token: hf_secret"))
    assert "hf_secret" in capsys.readouterr().err


def test_one_request_runs_at_a_time_and_the_queue_is_limited(address):
    """The last test of this module, since it leaves the app busy."""
    client = Client(address, verbose=False)
    jobs = [client.submit(param_4=16, param_5=200, api_name="/generate_plain") for _ in range(20)]
    deadline = time.monotonic() + TIMEOUT
    while any(job.status().code == Status.STARTING for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    states = [job.status().code for job in jobs]
    assert sum(state in (Status.PROCESSING, Status.PROGRESS) for state in states) <= 1
    refused = [str(job.exception()) for job in jobs if job.done() and job.exception()]
    assert 1 <= len(refused) <= 4 and all("Queue is full" in reason for reason in refused)
