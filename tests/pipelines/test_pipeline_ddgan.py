"""Claims about sampling from a Denoising Diffusion GAN: what is drawn, in which order, and Diffusers' conventions."""

import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from torch import nn
from torch._dynamo.testing import CompileCounter

from ddgan import DDGANPipeline, DDGANScheduler, NCSNpp
from ddgan.conversion.ddgan_checkpoints import convert_generator
from ddgan.pipelines import pipeline_ddgan
from ddgan.schedulers import scheduling_ddgan

# networks sum in another order in batches of another size, or at another place in them
ROUNDING = {"rtol": 0, "atol": 1e-5}


def pipeline(channels=3, **unet) -> DDGANPipeline:
    """A small pipeline with weights at which every part matters (a fresh one begins near zero)."""
    torch.manual_seed(0)
    config = {
        "sample_size": (8, 12),
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (8, 12),
        "layers_per_block": 1,
        "attention_resolutions": (4,),
        "latent_dim": 5,
        "latent_embed_dim": 8,
        "latent_mapping_layers": 1,
    }
    model = NCSNpp(**{**config, **unet}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    pipe = DDGANPipeline(model, DDGANScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def latents(pipe, **arguments):
    return pipe(**arguments, output_type="latent").images


def test_a_recorded_run_is_repeated_and_its_noise_is_drawn_in_this_order(golden, monkeypatch):
    run, _, _ = golden("sample_trajectory")
    _, config, state_dict = golden("generator_a")
    draws = [run["input/x_init"]]
    for step in range(4):
        draws += [run[f"step{step}/z"]] + ([run[f"step{step}/noise"]] if step < 3 else [])

    def next_draw(shape, **_):
        draw = draws.pop(0)
        assert draw.shape == shape
        return draw

    monkeypatch.setattr(pipeline_ddgan, "randn_tensor", next_draw)
    monkeypatch.setattr(scheduling_ddgan, "randn_tensor", next_draw)
    pipe = DDGANPipeline(convert_generator(state_dict, config).eval(), DDGANScheduler())
    drawn = latents(pipe, batch_size=3)
    assert draws == []
    torch.testing.assert_close(drawn, run["output"], rtol=0, atol=2e-5)


def test_a_generator_gives_x_T_then_z_and_noise_of_each_step_and_no_noise_at_the_last():
    pipe = pipeline()
    generator = seeded(5)
    x = torch.randn(2, 3, 8, 12, generator=generator)
    for t in (3, 2, 1, 0):
        z = torch.randn(2, 5, generator=generator)
        with torch.no_grad():
            x_0 = pipe.unet(x, t, z).sample
        x = pipe.scheduler.step(x_0, t, x, generator=generator).prev_sample
    used = seeded(5)
    assert torch.equal(latents(pipe, batch_size=2, generator=used), x)
    assert torch.equal(used.get_state(), generator.get_state())


def test_with_a_list_of_generators_each_picture_depends_on_its_own_alone():
    pipe = pipeline()
    three = latents(pipe, batch_size=3, generator=seeded(5, 6, 7))
    assert torch.equal(latents(pipe, batch_size=3, generator=seeded(8, 6, 9))[1], three[1])
    torch.testing.assert_close(latents(pipe, batch_size=3, generator=seeded(7, 5, 6))[2], three[1], **ROUNDING)
    alone = latents(pipe, generator=seeded(6))
    torch.testing.assert_close(alone[0], three[1], **ROUNDING)
    assert torch.equal(latents(pipe, generator=[seeded(6)]), alone)
    assert (three[0] - three[1]).abs().max() > 0.1


def test_fewer_steps_and_steps_by_name_are_the_schedulers():
    pipe = pipeline()
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))

    def steps(**arguments):
        seen.clear()
        drawn = latents(pipe, generator=seeded(0), **arguments)
        return list(seen), drawn

    assert steps()[0] == [3, 2, 1, 0]
    assert steps(num_inference_steps=2)[0] == [3, 1]
    assert steps(timesteps=[3, 0])[0] == [3, 0]
    assert torch.equal(steps(num_inference_steps=2)[1], steps(timesteps=[3, 1])[1])
    assert len(steps()[0]) == 4  # a short run leaves nothing behind


def test_given_latents_take_the_place_of_those_drawn_first():
    pipe = pipeline()
    generator = seeded(1)
    x_T = torch.randn(2, 3, 8, 12, generator=generator)
    drawn = latents(pipe, batch_size=2, latents=x_T, generator=generator)
    assert torch.equal(drawn, latents(pipe, batch_size=2, generator=seeded(1)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_output_types_are_one_picture_in_several_forms(channels, mode):
    pipe = pipeline(channels)
    forms = {
        form: pipe(batch_size=2, generator=seeded(0), output_type=form).images
        for form in ("pil", "np", "pt", "latent")
    }
    assert forms["latent"].shape == forms["pt"].shape == (2, channels, 8, 12)
    assert forms["np"].shape == (2, 8, 12, channels)
    assert forms["latent"].abs().max() <= 1 and forms["latent"].min() < -0.1
    torch.testing.assert_close(forms["pt"], forms["latent"] / 2 + 0.5)
    assert np.array_equal(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
    assert [(picture.mode, picture.size) for picture in forms["pil"]] == [(mode, (12, 8))] * 2
    levels = np.asarray(forms["pil"][0]).reshape(8, 12, channels)
    assert np.array_equal(levels, (forms["np"][0] * 255).round().astype(np.uint8))
    as_tuple = pipe(batch_size=2, generator=seeded(0), output_type="pt", return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], forms["pt"])


def test_a_network_without_tanh_is_clipped():
    drawn = pipeline(tanh_output=False)(batch_size=8, generator=seeded(0), output_type="pt").images
    assert drawn.min() == 0 and drawn.max() == 1


def test_class_labels_choose_the_class_of_each_picture():
    pipe = pipeline(num_class_embeds=3)
    drawn = latents(pipe, batch_size=2, class_labels=[0, 2], generator=seeded(5, 5))
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2
    other = latents(pipe, batch_size=2, class_labels=torch.tensor([1, 2]), generator=seeded(5, 5))
    assert torch.equal(other[1], drawn[1]) and not torch.equal(other[0], drawn[0])


def test_callback_sees_every_step_and_may_replace_the_sample():
    pipe = pipeline()
    calls = []

    def replace_at_last(pipeline_, step, timestep, kwargs):
        assert pipeline_ is pipe
        calls.append((step, int(timestep), tuple(kwargs["latents"].shape)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else kwargs

    drawn = latents(pipe, batch_size=2, callback_on_step_end=replace_at_last)
    assert calls == [(i, 3 - i, (2, 3, 8, 12)) for i in range(4)]
    assert not drawn.any()

    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    callback = Halve(cutoff_step_ratio=0.5)
    once = latents(pipe, num_inference_steps=1, callback_on_step_end=callback, generator=seeded(0))
    torch.testing.assert_close(once, latents(pipe, num_inference_steps=1, generator=seeded(0)) / 2)


def test_half_precision_draws_nearly_the_same_pictures():
    pipe = pipeline()
    full = latents(pipe, batch_size=2, generator=seeded(0))
    pipe.to(torch.bfloat16)
    half = latents(pipe, batch_size=2, generator=seeded(0))
    assert half.dtype == torch.float32
    # bfloat16 rounds by 2^-9, in each of some ten layers of four evaluations
    assert 0 < (half - full).abs().mean() < 0.02


def test_progress_bar_counts_the_steps(capsys):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err


def test_a_compiled_network_is_sampled_like_the_plain_one():
    pipe = pipeline()
    plain = latents(pipe, batch_size=2, generator=seeded(0))
    graphs = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)
    torch.testing.assert_close(latents(pipe, batch_size=2, generator=seeded(0)), plain, **ROUNDING)
    assert graphs.frame_count == 1  # the timesteps are inputs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_on_a_gpu_the_pictures_are_those_of_the_cpu_also_when_offloaded(offload):
    pipe = pipeline()
    expected = latents(pipe, batch_size=2, generator=seeded(0, 1))
    getattr(pipe, offload)() if offload else pipe.to("cuda")
    drawn = latents(pipe, batch_size=2, generator=seeded(0, 1))
    assert drawn.device.type == "cuda"
    torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=2e-2)  # convolutions in TF32
    if offload:
        assert pipe.unet.device.type in ("cpu", "meta")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch_size": 0, "class_labels": []}, "`batch_size` is 0"),
        ({"class_labels": None}, "`class_labels` is None, .* from 0 to 2 .* 2 images"),
        ({"class_labels": [1]}, r"`class_labels` is \[1\], .* 2 images"),
        ({"class_labels": [1, 3]}, r"`class_labels` is \[1, 3\], .* from 0 to 2"),
        ({"class_labels": [-1, 0]}, r"`class_labels` is \[-1, 0\]"),
        ({"class_labels": torch.zeros(2, 1, dtype=torch.int64)}, "one integer from 0 to 2"),
        ({"class_labels": [0.7, 1.2]}, r"`class_labels` is \[0.7, 1.2\], .* one integer"),
        ({"class_labels": ["a", "b"]}, r"`class_labels` is \['a', 'b'\]"),
        ({"class_labels": "01"}, "`class_labels` is 01"),
        ({"generator": [torch.Generator()] * 3}, "list of 3, .* 2 images"),
        ({"latents": torch.zeros(2, 3, 12, 8)}, r"\(2, 3, 12, 8\), but must have shape \(2, 3, 8, 12\)"),
        ({"output_type": "jpg"}, "'jpg', but must be 'pil', 'np', 'pt' or 'latent'"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, r"only \['latents'\]"),
        ({"num_inference_steps": 5}, "use 1 to 4"),
        ({"timesteps": [0, 3]}, "must descend"),
        ({"num_inference_steps": 2, "timesteps": [3, 0]}, "only one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        pipeline(num_class_embeds=3)(**{"batch_size": 2, "class_labels": [0, 1], **arguments})


def test_class_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="not conditioned on a class"):
        pipeline()(class_labels=[0])
