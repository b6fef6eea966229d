"""Claims about feature extractors."""

import io
import logging
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import save_clip
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.v2 import functional as TF
from transformers import CLIPModel, CLIPVisionConfig, Dinov2Config, Dinov2Model

from ddgan.core.errors import InputError
from ddgan.evaluation.arguments import EXTRACTOR_NAMES, HUB_EXTRACTORS
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.extractors import EXTRACTORS, _architecture, load_extractor, weights_digest
from ddgan.evaluation.metrics import Gaussian, frechet_distance


def images(count: int, channels: int, size: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), generator=random, dtype=torch.uint8)


@pytest.fixture
def classifier(tmp_path) -> str:
    torch.manual_seed(0)
    ImageClassifier(sample_size=8, in_channels=1, widths=(8, 16)).save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def test_a_classifier_gives_its_penultimate_layer_and_logits(classifier):
    torch.manual_seed(0)
    extractor, network = load_extractor(classifier), ImageClassifier(sample_size=8, in_channels=1, widths=(8, 16))
    samples = images(5, 1, 8)
    outputs = extractor(samples)
    assert torch.equal(outputs["features"], network.features(samples / 127.5 - 1))
    assert torch.equal(outputs["logits"], network(samples / 127.5 - 1))
    assert extractor.name == "classifier"


def test_weights_are_aligned_wherever_they_lie_in_their_file(classifier):
    """Kernels sum unaligned weights in another order on some processors, and a longer header moves them."""
    file = Path(classifier, "diffusion_pytorch_model.safetensors")
    for length in (4, 12):
        save_file(load_file(file), file, {"format": "pt", "comment": "x" * length})
        assert all(parameter.data_ptr() % 64 == 0 for parameter in load_extractor(classifier).parameters())


def test_images_are_converted_to_the_size_and_channels_of_the_classifier(classifier):
    extractor = load_extractor(classifier)
    samples = images(3, 3, 13)
    gray = TF.rgb_to_grayscale(samples)
    small = TF.resize(gray, [8, 8], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(extractor(samples)["features"], extractor(small)["features"])
    assert "to 8x8, bicubic, antialiased" in extractor.facts.resize


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_features_do_not_depend_on_the_batch(classifier, batch_size):
    extractor, samples = load_extractor(classifier), images(7, 1, 20)
    parts = torch.cat([extractor(part)["features"] for part in samples.split(batch_size)])
    torch.testing.assert_close(parts, extractor(samples)["features"])


def test_different_weights_have_different_digests(classifier, tmp_path):
    network = ImageClassifier.from_pretrained(classifier)
    network.head.bias.data[0] += 1
    network.save_pretrained(tmp_path / "other")
    assert load_extractor(classifier).digest == load_extractor(classifier).digest
    assert load_extractor(classifier).digest != load_extractor(str(tmp_path / "other")).digest


def test_pixels_are_averages_of_areas():
    extractor, samples = load_extractor("pixels-8x8"), images(20, 3, 32)
    features = extractor(samples)["features"]
    expected = torch.nn.functional.avg_pool2d(samples / 255, 4).flatten(1)
    assert features.shape == (20, 192)
    torch.testing.assert_close(features, expected)
    assert frechet_distance(Gaussian.of(features), Gaussian.of(expected)) == pytest.approx(0, abs=1e-6)
    gray = samples[:, :1]
    assert torch.equal(extractor(gray)["features"], extractor(gray.expand(-1, 3, -1, -1))["features"])
    assert extractor(images(2, 3, 20))["features"].shape == (2, 192)
    with pytest.raises(ValueError, match="pixels-8x8 has no weights"):
        load_extractor("pixels-8x8", weights="weights.pth")


@pytest.fixture
def dinov2(tmp_path) -> Path:
    """The folder of a tiny DINOv2 model."""
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2, "image_size": 32}
    Dinov2Model(Dinov2Config(**config)).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@pytest.fixture
def clip(tmp_path) -> Path:
    """The folder of a tiny CLIP model with both towers, like those on the Hub."""
    torch.manual_seed(0)
    save_clip(tmp_path / "tiny")
    return tmp_path / "tiny"


def preprocessed(samples: torch.Tensor, size: int, mean: list[float], std: list[float]) -> torch.Tensor:
    """Resize with Pillow and normalize as the papers do."""
    resized = [Image.fromarray(sample.permute(1, 2, 0).numpy()).resize((size, size), 3) for sample in samples]
    pixels = torch.stack([TF.pil_to_tensor(image) for image in resized]) / 255
    return TF.normalize(pixels, mean, std)


def test_dinov2_gives_its_class_token(dinov2):
    extractor, samples = load_extractor("dinov2-vit-l-14", weights=str(dinov2)), images(4, 3, 40)
    outputs = extractor(samples)
    assert outputs.keys() == {"features"} and outputs["features"].shape == (4, 16)
    assert extractor.name == "dinov2 (dino)" and not extractor.is_clip
    network = Dinov2Model.from_pretrained(dinov2)
    with torch.no_grad():
        inputs = preprocessed(samples, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        expected = network(inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(outputs["features"], expected, rtol=0.02, atol=0.02)  # rounding when resizing
    gray = samples[:, :1]
    assert torch.equal(extractor(gray)["features"], extractor(gray.expand(-1, 3, -1, -1))["features"])


def test_clip_gives_its_embeddings_of_images(clip, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    extractor, samples = load_extractor("clip-vit-b-32", weights=str(clip)), images(4, 3, 40)
    assert not caplog.text  # no table of the tensors of the text encoder
    outputs = extractor(samples)
    assert outputs.keys() == {"features"} and outputs["features"].shape == (4, 16)
    assert extractor.name == "clip (tiny)" and extractor.is_clip
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip).get_image_features(preprocessed(samples, 16, mean, std))
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(outputs["features"], expected, rtol=0.02, atol=0.02)  # rounding when resizing


def test_weights_are_downloaded_from_the_hub(local_hub, clip, request):
    """Those of OpenAI are stored in the format of PyTorch, with both towers."""
    cached = Path(constants.HF_HUB_CACHE, "models--openai--clip-vit-large-patch14-336")
    request.addfinalizer(lambda: shutil.rmtree(cached, ignore_errors=True))
    weights = io.BytesIO()
    torch.save(load_file(clip / "model.safetensors"), weights)
    files = {"config.json": (clip / "config.json").read_bytes(), "pytorch_model.bin": weights.getvalue()}
    local_hub.add("openai/clip-vit-large-patch14-336", **files)
    extractor = load_extractor("clip-vit-l-14-336px")
    assert extractor.name == "clip (clip-vit-large-patch14-336)"  # the tiny model does not have the named size
    assert extractor.digest == load_extractor("clip-vit-l-14-336px", str(clip)).digest


def test_a_model_of_the_named_size_has_its_name(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    Dinov2Model(config).half().save_pretrained(tmp_path / "weights")
    extractor = load_extractor("dinov2-vit-s-14", weights=str(tmp_path / "weights"))
    assert extractor.name == "dinov2-vit-s-14" and extractor.resize.startswith("to 224x224, bicubic, antialiased")
    assert all(parameter.dtype == torch.float32 for parameter in extractor.parameters())
    assert extractor(images(1, 3, 32))["features"].shape == (1, 384)
    assert load_extractor("dinov2-vit-l-14", weights=str(tmp_path / "weights")).name == "dinov2 (weights)"


@pytest.mark.parametrize("name", HUB_EXTRACTORS)
def test_the_named_sizes_are_those_of_transformers(name):
    """The defaults of Transformers are ViT-B/32 at 224x224 for CLIP and ViT-B/14 for DINOv2."""
    config = CLIPVisionConfig() if name.startswith("clip") else Dinov2Config()
    is_default = all(getattr(config, key) == value for key, value in _architecture(name).items())
    assert is_default == (name in ("clip-vit-b-32", "dinov2-vit-b-14"))


def test_other_models_and_damaged_weights_are_rejected(dinov2, clip):
    for name, folder, found in (("clip-vit-b-32", dinov2, "dinov2"), ("dinov2-vit-b-14", clip, "clip_vision_model")):
        with pytest.raises(ValueError, match=rf"could not be loaded: it is a model of the type {found}\."):
            load_extractor(name, weights=str(folder))
    whole = load_file(dinov2 / "model.safetensors")
    other_shape, missing = {**whole, "layernorm.weight": torch.ones(9)}, dict(whole)
    del missing["layernorm.weight"]
    for tensors in (other_shape, missing):
        save_file(tensors, dinov2 / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"do not fit their config: layernorm\.weight missing or of another"):
            load_extractor("dinov2-vit-b-14", weights=str(dinov2))
    for file in ("config.json", "model.safetensors"):
        (clip / file).write_bytes(b"{")
        with pytest.raises(ValueError, match=r"weights of clip-vit-b-32, .* could not be loaded: ") as error:
            load_extractor("clip-vit-b-32", weights=str(clip))
        assert "\n" not in str(error.value)


@pytest.fixture
def random_inception(monkeypatch) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network without its pretrained weights."""
    with monkeypatch.context() as patches:
        patches.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patches.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        return FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])


def test_inception_from_a_file_of_weights(random_inception, tmp_path):
    state, pth, safe = random_inception.state_dict(), tmp_path / "weights.pth", tmp_path / "weights.safetensors"
    torch.save(state, pth)
    save_file(state, safe)
    extractor = load_extractor("inception-v3-compat", weights=str(pth))
    samples = images(2, 3, 16)
    outputs = extractor(samples)
    assert outputs["features"].shape == (2, 2048) and outputs["logits"].shape == (2, 1008)
    assert torch.equal(outputs["features"], random_inception(samples)[0])
    assert load_extractor("inception-v3-compat", weights=str(safe)).digest == extractor.digest


def test_code_in_a_file_of_weights_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").write_text, ("",))

    torch.save({"fc.weight": Code()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not hold the weights of inception-v3-compat"):
        load_extractor("inception-v3-compat", weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 50, None])
@pytest.mark.parametrize("file", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_damaged_classifier_is_reported(tmp_path, file, content):
    ImageClassifier(sample_size=8, in_channels=3, num_classes=2, widths=(8,)).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        load_extractor(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tensor_missing_in_a_classifier_is_named(classifier):
    file = f"{classifier}/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name, _ = tensors.popitem()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError, match=f"classifier in {classifier} is incomplete: its weights lack {name}"):
        load_extractor(classifier)


def test_unavailable_extractors_are_reported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"there is no nowhere/config\.json"):
        load_extractor("nowhere")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="it holds a UNet2DModel"):
        load_extractor(str(tmp_path))
    with pytest.raises(ValueError, match=r"dinov2-vit-b-14, .* could not be loaded.*--feature_extractor pixels-8x8"):
        load_extractor("dinov2-vit-b-14", weights=str(tmp_path / "none"))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", no_network)
    with pytest.raises(
        ValueError, match=r"downloaded: no network.*--extractor_weights; or use --feature_extractor pixels-8x8"
    ):
        load_extractor("inception-v3-compat")


@pytest.mark.parametrize("name", EXTRACTOR_NAMES)
def test_nothing_is_downloaded_in_offline_mode(name, tmp_path, monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if name == "pixels-8x8":
        assert load_extractor(name).name == name
        return
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set.*--extractor_weights.*pixels-8x8") as error:
        load_extractor(name)
    assert "\n" not in str(error.value)


def test_downloaded_weights_are_used_in_offline_mode(random_inception, tmp_path, monkeypatch):
    file = tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    file.parent.mkdir(parents=True)
    torch.save(random_inception.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_extractor("inception-v3-compat").digest == weights_digest(random_inception)


def test_the_table_has_the_names_that_arguments_accept():
    assert tuple(EXTRACTORS) == EXTRACTOR_NAMES
