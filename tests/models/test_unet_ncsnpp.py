"""The generator: recorded outputs and gradients, every option and size, and the conventions of Diffusers."""

import itertools
import logging

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from ddgan import DDGANScheduler, NCSNpp
from ddgan.conversion.ddgan_checkpoints import convert_generator
from ddgan.models import unet_ncsnpp

GOLDEN = (
    *("a", "b", "c", "c_fir_noconv", "d", "e_cat", "e_sum", "f_fir", "f_nofir", "g", "h"),
    *("i_noskiprescale", "j_fourier", "k_biggan_nofir", "l_unconditional"),
)
TINY = {
    "sample_size": 16,
    "block_out_channels": (8, 12),
    "layers_per_block": 1,
    "attention_resolutions": (8,),
    "latent_dim": 5,
    "latent_embed_dim": 8,
    "latent_mapping_layers": 1,
}


def tiny(**changes):
    """Return a small network whose weights make every part matter; an untrained one starts near zero."""
    torch.manual_seed(0)
    model = NCSNpp(**{**TINY, **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(batch_size=2, channels=3, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch_size, channels, height, width, generator=generator)
    return sample, torch.arange(batch_size), torch.randn(batch_size, TINY["latent_dim"], generator=generator)


def relative_error(actual, recorded):
    return ((actual - recorded).norm() / recorded.norm()).item()


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_and_input_gradients_match_the_recorded_ones(golden, name):
    recorded, config, state_dict = golden(f"generator_{name}")
    model = convert_generator(state_dict, config).eval()
    x, z = recorded["input/x"].requires_grad_(), recorded["input/z"].requires_grad_()
    output = model(x, recorded["input/t"], z).sample
    torch.testing.assert_close(output, recorded["output"], rtol=0, atol=2e-5)
    (output * recorded["probe"]).sum().backward()
    assert relative_error(x.grad, recorded["grad/x"]) < 1e-4
    assert relative_error(z.grad, recorded["grad/z"]) < 1e-4


def test_sampling_reproduces_the_recorded_run(golden, monkeypatch):
    run, _, _ = golden("sample_trajectory")
    _, config, state_dict = golden("generator_a")
    model = convert_generator(state_dict, config).eval()
    scheduler = DDGANScheduler()
    x = run["input/x_init"]
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            x_0 = model(x, t, run[f"step{i}/z"]).sample
        noise = run[f"step{i}/noise"]
        monkeypatch.setattr("ddgan.schedulers.scheduling_ddgan.randn_tensor", lambda *_, noise=noise, **__: noise)
        x = scheduler.step(x_0, t, x).prev_sample
    torch.testing.assert_close(x, run["output"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("resnet_type", ["biggan", "biggan_oneadagn", "ddpm"])
@pytest.mark.parametrize("fir", [True, False])
def test_every_combination_of_options_runs_at_odd_sizes(resnet_type, fir):
    """7x10 -> 3x5 -> 1x2 rounds at every level; all parameters get gradients."""
    sample, t, z = inputs(height=7, width=10)
    for with_conv, (progressive_input, combine), output in itertools.product(
        (True, False) if resnet_type == "ddpm" else (True,),
        (("none", "sum"), ("input_skip", "sum"), ("input_skip", "cat"), ("residual", "sum")),
        ("none", "output_skip", "residual"),
    ):
        model = tiny(
            sample_size=(7, 10),
            block_out_channels=(4, 6, 8),
            attention_resolutions=(3,),
            resnet_type=resnet_type,
            fir=fir,
            resample_with_conv=with_conv,
            progressive_input=progressive_input,
            progressive_combine=combine,
            progressive_output=output,
        )
        result = model(sample, t, z).sample
        assert result.shape == sample.shape
        assert result.isfinite().all()
        result.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("size", "widths"),
    [((28, 28), (4, 8, 8, 8)), ((128, 256), (4, 4, 4, 4, 4, 4)), ((33, 64), (4, 8)), ((48, 20), (5, 7, 9))],
    ids=str,
)
def test_any_size_works_also_other_than_the_configured_one(size, widths):
    model = tiny(sample_size=size, block_out_channels=widths, attention_resolutions=())
    sample, t, z = inputs(1, 3, *size)
    assert model(sample, t, z).sample.shape == sample.shape
    sample, t, z = inputs(1, 3, size[0] + 8, size[1] + 11)
    assert model(sample, t, z).sample.shape == sample.shape


@pytest.mark.parametrize("width", [1, 3, 30, 132, 160])
def test_any_number_of_channels_is_divided_into_groups(width):
    model = tiny(block_out_channels=(8, width), in_channels=2, out_channels=5)
    sample, t, z = inputs(channels=2)
    assert model(sample, t, z).sample.shape == (2, 5, 16, 16)
    groups = unet_ncsnpp.num_groups(width)
    assert width % groups == 0
    assert groups <= max(min(width // 4, 32), 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_type": "resnet"},
        {"progressive_input": "sum"},
        {"progressive_output": "skip"},
        {"progressive_combine": "add"},
        {"time_embedding_type": "learned"},
        {"sample_size": (64, 7), "block_out_channels": (8, 8, 8, 8)},
        {"wavelet_levels": 4},
        {"wavelet_levels": -1},
        {"wavelet_levels": 1, "sample_size": (16, 18), "block_out_channels": (8,) * 5},
        {"wavelet_levels": 2, "sample_size": (16, 18)},
    ],
    ids=str,
)
def test_unsupported_configurations_are_refused(changes):
    with pytest.raises(ValueError, match=r"must be one of|too many to halve|are divisible by"):
        NCSNpp(**{**TINY, **changes})


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_transform_is_orthonormal_and_inverted(levels):
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bands = unet_ncsnpp.haar_transform(images, levels)
    assert bands.shape == (2, 3 * 4**levels, 8 >> levels, 12 >> levels)
    torch.testing.assert_close(unet_ncsnpp.inverse_haar_transform(bands, levels), images)
    torch.testing.assert_close(bands.square().sum(dim=(1, 2, 3)), images.square().sum(dim=(1, 2, 3)))
    averages = bands[:, :: 4**levels] / 2**levels  # the first sub-band of each channel
    torch.testing.assert_close(averages, nn.functional.avg_pool2d(images, 2**levels))


def test_haar_transform_separates_directions():
    """Stripes and a checkerboard each fill one of the three difference bands."""
    x, y = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    for band, pattern in ((1, x), (2, y), (3, x + y)):
        bands = unet_ncsnpp.haar_transform((-1.0) ** pattern[None, None], 1)
        assert [bool(b.any()) for b in bands[0]] == [i == band for i in range(4)]


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelet_network_works_at_reduced_resolution(levels):
    model = tiny(wavelet_levels=levels, attention_resolutions=(16 >> levels,), tanh_output=False)
    seen = []
    model.down_blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    sample, t, z = inputs()
    output = model(sample, t, z).sample
    assert output.shape == sample.shape
    assert seen[0][2:] == (16 >> levels, 16 >> levels)
    assert model.down_blocks[0].attentions is not None
    assert model(*inputs(height=24, width=8)).sample.shape == (2, 3, 24, 8)
    with pytest.raises(ValueError, match="are divisible by"):
        model(*inputs(height=17))
    # its layers see sub-bands and predict sub-bands: the same layers without the transforms agree
    plain = tiny(
        in_channels=3 * 4**levels,
        out_channels=3 * 4**levels,
        sample_size=16 >> levels,
        attention_resolutions=(16 >> levels,),
        tanh_output=False,
    )
    plain.load_state_dict(model.state_dict())
    bands = plain(unet_ncsnpp.haar_transform(sample, levels), t, z).sample
    torch.testing.assert_close(unet_ncsnpp.inverse_haar_transform(bands, levels), output)


def test_attention_is_at_the_listed_resolutions():
    model = NCSNpp(**{**TINY, "block_out_channels": (8, 8, 8), "attention_resolutions": (16, 4)})
    assert [block.attentions is not None for block in model.down_blocks] == [True, False, True]
    assert [block.attention is not None for block in model.up_blocks] == [True, False, True]


def test_base_channels_set_the_width_of_first_convolution_and_time_embedding():
    model = tiny(base_channels=20)
    assert model.conv_in.out_channels == 20
    assert model.time_embedding.linear_1.in_features == 20
    assert model(*inputs()).sample.shape == (2, 3, 16, 16)


def test_samples_of_a_batch_are_independent():
    model = tiny()
    sample, t, z = inputs(3)
    together = model(sample, t, z).sample
    alone = model(sample[1:2], t[1:2], z[1:2]).sample
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("timestep", [2, 2.0, torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2])], ids=str)
def test_timestep_may_be_a_number_or_a_tensor(timestep):
    model = tiny()
    sample, _, z = inputs()
    expected = model(sample, torch.tensor([2, 2]), z).sample
    assert torch.equal(model(sample, timestep, z).sample, expected)
    assert not torch.equal(model(sample, 1, z).sample, expected)


def test_fourier_embedding_is_defined_at_timestep_0():
    model = tiny(time_embedding_type="fourier")
    sample, _, z = inputs()
    at = [model(sample, t, z).sample for t in (0, 1, 2)]
    assert at[0].isfinite().all()
    assert not torch.allclose(at[0], at[1])
    assert not torch.allclose(at[0], at[2])


def test_direction_of_z_matters_and_its_norm_does_not():
    model = tiny()
    sample, t, z = inputs()
    torch.testing.assert_close(model(sample, t, z).sample, model(sample, t, 3 * z).sample)
    assert not torch.allclose(model(sample, t, z).sample, model(sample, t, -z).sample)


def test_class_labels_change_the_image_and_are_required():
    model = tiny(num_class_embeds=3)
    sample, t, z = inputs()
    first = model(sample, t, z, class_labels=torch.tensor([0, 1])).sample
    other = model(sample, t, z, class_labels=torch.tensor([0, 2])).sample
    assert torch.equal(first[0], other[0])
    assert not torch.allclose(first[1], other[1])
    with pytest.raises(ValueError, match="num_class_embeds"):
        model(sample, t, z)
    with pytest.raises(ValueError, match="num_class_embeds"):
        tiny()(sample, t, z, class_labels=torch.tensor([0, 1]))


def test_output_is_a_dataclass_or_an_equal_tuple():
    model = tiny()
    as_tuple = model(*inputs(), return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], model(*inputs()).sample)


def test_untrained_network_starts_near_zero_with_identity_styles():
    model = NCSNpp(**TINY)
    assert model(*inputs()).sample.abs().max() < 1e-3
    block = model.down_blocks[0].resnets[0]
    assert block.norm1.style.bias.tolist() == [1.0] * 8 + [0.0] * 8
    assert block.conv2.weight.abs().max() < 1e-4
    # uniform of variance 1 / fan_avg: fan_in = fan_out = 8 * 9
    assert 0.9 * (3 / 72) ** 0.5 < block.conv1.weight.abs().max() <= (3 / 72) ** 0.5
    assert block.conv1.bias.abs().max() == 0


def test_saved_network_loads_the_same_with_variant_and_dtype(tmp_path):
    model = tiny(num_class_embeds=2, time_embedding_type="fourier")
    labels = torch.tensor([0, 1])
    model.save_pretrained(tmp_path, variant="ema")
    loaded = NCSNpp.from_pretrained(tmp_path, variant="ema")
    assert torch.equal(loaded(*inputs(), labels).sample, model(*inputs(), labels).sample)
    assert loaded.config.block_out_channels == [8, 12]

    half = NCSNpp.from_pretrained(tmp_path, variant="ema", torch_dtype=torch.bfloat16)
    sample, t, z = inputs()
    output = half(sample.bfloat16(), t, z.bfloat16(), labels).sample
    assert half.dtype == output.dtype == torch.bfloat16
    assert torch.equal(half.time_proj.weight, model.time_proj.weight)  # frequencies stay in float32
    torch.testing.assert_close(output.float(), model(sample, t, z, labels).sample, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("changes", "is_warned"),
    [({}, False), ({"time_conditioning": False}, False), ({"time_embedding_type": "fourier"}, True)],
    ids=str,
)
def test_casting_warns_only_of_frequencies_with_weights(changes, is_warned, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    assert tiny(**changes).to(torch.float16).dtype == torch.float16
    assert ("['time_proj']" in caplog.text) == bool(caplog.text) == is_warned


def test_autocast_trains_in_bfloat16_near_the_float32_result():
    model = tiny()
    expected = model(*inputs()).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs()).sample
    output.float().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_is_bit_identical():
    gradients = []
    for checkpointing in (False, True):
        model = tiny(dropout=0.3).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)  # dropout
        output = model(*inputs()).sample
        output.square().sum().backward()
        gradients.append([output, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("changes", [{}, {"resnet_type": "ddpm", "progressive_output": "output_skip"}], ids=str)
def test_compiles_as_one_graph(changes):
    model = tiny(**changes)
    expected = model(*inputs()).sample
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # this tests the graph, not the compiler
    torch.testing.assert_close(compiled(*inputs()).sample, expected)


def test_repeated_blocks_compile_each_as_one_graph():
    model = tiny()
    expected = model(*inputs()).sample
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs()).sample, expected)


def test_attention_goes_through_the_dispatch_of_diffusers(monkeypatch):
    model = tiny()
    expected = model(*inputs()).sample
    backends = []
    dispatch = unet_ncsnpp.dispatch_attention_fn

    def recording(*args, backend, **kwargs):
        backends.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(unet_ncsnpp, "dispatch_attention_fn", recording)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(model(*inputs()).sample, expected)
    assert [str(backend.value) for backend in backends] == ["_native_math"] * 3
    assert len(model.attn_processors) == 3


def test_layerwise_casting_stores_float8_and_computes_in_float32():
    model = tiny()
    expected = model(*inputs()).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert stored["down_blocks.0.resnets.0.conv1.weight"] == torch.float8_e4m3fn
    assert stored["down_blocks.0.resnets.0.norm1.style.weight"] == torch.float32
    output = model(*inputs()).sample
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0, atol=0.5)


def test_weights_offloaded_to_disk_give_the_same_image(tmp_path):
    """`device_map` moves whole modules, some of which are loaded only when called."""
    model = tiny()
    expected = model(*inputs()).sample
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"mid_block": "disk", "up_blocks.1": "disk"}
    device_map |= {"up_blocks.0": "cpu"}
    device_map.pop("up_blocks")
    dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.mid_block.resnets[0].conv1.weight.device.type == "meta"
    assert torch.equal(model(*inputs()).sample, expected)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading_gives_the_same_image(offload_type):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = [argument.to(device) for argument in inputs()]
    expected = tiny().to(device)(*arguments).sample
    model = tiny()
    model.enable_group_offload(device, torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    torch.testing.assert_close(model(*arguments).sample, expected)
