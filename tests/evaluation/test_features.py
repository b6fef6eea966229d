"""Claims about feature extraction: distributed, resumable, cached."""

import pytest
import torch
from accelerate import Accelerator

from ddgan.evaluation import features
from ddgan.evaluation.features import cached_features, extract_features


class Squares:
    """The squares of image indices as features; stops after a number of batches."""

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
    result = extract_features(11, batch_size, Squares(), Accelerator())
    assert result["features"].flatten().tolist() == [i * i for i in range(11)]
    assert result["classes"].tolist() == list(range(11))
    assert result.keys() == {"features", "classes"}


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_are_aligned_and_can_run_in_threads(threads):
    batches = []

    def extract(images: range) -> dict[str, torch.Tensor]:
        batches.append(images)
        return Squares()(images)

    result = extract_features(11, 4, extract, Accelerator(), offset=2, threads=threads)
    assert sorted(batches, key=lambda images: images.start) == [range(0, 2), range(2, 6), range(6, 10), range(10, 11)]
    assert result["features"].flatten().tolist() == [i * i for i in range(11)]


def test_parts_with_another_offset_start_over(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract_features(20, 6, Squares(batches=3), Accelerator(), tmp_path)
    result = extract_features(20, 6, Squares(), Accelerator(), tmp_path, offset=4)
    assert result["features"].flatten().tolist() == [i * i for i in range(20)]


def test_an_interrupted_extraction_resumes_where_it_stopped(tmp_path):
    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        extract_features(20, 3, Squares(batches=5), Accelerator(), parts)
    extract = Squares()
    result = extract_features(20, 3, extract, Accelerator(), parts)
    assert extract.seen == list(range(12, 20))  # two parts of two batches were saved, the fifth batch was not
    assert result["features"].flatten().tolist() == [i * i for i in range(20)]
    again = extract_features(20, 3, Squares(batches=0), Accelerator(), parts)
    assert torch.equal(again["features"], result["features"])


def test_another_batch_size_starts_over(tmp_path):
    """Parts with another batch size would leave gaps."""
    path = tmp_path / "cached.safetensors"
    with pytest.raises(KeyboardInterrupt):
        cached_features(path, {}, 20, 3, Squares(batches=5), Accelerator())
    result = cached_features(path, {}, 20, 7, Squares(), Accelerator())
    assert result["features"].flatten().tolist() == [i * i for i in range(20)]
    assert [p.name for p in tmp_path.iterdir()] == ["cached.safetensors"]


def test_two_commands_that_extract_the_same_features_do_not_interfere(tmp_path):
    path = tmp_path / "cached.safetensors"
    second = []

    class WithConcurrentCommand(Squares):
        def __call__(self, images):
            if images.start == 12:  # two parts of the first command exist
                second.append(cached_features(path, {}, 20, 3, Squares(), Accelerator()))
            return super().__call__(images)

    first = cached_features(path, {}, 20, 3, WithConcurrentCommand(), Accelerator())
    assert torch.equal(first["features"], second[0]["features"])
    assert [p.name for p in tmp_path.iterdir()] == ["cached.safetensors"]


def test_cached_features_are_not_extracted_again(tmp_path):
    path = tmp_path / "cached.safetensors"
    first = cached_features(path, {"extractor": "squares"}, 7, 3, Squares(), Accelerator())
    again = cached_features(path, {"extractor": "squares"}, 7, 3, Squares(batches=0), Accelerator())
    assert torch.equal(first["features"], again["features"]) and torch.equal(first["classes"], again["classes"])
    assert features.read_protocol(path) == {"extractor": "squares"}
    assert [p.name for p in tmp_path.iterdir()] == ["cached.safetensors"]


def test_a_cache_that_cannot_be_written_does_not_end_the_extraction(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "cache" / "cached.safetensors"  # a folder that cannot be created
    result = cached_features(path, {}, 20, 3, Squares(), Accelerator())
    assert result["features"].flatten().tolist() == [i * i for i in range(20)]
    parts = extract_features(20, 3, Squares(), Accelerator(), path.with_suffix(".parts"))
    assert torch.equal(parts["features"], result["features"])
    assert len(caplog.records) == 2 and "cannot be written" in caplog.text and "--cache_dir" in caplog.text

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "replace_file", full)
    result = cached_features(tmp_path / "cached.safetensors", {}, 20, 3, Squares(), Accelerator())
    assert len(result["features"]) == 20 and "the disk is full" in caplog.text


@pytest.mark.parametrize("how", ["empty", "truncated", "changed"])
def test_damaged_features_are_extracted_again(tmp_path, caplog, how):
    path = tmp_path / "cached.safetensors"
    first = cached_features(path, {}, 7, 3, Squares(), Accelerator())
    intact = path.read_bytes()
    changed = intact[:-5] + bytes([intact[-5] ^ 1]) + intact[-4:]
    path.write_bytes({"empty": b"", "truncated": intact[:-8], "changed": changed}[how])
    again = cached_features(path, {}, 7, 3, Squares(), Accelerator())
    assert "cached.safetensors is damaged" in caplog.text
    saved = cached_features(path, {}, 7, 3, Squares(batches=0), Accelerator())
    assert torch.equal(first["features"], again["features"]) and torch.equal(first["features"], saved["features"])


def test_a_damaged_part_is_extracted_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract_features(20, 3, Squares(batches=5), Accelerator(), tmp_path)
    for part in tmp_path.iterdir():
        part.write_bytes(part.read_bytes()[:-8])
    resumed = extract_features(20, 3, Squares(), Accelerator(), tmp_path)
    assert resumed["features"].flatten().tolist() == [i * i for i in range(20)]


def test_an_image_whose_features_are_not_finite_is_named():
    def extract(images):
        return {"features": torch.tensor([[1.0, float("nan") if i == 7 else 0.0] for i in images])}

    with pytest.raises(ValueError, match="features of image 7 are not finite"):
        extract_features(10, 4, extract, Accelerator())
