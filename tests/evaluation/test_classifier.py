"""Claims about the classifier that judges pictures."""

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


def test_an_image_is_judged_alone_in_training_too(classifier):
    images = torch.rand(4, 3, 9, 9)
    classifier.train()
    torch.testing.assert_close(classifier(images)[2:3], classifier(images[2:3]))


def test_what_is_saved_is_loaded(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 9, 9)
    assert torch.equal(loaded(images), classifier(images))
    assert loaded.class_names == ["a", "b", "c"]
    assert not loaded.training


def test_classes_without_names_have_their_numbers():
    assert ImageClassifier(widths=(8,), num_classes=3).class_names == ["0", "1", "2"]


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 3, 18, 18), (1, 1, 9, 9)])
def test_images_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(ValueError, match="was trained on \\(3, 9, 9\\)"):
        classifier(torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "said"), [({"widths": (8, 12)}, "multiples of 8"), ({"id2label": {1: "one"}}, "must name 0 to 9")]
)
def test_impossible_configs_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        ImageClassifier(**config)
