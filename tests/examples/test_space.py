"""Claims about the Space in examples/space: its page in a real browser, and what it draws, says and refuses."""

import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from gradio_client import Client
from gradio_client.utils import Status
from huggingface_hub import snapshot_download
from PIL import Image, ImageColor
from tiny import ROOT, tiny_unet
from tiny_clip import save_clip

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, DDGANPipeline, GuidedPipeline
from ddgan.core.errors import InputError, RunError
from ddgan.hub.upload import Repository, upload_space
from ddgan.sampling.generation import sample

SPACE = ROOT / "examples" / "space"
DDGAN = ROOT / "examples" / "models" / "ddgan-mnist-16"
CHROMIUM = shutil.which("chromium")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync", "extensions")
PATIENCE = 120  # seconds, for a machine that is busy


def save_models(folder: Path) -> list[Path]:
    """Tiny pipelines: one in colour, one by class with names and a null class."""
    DDPMPipeline(tiny_unet().eval(), DDPMScheduler(prediction_type="v_prediction")).save_pretrained(
        folder / "in-color"
    )
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    names = {0: "cat", 1: "dog", 2: "wolf"}
    unet = ClassConditionedUnet(num_classes=3, class_dropout=0.1, id2label=names, **blocks, **sizes)
    for parameter in unet.parameters():  # to fresh weights the class hardly matters
        torch.nn.init.normal_(parameter, std=0.2)
    ClassConditionalPipeline(unet.eval(), DDPMScheduler()).save_pretrained(folder / "by-class")
    return [folder / "in-color", folder / "by-class"]


@contextmanager
def served(command: list, **environment):
    """The address of the app that a process runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DDGAN_", "GRADIO_"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    with TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            address = next(
                (found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line))), None
            )
            log.seek(0)
            assert address, log.read()
            yield address
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    torch.manual_seed(0)
    save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def address(models):
    shown = ",".join(map(str, (models / "in-color", models / "by-class", DDGAN)))
    command = [sys.executable, SPACE / "app.py"]
    with served(command, DDGAN_PIPELINE=shown, DDGAN_CLIP=str(models / "clip")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """With a window on a desk, and what it has cached."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: .[dev] has it")
    flags = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser.new_context(viewport={"width": 1280, "height": 900})
        browser.close()


@contextmanager
def opened(context, address: str):
    """A page of its own; no other host than that of the app may be asked for anything."""
    page, asked = context.new_page(), []
    page.set_default_timeout(PATIENCE * 1000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    page.close()


def press(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def choose(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).first.click()


def set_steps(page, count: int) -> None:
    page.get_by_role("button", name="Settings").first.click()
    page.get_by_label("number input for Steps").first.fill(str(count))


def pictures(page, gallery: str) -> list[Image.Image]:
    """Those that a gallery shows, in their own size."""
    shown = page.locator(f"#{gallery} .grid-container img")
    shown.first.wait_for()
    files = [page.request.get(image.get_attribute("src")).body() for image in shown.all()]
    large = [Image.open(io.BytesIO(file)) for file in files]
    return [image.resize((image.width * 8 // 256,) * 2, Image.Resampling.NEAREST) for image in large]


def distance(shown: list[Image.Image], color: str) -> float:
    """Of their mean colour, in levels."""
    mean = np.mean([np.asarray(image.convert("RGB")) for image in shown], axis=(0, 1, 2))
    return np.abs(mean - ImageColor.getrgb(color)).mean()


def same(shown: list[Image.Image], expected: list[Image.Image]) -> bool:
    """As far as sums in batches go."""
    pairs = zip(shown, expected, strict=True)
    return all(
        np.abs(np.asarray(a.convert("RGB"), int) - np.asarray(b.convert("RGB"), int)).max() <= 1 for a, b in pairs
    )


def has_no_sideways_scroll(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_chosen_colour_pulls_the_pictures(browser, address):
    with opened(browser, address) as page:
        page.get_by_role("button", name="Colour", exact=True).click()
        page.locator(".picker input").fill("#11aa44")
        page.locator(".picker input").press("Enter")
        page.get_by_role("heading", name="Diffusion, steered").click()
        page.get_by_label("number input for Guidance scale").fill("60")
        press(page, "Draw in this colour")
        guided, free = pictures(page, "pictures"), pictures(page, "unguided")
        assert len(guided) == len(free) == 4
        assert distance(guided, "#11aa44") < 20 < 50 < distance(free, "#11aa44")
        said = re.search(r"colour: ([\d.]+), without the pull ([\d.]+)", page.locator("#caption").inner_text())
        assert float(said[1]) < float(said[2]) / 2
        page.locator("#strip img").wait_for()

        with page.expect_download() as download:
            press(page, "Download the pictures")
        archive = zipfile.ZipFile(download.value.path())
        names = [f"in-color-seed-{seed}.png" for seed in range(4)]
        assert archive.namelist() == [*names, "in-color-seed-0-steps.png"]
        assert same([Image.open(archive.open(name)) for name in names], guided)


def test_the_examples_of_the_course_fill_in_the_fields(browser, address):
    with opened(browser, address) as page:
        scale, swatch = page.get_by_label("number input for Guidance scale"), page.locator(".picker .dialog-button")
        for color, value in (("#BB2266", "3"), ("#44CCAA", "5")):
            page.get_by_text(f"{color} at {value}").click()
            page.wait_for_function("([field, value]) => field.value == value", arg=[scale.element_handle(), value])
            assert swatch.evaluate("e => e.style.background") == "rgb({}, {}, {})".format(*ImageColor.getrgb(color))
        set_steps(page, 8)
        press(page, "#BB2266 at 3")
        press(page, "#44CCAA at 5")
        with page.expect_request("**/queue/join*") as request:  # at once, with what was filled in
            press(page, "Draw in this colour")
        assert {"#44CCAA", 5} <= {x for x in request.value.post_data_json["data"] if isinstance(x, str | int)}
        guided, free = pictures(page, "pictures"), pictures(page, "unguided")
        assert distance(guided, "#44CCAA") < distance(free, "#44CCAA") - 3


def test_a_sentence_pulls(browser, address):
    with opened(browser, address) as page:
        page.get_by_role("tab", name="Sentence").click()
        press(page, "Draw what it says")
        page.get_by_text("Write a sentence first").wait_for()
        page.get_by_label("Sentence").last.fill("a red rose")
        set_steps(page, 8)
        press(page, "Draw what it says")
        assert not same(pictures(page, "pictures"), pictures(page, "unguided"))
        assert "Distance to the sentence" in page.locator("#caption").inner_text()


def test_class_buttons_say_what_is_drawn(browser, address, models):
    pipe = ClassConditionalPipeline.from_pretrained(models / "by-class")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with opened(browser, address) as page:
        assert not page.get_by_role("radio", name="wolf").is_visible()
        choose(page, "by-class")
        choose(page, "wolf")
        page.get_by_label("number input for Guidance towards the class").fill("3")
        press(page, "Draw")
        expected = sample(pipe, range(4), 40, ["wolf"] * 4, guidance_scale=3.0)
        assert same(pictures(page, "pictures"), expected)


def test_a_model_without_colours_says_so(browser, address):
    with opened(browser, address) as page:
        choose(page, "ddgan-mnist-16")
        page.get_by_text("Denoising Diffusion GAN of 4 steps").first.wait_for()
        page.get_by_role("tab", name="Colour").click()
        assert page.get_by_text("draws in grey").is_visible()
        assert not page.get_by_role("button", name="Draw in this colour").is_visible()


def test_a_ddgan_is_shown_beside_a_model_of_many_steps(browser, address):
    with opened(browser, address) as page:
        page.get_by_role("tab", name="Few steps beside many").click()
        press(page, "Draw with both")
        shown = page.locator("#few .grid-container img")
        shown.first.wait_for()
        assert shown.count() == page.locator("#many .grid-container img").count() == 10
        assert re.match(r"[\d.]+ s\s+4 steps of ddgan-mnist-16", page.locator("#few-time").inner_text())
        assert re.match(r"[\d.]+ s\s+40 steps of by-class", page.locator("#many-time").inner_text())


def test_errors_are_shown_without_a_path(browser, address, models):
    with opened(browser, address) as page:
        page.get_by_role("button", name="Settings").first.click()
        page.get_by_label("Seed of the first picture").first.fill("")
        press(page, "Draw in this colour")
        page.get_by_text("The seed is empty: give a whole number.").wait_for()
        page.get_by_label("Seed of the first picture").first.fill("99999999999")
        press(page, "Draw in this colour")
        page.get_by_text("Value 99999999999 is greater than maximum value 2147483647").wait_for()
        config = page.request.get(f"{address}/config").text() + page.content()
        assert "in-color" in config
        assert not [path for path in (models, ROOT, Path.home()) if f"{path}/" in config]


def test_a_phone_shows_all_of_it(browser, address):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    with opened(browser.browser.new_context(**phone), address) as page:
        choose(page, "ddgan-mnist-16")
        press(page, "Draw")
        pictures(page, "pictures")
        assert has_no_sideways_scroll(page)
        for image in page.locator("#pictures .grid-container img, #strip img").all():
            box = image.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        page.get_by_role("tab", name="Few steps beside many").click()
        page.get_by_role("button", name="Draw with both").wait_for()
        assert has_no_sideways_scroll(page)


# what a process runs that has no other `ddgan` than the one beside the app
ALONE = """
import importlib.util, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
assert importlib.util.find_spec("ddgan") is None
sys.path.insert(0, sys.argv[1])
runpy.run_path(sys.argv[1] + "/app.py", run_name="__main__")
"""


@pytest.mark.slow
def test_an_uploaded_space_is_complete_in_itself(local_hub, browser, tmp_path):
    model, _ = save_models(tmp_path / "models")
    repository = Repository("ann/emoji")
    repository.open()
    repository.upload(model, "model")
    upload_space(SPACE, "ann/emoji")
    folder = snapshot_download("ann/emoji", repo_type="space", local_dir=tmp_path / "space")
    variables = {name: each["value"] for name, each in local_hub.repos["space", "ann/emoji"].variables.items()}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
    with (
        served([sys.executable, "-P", "-c", ALONE, folder], **variables, **home) as address,
        opened(browser, address) as page,
    ):
        page.get_by_role("tab", name="Sentence").click()
        page.get_by_text("Sentences pull by a CLIP model, whose weights are not here.").wait_for()
        assert page.get_by_role("tab").count() == 4, "there is nothing to compare"
        page.get_by_role("tab", name="Freely").click()
        press(page, "Draw")
        pipe = DDPMPipeline.from_pretrained(model)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert same(pictures(page, "pictures"), sample(pipe, range(4), 40))


def test_its_card_and_its_requirements_fit_the_package():
    text = (SPACE / "README.md").read_text()
    card = yaml.safe_load(text.split("---")[1])
    assert card["sdk"] == "gradio" and card["sdk_version"].startswith("6.") and (SPACE / card["app_file"]).is_file()
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={card["python_version"]}"' in setup
    needed = re.search(r"install_requires=\[(.*?)\]", setup, re.DOTALL)[1]
    assert (SPACE / "requirements.txt").read_text().split() == re.findall(r'"(.*?)"', needed)


# ---- what it draws, without the page


@pytest.fixture(scope="module")
def drawing() -> dict:
    return runpy.run_path(str(SPACE / "drawing.py"), run_name="drawing")


def test_what_takes_too_long_is_ended(drawing, models):
    model = drawing["load_model"](str(models / "in-color"), "in-color")
    wanted = drawing["Wanted"](pictures=1, steps=200, scheduler="ddim", seed=0)
    with pytest.raises(RunError, match=r"stopped after 0 seconds, at step 1 of 200 .*Ask for fewer"):
        drawing["draw"](model, wanted, drawing["Watch"](lambda *_: None, seconds=0))
    assert "step" not in vars(model.pipe.scheduler)


def test_a_guided_pipeline_is_also_drawn_freely(drawing, models):
    plain = DDPMPipeline.from_pretrained(models / "in-color")
    guided = drawing["Model"]("guided", GuidedPipeline.from_pipe(plain))
    wanted = drawing["Wanted"](pictures=2, steps=5, scheduler="ddim", seed=0)
    watch = drawing["Watch"](lambda *_: None)
    expected = drawing["draw"](drawing["Model"]("plain", plain), wanted, watch)
    assert same(drawing["draw"](guided, wanted, watch).pictures, expected.pictures)


def test_by_default_the_embedded_models_are_shown_those_in_colour_first(drawing, monkeypatch):
    monkeypatch.delenv("DDGAN_PIPELINE", raising=False)
    models = drawing["load_models"]()
    assert set(models) == {index.parent.name for index in (ROOT / "examples" / "models").glob("*/model_index.json")}
    in_color = [model.is_in_color for model in models.values()]
    assert in_color == sorted(in_color, reverse=True) and in_color[0]
    assert isinstance(models["ddgan-mnist-16"].pipe, DDGANPipeline)


def test_models_have_the_names_of_their_folders_and_of_those_above_where_these_are_the_same(
    drawing, monkeypatch, models, tmp_path
):
    for run in ("a", "b"):
        shutil.copytree(models / "in-color", tmp_path / run / "best")
    monkeypatch.chdir(models / "in-color")

    def names(*places) -> list[str]:
        monkeypatch.setenv("DDGAN_PIPELINE", ",".join(map(str, places)))
        return list(drawing["load_models"]())

    assert names(".") == names(".", models / "in-color") == ["in-color"]
    assert names(tmp_path / "a" / "best", tmp_path / "b" / "best") == ["a/best", "b/best"]


def test_what_cannot_be_shown_is_said_early(drawing, monkeypatch, tmp_path):
    monkeypatch.setenv("DDGAN_PIPELINE", str(tmp_path))
    with pytest.raises(InputError, match="holds no pipeline"):
        drawing["load_models"]()


def test_what_goes_wrong_is_told_in_our_own_words(drawing, capsys):
    in_words = drawing["in_words"]
    assert in_words(InputError("No such colour.")) == "No such colour."
    assert in_words(RunError("Too long.")) == "Too long."
    assert "/home" not in in_words(OSError("/home/me/token: hf_secret"))
    assert "hf_secret" in capsys.readouterr().err


def test_one_visitor_is_drawn_for_at_a_time_and_too_many_are_told(address):
    """The last one here, for it leaves the app at work."""
    client = Client(address, verbose=False)
    jobs = [client.submit(param_4=16, param_5=200, api_name="/draw_freely") for _ in range(20)]
    until = time.monotonic() + PATIENCE
    while any(job.status().code == Status.STARTING for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.1)
    states = [job.status().code for job in jobs]
    assert sum(state in (Status.PROCESSING, Status.PROGRESS) for state in states) <= 1
    refused = [str(job.exception()) for job in jobs if job.done() and job.exception()]
    assert 1 <= len(refused) <= 4 and all("Queue is full" in reason for reason in refused)
