"""The discriminator: recorded logits and R1, any batch, size and depth, and the conventions of Diffusers."""

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from torch.nn import functional as F

from ddgan import DDGANDiscriminator
from ddgan.conversion.ddgan_checkpoints import convert_discriminator
from ddgan.models.unet_ncsnpp import haar_transform

TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "base_channels": 6,
    "block_out_channels": (6, 8),
    "down_blocks": (False, True),
    "time_embed_dim": 8,
}


def tiny(**changes):
    """Return a small network whose weights make every part matter; an untrained one starts near zero."""
    torch.manual_seed(0)
    model = DDGANDiscriminator(**{**TINY, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch_size=4, channels=1, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    pair = torch.randn(2, batch_size, channels, height, width, generator=generator)
    return pair[0], torch.arange(batch_size) % 4, pair[1]


@pytest.mark.parametrize("name", ["small", "small_28", "large"])
def test_logits_input_gradients_and_r1_match_the_recorded_ones(golden, name):
    recorded, config, state_dict = golden(f"discriminator_{name}")
    model = convert_discriminator(state_dict, config)
    x = recorded["input/x"].requires_grad_()
    logits = model(x, recorded["input/t"], recorded["input/x_t"])
    torch.testing.assert_close(logits, recorded["output"][:, 0], rtol=0, atol=2e-5)

    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    assert (gradient - recorded["grad/x"]).norm() / recorded["grad/x"].norm() < 1e-4
    r1 = gradient.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(r1, recorded["r1/mean_sq_grad_norm"], rtol=1e-5, atol=0)
    r1.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(norm, recorded["r1/param_grad_norm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 6, 7, 8, 12, 13])
def test_any_batch_size_gives_one_logit_per_pair(batch_size):
    logits = tiny()(*inputs(batch_size))
    assert logits.shape == (batch_size,)
    assert logits.isfinite().all()


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_minibatch_statistic_distinguishes_equal_from_different_images(batch_size):
    model = tiny()
    sample, _, noisy = inputs(batch_size)
    different = model(sample, 0, noisy)
    equal = model(sample[:1].expand_as(sample), 0, noisy[:1].expand_as(noisy))
    assert not torch.allclose(different[0], equal[0])
    torch.testing.assert_close(equal, equal[:1].expand(batch_size))


@pytest.mark.parametrize(
    ("size", "widths", "down"),
    [
        ((28, 28), (4, 8, 8, 8), (False, True, True, True)),
        ((64, 64), (4, 8, 8, 8, 8, 8), (True,) * 6),
        ((9, 17), (4, 8, 12), (True, False, True)),
        ((256, 256), (4,) * 8, (True,) * 8),
        ((5, 5), (4,), (False,)),
    ],
    ids=str,
)
def test_any_size_and_depth_works(size, widths, down):
    model = tiny(sample_size=size, in_channels=3, block_out_channels=widths, down_blocks=down)
    assert model(*inputs(2, 3, *size)).shape == (2,)


def test_unsupported_configurations_are_refused():
    with pytest.raises(ValueError, match="too often"):
        tiny(sample_size=(64, 3), down_blocks=(True, True))
    with pytest.raises(ValueError, match="one for each"):
        tiny(down_blocks=(True,))
    with pytest.raises(ValueError, match="are divisible by"):
        tiny(sample_size=(16, 18), wavelet_levels=2)
    with pytest.raises(ValueError, match="sub-bands of a wavelet transform of 2x2 pixels"):
        tiny(sample_size=8, wavelet_levels=2, down_blocks=(True, True))


def test_wavelet_network_sees_the_sub_bands_of_both_images():
    """Up to a rotation of its channels, which its first convolution can undo."""
    model = tiny(wavelet_levels=1)
    plain = tiny(in_channels=4 * model.config.in_channels, sample_size=8)
    weights = model.state_dict()
    transform = haar_transform(F.pixel_shuffle(torch.eye(4).view(4, 4, 1, 1), 2), 1).flatten(1)
    rotated = weights["conv_in.weight"].unflatten(1, (-1, 4)).flatten(3).transpose(2, 3) @ transform
    weights["conv_in.weight"] = rotated.transpose(2, 3).reshape_as(weights["conv_in.weight"])
    plain.load_state_dict(weights)
    sample, t, noisy = inputs()
    torch.testing.assert_close(model(sample, t, noisy), plain(haar_transform(sample, 1), t, haar_transform(noisy, 1)))


def test_pair_order_and_timestep_matter():
    model = tiny()
    sample, t, noisy = inputs()
    assert not torch.allclose(model(sample, t, noisy), model(noisy, t, sample))
    assert not torch.allclose(model(sample, 0, noisy), model(sample, 3, noisy))
    assert torch.equal(model(sample, 2, noisy), model(sample, torch.full((4,), 2), noisy))


def test_class_is_projected_on_the_features_and_is_required():
    model = tiny(num_class_embeds=3)
    pair = inputs()
    labels = torch.tensor([0, 1, 2, 0])
    logits = model(*pair, class_labels=labels)
    changed = model(*pair, class_labels=torch.tensor([0, 2, 2, 0]))
    assert (logits != changed).tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="num_class_embeds"):
        model(*pair)
    with pytest.raises(ValueError, match="num_class_embeds"):
        tiny()(*pair, class_labels=labels)


def test_untrained_network_is_indifferent():
    assert DDGANDiscriminator(**TINY)(*inputs()).abs().max() < 1e-2
    assert DDGANDiscriminator(**TINY, near_zero_conv_out=False)(*inputs()).abs().max() > 1e-2


def test_gradient_checkpointing_is_bit_identical_also_for_r1():
    results = []
    for checkpointing in (False, True):
        model = tiny()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sample, t, noisy = inputs()
        sample.requires_grad_()
        logits = model(sample, t, noisy)
        (gradient,) = torch.autograd.grad(logits.sum(), sample, create_graph=True)
        (nn.functional.softplus(-logits).mean() + gradient.square().sum()).backward()
        results.append([logits, gradient, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiles_as_one_graph():
    model = tiny()
    expected = model(*inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # this tests the graph, not the compiler
    torch.testing.assert_close(compiled(*inputs()), expected)


def test_saved_network_loads_the_same_with_variant_and_dtype(tmp_path):
    model = tiny(num_class_embeds=2)
    labels = torch.tensor([0, 1, 1, 0])
    model.save_pretrained(tmp_path, variant="fp32")
    loaded = DDGANDiscriminator.from_pretrained(tmp_path, variant="fp32")
    assert torch.equal(loaded(*inputs(), labels), model(*inputs(), labels))
    half = DDGANDiscriminator.from_pretrained(tmp_path, variant="fp32", torch_dtype=torch.bfloat16)
    sample, t, noisy = inputs()
    logits = half(sample.bfloat16(), t, noisy.bfloat16(), labels)
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_gradients_are_finite_in_float16(batch_size):
    """For equal images the standard deviation is sqrt(1e-8), and 1e-8 underflows in float16."""
    torch.manual_seed(0)
    model = DDGANDiscriminator(**{**TINY, "block_out_channels": (16, 32)}, near_zero_conv_out=False)
    sample, t, noisy = inputs(batch_size)
    sample.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        logits = model(sample, t, noisy)
    logits.sum().backward()
    assert sample.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_layerwise_casting_stores_float8_and_computes_in_float32():
    model = tiny()
    expected = model(*inputs())
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[1].conv1.weight.dtype == torch.float8_e4m3fn
    logits = model(*inputs())
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.2 * expected.norm()


def test_weights_offloaded_to_disk_give_the_same_logits(tmp_path):
    """`device_map` moves whole modules, some of which are loaded only when called."""
    model = tiny()
    expected = model(*inputs())
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"blocks": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.blocks[1].conv1.weight.device.type == "meta"
    assert torch.equal(model(*inputs()), expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_gives_the_same_logits(offload_type):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = [argument.to(device) for argument in inputs()]
    expected = tiny().to(device)(*arguments)
    model = tiny()
    model.enable_group_offload(device, torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    torch.testing.assert_close(model(*arguments), expected)
