"""Claims about scripts/train_classifier.py, through its command line."""

import math
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT, largest_difference, run_ranks, write_idx

from ddgan.commands.arguments import ClassifierDataArguments
from ddgan.commands.train_classifier import open_splits
from ddgan.core.errors import InputError, RunError
from ddgan.data.preprocessing import Preprocessing
from ddgan.data.sources import MissingSplitError, open_source
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.extractors import load_extractor
from ddgan.scripts import train_classifier
from ddgan.training.objectives.classification import augment
from ddgan.training.randomness import PerSampleRNG
from ddgan.training.tracking import read_metrics

SHORT = ("--widths", "8", "16", "--num_epochs", "8", "--batch_size", "8", "--learning_rate", "1e-2")
CLASSES = ("left", "right")


def make_image(label: int, number: int) -> Image.Image:
    """Return noise that is brighter on one side: the left for class 0, the right for class 1."""
    pixels = np.random.default_rng([label, number]).integers(0, 128, (8, 8, 3), dtype=np.uint8)
    pixels[:, 4 * label : 4 * label + 4] += 100
    return Image.fromarray(pixels)


def write_classes(folder: Path, count: int) -> Path:
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            make_image(label, number).save(folder / name / f"{number}.png")
    return folder


def train(data: tuple, output: Path, *flags) -> ImageClassifier:
    train_classifier.main([str(flag) for flag in (*data, "--output_dir", output, *SHORT, *flags)])
    return ImageClassifier.from_pretrained(output)


def accuracy(classifier: ImageClassifier) -> float:
    """Return the accuracy on images that are not part of any training set."""
    images = np.stack([np.asarray(make_image(label, 1000 + i)) for label in (0, 1) for i in range(20)])
    logits = classifier(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    return (logits.argmax(1) == torch.arange(2).repeat_interleave(20)).double().mean().item()


def test_a_folder_with_one_subfolder_per_class(tmp_path, capsys):
    data = write_classes(tmp_path / "sides", 40)
    classifier = train(("--train_data_dir", data), tmp_path / "classifier")
    assert classifier.class_names == ["left", "right"]
    assert accuracy(classifier) > 0.9
    assert "of 8 images (held out)" in capsys.readouterr().out  # a tenth of 80


def test_a_folder_with_train_and_test_splits(tmp_path, capsys):
    write_classes(tmp_path / "sides" / "train", 30)
    write_classes(tmp_path / "sides" / "test", 7)
    classifier = train(("--train_data_dir", tmp_path / "sides"), tmp_path / "classifier")
    assert classifier.class_names == ["left", "right"]
    assert "of 14 images (the test split)" in capsys.readouterr().out


def test_the_split_to_test_on_is_that_of_the_flag(tmp_path, capsys):
    for split, count in (("train", 8), ("test", 7), ("validation", 5)):
        write_classes(tmp_path / "sides" / split, count)
    data = ("--train_data_dir", tmp_path / "sides", "--test_split", "validation")
    train(data, tmp_path / "classifier", "--num_epochs", 1)
    assert "of 10 images (the test split)" in capsys.readouterr().out


def test_images_train_alike_from_memory_and_from_files_and_otherwise_with_another_augmentation(tmp_path):
    data = ("--train_data_dir", write_classes(tmp_path / "sides", 8))
    first, same, other = (
        train(data, tmp_path / name, "--num_epochs", 1, *flags).head.weight
        for name, flags in (("first", ()), ("same", ("--no_cache_images",)), ("other", ("--augmentation", 0)))
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_images_to_train_on_are_not_the_test_split(tmp_path, capsys):
    for split in ("train", "test"):
        write_classes(tmp_path / "data" / split, 8)
    data = ("--train_data_dir", tmp_path / "data", "--split", "test")
    train(data, tmp_path / "classifier", "--num_epochs", 1)
    assert "(held out)" in capsys.readouterr().out
    with pytest.raises(InputError, match="--test_split test names the images to train on"):
        train(data, tmp_path / "other", "--test_split", "test")
    with pytest.raises(MissingSplitError, match="has no split test"):
        train(("--train_data_dir", tmp_path / "data" / "train"), tmp_path / "other", "--test_split", "test")


def test_a_dataset_with_labels(tmp_path, capsys):
    features = datasets.Features({"side": datasets.ClassLabel(names=list(CLASSES)), "image": datasets.Image()})
    for split, count in (("train", 30), ("test", 5)):
        rows = {"side": [0, 1] * count, "image": [make_image(i % 2, i) for i in range(2 * count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    classifier = train(("--dataset_name", tmp_path / "data"), tmp_path / "classifier")
    assert classifier.class_names == ["left", "right"]
    assert accuracy(classifier) > 0.9
    assert "of 10 images (the test split)" in capsys.readouterr().out


def test_an_mnist_style_folder_gives_a_grayscale_classifier(tmp_path, capsys):
    for part, count in (("train", 60), ("t10k", 6)):
        labels = np.arange(count, dtype=np.uint8) % 2
        images = np.stack([np.asarray(make_image(label, i).convert("L")) for i, label in enumerate(labels)])
        write_idx(tmp_path / "sides" / "raw" / f"{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / "sides" / "raw" / f"{part}-labels-idx1-ubyte", labels)
    classifier = train(("--train_data_dir", tmp_path / "sides"), tmp_path / "classifier")
    assert (classifier.config.in_channels, classifier.config.sample_size) == (1, 8)
    assert "of 6 images (the test split)" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_weights_at_another_image_size(tmp_path):
    data = write_classes(tmp_path / "sides", 10)
    flags = ("--image_size", "6", "--random_flip", "--num_epochs", "1")
    first, second, other = (
        train(("--train_data_dir", data), tmp_path / name, *flags, "--seed", seed)
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    assert first.config.sample_size == 6
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_augmentation_changes_each_image_within_the_value_range_unless_disabled():
    images = torch.rand(6, 3, 8, 8) * 2 - 1
    unchanged, augmented = (augment(images, strength, PerSampleRNG(range(6), images.device)) for strength in (0, 1))
    flip = Preprocessing(3, 8, 8, random_flip=True)
    flipped = torch.stack([flip.finish((image + 1) * 127.5, sample_key=key) for key, image in enumerate(images)])
    torch.testing.assert_close(unchanged, images, atol=1e-5, rtol=0)
    assert augmented.min() >= -1 and augmented.max() <= 1
    assert ((augmented - images).abs().amax((1, 2, 3)) > 0.1).all()
    pairs = list(zip(flipped, images, strict=True))
    is_flipped = [torch.allclose(result, image.flip(2), atol=1e-5) for result, image in pairs]
    is_same = [torch.allclose(result, image, atol=1e-5) for result, image in pairs]
    assert all(a != b for a, b in zip(is_flipped, is_same, strict=True)) and any(is_flipped) and any(is_same)


def test_the_card_has_the_accuracy_the_command_and_code_that_runs(tmp_path, monkeypatch):
    data = write_classes(tmp_path / "sides", 10)
    train(("--train_data_dir", data), tmp_path / "my-classifier", "--num_epochs", "1")
    card = ModelCard.load(tmp_path / "my-classifier" / "README.md")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_name) == ("accuracy", "sides") and 0 <= result.metric_value <= 1
    command = "ddgan train-classifier --train_data_dir sides --output_dir my-classifier "
    assert command in card.text and "--widths 8 16" in card.text
    assert str(tmp_path) not in card.content
    names = {"images": torch.zeros(2, 3, 8, 8)}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names)
    assert names["logits"].shape == (2, 2)


def test_the_test_accuracy_is_on_the_card_and_in_metrics_csv(tmp_path):
    train(("--train_data_dir", write_classes(tmp_path / "sides", 10)), tmp_path / "run", "--num_epochs", 2)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert math.isnan(rows[0]["test_accuracy"])
    assert rows[-1]["test_accuracy"] == pytest.approx(card.data.eval_results[0].metric_value, abs=1e-4)
    assert f"| accuracy | {rows[-1]['test_accuracy']:.2%} of 2 images (held out) |" in card.text
    assert "| accuracy of left |" in card.text and "| accuracy of right |" in card.text
    assert "| data | sides, 18 images |" in card.text  # without those held out


def test_the_run_folder_is_a_feature_extractor_and_holds_no_training_images(tmp_path):
    data = write_classes(tmp_path / "sides", 3)
    classifier = train(("--train_data_dir", data), data / "run", "--num_epochs", 1)
    assert (data / "run" / "loss.png").exists() and len(open_source(str(data), folder_as="images")) == 6
    features = load_extractor(str(data / "run"))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    torch.testing.assert_close(features["features"].float(), classifier.features(-torch.ones(1, 3, 8, 8)))


def test_a_resumed_run_is_bit_identical(tmp_path):
    data, run = write_classes(tmp_path / "sides", 10), tmp_path / "run"
    flags = ("--random_flip", "--num_epochs", 4, "--checkpointing_steps", 5, "--checkpoints_total_limit", 0)
    train(("--train_data_dir", data), run, *flags)
    last = run / "checkpoints" / "step-00000012"
    files = [run / "diffusion_pytorch_model.safetensors", run / "metrics.csv", last / "model.safetensors"]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    train(("--train_data_dir", data), run, *flags, "--resume_from_checkpoint", run / "checkpoints" / "step-00000005")
    assert [file.read_bytes() for file in files] == before


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    data = ("--train_data_dir", write_classes(tmp_path / "sides", 10))  # 18 images: global batches of 8, 8 and 2
    flags = ("--learning_rate", 1e-6, "--num_epochs", 2)
    whole = train(data, tmp_path / "whole", *flags)
    parts = train(data, tmp_path / "parts", *flags, "--batch_size", 2, "--grad_accumulation_steps", 4)
    assert largest_difference(whole.state_dict(), parts.state_dict()) < 1e-6
    rows = zip(*(read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "parts")), strict=True)
    for row_whole, row_parts in rows:
        assert row_parts["loss"] == pytest.approx(row_whole["loss"], abs=1e-6)
        assert row_parts["grad_norm"] == pytest.approx(row_whole["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    data = ("--train_data_dir", write_classes(tmp_path / "sides", 10))  # 18 images: in the last batch, one each
    flags = ("--learning_rate", 1e-6, "--num_epochs", 2)
    one = train(data, tmp_path / "one", *flags)
    two = (*data, "--output_dir", tmp_path / "two", *SHORT, *flags, "--batch_size", 4, "--report_to", "none")
    run_ranks(ROOT / "scripts" / "train_classifier.py", *two, output=tmp_path / "output.txt", machines=2)
    two = ImageClassifier.from_pretrained(tmp_path / "two")
    assert largest_difference(one.state_dict(), two.state_dict()) < 1e-6
    card = (tmp_path / "two" / "README.md").read_text()
    assert "| global batch size | 8, 2 processes |" in card and "of 2 images (held out)" in card


def test_no_image_is_both_trained_on_and_held_out(tmp_path):
    args = ClassifierDataArguments(train_data_dir=str(write_classes(tmp_path / "sides", 10)))
    (trained, tested, _), (_, other, _) = (open_splits(args, None, seed) for seed in (0, 1))
    names = [[source.name(i) for i in range(len(source))] for source in (trained, tested, other)]
    assert (len(names[0]), len(names[1]), len({*names[0], *names[1]})) == (18, 2, 20)
    assert names[1] != names[2]  # the seed chooses them


def test_an_existing_classifier_is_not_overwritten(tmp_path):
    data = ("--train_data_dir", write_classes(tmp_path / "sides", 3))
    ImageClassifier().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"contains config\.json, which no run wrote"):
        train(data, tmp_path / "other")
    train(data, tmp_path / "run", "--num_epochs", 1)
    with pytest.raises(InputError, match="already contains a run"):
        train(data, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --dataset_name or --train_data_dir"),
        (["--train_data_dir", "nowhere"], "--train_data_dir nowhere does not exist"),
        (["--train_data_dir", "one"], "at least two classes"),
        (["--train_data_dir", "flat"], "no class labels"),
        (["--train_data_dir", "sides", "--widths", "9"], "multiples of 8"),
        (["--train_data_dir", "sides", "--num_epochs", "0"], "at least 1"),
        (["--train_data_dir", "sides", "--resolution", "8", "16"], "square images"),
        (["--dataset_name", "sides", "--streaming"], "which a stream does not allow"),
        (["--train_data_dir", "sides", "--gradient_checkpointing"], "too small"),
        (["--train_data_dir", "sides", "--push_to_hub"], "uploads pipelines, not classifiers"),
    ],
)
def test_unusable_data_and_settings_are_refused(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "sides", 2)
    (tmp_path / "one" / "left").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    for i in range(2):
        make_image(0, i).save(tmp_path / "one" / "left" / f"{i}.png")
        make_image(0, i).save(tmp_path / "flat" / f"{i}.png")
    with pytest.raises(InputError, match=message):
        train_classifier.main(flags)


def test_a_broken_image_is_reported_by_name(tmp_path):
    data = write_classes(tmp_path / "sides", 3)
    (data / "left" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(RunError, match=r"left/broken\.png"):
        train(("--train_data_dir", data), tmp_path / "classifier")


def test_broken_images_are_skipped_on_request(tmp_path, capsys):
    data = write_classes(tmp_path / "sides", 10)
    for number in range(10):  # some of them are held out
        (data / "left" / f"broken-{number}.png").write_bytes(b"not an image")
    train(("--train_data_dir", data), tmp_path / "run", "--num_epochs", 1, "--skip_broken_images")
    assert "Broken images skipped: " in capsys.readouterr().out


def test_one_grayscale_image_among_color_images_is_converted(tmp_path):
    data = write_classes(tmp_path / "sides", 3)
    first = min((data / "left").iterdir())
    Image.open(first).convert("L").save(first)
    assert train(("--train_data_dir", data), tmp_path / "classifier").config.in_channels == 3
