"""Class-conditional sampling: every scheduler and network, guidance, all forms of labels, and invalid arguments."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from tiny import tiny_unet
from torch import nn

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, ContextUnet
from ddgan.pipelines.pipeline_class_conditional import Autoguidance, noise_level

NAMES = {0: "angry", 1: "happy", 2: "sad"}
# networks sum in another order for other batch sizes and positions in the batch
ROUNDING = {"rtol": 0, "atol": 1e-5}
SCHEDULERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "ddim eta": (DDIMScheduler, {}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {}),
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver++ single": (DPMSolverSinglestepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "deis": (DEISMultistepScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
}
STOCHASTIC = ("ddpm", "ddim eta", "sde-dpmsolver++", "euler ancestral")


def with_class_dependence(model):
    """Change the weights so that the class matters, which at initialization it hardly does."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def class_conditioned(**changes):
    torch.manual_seed(0)
    config = {
        "sample_size": (8, 12),
        "num_classes": 3,
        "class_dropout": 0.1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "id2label": NAMES,
    }
    return with_class_dependence(ClassConditionedUnet(**{**config, **changes}))


def context(**changes):
    torch.manual_seed(0)
    config = {"n_feat": 8, "n_cfeat": 3, "height": 8, "class_dropout": 0.1, "num_train_timesteps": 1000}
    return with_class_dependence(ContextUnet(**{**config, **changes}))


def plain_unet(**changes):
    return tiny_unet(num_class_embeds=3, **changes).eval()


def pipeline(unet=None, name="ddim", **scheduler):
    scheduler_class, config = SCHEDULERS[name]
    pipe = ClassConditionalPipeline(unet or class_conditioned(), scheduler_class(1000, **{**config, **scheduler}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def latents(pipe, class_labels, **arguments):
    return pipe(class_labels, **{"num_inference_steps": 4, "output_type": "latent", **arguments}).images


class OneImagePerClass(ModelMixin, ConfigMixin):
    """The perfect network for data with one image per class: a smooth ramp, brighter from class to class."""

    @register_to_config
    def __init__(self, num_classes=3, in_channels=1, sample_size=8, class_dropout=0.0):
        super().__init__()
        self.images = nn.Parameter(torch.linspace(-0.9, 0.8, 3 * 64).view(3, 1, 8, 8))
        self.alphas_cumprod = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()

    def forward(self, sample, timestep, class_labels, return_dict=True):
        # sigmas are interpolated where a scheduler stops between two timesteps
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        variance = float(np.interp(float(timestep), range(1000), sigmas)) ** 2
        noise = sample * (1 + variance) ** 0.5 - self.images[class_labels]
        return (noise / variance**0.5,)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_network_generates_the_image_of_the_class_with_every_scheduler(name):
    unet = OneImagePerClass()
    pipe = pipeline(unet, name, beta_schedule="squaredcos_cap_v2")
    samples = latents(pipe, [2, 0], num_inference_steps=20, eta=float("eta" in name), generator=seeded(0))
    # PNDM and DEIS extrapolate to their end, which PNDM has at the least noisy timestep
    tolerance = 0.03 if name in ("pndm", "deis") else 1e-3
    torch.testing.assert_close(samples, unet.images[[2, 0]].detach(), rtol=0, atol=tolerance)


def test_guided_ddim_uses_the_noise_of_the_clipped_image():
    unet = OneImagePerClass(num_classes=2, class_dropout=0.1)  # the third image is that of the null class
    pipe = pipeline(unet, "ddim", beta_schedule="squaredcos_cap_v2")
    null, target = unet.images[2], unet.images[0]
    clipped = (null + 3 * (target - null)).clamp(-1, 1).detach()
    assert (clipped == -1).any()
    noises = []

    def noise_of(pipe, i, t, tensors):
        if i + 1 < len(pipe.scheduler.timesteps):
            alpha = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[i + 1]]
            noises.append((tensors["latents"] - alpha**0.5 * clipped) / (1 - alpha) ** 0.5)
        return {}

    latents(pipe, [0], guidance_scale=3.0, num_inference_steps=10, callback_on_step_end=noise_of)
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_with_a_list_of_generators_images_are_independent(name):
    pipe = pipeline(name=name)
    arguments = {"guidance_scale": 2.0, "eta": float("eta" in name)}
    three = latents(pipe, [0, 1, 2], generator=seeded(5, 6, 7), **arguments)
    assert torch.equal(latents(pipe, [2, 1, 0], generator=seeded(8, 6, 9), **arguments)[1], three[1])
    alone = latents(pipe, [1], generator=[seeded(6)], **arguments)
    scale = three.abs().max()
    torch.testing.assert_close(alone[0] / scale, three[1] / scale, **ROUNDING)
    other = latents(pipe, [1], generator=[seeded(8)], **arguments)
    assert (other - alone).abs().max() > 0.1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_of_stochastic_schedulers_comes_from_the_generator(name):
    pipe = pipeline(name=name)
    start = torch.randn(1, 1, 8, 12, generator=seeded(0))

    def samples(seed):
        return latents(pipe, 1, latents=start, generator=seeded(seed), eta=float("eta" in name))

    assert torch.equal(samples(1), samples(1))
    assert torch.equal(samples(1), samples(2)) == (name not in STOCHASTIC)


@pytest.mark.parametrize("network", [class_conditioned, context], ids=["class", "context"])
@pytest.mark.parametrize("name", ["ddpm", "unipc", "euler"])
def test_guidance_adds_the_scaled_difference_to_the_unconditional_prediction(network, name):
    pipe = pipeline(network(), name)
    generator = seeded(3)
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.randn(2, pipe.unet.config.in_channels, height, width, generator=generator)
    pipe.scheduler.set_timesteps(4)
    x = x * pipe.scheduler.init_noise_sigma
    step_kwargs = {"generator": generator} if name != "unipc" else {}
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t)
        with torch.no_grad():
            conditional = pipe.unet(scaled, t, torch.tensor([2, 1])).sample
            unconditional = pipe.unet(scaled, t, torch.tensor([3, 3])).sample
        x = pipe.scheduler.step(unconditional + 2.5 * (conditional - unconditional), t, x, **step_kwargs).prev_sample
    samples = latents(pipe, [2, 1], guidance_scale=2.5, generator=seeded(3))
    scale = x.abs().max()
    torch.testing.assert_close(samples / scale, x / scale, **ROUNDING)
    assert (samples - latents(pipe, [2, 1], generator=seeded(3))).abs().max() > 100 * ROUNDING["atol"] * scale


@pytest.mark.parametrize(("guidance_scale", "batch"), [(1.0, 2), (2.0, 4)])
def test_guidance_doubles_the_batch_of_the_network(guidance_scale, batch):
    pipe = pipeline()
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latents(pipe, [0, 1], guidance_scale=guidance_scale)
    assert sizes == [batch] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Autoguidance, and guidance at some noise levels only


def worse(network=class_conditioned, **changes):
    """Return another network for the same images."""
    unet = network(**changes)
    torch.manual_seed(1)
    return with_class_dependence(unet)


def evaluations(*networks) -> list[list[int]]:
    """Return a list for each network that will contain the batch size of each of its evaluations."""
    sizes = [[] for _ in networks]
    for network, own in zip(networks, sizes, strict=True):
        network.register_forward_pre_hook(lambda module, args, own=own: own.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler karras", "heun"])
@pytest.mark.parametrize("class_scale", [None, 2.0])
def test_autoguidance_adds_the_scaled_difference_to_the_guide(name, class_scale):
    unclipped = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
    pipe, guide = pipeline(name=name, **unclipped), pipeline(worse(), name)
    labels, null = torch.tensor([2, 1]), torch.tensor([3, 3])
    generator = seeded(3)
    x = torch.randn(2, 1, 8, 12, generator=generator)
    pipe.scheduler.set_timesteps(4)
    x = x * pipe.scheduler.init_noise_sigma
    step_kwargs = {} if name == "heun" else {"generator": generator}
    for t in pipe.scheduler.timesteps:
        scaled = pipe.scheduler.scale_model_input(x, t)
        with torch.no_grad():
            conditional, other = pipe.unet(scaled, t, labels).sample, guide.unet(scaled, t, labels).sample
            unconditional = pipe.unet(scaled, t, null).sample
        guided = other + 2.5 * (conditional - other) + ((class_scale or 1) - 1) * (conditional - unconditional)
        x = pipe.scheduler.step(guided, t, x, **step_kwargs).prev_sample
    arguments = {"guide": guide, "guidance_scale": 2.5, "class_guidance_scale": class_scale}
    samples = latents(pipe, [2, 1], generator=seeded(3), **arguments)
    scale = x.abs().max()
    torch.testing.assert_close(samples / scale, x / scale, rtol=0, atol=1e-4)  # guidance amplifies rounding
    for other in (arguments | {"guidance_scale": 1.0}, arguments | {"class_guidance_scale": 3.0}):
        assert (samples - latents(pipe, [2, 1], generator=seeded(3), **other)).abs().max() > 1e-2 * scale


def test_autoguidance_with_a_scale_of_1_changes_nothing_and_costs_nothing():
    pipe, guide = pipeline(), pipeline(worse())
    (sizes,) = evaluations(guide.unet)
    for more in ({}, {"guidance_scale": 2.0}):
        expected = latents(pipe, [2, 1], generator=seeded(0), **more)
        more = {f"class_{name}": scale for name, scale in more.items()}
        samples = latents(pipe, [2, 1], generator=seeded(0), guide=guide, guidance_scale=1.0, **more)
        assert torch.equal(samples, expected)
    assert not sizes


def test_a_network_that_guides_itself_has_no_effect():
    pipe = pipeline(name="ddpm")  # guided DDIM computes the noise in another way, see above
    guided = latents(pipe, [2, 1], generator=seeded(0), guide=pipe, guidance_scale=3.0)
    assert torch.equal(guided, latents(pipe, [2, 1], generator=seeded(0)))


def test_a_guide_without_classes_is_evaluated_without_them():
    pipe = pipeline()
    guide = pipeline(tiny_unet(sample_size=(8, 12), in_channels=1, out_channels=1).eval())
    sizes = evaluations(guide.unet)[0]
    assert latents(pipe, [2, 1], guide=guide, guidance_scale=2.0).isfinite().all()
    assert sizes == [2] * 4


@pytest.mark.parametrize("kind", ["null class", "guide", "both"])
@pytest.mark.parametrize("name", ["ddim", "euler karras", "heun"])
def test_guidance_applies_to_the_noise_levels_of_the_interval(name, kind):
    pipe, guide = pipeline(name=name), pipeline(worse(), name)
    pipe.scheduler.set_timesteps(6)
    timesteps = pipe.scheduler.timesteps.tolist()
    if hasattr(pipe.scheduler, "sigmas"):
        sigmas = pipe.scheduler.sigmas.tolist()[: len(timesteps)]
    else:
        sigmas = [((1 - a) / a) ** 0.5 for a in pipe.scheduler.alphas_cumprod[timesteps].tolist()]
    assert [noise_level(pipe.scheduler, t) for t in timesteps] == pytest.approx(sigmas, rel=1e-3)
    distinct = sorted(set(sigmas))
    low, high = distinct[0] * 1.01, distinct[-1] * 0.99
    inside = [low < sigma <= high for sigma in sigmas]
    assert 0 < sum(inside) < len(inside)

    arguments = {
        "null class": {"guidance_scale": 2.0},
        "guide": {"guidance_scale": 2.0, "guide": guide},
        "both": {"guidance_scale": 2.0, "guide": guide, "class_guidance_scale": 2.0},
    }[kind]
    sizes, guide_sizes = evaluations(pipe.unet, guide.unet)
    steps = {"num_inference_steps": 6, "generator": seeded(0)}
    latents(pipe, [2, 1], guidance_interval=(low, high), **arguments, **steps)
    assert sizes == [4 if guided and kind != "guide" else 2 for guided in inside]
    assert guide_sizes == ([] if kind == "null class" else [2] * sum(inside))
    unguided = latents(pipe, [2, 1], **{**steps, "generator": seeded(0)})
    outside = {**steps, "generator": seeded(0), "guidance_interval": (distinct[-1] * 2, distinct[-1] * 3)}
    assert torch.equal(latents(pipe, [2, 1], **arguments, **outside), unguided)


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_a_learned_variance_is_used_by_ddpm_and_not_guided(variance_type):
    pipe = pipeline(class_conditioned(out_channels=2))
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type=variance_type)
    seen, step = [], pipe.scheduler.step

    def recorded(output, *args, **kwargs):
        seen.append(output)
        return step(output, *args, **kwargs)

    pipe.scheduler.step = recorded
    start = torch.randn(1, 1, 8, 12, generator=seeded(0))
    for scale in (1.0, 4.0):
        latents(pipe, 1, latents=start, guidance_scale=scale, num_inference_steps=1)
    plain, guided = seen
    assert not torch.equal(plain[:, :1], guided[:, :1])
    assert plain.shape[1] == guided.shape[1] == (2 if variance_type == "learned_range" else 1)
    torch.testing.assert_close(plain[:, 1:], guided[:, 1:], **ROUNDING)


def test_a_guide_is_converted_where_there_is_only_noise():
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    guide, pipe = pipeline(prediction_type="sample"), pipeline(prediction_type="v_prediction")
    for part in (guide, pipe):
        part.scheduler = DDIMScheduler.from_config(part.scheduler.config, **zero_snr)
    images = latents(pipe, [2, 1], guide=guide, guidance_scale=2.0, num_inference_steps=2)
    assert images.isfinite().all()


@pytest.mark.parametrize("target", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("source", ["epsilon", "sample", "v_prediction"])
def test_predictions_of_a_guide_are_converted(source, target):
    noise, image = torch.randn(2, 2, 1, 8, 12, generator=seeded(0)).double()
    guide, pipe = (pipeline(prediction_type=kind) for kind in (source, target))
    t = torch.tensor(400)
    alpha = pipe.scheduler.alphas_cumprod[t].double()
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * image
    outputs = {"epsilon": noise, "sample": image, "v_prediction": velocity}
    guide.unet.forward = lambda *args, **kwargs: (outputs[source],)
    noisy = alpha.sqrt() * image + (1 - alpha).sqrt() * noise
    update = Autoguidance(guide, pipe, 3.0).update(outputs[target] + 0.5, noisy, t, torch.tensor([0, 1]))
    torch.testing.assert_close(update, torch.full_like(noise, 1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (lambda: pipeline(worse(sample_size=8)), r"its image size \(height, width\): \(8, 8\) instead of \(8, 12\)"),
        (lambda: pipeline(worse(in_channels=3, out_channels=3)), "its channels: 3 instead of 1"),
        (lambda: pipeline(worse(num_classes=4, id2label=None)), "its classes: 4 instead of 3"),
        (lambda: pipeline(worse(id2label=["sad", "happy", "angry"])), "its class names: .*'sad', 'happy', 'angry'"),
        (lambda: pipeline(worse(), beta_schedule="squaredcos_cap_v2"), "another noise schedule .* squaredcos_cap_v2"),
        (lambda: ClassConditionalPipeline(worse(), DDIMScheduler(500)), r"noise schedule \(500 timesteps"),
    ],
)
def test_an_incompatible_guide_is_refused(guide, message):
    with pytest.raises(ValueError, match=message):
        latents(pipeline(), [0, 1], guide=guide(), guidance_scale=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 0.5, "guide": True}, "The scale of autoguidance is 0.5, but must be at least 1"),
        ({"class_guidance_scale": 2.0}, "`class_guidance_scale` is 2.0, but there is no `guide`"),
        ({"guidance_scale": 2.0, "guidance_interval": (5.0, 0.2)}, r"\(5.0, 0.2\), but must be two noise levels"),
        ({"guidance_scale": 2.0, "guidance_interval": (0.2,)}, r"\(0.2,\), but must be two noise levels"),
        ({"class_labels": [3, 0], "guide": True}, "holds 3, the null class, which the guide does not have"),
    ],
)
def test_invalid_arguments_of_autoguidance_are_refused(arguments, message):
    if "guide" in arguments:
        arguments = {**arguments, "guide": pipeline(worse(class_dropout=0.0))}
    with pytest.raises(ValueError, match=message):
        latents(pipeline(), **{"class_labels": [0, 1], **arguments})


# ---------------------------------------------------------------------------------------------------------------------
# Labels, outputs, callbacks and data types


@pytest.mark.parametrize("network", [class_conditioned, context, plain_unet], ids=["class", "context", "plain"])
def test_labels_determine_the_class_with_each_network(network):
    pipe = pipeline(network())
    samples = latents(pipe, [0, 2], generator=seeded(5, 5))
    assert (samples[0] - samples[1]).abs().max() > 1e-3
    other = latents(pipe, [1, 2], generator=seeded(5, 5))
    assert torch.equal(other[1], samples[1])
    assert not torch.equal(other[0], samples[0])


@pytest.mark.parametrize("id2label", [NAMES, list(NAMES.values())], ids=["dict", "list"])
def test_all_forms_of_labels_are_equivalent(tmp_path, id2label):
    pipe = pipeline(class_conditioned(id2label=id2label))
    expected = latents(pipe, [2, 0], generator=seeded(0))
    for labels in (["sad", "angry"], ("sad", 0), torch.tensor([2, 0]), np.array([2, 0], dtype=np.uint8)):
        assert torch.equal(latents(pipe, labels, generator=seeded(0)), expected)
    four = latents(pipe, [1] * 4, generator=seeded(0))
    for label in (1, "happy", torch.tensor(1), np.int64(1)):
        assert torch.equal(latents(pipe, label, batch_size=4, generator=seeded(0)), four)
    assert len(latents(pipe, "happy")) == 1

    pipe.unet.save_pretrained(tmp_path)  # JSON makes strings of the labels
    pipe.unet = ClassConditionedUnet.from_pretrained(tmp_path)
    assert pipe.labels == {"angry": 0, "happy": 1, "sad": 2}
    assert torch.equal(latents(pipe, ["sad", "angry"], generator=seeded(0)), expected)


def test_contexts_may_be_one_hot_mixed_or_zero():
    pipe = pipeline(context(), clip_sample=False)  # clipping of guided predictions is not tested here
    labels = latents(pipe, [2, 0], guidance_scale=2.0, generator=seeded(0))
    one_hot = torch.eye(3)[[2, 0]]
    for matrix in (one_hot, one_hot.double(), one_hot.tolist(), one_hot.long().tolist(), one_hot.numpy()):
        assert torch.equal(latents(pipe, matrix, guidance_scale=2.0, generator=seeded(0)), labels)
    half_half = [0.5, 0.0, 0.5]
    mixed = latents(pipe, [half_half, half_half], generator=seeded(0))
    assert torch.equal(latents(pipe, half_half, batch_size=2, generator=seeded(0)), mixed)
    assert not torch.allclose(mixed, labels)
    none = latents(pipe, torch.zeros(2, 3), generator=seeded(0))
    assert torch.equal(latents(pipe, 3, batch_size=2, generator=seeded(0)), none)  # the null class by its label
    guided = latents(pipe, torch.zeros(2, 3), guidance_scale=2.0, generator=seeded(0))
    torch.testing.assert_close(guided / none.abs().max(), none / none.abs().max(), **ROUNDING)


def test_latents_can_be_passed_instead_of_generated():
    for name in ("ddpm", "euler"):
        pipe = pipeline(name=name)
        generator = seeded(1)
        noise = torch.randn(2, 1, 8, 12, generator=generator)
        samples = latents(pipe, [0, 1], latents=noise, generator=generator)
        assert torch.equal(samples, latents(pipe, [0, 1], generator=seeded(1)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_output_types_hold_the_same_image(channels, mode):
    pipe = pipeline(class_conditioned(in_channels=channels, out_channels=channels))
    forms = {
        form: pipe([0, 1], num_inference_steps=3, generator=seeded(0), output_type=form).images
        for form in ("pil", "np", "pt", "latent")
    }
    assert forms["latent"].shape == forms["pt"].shape == (2, channels, 8, 12)
    assert forms["np"].shape == (2, 8, 12, channels)
    assert forms["latent"].min() < -0.1
    torch.testing.assert_close(forms["pt"], (forms["latent"] / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(forms["np"], forms["pt"].permute(0, 2, 3, 1).numpy())
    assert [(image.mode, image.size) for image in forms["pil"]] == [(mode, (12, 8))] * 2
    levels = np.asarray(forms["pil"][0]).reshape(8, 12, channels)
    assert np.array_equal(levels, (forms["np"][0] * 255).round().astype(np.uint8))
    as_tuple = pipe([0, 1], num_inference_steps=3, generator=seeded(0), output_type="pt", return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], forms["pt"])


def test_callback_sees_every_step_and_may_replace_the_sample():
    pipe = pipeline()
    calls = []

    def replace_at_last(pipeline_, step, timestep, kwargs):
        assert pipeline_ is pipe
        calls.append((step, int(timestep), tuple(kwargs["latents"].shape)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else kwargs

    samples = latents(pipe, [0, 1], callback_on_step_end=replace_at_last)
    assert calls == [(i, t, (2, 1, 8, 12)) for i, t in enumerate(pipe.scheduler.timesteps.tolist())]
    assert pipe.num_timesteps == 4
    assert not samples.any()


def test_callback_may_end_guidance_or_sampling_early():
    pipe = pipeline()
    sizes = []
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))

    class EndGuidance(PipelineCallback):
        tensor_inputs = ["class_labels"]  # noqa: RUF012

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == 0:
                assert callback_kwargs["class_labels"].tolist() == [3, 3, 2, 1]
                pipeline._guidance_scale = 1.0
                callback_kwargs["class_labels"] = callback_kwargs["class_labels"].chunk(2)[1]
            return callback_kwargs

    latents(pipe, [2, 1], guidance_scale=3.0, callback_on_step_end=EndGuidance(cutoff_step_ratio=0.5))
    assert sizes == [4, 2, 2, 2]

    def stop(pipeline, step, timestep, kwargs):
        pipeline._interrupt = step == 1
        return kwargs

    sizes.clear()
    latents(pipe, [2, 1], num_inference_steps=10, callback_on_step_end=stop)
    assert sizes == [2, 2]
    sizes.clear()
    latents(pipe, [2, 1], guidance_scale=3.0)  # neither lasts
    assert sizes == [4, 4, 4, 4]


@pytest.mark.parametrize("network", [class_conditioned, context, plain_unet], ids=["class", "context", "plain"])
@pytest.mark.parametrize("name", ["ddpm", "dpmsolver++", "euler"])
def test_samples_stay_float32_with_a_half_precision_network(network, name):
    pipe = pipeline(network(), name)
    full = latents(pipe, [0, 1], generator=seeded(0))
    pipe.to(torch.bfloat16)
    dtypes = set()
    step = pipe.scheduler.step

    def recording(output, t, sample, generator=None, **kwargs):
        dtypes.update((output.dtype, sample.dtype))
        return step(output, t, sample, generator=generator, **kwargs)

    pipe.scheduler.step = recording
    half = latents(pipe, [0, 1], generator=seeded(0))
    assert dtypes == {half.dtype} == {torch.float32}
    # bfloat16 rounds by 2^-9, in each of some ten layers of three evaluations
    assert 0 < (half - full).abs().mean() < 0.03 * full.abs().mean()


def test_progress_bar_counts_the_steps(capsys):
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=False)
    pipe(0, num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_images_on_a_gpu_match_the_cpu_also_when_offloaded(offload):
    pipe = pipeline()
    expected = latents(pipe, [0, 1], guidance_scale=2.0, generator=seeded(0, 1))
    getattr(pipe, offload)() if offload else pipe.to("cuda")
    samples = latents(pipe, [0, 1], guidance_scale=2.0, generator=seeded(0, 1))
    assert samples.device.type == "cuda"
    torch.testing.assert_close(samples.cpu(), expected, rtol=0, atol=2e-2)  # convolutions in TF32
    if offload:
        assert pipe.unet.device.type in ("cpu", "meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0, 4, -1]}, "holds -1, 4, but .* 3 classes, whose labels are 0 to 2, and 3 for the null"),
        ({"class_labels": 7}, "holds 7, but"),
        ({"class_labels": ["sad", "hapy"]}, "no class 'hapy' among the 3 .* classes are 'angry', 'happy', 'sad'"),
        ({"class_labels": "SAD"}, r"no class 'SAD' .* The classes are "),
        (
            {"class_labels": torch.zeros(2, 3)},
            r"float32 of shape \(2, 3\), but a ClassConditionedUnet takes no contexts",
        ),
        ({"class_labels": [0, 1], "batch_size": 3}, "2 entries, but `batch_size` is 3"),
        ({"class_labels": 0, "batch_size": 0}, "`batch_size` is 0"),
        ({"generator": [torch.Generator()] * 3}, "list of 3, .* each of the 2 images"),
        ({"class_labels": 0, "generator": [torch.Generator()] * 3}, "list of 3, .* each of the 1 images"),
        ({"latents": torch.zeros(2, 1, 12, 8)}, r"\(2, 1, 12, 8\), but must have shape \(2, 1, 8, 12\)"),
        ({"latents": torch.zeros(3, 1, 8, 12)}, r"\(3, 1, 8, 12\), but must have shape \(2, 1, 8, 12\)"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, but must be at least 1"),
        ({"output_type": "jpg"}, "'jpg', but must be 'pil', 'np', 'pt' or 'latent'"),
        ({"callback_on_step_end_tensor_inputs": ["z"]}, r"only \['latents', 'class_labels'\]"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        latents(pipeline(), **{"class_labels": [0, 1], **arguments})


def test_of_many_classes_an_unknown_name_lists_the_nearest():
    names = {i: f"emoji {i}" for i in range(21)}
    pipe = pipeline(class_conditioned(num_classes=21, id2label=names))
    with pytest.raises(ValueError, match=r"among the 21 .* nearest names are 'emoji 7', 'emoji \d+', 'emoji \d+'\."):
        pipe.get_label_ids(["emojy 7"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 4), r"context of shape \(2, 4\), but must have one column for each of the 3 classes"),
        ([0.5, 0.5], r"context of shape \(2,\), but must have one column for each of the 3 classes"),
        (torch.zeros(1, 2, 3), r"context of shape \(1, 2, 3\)"),
        ([0, 5], "holds 5, but .* 3 classes, whose labels are 0 to 2, and 3 for the null class"),
        ("hero", r"\['hero'\] were passed, but this network has none .* labels from 0 to 2"),
    ],
    ids=str,
)
def test_invalid_contexts_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        latents(pipeline(context()), labels)


@pytest.mark.parametrize(
    "unet",
    [class_conditioned(class_dropout=0.0), context(class_dropout=0.0), plain_unet()],
    ids=["class", "context", "plain"],
)
def test_a_network_without_null_class_cannot_be_guided(unet):
    pipe = pipeline(unet)
    with pytest.raises(ValueError, match=f"2.0, but this {type(unet).__name__} was not trained with a null class"):
        latents(pipe, [0, 1], guidance_scale=2.0)
    assert latents(pipe, [0, 1], guidance_scale=2.0, guide=pipe).isfinite().all()
    with pytest.raises(ValueError, match=r"`class_guidance_scale` is 2.0, .* with `class_guidance_scale=1`"):
        latents(pipe, [0, 1], guidance_scale=2.0, guide=pipe, class_guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"holds 3, but this network has 3 classes, whose labels are 0 to 2\."):
        latents(pipe, [3])
    assert latents(pipe, [0, 1], guidance_scale=1.0).isfinite().all()


def test_a_flow_matching_scheduler_is_refused():
    pipe = ClassConditionalPipeline(class_conditioned(), FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"A FlowMatchEulerDiscreteScheduler cannot be used here: .* DDIM"):
        latents(pipe, [0, 1])


def test_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="UNet2DModel is not conditioned on a class"):
        latents(pipeline(tiny_unet()), 0)
