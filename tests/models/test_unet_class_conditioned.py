"""The class-conditioned UNet: a plain UNet with the class as input channels, and the conventions of Diffusers."""

import logging

import pytest
import torch
from accelerate import infer_auto_device_map
from diffusers import UNet2DModel

from ddgan import ClassConditionedUnet

TINY = {
    "sample_size": 8,
    "num_classes": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


def tiny(**changes):
    torch.manual_seed(0)
    return ClassConditionedUnet(**{**TINY, **changes})


def inputs(batch_size=3, channels=1, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch_size, channels, height, width, generator=generator)
    return sample, torch.tensor([5, 400, 999])[:batch_size], torch.tensor([2, 0, 1])[:batch_size]


def plain_unet(model, in_channels, **changes):
    """Return the network of Diffusers with the same weights."""
    config = {**TINY, "in_channels": in_channels, "out_channels": 1, **changes}
    unet = UNet2DModel(**{key: value for key, value in config.items() if key != "num_classes"})
    unet.load_state_dict({name.removeprefix("unet."): w for name, w in model.state_dict().items() if "unet." in name})
    return unet


def test_defaults_are_the_mnist_network_with_1_7_million_parameters():
    model = ClassConditionedUnet()
    plain = UNet2DModel(
        sample_size=28,
        in_channels=1 + 4,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    assert model.num_parameters() == plain.num_parameters() + 10 * 4
    assert round(model.num_parameters() / 1e6, 1) == 1.7
    assert model.config.sample_size == 28
    assert model.config.in_channels == model.config.out_channels == 1
    plain.load_state_dict(model.unet.state_dict())  # the same parts of the same shapes


def test_outputs_are_those_of_a_plain_unet_with_the_embedding_at_every_pixel():
    model = tiny(in_channels=2, class_emb_size=5)
    sample, t, labels = inputs(channels=2)
    joined = torch.empty(3, 2 + 5, 8, 8)
    for i, label in enumerate(labels):
        joined[i, :2] = sample[i]
        for j in range(5):
            joined[i, 2 + j] = model.class_embedding.weight[label, j].detach()
    expected = plain_unet(model, 2 + 5)(joined, t).sample
    assert torch.equal(model(sample, t, labels).sample, expected)


def test_each_one_hot_class_has_a_channel_and_the_null_class_has_none():
    model = tiny(class_emb_size=None, class_dropout=0.1)
    assert not any("class_embedding" in name for name, _ in model.named_parameters())
    sample, t, _ = inputs()
    joined = torch.zeros(3, 1 + 3, 8, 8)
    joined[:, :1] = sample
    joined[0, 1 + 2] = 1
    joined[1, 1 + 0] = 1
    expected = plain_unet(model, 1 + 3)(joined, t).sample
    assert torch.equal(model(sample, t, torch.tensor([2, 0, 3])).sample, expected)


@pytest.mark.parametrize("class_emb_size", [4, None])
def test_with_class_dropout_there_is_one_more_label(class_emb_size):
    sample, t, _ = inputs()
    null = torch.tensor([3, 3, 3])
    with_null = tiny(class_emb_size=class_emb_size, class_dropout=0.1)
    outputs = [with_null(sample, t, torch.full((3,), label)).sample for label in range(4)]
    assert all(not torch.allclose(outputs[3], output) for output in outputs[:3])
    with pytest.raises((IndexError, RuntimeError)):
        tiny(class_emb_size=class_emb_size)(sample, t, null)


PRETRAINED = {
    "as google/ddpm-celebahq-256": {
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "scale and shift, learned variance": {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "out_channels": 2,
        "act_fn": "gelu",
    },
    "centered input, not square": {"center_input_sample": True, "sample_size": (8, 12)},
}


def unconditional(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    config = {name: value for name, value in TINY.items() if name != "num_classes"}
    return UNet2DModel(**{**config, "in_channels": 1, "out_channels": 1, **changes})


@pytest.mark.parametrize("options", PRETRAINED.values(), ids=PRETRAINED)
def test_a_pretrained_unet_gets_classes_and_first_predicts_the_same_for_each(tmp_path, options):
    unet = unconditional(**options)
    sample, t, _ = inputs(width=12 if "sample_size" in options else 8)
    expected = unet(sample, t).sample
    model = ClassConditionedUnet.from_unet(unet, 3, class_dropout=0.1, id2label=["a", "b", "c"])
    for labels in ([2, 0, 1], [3, 3, 3]):
        assert torch.equal(model(sample, t, torch.tensor(labels)).sample, expected)
    assert (model.config.num_classes, model.config.class_dropout) == (3, 0.1)
    assert model.config.sample_size == unet.config.sample_size

    model(sample, t, torch.tensor([0, 2, 2])).sample.square().sum().backward()
    gradient = model.unet.class_embedding.weight.grad
    assert [bool(row.any()) for row in gradient] == [True, False, True, False]
    with torch.no_grad():
        model.unet.class_embedding.weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = ClassConditionedUnet.from_pretrained(tmp_path)
    output = loaded(sample, t, torch.tensor([2, 0, 1])).sample
    assert torch.equal(output, model(sample, t, torch.tensor([2, 0, 1])).sample)
    assert not torch.allclose(output, expected)
    assert torch.equal(unet(sample, t).sample, expected), "the pretrained network must not change"


def test_a_class_conditional_unet_gets_no_classes():
    with pytest.raises(ValueError, match="class-conditional already"):
        ClassConditionedUnet.from_unet(unconditional(num_class_embeds=3), 3)


def test_the_class_enters_at_the_input_or_with_the_timestep():
    with pytest.raises(ValueError, match="`conditioning` is 'output'"):
        tiny(conditioning="output")


def test_the_network_itself_is_deterministic():
    model = tiny(class_dropout=0.9).train()
    assert torch.equal(model(*inputs()).sample, model(*inputs()).sample)


def test_gradients_reach_all_weights_and_the_embeddings_of_the_classes_seen():
    model = tiny()
    sample, t, _ = inputs()
    model(sample, t, torch.tensor([0, 2, 2])).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [bool(row.any()) for row in model.class_embedding.weight.grad] == [True, False, True]


@pytest.mark.parametrize("timestep", [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7])], ids=str)
def test_timestep_may_be_a_number_or_a_tensor(timestep):
    model = tiny()
    sample, _, labels = inputs()
    torch.testing.assert_close(
        model(sample, timestep, labels).sample, model(sample, torch.full((3,), 7), labels).sample
    )


def test_output_is_a_dataclass_or_an_equal_tuple():
    model = tiny()
    as_tuple = model(*inputs(), return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], model(*inputs()).sample)


def test_images_need_not_be_square():
    model = tiny(sample_size=(8, 12))
    sample, t, labels = inputs(width=12)
    assert model(sample, t, labels).sample.shape == sample.shape


@pytest.mark.parametrize("id2label", [{0: "a", 1: "b", 2: "c"}, ["a", "b", "c"]], ids=str)
def test_saved_network_loads_the_same_with_names_and_dtype(tmp_path, caplog, monkeypatch, id2label):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    model = tiny(class_dropout=0.1, id2label=id2label)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = ClassConditionedUnet.from_pretrained(tmp_path)
    assert caplog.text == ""
    assert torch.equal(loaded(*inputs()).sample, model(*inputs()).sample)
    assert loaded.config.class_dropout == 0.1
    names = loaded.config.id2label
    assert names == (id2label if isinstance(id2label, list) else {"0": "a", "1": "b", "2": "c"})

    half = ClassConditionedUnet.from_pretrained(tmp_path, dtype=torch.bfloat16)
    sample, t, labels = inputs()
    output = half(sample.bfloat16(), t, labels).sample
    assert half.dtype == output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), model(sample, t, labels).sample, rtol=0, atol=0.1)


def test_autocast_trains_in_bfloat16_near_the_float32_result():
    model = tiny()
    expected = model(*inputs()).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs()).sample
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_reaches_the_unet_and_is_bit_identical():
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert all(block.gradient_checkpointing for block in [*model.unet.down_blocks, *model.unet.up_blocks])
        output = model(*inputs()).sample
        output.square().sum().backward()
        gradients.append([output, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("class_emb_size", [4, None])
def test_compiles_as_one_graph(class_emb_size):
    model = tiny(class_emb_size=class_emb_size, class_dropout=0.1)
    expected = model(*inputs()).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # this tests the graph, not the compiler
    torch.testing.assert_close(compiled(*inputs()).sample, expected)


def test_layerwise_casting_stores_float8_and_computes_in_float32():
    model = tiny()
    expected = model(*inputs()).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.unet.conv_in.weight.dtype == torch.float8_e4m3fn
    output = model(*inputs()).sample
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=0.5)


def test_the_wrapped_network_stays_on_one_device():
    model = tiny()
    no_split = model._get_no_split_modules("auto")
    devices = infer_auto_device_map(model, {0: "150KB", "cpu": "1GB"}, no_split_module_classes=no_split)
    assert devices.keys() <= {"", "class_embedding", "unet"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.0, 1.0, 2.0]), "one integer for each of the 3 images"),
        (torch.tensor([0, 1]), r"shape \(2,\), but must hold one integer for each of the 3"),
        (torch.eye(3), "one integer for each of the 3 images"),
    ],
    ids=["floats", "too few", "a matrix"],
)
def test_invalid_labels_are_refused(labels, message):
    sample, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        tiny()(sample, t, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_dropout": 1.0}, r"class_dropout.*\[0, 1\)"),
        ({"id2label": ["a", "b"]}, r"names the labels \[0, 1\].*each of the 3 classes, 0 to 2"),
        ({"id2label": {1: "a", 2: "b", 3: "c"}}, r"names the labels \[1, 2, 3\].*0 to 2"),
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
