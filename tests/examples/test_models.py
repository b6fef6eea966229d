"""The pipelines in examples/models are up to date, can be published, and generate what their cards say."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import DDPMPipeline, DiffusionPipeline
from huggingface_hub import ModelCard
from tiny import ROOT, contents

from ddgan.evaluation.extractors import load_extractor
from ddgan.examples.models.save_models import remove_code, save_configs
from ddgan.hub.cards import CARD_NAME, code_section
from ddgan.hub.folders import code_files
from ddgan.hub.publication import snapshot
from ddgan.sampling.loading import load_pipeline, pipeline_hash, with_scheduler

MODELS = ROOT / "examples" / "models"
FOLDERS = sorted(index.parent for index in MODELS.glob("*/model_index.json"))
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@every_folder
def test_a_card_has_a_license_and_shows_existing_images(folder):
    card = ModelCard.load(folder / CARD_NAME)
    assert card.data.license
    assert "](samples.png)" in card.text
    assert (folder / "samples.png").is_file()


@every_folder
def test_saving_the_configs_again_changes_nothing(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    remove_code(copy)
    save_configs(copy)
    assert contents(copy) == contents(folder), "run `make models`"


def test_a_self_contained_folder_is_embedded_without_its_code(tmp_path):
    folder = MODELS / "ddgan-mnist-16"
    load_pipeline(str(folder)).save_pretrained(tmp_path)
    code = code_files(tmp_path)
    card, heading, limits = (folder / CARD_NAME).read_text(encoding="utf-8").partition("## Limits")
    (tmp_path / CARD_NAME).write_text(f"{card}{code_section(code)}\n\n{heading}{limits}", encoding="utf-8")
    remove_code(tmp_path)
    save_configs(tmp_path)
    assert len(code) == 3 and contents(tmp_path).items() <= contents(folder).items()


@every_folder
def test_a_published_folder_contains_its_code_and_loads_with_diffusers_alone(folder, tmp_path):
    before, pipe = contents(folder), load_pipeline(str(folder))
    pipe.save_pretrained(tmp_path)
    with snapshot(shutil.copytree(folder, tmp_path / "model"), "ann/model") as copy:
        code = code_files(Path(copy))
        published = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True)
        card = Path(copy, CARD_NAME).read_text(encoding="utf-8")
    assert code == code_files(tmp_path) and bool(code) == (type(pipe) is not DDPMPipeline)
    assert pipeline_hash(published) == pipeline_hash(pipe)
    assert type(published).__module__.startswith("diffusers_modules." if code else "diffusers.")
    assert code_section(code) in card if code else "## Code" not in card
    assert 'Pipeline.from_pretrained("ann/model")' in card and "examples/models" not in card.split("```")[1]
    assert contents(folder) == before


def class_accuracy(pipe, **arguments) -> float:
    """Return the share of 100 digits that a classifier recognizes as the requested ones."""
    requested = torch.arange(10).repeat(10)
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    images = pipe(batch_size=100, class_labels=requested, generator=generators, output_type="pt", **arguments).images
    classifier = load_extractor(str(ROOT / "examples" / "classifiers" / "mnist"))
    recognized = classifier((images * 255).round().byte())["logits"].argmax(1)
    return (recognized == requested).double().mean().item()


def test_digits_in_four_steps_are_recognized_as_requested():
    pipe = load_pipeline(str(MODELS / "ddgan-mnist-16"))
    assert class_accuracy(pipe) > 0.95  # its card says 99 %
    assert pipe.scheduler.num_inference_steps == 4


def test_guided_digits_are_recognized_as_requested():
    pipe = with_scheduler(load_pipeline(str(MODELS / "mnist-28")), "ddim")
    assert class_accuracy(pipe, guidance_scale=1.5, num_inference_steps=10) > 0.9  # its card: 99 % in 50 steps


def test_emoji_of_another_set_are_recognized_more_often_than_by_chance():
    dataset = load_dataset(str(ROOT / "examples" / "data" / "twemoji-32"), split="train").with_format("torch")
    classifier = load_extractor(str(ROOT / "examples" / "classifiers" / "emoji"))
    recognized = classifier(dataset["image"][:])["logits"].argmax(1)
    assert (recognized == dataset["label"][:]).double().mean() > 0.3  # its card says 40 %, chance is 11 %
