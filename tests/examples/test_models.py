"""Claims about the embedded pipelines in examples/models: complete cards, current code and the stated accuracy."""

import pytest
import torch
from huggingface_hub import ModelCard
from tiny import ROOT

from ddgan.evaluation.extractors import load_extractor
from ddgan.hub.export import code_files
from ddgan.sampling.loading import load_pipeline, with_scheduler

MODELS = ROOT / "examples" / "models"


@pytest.mark.parametrize("folder", sorted(path for path in MODELS.iterdir()), ids=lambda path: path.name)
def test_the_card_shows_existing_samples_and_lists_the_code(folder, tmp_path):
    card = ModelCard.load(folder / "README.md")
    assert card.data.license
    assert "](samples.png)" in card.text
    assert (folder / "samples.png").is_file()
    for file, digest in code_files(folder).items():
        assert f"| `{file}` | SHA-256 `{digest}` |" in card.text
    load_pipeline(str(folder)).save_pretrained(tmp_path)
    assert code_files(tmp_path) == code_files(folder), "the code in the folder is outdated: save the pipeline again"


def class_accuracy(pipe, **arguments) -> float:
    labels = torch.arange(10).repeat(10)
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    images = pipe(batch_size=100, class_labels=labels, generator=generators, output_type="pt", **arguments).images
    classifier = load_extractor(str(ROOT / "examples" / "classifiers" / "mnist"))
    predictions = classifier((images * 255).round().byte())["logits"].argmax(1)
    return (predictions == labels).double().mean().item()


def test_class_accuracy_of_the_ddgan_in_four_steps():
    pipe = load_pipeline(str(MODELS / "ddgan-mnist-16"))
    assert class_accuracy(pipe) > 0.85  # its card says 95 %
    assert pipe.scheduler.num_inference_steps == 4


def test_class_accuracy_with_classifier_free_guidance():
    pipe = with_scheduler(load_pipeline(str(MODELS / "mnist-28")), "ddim")
    assert class_accuracy(pipe, guidance_scale=1.5, num_inference_steps=10) > 0.9  # its card says 99 % in 50 steps
