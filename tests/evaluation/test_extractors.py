"""Claims about the networks that features come from."""

import pytest
import torch
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.v2 import functional as TF
from transformers import Dinov2Config, Dinov2Model

from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.extractors import load_extractor


def images(count: int, channels: int, size: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=random, dtype=torch.uint8)


@pytest.fixture
def classifier(tmp_path) -> str:
    torch.manual_seed(0)
    ImageClassifier(sample_size=8, in_channels=1, widths=(8, 16)).save_pretrained(tmp_path / "judge")
    return str(tmp_path / "judge")


def test_a_classifier_of_our_own(classifier):
    extractor, network = load_extractor(classifier), ImageClassifier.from_pretrained(classifier)
    pictures = images(5, 1, 8)
    found = extractor(pictures)
    assert torch.equal(found["features"], network.features(pictures / 127.5 - 1))
    assert torch.equal(found["logits"], network(pictures / 127.5 - 1))
    assert extractor.name == "judge"


def test_pictures_of_another_size_and_with_colours_are_brought_to_the_classifiers(classifier):
    extractor = load_extractor(classifier)
    pictures = images(3, 3, 13)
    grey = TF.rgb_to_grayscale(pictures)
    small = TF.resize(grey, [8, 8], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(extractor(pictures)["features"], extractor(small)["features"])
    assert "to 8x8, bicubic, antialiased" in extractor.protocol["resize"]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_batch_does_not_matter(classifier, batch_size):
    extractor, pictures = load_extractor(classifier), images(7, 1, 20)
    parts = torch.cat([extractor(part)["features"] for part in pictures.split(batch_size)])
    torch.testing.assert_close(parts, extractor(pictures)["features"])


def test_other_weights_have_another_digest(classifier, tmp_path):
    network = ImageClassifier.from_pretrained(classifier)
    network.head.bias.data[0] += 1
    network.save_pretrained(tmp_path / "other")
    assert load_extractor(classifier).digest == load_extractor(classifier).digest
    assert load_extractor(classifier).digest != load_extractor(str(tmp_path / "other")).digest


def test_dinov2_through_transformers(tmp_path):
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2, "image_size": 32}
    network = Dinov2Model(Dinov2Config(**config)).eval()
    network.save_pretrained(tmp_path / "dino")
    extractor = load_extractor("dinov2", weights=str(tmp_path / "dino"))
    found = extractor(images(4, 1, 9))
    assert found.keys() == {"features"} and found["features"].shape == (4, 16)
    assert extractor.name == "dinov2 (dino)"
    white = extractor(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8))["features"]
    normalised = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network(normalised.view(1, 3, 1, 1).expand(-1, -1, 32, 32)).pooler_output
    torch.testing.assert_close(white, expected)


@pytest.fixture
def random_inception(monkeypatch) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network before it has its weights."""
    with monkeypatch.context() as without:
        without.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        without.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        return FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])


def test_inception_from_a_file_of_weights(random_inception, tmp_path):
    state, pth, safe = random_inception.state_dict(), tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    torch.save(state, pth)
    save_file(state, safe)
    extractor = load_extractor("inception-v3-compat", weights=str(pth))
    pictures = images(2, 3, 16)
    found = extractor(pictures)
    assert found["features"].shape == (2, 2048) and found["logits"].shape == (2, 1008)
    assert torch.equal(found["features"], random_inception(pictures)[0])
    assert load_extractor("inception-v3-compat", weights=str(safe)).digest == extractor.digest


def test_weights_that_are_code_are_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("",))

    torch.save({"fc.weight": Code()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not hold the weights of inception-v3-compat"):
        load_extractor("inception-v3-compat", weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_had_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no nowhere/config\.json"):
        load_extractor("nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="it holds a UNet2DModel"):
        load_extractor(str(tmp_path))
    with pytest.raises(ValueError, match=r"DINOv2 model .* could not be loaded"):
        load_extractor("dinov2", weights=str(tmp_path / "none"))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"could not be downloaded: no network.*--extractor_weights"):
        load_extractor("inception-v3-compat")
