"""CLIP guidance losses, with tiny models of the real classes and random weights."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tiny import tiny_unet
from tiny_clip import MEAN, STD, TOWER, VISION_TOWER, save_clip
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTokenizer,
)

from ddgan import CLIPLoss, GuidedPipeline
from ddgan.core.errors import InputError
from ddgan.guidance import clip
from ddgan.guidance.clip import load_encoder, random_cut, squared_great_circle

needs_open_clip = pytest.mark.skipif(
    find_spec("open_clip") is None, reason="open_clip is not installed: pip install open-clip-torch"
)


def save_siglip(folder) -> None:
    folder.mkdir()
    (folder / "words.txt").write_text("a red rose\n" * 9)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    pieces = {"model_prefix": folder / "spiece", "vocab_size": 32, "hard_vocab_limit": False, **ids}
    SentencePieceTrainer.train(input=folder / "words.txt", minloglevel=2, **pieces)
    SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    text = {**TOWER, "vocab_size": 32, "max_position_embeddings": 8, "bos_token_id": 2, "eos_token_id": 2}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION_TOWER)).save_pretrained(folder)
    size = {"size": {"height": 16, "width": 16}}
    SiglipImageProcessor(**size, image_mean=MEAN, image_std=STD).save_pretrained(folder)


def save_open_clip(folder) -> None:
    import open_clip

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder.mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    preprocessing = {"mean": MEAN, "std": STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    (folder / "tiny-clip.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folder of a tiny model, created on first use."""
    made, root = {}, tmp_path_factory.mktemp("clip")

    def folder(kind: str):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = root / kind
            {"clip": save_clip, "siglip": save_siglip, "open_clip": save_open_clip}[kind](made[kind])
        return made[kind]

    return folder


@pytest.fixture(params=["clip", "siglip", pytest.param("open_clip", marks=needs_open_clip)])
def model(request, folders) -> str:
    folder = folders(request.param)
    return f"local-dir:{folder}" if request.param == "open_clip" else str(folder)


def noise(count: int, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_image(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def test_the_great_circle_distance_matches_float64():
    random = np.random.default_rng(0)
    u, v = random.standard_normal((5, 64)), random.standard_normal((4, 64))
    v[1] = u[1] + 1e-2 * v[1]  # a small angle, of which the arccosine of a float32 product loses digits
    v[2] = -u[2] + 1e-2 * v[2]
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (u, v)]
    expected = np.arccos(unit[0] @ unit[1].T) ** 2
    actual = squared_great_circle(torch.tensor(u, dtype=torch.float32), torch.tensor(v, dtype=torch.float32))
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    half_chord = np.linalg.norm(unit[0][:, None] - unit[1], axis=2) / 2
    np.testing.assert_allclose(expected, 4 * np.arcsin(half_chord) ** 2, rtol=1e-6)


def test_the_great_circle_distance_has_a_gradient_everywhere():
    vectors = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda u: squared_great_circle(u, vectors[:2]), vectors[2:].clone().requires_grad_()
    )
    for same in (vectors[:1], -vectors[:1]):
        u = same.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(squared_great_circle(u, vectors[:1]).sum(), u)
        assert gradient.isfinite().all()


def test_the_gradient_matches_finite_differences(model):
    loss = CLIPLoss("a red rose", model, n_cuts=3)
    images = noise(2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(images, step=5).sum(), images)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = (loss(images + sign * 0.02 * direction, step=5).sum() for sign in (1, -1))
    # float32, and curvature over the 0.04 between the two
    assert (ahead - behind).item() / 0.04 == pytest.approx(gradient.norm().item(), rel=0.02)


def test_the_loss_of_an_image_does_not_depend_on_its_batch(model):
    loss = CLIPLoss("a red rose", model)
    images = noise(4)
    losses = loss(images, step=2)
    assert losses.shape == (4,) and len(set(losses.tolist())) == 4
    torch.testing.assert_close(loss(images[[3, 1]], step=2), losses[[3, 1]])
    torch.testing.assert_close(loss(images[2:3], step=2), losses[2:3])


def test_cutouts_depend_only_on_seed_and_step(model):
    images = noise(1)
    first = CLIPLoss("a red rose", model)
    torch.manual_seed(1)
    again = CLIPLoss("a red rose", model)
    assert [first(images, step).item() for step in (0, 1)] == [again(images, step).item() for step in (0, 1)]
    others = [first(images, 1), CLIPLoss("a red rose", model, seed=1)(images, 0)]
    assert first(images, 0).item() not in [other.item() for other in others]


def test_the_loss_is_the_mean_over_the_cutouts(folders):
    loss = CLIPLoss("a red rose", str(folders("clip")), n_cuts=3, seed=7)
    images, random = noise(2), np.random.default_rng([7, 4])
    cuts = [random_cut(images, (16, 16), random) for _ in range(3)]
    of_cuts = [squared_great_circle(loss.encoder.embed_images(cut), loss.targets)[:, 0] for cut in cuts]
    torch.testing.assert_close(loss(images, step=4), torch.stack(of_cuts).mean(0))


@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_cutouts_have_all_sizes_and_are_the_same_for_all_images(size):
    ramp = torch.linspace(-1, 1, 64).expand(2, 3, 48, 64).contiguous()
    random = np.random.default_rng(0)
    cuts = torch.stack([random_cut(ramp, size, random) for _ in range(200)])
    assert cuts.shape == (200, 2, 3, *size)
    assert torch.equal(cuts[:, 0], cuts[:, 1])
    middle = cuts[:, 0, 0, size[0] // 2]
    slopes = (middle[:, -4] - middle[:, 3]) * size[1] / (size[1] - 7)
    assert 0.3 < (slopes < 0).float().mean() < 0.7  # mirrored
    assert (
        slopes.abs().min() < 0.8 and slopes.abs().max() > 1.8
    )  # from a small part of the ramp of 2 to the whole ramp


def test_images_are_normalized_by_the_statistics_of_the_model(folders):
    folder = folders("clip")
    loss = CLIPLoss(random_image(), str(folder))
    pixels = CLIPImageProcessor.from_pretrained(folder)(random_image(), return_tensors="pt")
    expected = CLIPModel.from_pretrained(folder).eval().get_image_features(**pixels)
    torch.testing.assert_close(loss.targets, getattr(expected, "pooler_output", expected), rtol=1e-4, atol=1e-5)


@needs_open_clip
def test_images_and_texts_are_embedded_as_in_open_clip(folders):
    import open_clip

    name = f"local-dir:{folders('open_clip')}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    loss = CLIPLoss([random_image(), "a red rose"], name)
    expected = [
        model.eval().encode_image(preprocess(random_image())[None]),
        model.encode_text(open_clip.get_tokenizer(name)(["a red rose"])),
    ]
    torch.testing.assert_close(loss.targets, torch.cat(expected), rtol=1e-4, atol=1e-5)


@needs_open_clip
def test_open_clip_takes_an_architecture_and_weights(folders):
    import open_clip

    folder = folders("open_clip")
    open_clip.add_model_config(folder / "tiny-clip.json")
    named = CLIPLoss("a red rose", "tiny-clip", str(folder / "open_clip_model.safetensors"))
    torch.testing.assert_close(named.targets, CLIPLoss("a red rose", f"local-dir:{folder}").targets)


def test_prompts_have_weights_and_may_be_images(model):
    images = noise(2)
    rose, gradient = (CLIPLoss(prompt, model)(images) for prompt in ("a red rose", random_image(size=(40, 20))))
    both = CLIPLoss(["a red rose", (random_image(size=(40, 20)), 3)], model)
    torch.testing.assert_close(both(images), (rose + 3 * gradient) / 4)
    away = CLIPLoss([("a red rose", -1)], model)
    torch.testing.assert_close(away(images), -rose)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_gray_and_transparent_images_work(model, channels):
    loss = CLIPLoss("a red rose", model)
    images = noise(2, channels)
    rgb = images[:, :1].expand(-1, 3, -1, -1) if channels < 3 else images[:, :3]
    assert torch.equal(loss(images), loss(rgb.contiguous()))


def test_a_model_is_loaded_once_and_shared(model):
    first, second = CLIPLoss("a red rose", model), CLIPLoss(random_image(), model)
    assert first.encoder is second.encoder
    assert not any(parameter.requires_grad for parameter in first.encoder.model.parameters())


# a random network embeds some images near a given image, but hardly any near a text
@pytest.mark.parametrize(("prompt", "reached"), [("a red rose", 0.98), (random_image(1, (32, 32)), 0.8)])
def test_gradient_descent_lowers_the_loss_of_other_cutouts(model, prompt, reached):
    loss, image = CLIPLoss(prompt, model), noise(1)

    def loss_of_other_cutouts():
        return sum(loss(image, step).item() for step in range(100, 110))

    before = loss_of_other_cutouts()
    for step in range(40):
        image.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(image, step).sum(), image)
        image = image.detach() - gradient / gradient.norm()
    assert loss_of_other_cutouts() < reached * before


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_the_gradient_stays_accurate_in_half_precision(model, monkeypatch, factor):
    images = noise(2).requires_grad_()

    def gradient():
        load_encoder.cache_clear()
        loss = CLIPLoss("a red rose", model)
        return loss.encoder.dtype, torch.autograd.grad((factor * loss)(images).sum(), images)[0]

    whole_dtype, whole = gradient()
    monkeypatch.setattr(clip, "half_on_gpu", lambda device: torch.float16)
    half_dtype, half = gradient()
    load_encoder.cache_clear()
    assert (whole_dtype, half_dtype) == (torch.float32, torch.float16)
    # the weights have 11 bits; random networks multiply that rounding
    assert (half - whole).norm() < 0.02 * whole.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "needs a prompt"),
        ({"prompt": [("a rose", 0.0)]}, "needs a prompt"),
        ({"prompt": "a rose", "n_cuts": 0}, "n_cuts"),
        ({"prompt": "a rose", "model": "./nowhere"}, r"\./nowhere cannot be loaded.*Transformers"),
        pytest.param({"prompt": "a rose", "model": "local-dir:./nowhere"}, "open_clip reports", marks=needs_open_clip),
        pytest.param({"prompt": "a rose", "model": "ViT", "pretrained": "x"}, r"ViT \(x\)", marks=needs_open_clip),
    ],
)
def test_invalid_arguments_are_refused_in_one_paragraph(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        CLIPLoss(**arguments)
    assert "\n" not in str(error.value)


@needs_open_clip
def test_pickled_weights_are_refused_without_running_them(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    torch.save({"state_dict": Attack()}, tmp_path / "weights.bin")
    with pytest.raises(InputError, match=r"weights\.bin\) cannot be loaded"):
        CLIPLoss("a rose", "ViT-B-32", str(tmp_path / "weights.bin"))
    assert not (tmp_path / "attacked").exists()


def test_a_model_without_both_towers_is_refused(folders, tmp_path):
    model = CLIPModel.from_pretrained(folders("clip"))
    model.text_model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="does not embed both images and text"):
        CLIPLoss("a rose", str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    with pytest.raises(InputError, match="contains custom Python code, which is not run"):
        CLIPLoss("a rose", str(tmp_path))
    assert not (tmp_path / "it ran").exists()


def test_without_open_clip_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(InputError, match="pip install 'open-clip-torch>="):
        CLIPLoss("a rose", "ViT-B-32", "openai")


def test_the_distance_of_a_reference_image_to_itself_is_zero(model):
    loss = CLIPLoss(random_image(), model)
    pixels = pil_to_tensor(random_image())[None] / 127.5 - 1
    assert squared_great_circle(loss.encoder.embed_images(pixels), loss.targets).item() < 1e-5
    transparent = random_image().convert("RGBA")
    transparent.putalpha(0)  # shown as white
    white = torch.ones_like(pixels)
    targets = CLIPLoss(transparent, model).targets
    assert squared_great_circle(loss.encoder.embed_images(white), targets).item() < 1e-5


@pytest.mark.parametrize("gradient", ["sample", "model"])
def test_guided_sampling_lowers_the_loss_of_other_cutouts(model, gradient):
    pipe = GuidedPipeline(tiny_unet(sample_size=16).eval(), DDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    loss = CLIPLoss(random_image(1, (32, 32)), model)

    def generate(guidance_scale):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        options = {"num_inference_steps": 8, "gradient": gradient, "output_type": "latent", "max_grad_norm": 1e-3}
        return pipe(loss, guidance_scale, 2, generator=generators, **options).images

    def loss_of_other_cutouts(images):
        return sum(loss(images, step) for step in range(100, 110)) / 10

    unguided, guided = generate(0.0), generate(2000.0)  # the gradients of some random networks are tiny
    assert (loss_of_other_cutouts(guided) < 0.9 * loss_of_other_cutouts(unguided)).all()


@pytest.mark.parametrize("prompt", ["", "  ", ["a red rose", ""]])
def test_empty_prompts_are_refused(model, prompt):
    with pytest.raises(InputError, match="A prompt is empty"):
        CLIPLoss(prompt, model)


def test_prompts_longer_than_the_model_reads_are_refused_instead_of_cut(model):
    CLIPLoss("a red", model)
    with pytest.raises(InputError, match=r"'a red rose .* is longer than the (8|16) tokens .*several prompts"):
        CLIPLoss("a red rose " * 20, model)


def test_weights_of_prompts_must_be_finite(model):
    with pytest.raises(InputError, match="with weights other than 0"):
        CLIPLoss([("a red rose", float("nan"))], model)
