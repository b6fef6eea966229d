"""Claims about collecting features: dealt out, taken up, kept."""

import pytest
import torch
from accelerate import Accelerator

from ddgan.core import files
from ddgan.evaluation import features
from ddgan.evaluation.features import cached_features, extract_features


class MetricValue:
    """Squares of the numbers of images; refuses after so many batches."""

    def __init__(self, batches: int = 1000):
        self.left, self.seen = batches, []

    def __call__(self, images: range) -> dict[str, torch.Tensor]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += images
        return {"features": torch.tensor([[float(i * i)] for i in images]), "classes": torch.tensor(images)}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(features, "PART_IMAGES", 6)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_every_image_has_its_row(batch_size):
    found = extract_features(11, batch_size, MetricValue(), Accelerator())
    assert found["features"].flatten().tolist() == [i * i for i in range(11)]
    assert found["classes"].tolist() == list(range(11))
    assert found.keys() == {"features", "classes"}


def test_an_interrupted_collection_goes_on_where_it_was(tmp_path):
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        extract_features(20, 3, MetricValue(batches=5), Accelerator(), parts)
    measure = MetricValue()
    found = extract_features(20, 3, measure, Accelerator(), parts)
    assert measure.seen == list(range(12, 20))  # two parts of two batches were kept, the fifth batch was not
    assert found["features"].flatten().tolist() == [i * i for i in range(20)]
    again = extract_features(20, 3, MetricValue(batches=0), Accelerator(), parts)
    assert torch.equal(again["features"], found["features"])


def test_batches_of_another_size_begin_anew(tmp_path):
    """A part of other batches would leave holes between these."""
    path = tmp_path / "kept.safetensors"
    with pytest.raises(KeyboardInterrupt):
        cached_features(path, {}, 20, 3, MetricValue(batches=5), Accelerator())
    found = cached_features(path, {}, 20, 7, MetricValue(), Accelerator())
    assert found["features"].flatten().tolist() == [i * i for i in range(20)]
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_two_commands_that_measure_the_same_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "kept.safetensors"
    second = []

    class AndMeanwhile(MetricValue):
        def __call__(self, images):
            if images.start == 12:  # two parts of the first command are there
                second.append(cached_features(path, {}, 20, 3, MetricValue(), Accelerator()))
            return super().__call__(images)

    first = cached_features(path, {}, 20, 3, AndMeanwhile(), Accelerator())
    assert torch.equal(first["features"], second[0]["features"])
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_what_is_kept_is_not_measured_again(tmp_path):
    path = tmp_path / "kept.safetensors"
    first = cached_features(path, {"extractor": "squares"}, 7, 3, MetricValue(), Accelerator())
    again = cached_features(path, {"extractor": "squares"}, 7, 3, MetricValue(batches=0), Accelerator())
    assert torch.equal(first["features"], again["features"]) and torch.equal(first["classes"], again["classes"])
    assert features.read_protocol(path) == {"extractor": "squares"}
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_an_image_whose_features_are_not_finite_is_named():
    def measure(images):
        return {"features": torch.tensor([[1.0, float("nan") if i == 7 else 0.0] for i in images])}

    with pytest.raises(ValueError, match="features of image 7 are not finite"):
        extract_features(10, 4, measure, Accelerator())


def test_fingerprints_tell_facts_apart_not_their_order():
    assert files.fingerprint({"a": 1, "b": [2]}) == files.fingerprint({"b": [2], "a": 1})
    assert files.fingerprint({"a": 1}) != files.fingerprint({"a": 2})
