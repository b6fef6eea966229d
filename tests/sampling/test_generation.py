"""Loading a pipeline, sampling it from seeds, and recording intermediate steps."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler
from PIL import Image
from tiny import tiny_unet

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, DDGANScheduler
from ddgan.core.errors import InputError
from ddgan.sampling.generation import sample
from ddgan.sampling.loading import SCHEDULERS, load_pipeline, with_scheduler
from ddgan.sampling.traces import intermediates, trace_steps

# networks sum in another order for other batch sizes, which can change the rounding to 256 levels
ONE_LEVEL = 1

CUSTOM_PIPELINE = '''
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class ShadePipeline(DiffusionPipeline):
    """Noise around a gray level that depends on the class."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(self, batch_size=1, class_labels=None, generator=None, output_type="pil"):
        noise = randn_tensor((batch_size, 8, 8, 3), generator=generator)
        shade = torch.tensor(class_labels or [0] * batch_size).view(-1, 1, 1, 1) / 10
        return ImagePipelineOutput(images=(shade + 0.05 * noise.tanh()).clamp(0, 1).numpy())
'''


def pipeline(scheduler=None, **unet) -> DDPMPipeline:
    pipe = DDPMPipeline(tiny_unet(**unet).eval(), scheduler or DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def difference(a: Image.Image, b: Image.Image) -> int:
    """Return the largest difference of two pixels in levels."""
    assert a.mode == b.mode and a.size == b.size
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.fixture
def custom_folder(tmp_path):
    """A pipeline folder with custom code."""
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": ["pipeline_shade", "ShadePipeline"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "0.42.1"}))
    (tmp_path / "pipeline_shade.py").write_text(CUSTOM_PIPELINE)
    return tmp_path


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_generates_an_image_from_its_seed(kind, name):
    pipe = with_scheduler(kind(tiny_unet().eval(), DDPMScheduler()), name)
    assert isinstance(pipe.scheduler, SCHEDULERS[name])
    first, second = sample(pipe, [3, 4], 5)
    (again,) = sample(pipe, [3], 5)
    assert first.size == (8, 8) and first.mode == "RGB"
    assert difference(first, again) <= ONE_LEVEL
    assert difference(first, second) > 50


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_images_are_those_of_the_pipeline_itself(name):
    pipe = with_scheduler(pipeline(), name)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipe(batch_size=2, generator=generators, num_inference_steps=6).images
    assert [difference(a, b) for a, b in zip(sample(pipe, [3, 4], 6), expected, strict=True)] == [0, 0]


def test_deterministic_schedulers_converge_to_the_same_image():
    pipe = pipeline(DDPMScheduler(clip_sample=False))
    expected, *others = (
        np.asarray(sample(with_scheduler(pipe, name), [0], 100)[0]).astype(float)
        for name in ("ddim", "dpmsolver", "unipc", "euler")
    )
    # all solve the same differential equation, with errors due to the step size
    assert [np.abs(other - expected).mean() < 3 for other in others] == [True] * 3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_its_batch(name):
    pipe = with_scheduler(pipeline(), name)
    assert difference(sample(pipe, [3, 5], 5)[1], sample(pipe, [7, 5], 5)[1]) == 0
    assert difference(sample(pipe, [3, 5], 5)[1], sample(pipe, [5, 3], 5)[0]) == 0


@pytest.mark.parametrize("name", ["dpmsolver", "unipc"])
@pytest.mark.parametrize("clips", [True, False])
def test_solvers_for_latents_clip_if_the_saved_scheduler_clips(name, clips):
    scheduler = with_scheduler(pipeline(DDPMScheduler(clip_sample=clips)), name).scheduler
    scheduler.set_timesteps(5)
    far = torch.full((1, 3, 8, 8), 9.0)
    scheduler.step(far, scheduler.timesteps[0], -far)
    predicted_clean = scheduler.model_outputs[-1]
    assert (predicted_clean.abs().max() <= 1) == clips


def test_with_scheduler_does_not_change_the_pipeline():
    pipe = pipeline()
    other = with_scheduler(pipe, "euler")
    assert type(pipe.scheduler) is DDPMScheduler and other.unet is pipe.unet
    assert with_scheduler(pipe, "as-saved") is pipe


def test_a_custom_noise_process_is_not_replaced():
    pipe = pipeline(DDGANScheduler())
    with pytest.raises(InputError, match="DDGANScheduler"):
        with_scheduler(pipe, "ddim")
    assert sample(with_scheduler(pipe, "as-saved"), [0])[0].size == (8, 8)


def test_a_saved_scheduler_whose_step_takes_no_generator_works():
    pipe = pipeline(PNDMScheduler(skip_prk_steps=True))
    assert difference(*(sample(pipe, [5], 6)[0] for _ in range(2))) == 0


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels_become_modes(channels, mode):
    (image,) = sample(pipeline(in_channels=channels, out_channels=channels), [0], 2)
    assert image.mode == mode


def test_rectangles_are_height_by_width():
    (image,) = sample(pipeline(sample_size=(8, 16)), [0], 2)
    assert (image.height, image.width) == (8, 16)


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 4), (torch.bfloat16, 32)])  # 11 and 8 bits of 24
def test_half_precision_generates_nearly_the_same_image(dtype, levels, tmp_path):
    whole = pipeline()
    whole.save_pretrained(tmp_path)
    half = load_pipeline(str(tmp_path), dtype)
    assert half.unet.dtype == dtype
    # noise and sample stay in float32, so that only the network's output is rounded
    assert difference(sample(half, [5], 10)[0], sample(whole, [5], 10)[0]) <= levels


def test_class_labels_determine_the_class():
    pipe = pipeline(num_class_embeds=3)
    torch.nn.init.normal_(pipe.unet.class_embedding.weight, std=20)
    zero, one, one_alone = *sample(pipe, [5, 5], 5, [0, 1]), *sample(pipe, [5], 5, [1])
    assert difference(one, one_alone) <= ONE_LEVEL
    assert difference(zero, one) > 10


@pytest.mark.parametrize("labels", [None, [3], [-1]])
def test_missing_and_unknown_labels_are_refused(labels):
    with pytest.raises(InputError, match="from 0 to 2"):
        sample(pipeline(num_class_embeds=3), [5], 5, labels)


def test_an_unconditional_network_refuses_labels():
    with pytest.raises(InputError, match="not conditioned"):
        sample(pipeline(), [5], 5, [0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learned_variance_is_supported(name):
    pipe = pipeline(DDPMScheduler(variance_type="learned_range"), out_channels=6)
    assert sample(with_scheduler(pipe, name), [0], 3)[0].mode == "RGB"


def test_options_of_other_pipelines_are_refused():
    with pytest.raises(InputError, match="DDPMPipeline takes no loss"):
        sample(pipeline(), [0], loss=torch.mean)


def test_more_steps_than_trained_are_refused():
    with pytest.raises(InputError, match=r"11 inference steps .* 10 "):
        sample(pipeline(DDPMScheduler(num_train_timesteps=10)), [0], 11)


def test_default_is_all_steps_for_ddpm_and_at_most_fifty_for_others():
    pipe = pipeline(DDPMScheduler(num_train_timesteps=60))
    assert len(intermediates(pipe, 0, 100)[0]) == 60
    assert len(intermediates(with_scheduler(pipe, "ddim"), 0, 100)[0]) == 50


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_intermediates_end_in_the_final_image(name, kind):
    pipe = with_scheduler(pipeline(DDPMScheduler(prediction_type=kind)), name)
    timesteps, noisy, clean = intermediates(pipe, 5, 4, 9)
    assert len(timesteps) == len(noisy) == len(clean) == 4
    assert timesteps == sorted(timesteps, reverse=True)
    assert difference(clean[-1], sample(pipe, [5], 9)[0]) <= ONE_LEVEL
    assert difference(clean[0], clean[-1]) > 10


def test_intermediates_start_in_the_initial_noise():
    expected = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255)[0].permute(1, 2, 0).numpy()
    for name in SCHEDULERS:
        _, noisy, _ = intermediates(with_scheduler(pipeline(), name), 5, 4, 9)
        assert np.abs(np.asarray(noisy[0]) - expected).max() <= ONE_LEVEL


def test_traced_sampling_can_be_ended_by_an_exception():
    pipe, seen = pipeline(), []

    def watch(step):
        seen.append(step)
        if step.number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), trace_steps(pipe, watch):
        sample(pipe, [5, 6], 9)
    assert [(step.number, step.total) for step in seen] == [(0, 9), (1, 9), (2, 9)]
    assert all(step.noisy.shape == step.clean.shape == (2, 3, 8, 8) for step in seen)
    assert "step" not in vars(pipe.scheduler)


def test_intermediates_of_a_ddgan_hold_all_steps():
    pipe = pipeline(DDGANScheduler(num_train_timesteps=4))
    timesteps, _, clean = intermediates(pipe, 5, 10)
    assert timesteps == [3, 2, 1, 0]
    assert difference(clean[-1], sample(pipe, [5])[0]) == 0


def test_custom_code_runs_only_if_trusted(custom_folder):
    with pytest.raises(InputError, match="--trust_remote_code"):
        load_pipeline(str(custom_folder))
    pipe = load_pipeline(str(custom_folder), trust_remote_code=True)
    dark, bright = sample(pipe, [0, 1], class_labels=[2, 8])
    assert abs(np.asarray(dark).mean() - 51) < 5 and abs(np.asarray(bright).mean() - 204) < 5
    assert difference(bright, sample(pipe, [1], class_labels=[8])[0]) == 0
    with pytest.raises(InputError, match="num_inference_steps"):
        sample(pipe, [0], num_inference_steps=5)


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
    assert [difference(a, b) for a, b in zip(by_number, by_name, strict=True)] == [0, 0]
    assert difference(by_number[0], other[0]) <= ONE_LEVEL < difference(by_number[1], other[1])
    assert difference(by_number[0], guided[0]) > ONE_LEVEL
    _, _, clean = intermediates(pipe, 5, 3, 3, "cat", guidance_scale=3.0)
    assert difference(clean[-1], sample(pipe, [5], 3, ["cat"], guidance_scale=3.0)[0]) == 0
    with pytest.raises(InputError, match="needs a class label: one of ant, bee, cat"):
        sample(pipe, [5], 3)
    with pytest.raises(InputError, match="nearest names are 'cat'"):
        sample(pipe, [5], 3, ["car"])
    with pytest.raises(InputError, match="labels are 0 to 2, and 3 for the null class"):
        sample(pipe, [5], 3, [4])


def test_a_folder_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(InputError, match=r"model_index\.json"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/nothing", "./nothing", "a/b/c"])
def test_a_missing_pipeline_is_reported_with_the_places_searched(name):
    with pytest.raises(InputError, match=rf"No pipeline {name} .*folder.*Hub") as error:
        load_pipeline(name)
    assert "\n" not in str(error.value)


def test_a_broken_pipeline_folder_is_not_looked_for_on_the_hub(tmp_path):
    pipeline().save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(str(tmp_path))


def test_ddim_pipelines_load_and_sample(tmp_path):
    DDIMPipeline(tiny_unet().eval(), DDIMScheduler()).save_pretrained(tmp_path)
    assert sample(load_pipeline(str(tmp_path)), [0], 4)[0].size == (8, 8)


def test_a_gated_repository_is_reported_with_the_steps_to_get_access(local_hub):
    local_hub.add("bob/faces", **{"model_index.json": b'{"_class_name": "DDPMPipeline"}'})
    local_hub.repos["model", "bob/faces"].gated = True
    with pytest.raises(InputError, match=r"bob/faces is gated\. Accept its terms"):
        load_pipeline("bob/faces")
