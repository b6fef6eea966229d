"""Claims about the image classifier."""

import pytest
import torch

from ddgan.evaluation.classifier import ImageClassifier


@pytest.fixture
def classifier() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(
        sample_size=9, in_channels=3, num_classes=3, widths=(8, 16), id2label={0: "a", 1: "b", 2: "c"}
    )


def test_features_are_the_penultimate_layer(classifier):
    images = torch.rand(5, 3, 9, 9) * 2 - 1
    features = classifier.features(images)
    assert features.shape == (5, 16)
    assert torch.equal(classifier.head(features), classifier(images))


def test_features_do_not_depend_on_the_batch_even_in_training_mode(classifier):
    images = torch.rand(4, 3, 9, 9)
    classifier.train()
    torch.testing.assert_close(classifier(images)[2:3], classifier(images[2:3]))


def test_a_saved_classifier_is_loaded_unchanged(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(loaded(images), classifier(images))
    assert loaded.class_names == ["a", "b", "c"]
    assert not loaded.training


def test_unnamed_classes_are_named_by_their_numbers():
    assert ImageClassifier(widths=(8,), num_classes=3).class_names == ["0", "1", "2"]


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 3, 18, 18), (1, 1, 9, 9)])
def test_images_of_another_shape_are_rejected(classifier, shape):
    with pytest.raises(ValueError, match="was trained on \\(3, 9, 9\\)"):
        classifier(torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "message"), [({"widths": (8, 12)}, "multiples of 8"), ({"id2label": {1: "one"}}, "must name 0 to 9")]
)
def test_invalid_configs_are_rejected(config, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(**config)
