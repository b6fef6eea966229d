"""Sampling from a Denoising Diffusion GAN: recorded runs, order of the noise, and the conventions of Diffusers."""

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

# networks sum in another order for other batch sizes and positions in the batch
ROUNDING = {"rtol": 0, "atol": 1e-5}


def pipeline(channels=3, **unet) -> DDGANPipeline:
    """Return a small pipeline whose weights make every part matter; an untrained one starts near zero."""
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


def test_a_recorded_run_is_reproduced_with_its_noise_in_the_documented_order(golden, monkeypatch):
    run, _, _ = golden("sample_trajectory")
    _, config, state_dict = golden("generator_a")
    noises = [run["input/x_init"]]
    for step in range(4):
        noises += [run[f"step{step}/z"]] + ([run[f"step{step}/noise"]] if step < 3 else [])

    def next_noise(shape, **_):
        noise = noises.pop(0)
        assert noise.shape == shape
        return noise

    monkeypatch.setattr(pipeline_ddgan, "randn_tensor", next_noise)
    monkeypatch.setattr(scheduling_ddgan, "randn_tensor", next_noise)
    pipe = DDGANPipeline(convert_generator(state_dict, config).eval(), DDGANScheduler())
    samples = latents(pipe, batch_size=3)
    assert noises == []
    torch.testing.assert_close(samples, run["output"], rtol=0, atol=2e-5)


def four_steps(pipe, generator, z_generator, **step) -> torch.Tensor:
    """Sample two images step by step: x_T and the posterior noise from one generator, z from the other."""
    x = torch.randn(2, 3, 8, 12, generator=generator)
    for t in (3, 2, 1, 0):
        z = torch.randn(2, 5, generator=z_generator)
        with torch.no_grad():
            x_0 = pipe.unet(x, t, z).sample
        x = pipe.scheduler.step(x_0, t, x, generator=generator, **step).prev_sample
    return x


def test_a_generator_provides_x_T_then_z_and_noise_of_each_step_but_the_last():
    pipe = pipeline()
    generator = seeded(5)
    x = four_steps(pipe, generator, generator)
    used = seeded(5)
    assert torch.equal(latents(pipe, batch_size=2, generator=used), x)
    assert torch.equal(used.get_state(), generator.get_state())


def test_with_eta_0_only_x_T_and_z_are_random():
    pipe = pipeline()
    generator = seeded(5)
    x = four_steps(pipe, generator, generator, variance_noise=torch.zeros(2, 3, 8, 12))
    assert torch.equal(latents(pipe, batch_size=2, eta=0, generator=seeded(5)), x)
    assert (latents(pipe, batch_size=2, eta=0.5, generator=seeded(5)) - x).abs().max() > 0.01


def test_z_generator_provides_only_z():
    pipe = pipeline()
    x = four_steps(pipe, seeded(5), seeded(6))
    samples = latents(pipe, batch_size=2, generator=seeded(5), z_generator=seeded(6))
    assert torch.equal(samples, x)
    for seeds in ((5, 7), (7, 6)):
        other = latents(pipe, batch_size=2, generator=seeded(seeds[0]), z_generator=seeded(seeds[1]))
        assert (other - samples).abs().max() > 0.05
    one_by_one = latents(pipe, batch_size=2, generator=seeded(5, 5), z_generator=seeded(6, 7))
    torch.testing.assert_close(latents(pipe, generator=seeded(5), z_generator=seeded(7))[0], one_by_one[1], **ROUNDING)


def test_with_a_list_of_generators_images_are_independent():
    pipe = pipeline()
    three = latents(pipe, batch_size=3, generator=seeded(5, 6, 7))
    assert torch.equal(latents(pipe, batch_size=3, generator=seeded(8, 6, 9))[1], three[1])
    torch.testing.assert_close(latents(pipe, batch_size=3, generator=seeded(7, 5, 6))[2], three[1], **ROUNDING)
    alone = latents(pipe, generator=seeded(6))
    torch.testing.assert_close(alone[0], three[1], **ROUNDING)
    assert torch.equal(latents(pipe, generator=[seeded(6)]), alone)
    assert (three[0] - three[1]).abs().max() > 0.1


def test_number_of_steps_and_timesteps_are_those_of_the_scheduler():
    pipe = pipeline()
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))

    def steps(**arguments):
        seen.clear()
        samples = latents(pipe, generator=seeded(0), **arguments)
        return list(seen), samples

    assert steps()[0] == [3, 2, 1, 0]
    assert steps(num_inference_steps=2)[0] == [3, 1]
    assert steps(timesteps=[3, 0])[0] == [3, 0]
    assert torch.equal(steps(num_inference_steps=2)[1], steps(timesteps=[3, 1])[1])
    assert len(steps()[0]) == 4  # a shorter run has no lasting effect


def test_latents_can_be_passed_instead_of_generated():
    pipe = pipeline()
    generator = seeded(1)
    x_T = torch.randn(2, 3, 8, 12, generator=generator)
    samples = latents(pipe, batch_size=2, latents=x_T, generator=generator)
    assert torch.equal(samples, latents(pipe, batch_size=2, generator=seeded(1)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_output_types_hold_the_same_image(channels, mode):
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
    assert [(image.mode, image.size) for image in forms["pil"]] == [(mode, (12, 8))] * 2
    levels = np.asarray(forms["pil"][0]).reshape(8, 12, channels)
    assert np.array_equal(levels, (forms["np"][0] * 255).round().astype(np.uint8))
    as_tuple = pipe(batch_size=2, generator=seeded(0), output_type="pt", return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], forms["pt"])


def test_a_network_without_tanh_is_clipped():
    samples = pipeline(tanh_output=False)(batch_size=8, generator=seeded(0), output_type="pt").images
    assert samples.min() == 0 and samples.max() == 1


def test_class_labels_determine_the_class_of_each_image():
    pipe = pipeline(num_class_embeds=3)
    samples = latents(pipe, batch_size=2, class_labels=[0, 2], generator=seeded(5, 5))
    assert (samples[0] - samples[1]).abs().max() > 1e-2
    other = latents(pipe, batch_size=2, class_labels=torch.tensor([1, 2]), generator=seeded(5, 5))
    assert torch.equal(other[1], samples[1]) and not torch.equal(other[0], samples[0])


def test_classes_can_be_given_by_name(tmp_path):
    named = pipeline(num_class_embeds=3, id2label=["1", "2", "10"])
    named.save_pretrained(tmp_path)
    expected = latents(named, batch_size=2, class_labels=[1, 2], generator=seeded(5, 5))
    for pipe in (named, DDGANPipeline.from_pretrained(tmp_path)):
        pipe.set_progress_bar_config(disable=True)
        assert pipe.labels == {"1": 0, "2": 1, "10": 2}
        assert torch.equal(latents(pipe, batch_size=2, class_labels=["2", "10"], generator=seeded(5, 5)), expected)
    with pytest.raises(ValueError, match=r"`class_labels` is \['0', 1\], .* or one of the names 1, 2, 10,"):
        named(batch_size=2, class_labels=["0", 1])
    with pytest.raises(ValueError, match=r"`id2label` names the labels \[0\], but must name each of the 3 classes"):
        pipeline(num_class_embeds=3, id2label=["a"])


def test_the_number_of_images_is_that_of_the_labels_and_one_label_serves_all_images():
    pipe = pipeline(num_class_embeds=3, id2label=["a", "b", "c"])
    both = latents(pipe, batch_size=2, class_labels=[2, 2], generator=seeded(0))
    for arguments in ({"class_labels": [2, "c"]}, {"class_labels": "c", "batch_size": 2}):
        assert torch.equal(latents(pipe, **arguments, generator=seeded(0)), both)
    labels = torch.tensor(2)
    assert torch.equal(latents(pipe, class_labels=labels, batch_size=2, generator=seeded(0)), both)
    assert latents(pipe, class_labels=1).shape[0] == 1 == latents(pipeline()).shape[0]


def test_sampling_can_be_interrupted():
    pipe, steps = pipeline(), []

    def stop(pipeline, step, timestep, kwargs):
        steps.append(step)
        pipeline._interrupt = step == 1
        return kwargs

    latents(pipe, callback_on_step_end=stop)
    assert steps == [0, 1] and pipe.interrupt
    latents(pipe, num_inference_steps=2, callback_on_step_end=lambda *args: args[-1])
    assert not pipe.interrupt and pipe.num_timesteps == 2


def test_callback_sees_every_step_and_may_replace_the_sample():
    pipe = pipeline()
    calls = []

    def replace_at_last(pipeline_, step, timestep, kwargs):
        assert pipeline_ is pipe
        calls.append((step, int(timestep), tuple(kwargs["latents"].shape)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else kwargs

    samples = latents(pipe, batch_size=2, callback_on_step_end=replace_at_last)
    assert calls == [(i, 3 - i, (2, 3, 8, 12)) for i in range(4)]
    assert not samples.any()

    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    callback = Halve(cutoff_step_ratio=0.5)
    once = latents(pipe, num_inference_steps=1, callback_on_step_end=callback, generator=seeded(0))
    torch.testing.assert_close(once, latents(pipe, num_inference_steps=1, generator=seeded(0)) / 2)


def test_half_precision_generates_nearly_the_same_images():
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


def test_a_compiled_network_gives_the_same_samples():
    pipe = pipeline()
    plain = latents(pipe, batch_size=2, generator=seeded(0))
    graphs = CompileCounter()
    pipe.unet = torch.compile(pipe.unet, backend=graphs, fullgraph=True)
    torch.testing.assert_close(latents(pipe, batch_size=2, generator=seeded(0)), plain, **ROUNDING)
    assert graphs.frame_count == 1  # the timesteps are inputs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_images_on_a_gpu_match_the_cpu_also_when_offloaded(offload):
    pipe = pipeline()
    expected = latents(pipe, batch_size=2, generator=seeded(0, 1))
    getattr(pipe, offload)() if offload else pipe.to("cuda")
    samples = latents(pipe, batch_size=2, generator=seeded(0, 1))
    assert samples.device.type == "cuda"
    torch.testing.assert_close(samples.cpu(), expected, rtol=0, atol=2e-2)  # convolutions in TF32
    if offload:
        assert pipe.unet.device.type in ("cpu", "meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "class_labels": []}, "`batch_size` is 0"),
        ({"class_labels": None}, "`class_labels` is None, .* from 0 to 2 .* 2 images"),
        ({"class_labels": [1]}, r"`class_labels` is \[1\], .* 2 images"),
        ({"class_labels": [1, 3]}, r"`class_labels` is \[1, 3\], .* from 0 to 2"),
        ({"class_labels": [-1, 0]}, r"`class_labels` is \[-1, 0\]"),
        ({"class_labels": torch.zeros(2, 1, dtype=torch.int64)}, "one integer from 0 to 2"),
        ({"class_labels": [0.7, 1.2]}, r"`class_labels` is \[0.7, 1.2\], .* one integer"),
        ({"class_labels": ["a", "b"]}, r"`class_labels` is \['a', 'b'\]"),
        ({"class_labels": "01"}, "`class_labels` is \\['01', '01'\\]"),
        ({"generator": [torch.Generator()] * 3}, "list of 3, .* 2 images"),
        ({"z_generator": [torch.Generator()] * 3}, "`z_generator` is a list of 3, .* 2 images"),
        ({"eta": -0.1}, "`eta` is -0.1, but must be at least 0"),
        ({"latents": torch.zeros(2, 3, 12, 8)}, r"\(2, 3, 12, 8\), but must have shape \(2, 3, 8, 12\)"),
        ({"output_type": "jpg"}, "'jpg', but must be 'pil', 'np', 'pt' or 'latent'"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, r"only \['latents'\]"),
        ({"num_inference_steps": 5}, "use 1 to 4"),
        ({"timesteps": [0, 3]}, "must descend"),
        ({"num_inference_steps": 2, "timesteps": [3, 0]}, "only one of"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(num_class_embeds=3)(**{"batch_size": 2, "class_labels": [0, 1], **arguments})


def test_class_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="not conditioned on a class"):
        pipeline()(class_labels=[0])
