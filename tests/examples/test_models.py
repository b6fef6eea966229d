"""The pipelines in examples/models draw what their cards say."""

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import ROOT

from ddgan.evaluation.extractors import load_extractor
from ddgan.hub.cards import code_files
from ddgan.sampling.pipelines import load_pipeline

MODELS = ROOT / "examples" / "models"


@pytest.mark.parametrize("folder", sorted(path for path in MODELS.iterdir()), ids=lambda path: path.name)
def test_its_card_shows_pictures_that_are_there_and_names_its_code(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license
    assert "](samples.png)" in card.text
    assert (folder / "samples.png").is_file()
    for file, digest in code_files(folder).items():
        assert f"| `{file}` | SHA-256 `{digest}` |" in card.text


def test_digits_in_four_steps_are_read_as_what_was_asked_for():
    pipe = load_pipeline(str(MODELS / "ddgan-mnist-16"))
    asked = torch.arange(10).repeat(10)
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    images = pipe(batch_size=100, class_labels=asked, generator=generators, output_type="pt").images
    classifier = load_extractor(str(ROOT / "tests" / "fixtures" / "classifiers" / "mnist"))
    read = classifier((images * 255).round().byte())["logits"].argmax(1)
    assert pipe.scheduler.num_inference_steps == 4
    assert (read == asked).float().mean() > 0.6  # its card says 75 %
