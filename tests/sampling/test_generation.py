"""One image per seed, from any pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
)
from tiny import level_difference, tiny_pipeline, tiny_unet

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, ContextUnet
from ddgan.core.errors import InputError, RunError
from ddgan.pipelines.pipeline_class_conditional import count_classes
from ddgan.sampling.generation import class_names, parse_class_labels, sample
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler
from ddgan.sampling.traces import intermediates

# networks sum in another order for other batch sizes, which can change the rounding to 256 levels
ONE_LEVEL = 1


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_generates_an_image_from_its_seed(kind, name):
    pipe = with_scheduler(kind(tiny_unet().eval(), DDPMScheduler()), name)
    assert isinstance(pipe.scheduler, SCHEDULERS[name])
    first, second = sample(pipe, [3, 4], 5)
    (again,) = sample(pipe, [3], 5)
    assert first.size == (8, 8) and first.mode == "RGB"
    assert level_difference(first, again) <= ONE_LEVEL
    assert level_difference(first, second) > 50


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_images_are_those_of_the_pipeline_itself(name):
    pipe = with_scheduler(tiny_pipeline(), name)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipe(batch_size=2, generator=generators, num_inference_steps=6).images
    assert [level_difference(a, b) for a, b in zip(sample(pipe, [3, 4], 6), expected, strict=True)] == [0, 0]


def test_eta_scales_the_noise_of_ddim_steps():
    pipe = with_scheduler(tiny_pipeline(), "ddim")
    default, deterministic, noisy = (sample(pipe, [3], 6, **eta)[0] for eta in ({}, {"eta": 0.0}, {"eta": 0.5}))
    ddim = DDIMPipeline(pipe.unet, pipe.scheduler)
    (expected,) = ddim(generator=torch.Generator().manual_seed(3), num_inference_steps=6, eta=0.5).images
    assert level_difference(deterministic, default) == level_difference(noisy, expected) == 0
    assert level_difference(noisy, default) > ONE_LEVEL
    with pytest.raises(InputError, match="The steps of a DDPMScheduler take no eta"):
        sample(tiny_pipeline(), [3], 6, eta=0.5)


def worse_pipeline(**unet) -> DDPMPipeline:
    """Return a pipeline with other weights."""
    pipe = tiny_pipeline(**unet)
    torch.manual_seed(1)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return pipe


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_autoguidance_of_an_unconditional_pipeline_adds_the_scaled_difference_to_the_guide(name):
    pipe, guide = with_scheduler(tiny_pipeline(DDPMScheduler(clip_sample=False)), name), worse_pipeline()
    generator = torch.Generator().manual_seed(3)
    pipe.scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 8, 8, generator=generator) * pipe.scheduler.init_noise_sigma
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t)
        with torch.no_grad():
            prediction, other = pipe.unet(scaled, t).sample, guide.unet(scaled, t).sample
        x = pipe.scheduler.step(other + 1.5 * (prediction - other), t, x, generator=generator).prev_sample
    expected = np.asarray(((x[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0), dtype=np.uint8)
    (guided,), (plain,) = sample(pipe, [3], 4, guide=guide, guidance_scale=1.5), sample(pipe, [3], 4)
    assert np.abs(np.asarray(guided).astype(int) - expected).max() <= ONE_LEVEL
    assert level_difference(guided, plain) > 20


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_scale_of_1_a_distant_interval_and_the_model_itself_leave_images_unchanged(name):
    pipe = with_scheduler(tiny_pipeline(DDPMScheduler(clip_sample=False)), name)
    guide, (plain,) = worse_pipeline(), sample(pipe, [3], 4)
    for options in ({"guidance_scale": 1.0}, {"guidance_scale": 2.0, "guidance_interval": [1e5, 2e5]}):
        assert sample(pipe, [3], 4, guide=guide, **options)[0].tobytes() == plain.tobytes()
    (itself,) = sample(pipe, [3], 4, guide=pipe, guidance_scale=2.0)
    assert level_difference(itself, plain) <= ONE_LEVEL


def test_autoguidance_covers_the_classes_of_a_plain_pipeline():
    pipe, guide = tiny_pipeline(num_class_embeds=3), worse_pipeline(num_class_embeds=3)
    labels = []
    guide.unet.register_forward_pre_hook(
        lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    sample(pipe, [3, 4], 2, [2, 0], guide=guide, guidance_scale=2.0)
    assert labels == [[2, 0]] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 0.5}, "The scale of autoguidance is 0.5, but must be at least 1"),
        ({"guidance_interval": [2.0, 1.0]}, "must be two noise levels"),
        ({"class_guidance_scale": 2.0}, "A DDPMPipeline takes no class_guidance_scale"),
        (
            {"guide": worse_pipeline(sample_size=16)},
            r"its image size \(height, width\): \(16, 16\) instead of \(8, 8\)",
        ),
        ({"guide": worse_pipeline(num_class_embeds=3)}, "its classes: 3 instead of None"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_invalid_autoguidance_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        sample(tiny_pipeline(), [3], 4, **{"guide": worse_pipeline(), "guidance_scale": 2.0, **options})


def test_deterministic_schedulers_converge_to_the_same_image():
    pipe = tiny_pipeline(DDPMScheduler(clip_sample=False))
    expected, *others = (
        np.asarray(sample(with_scheduler(pipe, name), [0], 100)[0]).astype(float)
        for name in ("ddim", "dpmsolver", "unipc", "euler")
    )
    # all solve the same differential equation, with errors due to the step size
    assert [np.abs(other - expected).mean() < 3 for other in others] == [True] * 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(name):
    pipe = with_scheduler(tiny_pipeline(), name)
    assert level_difference(sample(pipe, [3, 5], 5)[1], sample(pipe, [7, 5], 5)[1]) == 0
    assert level_difference(sample(pipe, [3, 5], 5)[1], sample(pipe, [5, 3], 5)[0]) == 0


def test_a_saved_scheduler_whose_step_takes_no_generator_works():
    pipe = tiny_pipeline(PNDMScheduler(skip_prk_steps=True))
    assert level_difference(*(sample(pipe, [5], 6)[0] for _ in range(2))) == 0


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_become_modes(channels, mode):
    (image,) = sample(tiny_pipeline(in_channels=channels, out_channels=channels), [0], 2)
    assert image.mode == mode


def test_rectangles_are_height_by_width():
    (image,) = sample(tiny_pipeline(sample_size=(8, 16)), [0], 2)
    assert (image.height, image.width) == (8, 16)


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 4), (torch.bfloat16, 32)])  # 11 and 8 bits of 24
def test_half_precision_generates_nearly_the_same_image(dtype, levels, tmp_path):
    whole = tiny_pipeline()
    whole.save_pretrained(tmp_path)
    half = load_pipeline(str(tmp_path), dtype)
    assert half.unet.dtype == dtype
    # noise and sample stay in float32, so that only the network's output is rounded
    assert level_difference(sample(half, [5], 10)[0], sample(whole, [5], 10)[0]) <= levels


def test_class_labels_determine_the_class():
    pipe = tiny_pipeline(num_class_embeds=3)
    torch.nn.init.normal_(pipe.unet.class_embedding.weight, std=20)
    zero, one, one_alone = *sample(pipe, [5, 5], 5, [0, 1]), *sample(pipe, [5], 5, [1])
    assert level_difference(one, one_alone) <= ONE_LEVEL
    assert level_difference(zero, one) > 10


@pytest.mark.parametrize("labels", [None, [3], [-1]])
def test_missing_and_unknown_labels_are_refused(labels):
    with pytest.raises(InputError, match="from 0 to 2"):
        sample(tiny_pipeline(num_class_embeds=3), [5], 5, labels)


def test_an_unconditional_network_refuses_labels():
    with pytest.raises(InputError, match="not conditioned"):
        sample(tiny_pipeline(), [5], 5, [0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learned_variance_is_supported(name):
    pipe = tiny_pipeline(DDPMScheduler(variance_type="learned_range"), out_channels=6)
    assert sample(with_scheduler(pipe, name), [0], 3)[0].mode == "RGB"


def test_options_of_other_pipelines_are_refused():
    with pytest.raises(InputError, match="DDPMPipeline takes no loss"):
        sample(tiny_pipeline(), [0], loss=torch.mean)


def test_more_steps_than_trained_are_refused():
    with pytest.raises(InputError, match=r"11 inference steps .* 10 "):
        sample(tiny_pipeline(DDPMScheduler(num_train_timesteps=10)), [0], 11)


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_seeds_that_would_repeat_another_image_are_refused(seed):
    with pytest.raises(InputError, match=f"The seed is {seed}; it must be from 0 to 4294967295"):
        sample(tiny_pipeline(), [0, seed], 2)


def test_images_that_are_not_finite_are_reported_instead_of_saved_black():
    pipe = tiny_pipeline()
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(RunError, match="The image of seed 3, 4 is not finite and would be black"):
        sample(pipe, [3, 4], 2)
    conditional = ClassConditionalPipeline(tiny_unet(num_class_embeds=3).eval(), DDPMScheduler())
    conditional.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(RunError, match="The image of seed 5 is not finite"):
        sample(conditional, [5], 2, [1])


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_networks_conditioned_on_other_values_than_classes_are_refused(kind):
    with pytest.raises(InputError, match=f"class_embed_type: {kind}.*not supported"):
        sample(tiny_pipeline(class_embed_type=kind), [0], 2)


def test_a_consistency_pipeline_with_classes_needs_labels():
    pipe = ConsistencyModelPipeline(tiny_unet(num_class_embeds=3).eval(), CMStochasticIterativeScheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="each image needs a class label"):
        sample(pipe, [0, 1], 1)
    batch = sample(pipe, [0, 1], 1, [2, 0])
    assert level_difference(batch[1], sample(pipe, [1], 1, [0])[0]) <= ONE_LEVEL


def test_classes_can_be_given_by_label_or_name():
    unet = ClassConditionedUnet(
        sample_size=8,
        num_classes=3,
        class_dropout=0.1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        id2label=["ant", "bee", "cat"],
    ).eval()
    unet.class_embedding.weight.data *= 20
    pipe = with_scheduler(ClassConditionalPipeline(unet, DDPMScheduler()), "ddim")
    pipe.set_progress_bar_config(disable=True)
    by_number, by_name, other, guided = (
        sample(pipe, [5, 6], 3, labels, **options)
        for labels, options in (
            ([0, 2], {}),
            (["ant", 2], {}),
            (["ant", "bee"], {}),
            (["ant", "cat"], {"guidance_scale": 3.0}),
        )
    )
    assert [level_difference(a, b) for a, b in zip(by_number, by_name, strict=True)] == [0, 0]
    assert level_difference(by_number[0], other[0]) <= ONE_LEVEL < level_difference(by_number[1], other[1])
    assert level_difference(by_number[0], guided[0]) > ONE_LEVEL
    _, _, clean = intermediates(pipe, 5, 3, 3, "cat", guidance_scale=3.0)
    assert level_difference(clean[-1], sample(pipe, [5], 3, ["cat"], guidance_scale=3.0)[0]) == 0
    with pytest.raises(InputError, match="needs a class label: one of ant, bee, cat"):
        sample(pipe, [5], 3)
    with pytest.raises(InputError, match="classes are 'ant', 'bee', 'cat'"):
        sample(pipe, [5], 3, ["car"])
    with pytest.raises(InputError, match="labels are 0 to 2, and 3 for the null class"):
        sample(pipe, [5], 3, [4])


def test_the_number_of_classes_is_read_from_the_config_of_any_network():
    assert count_classes(tiny_unet()) is None
    assert count_classes(tiny_unet(num_class_embeds=3)) == 3
    assert count_classes(ContextUnet(n_feat=8, n_cfeat=4, class_dropout=0.1)) == 4
    assert count_classes(ClassConditionedUnet(num_classes=7, class_dropout=0.1)) == 7


def test_digits_are_class_labels_and_other_texts_are_names():
    assert parse_class_labels(["3", "Food & Drink"], {0: "Food & Drink"}) == [3, "Food & Drink"]
    assert parse_class_labels(["1", "0"], {0: "0", 1: "1"}) == [1, 0]
    assert parse_class_labels(["2", "0"], {0: "1", 1: "2", 2: "10"}) == ["2", "0"]  # where numbers are other names


def test_the_names_of_classes_are_read_from_the_config_of_any_network():
    names = ["ant", "bee"]
    assert class_names(ContextUnet(n_feat=8, n_cfeat=2, id2label=names)) == {0: "ant", 1: "bee"}
    assert class_names(ContextUnet(n_feat=8, n_cfeat=2, id2label={"1": "bee", "0": "ant"}))[0] == "ant"
    assert class_names(tiny_unet()) == class_names(None) == {}
