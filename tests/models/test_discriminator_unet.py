"""Claims about the UNet discriminator: it keeps the UNet's features, can be penalized, and saves and loads."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ddgan import ClassConditionedUnet, UNetDiscriminator

TINY = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
CONFIGS = {
    "attention": {},
    "resnet_downsampling": {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"), "layers_per_block": 2},
    "skip": {"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "block_out_channels": (16, 32)},
    "fourier": {"time_embedding_type": "fourier", "resnet_time_scale_shift": "scale_shift"},
    "learned_time": {"time_embedding_type": "learned", "num_train_timesteps": 10},
    "no_mid_block": {"mid_block_type": None},
    "no_mid_attention": {"add_attention": False, "center_input_sample": True},
    "learned_variance": {"out_channels": 6},
    "class_embedding": {"num_class_embeds": 3},
    "class_timestep": {"class_embed_type": "timestep"},
}


def tiny_unet(**changes):
    torch.manual_seed(0)
    return UNet2DModel(**{**TINY, **changes})


def tiny(num_heads=2, **changes):
    """A discriminator whose heads matter (fresh ones give zero)."""
    return with_heads(UNetDiscriminator.from_unet(tiny_unet(**changes), num_heads))


def with_heads(model):
    torch.manual_seed(1)
    for head in model.heads:
        nn.init.normal_(head.conv_out.weight)
    return model


def inputs(batch_size=3, channels=3, height=8, width=8):
    sample = torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(2))
    return sample, torch.arange(1, batch_size + 1)


def labels_of(changes, batch_size=3):
    return torch.arange(batch_size) if changes.keys() & {"num_class_embeds", "class_embed_type"} else None


def recorded_encoder_output(network, *arguments):
    """The output of the mid block of a UNet or a discriminator, or of the last down block where there is none."""
    recorded = []
    block = network.mid_block or network.down_blocks[-1]
    hook = block.register_forward_hook(lambda module, args, output: recorded.append(output))
    network(*arguments)
    hook.remove()
    return recorded[0] if network.mid_block else recorded[0][0]


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_has_the_features_of_the_unet(name):
    changes = CONFIGS[name]
    unet = tiny_unet(**changes)
    model = UNetDiscriminator.from_unet(unet, num_heads=2)
    sample, t = inputs()
    labels = labels_of(changes)
    expected = recorded_encoder_output(unet, sample, t, labels)
    torch.testing.assert_close(recorded_encoder_output(model, sample, t, labels), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_penalty_trains_every_parameter(name):
    changes = CONFIGS[name]
    model = tiny(**changes)
    sample, t = inputs()
    sample.requires_grad_()
    logits = model(sample, t, class_labels=labels_of(changes))
    (gradient,) = torch.autograd.grad(logits.sum(), sample, create_graph=True)
    assert gradient.abs().sum() > 0
    (logits.square().sum() + gradient.square().sum()).backward()
    without = [k for k, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [key for key in without if not key.endswith("to_k.bias")]  # which softmax ignores


def test_gradient_of_the_penalty_through_attention_matches_finite_differences():
    model = tiny().double()  # but for the softmax, which Diffusers computes in float32
    sample, t = inputs(batch_size=1)
    sample = sample.double().requires_grad_()
    weight = model.mid_block.attentions[0].to_q.weight

    def penalty():
        (gradient,) = torch.autograd.grad(model(sample, t).sum(), sample, create_graph=True)
        return gradient.square().sum()

    (derivative,) = torch.autograd.grad(penalty(), weight)
    direction, step = torch.randn_like(weight), 1e-3
    with torch.no_grad():
        weight += step * direction
    above = penalty().item()
    with torch.no_grad():
        weight -= 2 * step * direction
    below = penalty().item()
    assert (derivative * direction).sum().item() == pytest.approx((above - below) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (6, 4)], ids=str)
@pytest.mark.parametrize(("num_heads", "heads"), [(1, 1), (2, 2), (3, 2)])
def test_any_size_gives_one_logit_per_head_and_image(size, num_heads, heads):
    logits = tiny(num_heads)(*inputs(3, 3, *size))
    assert logits.shape == (3, heads)


def test_logits_do_not_depend_on_the_rest_of_the_batch():
    model = tiny()
    sample, t = inputs()
    torch.testing.assert_close(model(sample[1:2], t[1:2]), model(sample, t)[1:2])
    torch.testing.assert_close(model(sample, 4), model(sample, torch.full((3,), 4)))


def test_fresh_heads_give_zero():
    model = UNetDiscriminator.from_unet(tiny_unet(), num_heads=2)
    assert torch.equal(model(*inputs()), torch.zeros(3, 2))


def test_noise_level_matters():
    model = tiny()
    sample, _ = inputs()
    assert not torch.allclose(model(sample, 0), model(sample, 500))


@pytest.mark.parametrize(
    ("conditioning", "class_emb_size", "class_dropout"),
    [("input", 2, 0.0), ("input", 2, 0.1), ("input", None, 0.1), ("time", None, 0.1)],
)
def test_class_conditioned_unet_keeps_its_features_and_classes(conditioning, class_emb_size, class_dropout):
    names = ("sample_size", "layers_per_block", "block_out_channels", "down_block_types", "up_block_types")
    config = {name: TINY[name] for name in (*names, "attention_head_dim", "norm_num_groups")}
    torch.manual_seed(0)
    unet = ClassConditionedUnet(
        **config, num_classes=3, class_emb_size=class_emb_size, class_dropout=class_dropout, conditioning=conditioning
    )
    model = with_heads(UNetDiscriminator.from_unet(unet, num_heads=2))
    sample, t = inputs(channels=1)
    labels = torch.tensor([0, 2, unet.num_labels - 1])
    recorded = []
    for network in (unet.unet, model):
        network.mid_block.register_forward_hook(lambda module, args, output: recorded.append(output))
    unet(sample, t, labels)
    logits = model(sample, t, labels)
    torch.testing.assert_close(recorded[1], recorded[0])
    assert not torch.allclose(logits[0], model(sample, t, torch.tensor([1, 2, 0]))[0])


def test_training_the_discriminator_leaves_the_unet_alone():
    unet = tiny_unet()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    model = with_heads(UNetDiscriminator.from_unet(unet, num_heads=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(*inputs()).sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_wrong_arguments_are_refused():
    sample, t = inputs()
    with pytest.raises(ValueError, match="which this one is not"):
        tiny()(sample, t, class_labels=t - 1)
    with pytest.raises(ValueError, match=r"which this one is\."):
        tiny(num_class_embeds=3)(sample, t)


def test_gradient_checkpointing_changes_no_number_not_even_of_the_penalty():
    results = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        sample, t = inputs()
        sample.requires_grad_()
        logits = model(sample, t)
        (gradient,) = torch.autograd.grad(logits.sum(), sample, create_graph=True)
        (nn.functional.softplus(-logits).mean() + gradient.square().sum()).backward()
        results.append([logits, gradient, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_network_loads_the_same_with_variant_and_dtype(tmp_path):
    model = tiny(num_class_embeds=3)
    sample, t = inputs()
    labels = torch.tensor([0, 1, 2])
    arguments = sample, t, labels
    model.save_pretrained(tmp_path, variant="fp32")
    loaded = UNetDiscriminator.from_pretrained(tmp_path, variant="fp32")
    assert torch.equal(loaded(*arguments), model(*arguments))
    half = UNetDiscriminator.from_pretrained(tmp_path, variant="fp32", torch_dtype=torch.bfloat16)
    logits = half(sample.bfloat16(), t, labels)
    assert logits.dtype == torch.bfloat16


def test_logits_are_computed_in_float32_under_autocast():
    model = tiny()
    expected = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(*inputs()), expected)


def test_discriminator_of_a_half_precision_unet_is_in_float32():
    model = UNetDiscriminator.from_unet(tiny_unet().half(), num_heads=2)
    assert model(*inputs()).dtype == torch.float32


def test_compiles_as_one_graph():
    model = tiny()
    expected = model(*inputs())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what is tested is the graph, not the compiler
    torch.testing.assert_close(compiled(*inputs()), expected)
