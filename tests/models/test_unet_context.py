"""The context network: its arithmetic, its contexts, and the conventions of Diffusers."""

import logging

import pytest
import torch
import torch.nn.functional as F
from accelerate import dispatch_model
from torch import nn

from ddgan import ContextUnet

TINY = {"n_feat": 8, "n_cfeat": 3, "height": 8}


def tiny(**changes):
    """Return a small network whose weights make every part matter."""
    torch.manual_seed(0)
    model = ContextUnet(**{**TINY, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch_size=3, channels=3, height=8):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch_size, channels, height, height, generator=generator)
    return sample, torch.tensor([5, 250, 499])[:batch_size], torch.tensor([2, 0, 1])[:batch_size]


def reference_forward(weights, x, t, context, T):
    """Compute the network's output in float64 by explicit operations on its weights."""
    weights = {name: w.double() for name, w in weights.items()}
    x, context = x.double(), context.double()

    def conv(name, h, padding=1):
        return F.conv2d(h, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    def norm(name, h):
        groups = h.unflatten(1, (8, -1))
        mean = groups.mean(dim=(2, 3, 4), keepdim=True)
        variance = groups.var(dim=(2, 3, 4), unbiased=False, keepdim=True)
        h = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        return h * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def block(name, h):
        h = F.gelu(norm(f"{name}.norm1", conv(f"{name}.conv1", h)))
        return F.gelu(norm(f"{name}.norm2", conv(f"{name}.conv2", h)))

    def residual_block(name, h):
        shortcut = conv(f"{name}.conv_shortcut", h, 0) if f"{name}.conv_shortcut.weight" in weights else h
        return (shortcut + block(name, h)) / 2**0.5

    def two_blocks(name, h):
        return block(f"{name}.block2", block(f"{name}.block1", h))

    def embedding(name, vector):
        for layer in ("linear_1", "linear_2"):
            vector = vector if layer == "linear_1" else F.gelu(vector)
            vector = vector @ weights[f"{name}.{layer}.weight"].T + weights[f"{name}.{layer}.bias"]
        return vector[:, :, None, None]

    def up(name, h, kept):
        h = embedding(f"{name}.context_embedding", context) * h + embedding(f"{name}.time_embedding", time)
        h = torch.cat([h, kept], dim=1)
        # a transposed convolution of size and stride 2 makes four pixels of each
        h = torch.einsum("bihw,iokl->bohkwl", h, weights[f"{name}.upsample.weight"]).flatten(4).flatten(2, 3)
        return two_blocks(name, h + weights[f"{name}.upsample.bias"][:, None, None])

    time = t.double()[:, None] / T
    initial = residual_block("conv_in", x)
    kept1 = two_blocks("down_block1", initial).unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    kept2 = two_blocks("down_block2", kept1).unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    vector = F.gelu(kept2.mean(dim=(2, 3)))
    h = torch.einsum("bi,iokl->bokl", vector, weights["unpool.weight"]) + weights["unpool.bias"][:, None, None]
    h = up("up_block1", norm("norm", h).relu(), kept2)
    h = up("up_block2", h, kept1)
    h = conv("conv_out.conv1", torch.cat([h, initial], dim=1))
    return conv("conv_out.conv2", norm("conv_out.norm", h).relu())


@pytest.mark.parametrize(
    "changes",
    [{}, {"height": 4}, {"height": 12, "n_feat": 16, "in_channels": 1, "out_channels": 2, "n_cfeat": 4}],
    ids=str,
)
def test_outputs_match_the_reference_arithmetic(changes):
    model = tiny(**changes)
    sample, t, labels = inputs(channels=model.config.in_channels, height=model.config.height)
    context = torch.eye(model.config.n_cfeat)[labels]
    expected = reference_forward(model.state_dict(), sample, t, context, T=500)
    assert expected.shape == (3, model.config.out_channels, model.config.height, model.config.height)
    torch.testing.assert_close(model(sample, t, labels).sample.double(), expected, rtol=1e-4, atol=1e-4)


def test_defaults_are_those_of_the_course():
    model = ContextUnet()
    config = model.config
    assert (config.in_channels, config.n_feat, config.n_cfeat, config.height) == (3, 64, 5, 16)
    assert (config.sample_size, config.out_channels, config.num_train_timesteps) == (16, 3, 500)
    sample, t, labels = inputs(height=16)
    assert model(sample, t, labels).sample.shape == sample.shape


def test_a_label_is_its_one_hot_context():
    model = tiny()
    sample, t, labels = inputs()
    assert torch.equal(model(sample, t, labels).sample, model(sample, t, torch.eye(3)[labels]).sample)


def test_contexts_can_be_mixed():
    model = tiny()
    sample, t, _ = inputs()
    half_half = torch.tensor([[0.5, 0.0, 0.5]]).expand(3, 3)
    outputs = [model(sample, t, context).sample for context in (half_half, *torch.eye(3)[:, None].expand(3, 3, 3))]
    assert all(not torch.allclose(outputs[0], output) for output in outputs[1:])
    expected = reference_forward(model.state_dict(), sample, t, half_half, T=500)
    torch.testing.assert_close(outputs[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_with_class_dropout_the_null_class_is_the_zero_context():
    model = tiny(class_dropout=0.1)
    sample, t, _ = inputs()
    null = torch.tensor([3, 3, 3])
    assert torch.equal(model(sample, t, null).sample, model(sample, t, torch.zeros(3, 3)).sample)
    assert not torch.allclose(model(sample, t, null).sample, model(sample, t, torch.tensor([0, 1, 2])).sample)
    without = tiny()
    assert torch.equal(without(sample, t, torch.zeros(3, 3)).sample, model(sample, t, torch.zeros(3, 3)).sample)
    with pytest.raises(RuntimeError):
        without(sample, t, null)


def test_the_network_itself_is_deterministic():
    model = tiny(class_dropout=0.9).train()
    assert torch.equal(model(*inputs()).sample, model(*inputs()).sample)


def test_time_enters_as_a_fraction_of_all_timesteps():
    sample, t, labels = inputs()
    double = tiny(num_train_timesteps=1000)
    torch.testing.assert_close(double(sample, 2 * t, labels).sample, tiny()(sample, t, labels).sample)
    assert not torch.allclose(double(sample, t, labels).sample, tiny()(sample, t, labels).sample)


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])], ids=str)
def test_timestep_may_be_a_number_or_a_tensor(timestep):
    model = tiny()
    sample, _, labels = inputs()
    assert torch.equal(model(sample, timestep, labels).sample, model(sample, torch.full((3,), 7), labels).sample)


def test_samples_of_a_batch_are_independent():
    model = tiny().train()
    sample, t, labels = inputs()
    alone = model(sample[1:2], t[1:2], labels[1:2]).sample
    torch.testing.assert_close(model(sample, t, labels).sample[1:2], alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_all_weights_and_the_contexts():
    model = tiny()
    sample, t, labels = inputs()
    context = torch.eye(3)[labels].requires_grad_()
    model(sample, t, context).sample.square().sum().backward()
    for tensor in (context, *model.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


def test_output_is_a_dataclass_or_an_equal_tuple():
    model = tiny()
    as_tuple = model(*inputs(), return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], model(*inputs()).sample)


def test_saved_network_loads_the_same_with_names_and_dtype(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    model = tiny(class_dropout=0.1, id2label={0: "hero", 1: "food", 2: "spell"})
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = ContextUnet.from_pretrained(tmp_path)
    assert caplog.text == ""
    assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)
    assert loaded.config.id2label == {"0": "hero", "1": "food", "2": "spell"}
    assert loaded.config.sample_size == loaded.config.height == 8
    assert ContextUnet.from_config(model.config, height=12).config.sample_size == 12

    half = ContextUnet.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sample, t, labels = inputs()
    output = half(sample.bfloat16(), t, labels).sample
    assert half.dtype == output.dtype == torch.bfloat16
    expected = model(sample, t, labels).sample
    assert (output.float() - expected).norm() < 0.1 * expected.norm()


def test_autocast_trains_in_bfloat16_near_the_float32_result():
    model = tiny()
    expected = model(*inputs()).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs()).sample
    output.float().sum().backward()
    assert (output.float() - expected).norm() < 0.1 * expected.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_is_bit_identical():
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output = model(*inputs()).sample
        output.square().sum().backward()
        gradients.append([output, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("as_context", [False, True])
def test_compiles_as_one_graph(as_context):
    model = tiny(class_dropout=0.1)
    sample, t, labels = inputs()
    labels = torch.eye(3)[labels] if as_context else labels
    expected = model(sample, t, labels).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # this tests the graph, not the compiler
    torch.testing.assert_close(compiled(sample, t, labels).sample, expected)


def test_repeated_blocks_compile_each_as_one_graph():
    model = tiny()
    expected = model(*inputs()).sample
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs()).sample, expected)


def test_layerwise_casting_stores_float8_and_computes_in_float32():
    model = tiny()
    expected = model(*inputs()).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.up_block1.block1.conv1.weight.dtype == torch.float8_e4m3fn
    output = model(*inputs()).sample
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 0.2 * expected.norm()


def test_weights_offloaded_to_disk_give_the_same_image(tmp_path):
    """`device_map` moves whole modules, some of which are loaded only when called."""
    model = tiny()
    expected = model(*inputs()).sample
    assert set(model._get_no_split_modules("auto")) >= {type(m).__name__ for m in (model.conv_in, model.up_block1)}
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"up_block1": "disk", "conv_out": "disk"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.up_block1.upsample.weight.device.type == "meta"
    assert torch.equal(model(*inputs()).sample, expected)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, 4), r"shape \(3, 4\).*float matrix \(3, 3\)"),
        (torch.zeros(2, 3), r"shape \(2, 3\).*float matrix \(3, 3\)"),
        (torch.tensor([0, 1]), r"shape \(2,\).*one integer for each of the 3"),
        (torch.eye(3).long(), r"int64 of shape \(3, 3\).*one integer for each of the 3"),
    ],
    ids=["too wide", "too few", "too few labels", "integers"],
)
def test_invalid_labels_are_refused(labels, message):
    sample, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        tiny()(sample, t, labels)


def test_images_of_another_size_are_refused():
    sample, t, labels = inputs(height=16)
    with pytest.raises(ValueError, match=r"16x16 pixels.*8x8 only"):
        tiny()(sample, t, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_feat": 12}, "multiple of 8"),
        ({"height": 18}, "multiple of 4"),
        ({"sample_size": 16}, "`sample_size` is 16 and `height` is 8"),
        ({"class_dropout": -0.1}, r"class_dropout.*\[0, 1\)"),
        ({"id2label": ["hero", "food"]}, r"names the labels \[0, 1\].*each of the 3 classes, 0 to 2"),
    ],
    ids=str,
)
def test_invalid_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_casting_does_not_warn(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert tiny().to("cpu", torch.float16).dtype == torch.float16
    assert caplog.text == ""
