"""The pipelines in examples/models draw what their cards say."""

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import ROOT

from ddgan.evaluation.extractors import load_extractor
from ddgan.hub.export import code_files
from ddgan.sampling.loading import load_pipeline, with_scheduler

MODELS = ROOT / "examples" / "models"


@pytest.mark.parametrize("folder", sorted(path for path in MODELS.iterdir()), ids=lambda path: path.name)
def test_its_card_shows_pictures_that_are_there_and_names_its_code(folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license
    assert "](samples.png)" in card.text
    assert (folder / "samples.png").is_file()
    for file, digest in code_files(folder).items():
        assert f"| `{file}` | SHA-256 `{digest}` |" in card.text
    load_pipeline(str(folder)).save_pretrained(tmp_path)
    assert code_files(tmp_path) == code_files(folder), "its code is not the present one: save it anew"


def share_read_as_asked(pipe, **arguments) -> float:
    asked = torch.arange(10).repeat(10)
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    images = pipe(batch_size=100, class_labels=asked, generator=generators, output_type="pt", **arguments).images
    classifier = load_extractor(str(ROOT / "examples" / "classifiers" / "mnist"))
    read = classifier((images * 255).round().byte())["logits"].argmax(1)
    return (read == asked).double().mean().item()


def test_digits_in_four_steps_are_read_as_what_was_asked_for():
    pipe = load_pipeline(str(MODELS / "ddgan-mnist-16"))
    assert share_read_as_asked(pipe) > 0.85  # its card says 95 %
    assert pipe.scheduler.num_inference_steps == 4


def test_guided_digits_are_read_as_what_was_asked_for():
    pipe = with_scheduler(load_pipeline(str(MODELS / "mnist-28")), "ddim")
    assert share_read_as_asked(pipe, guidance_scale=1.5, num_inference_steps=10) > 0.9  # its card: 99 % in 50 steps
