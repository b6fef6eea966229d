"""Guided sampling with tiny networks."""

import inspect
import runpy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    ConfigMixin,
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    LDMPipeline,
    ModelMixin,
    PNDMScheduler,
    ScoreSdeVeScheduler,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from tiny import ROOT, tiny_unet

from ddgan import (
    ClassConditionalPipeline,
    ClassConditionedUnet,
    ColorLoss,
    ContextUnet,
    DDGANPipeline,
    DDGANScheduler,
    GuidedPipeline,
    NCSNpp,
    SymmetryLoss,
)

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    DEISMultistepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DDGANScheduler,
]
GREEN = ColorLoss((0.1, 0.9, 0.5))


def guided(scheduler=None, unet=None) -> GuidedPipeline:
    scheduler = DDIMScheduler() if scheduler is None else scheduler
    pipe = GuidedPipeline(unet or tiny_unet().eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def generate(pipe: GuidedPipeline, loss=GREEN, guidance_scale=10.0, seeds=(0, 1, 2), num_inference_steps=4, **options):
    """Return the final samples and the losses of each step."""
    options = {"generator": generators(*seeds), "batch_size": len(seeds), **options}
    output = pipe(loss, guidance_scale, num_inference_steps=num_inference_steps, output_type="latent", **options)
    return output.images, output.guidance_losses


@contextmanager
def recorded_steps(scheduler):
    """Record the arguments of `step`."""
    step, calls = scheduler.step, []

    def recording_step(model_output, timestep, sample, **options):
        calls.append((model_output, timestep, sample))
        return step(model_output, timestep, sample, **options)

    scheduler.step = recording_step
    recording_step.__signature__ = inspect.signature(step)
    try:
        yield calls
    finally:
        del scheduler.step


def update_at_first_step(pipe: GuidedPipeline, loss, latents: torch.Tensor, **options) -> torch.Tensor:
    """Return the guidance update of the sample at an intermediate timestep, for a scale of 1."""
    options = {"guidance_scale": 1.0, **options}
    with recorded_steps(pipe.scheduler) as calls:
        pipe(loss, batch_size=len(latents), num_inference_steps=2, latents=latents, guidance_end=0.5, **options)
    return calls[0][2] - latents * pipe.scheduler.init_noise_sigma


def noise(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


def tiny_generator(**changes) -> NCSNpp:
    torch.manual_seed(0)
    size = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_resolutions": (4,)}
    network = NCSNpp(**{**size, "latent_dim": 6, "latent_embed_dim": 8, **changes}).eval()
    for name, parameter in network.named_parameters():
        if "weight" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # at its own initialization it hardly depends on its input
    return network


class Denoiser(ModelMixin, ConfigMixin):
    """A denoiser of images within [-1, 1] with any of the three prediction types."""

    @register_to_config
    def __init__(self, prediction_type: str = "epsilon", sample_size: int = 8, in_channels: int = 3):
        super().__init__()
        self.unet = tiny_unet()
        self.alphas_cumprod = DDPMScheduler().alphas_cumprod

    def forward(self, sample, timestep):
        alpha_bar = self.alphas_cumprod[int(timestep)].item()
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        x_0 = torch.tanh(signal * sample + 0.3 * self.unet(sample, timestep).sample)
        outputs = {
            "epsilon": (sample - signal * x_0) / noise,
            "sample": x_0,
            "v_prediction": (signal * sample - x_0) / noise,
        }
        return UNet2DOutput(sample=outputs[self.config.prediction_type])


def guided_denoiser(kind, prediction_type: str = "epsilon", **config) -> GuidedPipeline:
    """Return a pipeline with a scheduler of this class, which by default does not clip."""
    if "clip_sample" in inspect.signature(kind.__init__).parameters:
        config = {"clip_sample": False, **config}
    pipe = guided(kind(prediction_type=prediction_type, **config), Denoiser(prediction_type).eval())
    pipe.unet.alphas_cumprod = pipe.scheduler.alphas_cumprod
    return pipe


class Offset(ModelMixin, ConfigMixin):
    """A network that outputs the sample plus a constant."""

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 3, offset: float = 0.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, sample, timestep):
        return UNet2DOutput(sample=self.weight * sample + self.config.offset)


class Slope(ModelMixin, ConfigMixin):
    """A network that outputs a multiple of the sample."""

    @register_to_config
    def __init__(self, slope: float, sample_size: int = 8, in_channels: int = 3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(slope))

    def forward(self, sample, timestep, return_dict=True):
        output = self.weight * sample
        return UNet2DOutput(sample=output) if return_dict else (output,)


# --- samples ---


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_with_scale_zero_samples_are_those_of_the_unguided_pipeline(kind):
    own = kind(tiny_unet().eval(), DDPMScheduler())
    own.set_progress_bar_config(disable=True)
    expected = own(batch_size=2, generator=generators(3, 4), num_inference_steps=6, output_type="np").images
    output = GuidedPipeline.from_pipe(own)(
        GREEN, 0.0, batch_size=2, generator=generators(3, 4), num_inference_steps=6, output_type="np"
    )
    assert np.array_equal(output.images, expected)


def test_with_scale_zero_samples_are_those_of_a_ddgan():
    own = DDGANPipeline(tiny_generator(), DDGANScheduler())
    expected = own(batch_size=2, generator=generators(3, 4), output_type="np").images
    output = GuidedPipeline.from_pipe(own)(GREEN, 0.0, batch_size=2, generator=generators(3, 4), output_type="np")
    assert np.array_equal(output.images, expected)
    assert output.guidance_losses.shape == (4, 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_guidance_lowers_the_loss(kind, prediction_type):
    if kind is EulerAncestralDiscreteScheduler and prediction_type == "sample":
        pytest.skip("Diffusers' EulerAncestralDiscreteScheduler steps with no prediction of x_0 itself")
    pipe = guided_denoiser(kind, prediction_type)
    options = {"num_inference_steps": 4 if kind is DDGANScheduler else 8, "seeds": (0, 1)}
    unguided_samples, unguided_losses = generate(pipe, guidance_scale=0.0, **options)
    for gradient in ("sample", "model"):
        samples, losses = generate(pipe, guidance_scale=40.0, gradient=gradient, **options)
        assert losses.shape == unguided_losses.shape and torch.equal(losses[0], unguided_losses[0])
        assert (GREEN(samples) < GREEN(unguided_samples) - 0.05).all()


@pytest.mark.parametrize("gradient", ["sample", "model"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, DDGANScheduler])
def test_an_image_does_not_depend_on_its_batch(kind, gradient):
    pipe = guided_denoiser(kind, "sample" if kind is DDGANScheduler else "epsilon")
    if kind is DDGANScheduler:
        pipe.unet = tiny_generator()
    for loss in (GREEN, lambda images: GREEN(images).mean()):
        expected, losses = generate(pipe, loss, gradient=gradient)
        for seeds in ((5, 1, 0), (1,)):
            actual, actual_losses = generate(pipe, loss, seeds=seeds, gradient=gradient)
            position = seeds.index(1)
            # networks sum in another order for other batch sizes and positions in the batch
            torch.testing.assert_close(actual[position], expected[1], rtol=0, atol=1e-5)
            torch.testing.assert_close(actual_losses[:, position], losses[:, 1], rtol=0, atol=1e-5)
            assert (actual[position] - expected[2]).abs().max() > 0.1


def test_a_scalar_loss_guides_like_one_loss_per_image():
    pipe = guided()
    expected, losses = generate(pipe)
    actual, one_by_one = generate(pipe, lambda images: GREEN(images).sum())
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(one_by_one, losses)


@pytest.mark.parametrize("gradient", ["sample", "model"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_scale_means_the_same_for_schedulers_that_scale_their_samples(prediction_type, gradient):
    ddim, euler = (
        guided_denoiser(kind, prediction_type, timestep_spacing="trailing")
        for kind in (DDIMScheduler, EulerDiscreteScheduler)
    )
    options = {"num_inference_steps": 10, "gradient": gradient, "guidance_scale": 40.0, "latents": noise(3, 3, 8, 8)}
    # both are the same method except for the start: Euler scales the noise by 157.4, but its first sigma is 157
    expected, actual = generate(ddim, **options), generate(euler, **options)
    assert (expected[0] - generate(ddim, **{**options, "guidance_scale": 0.0})[0]).abs().mean() > 0.05
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("gradient", ["sample", "model"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, DDGANScheduler])
def test_a_network_that_predicts_x_0_is_guided_like_the_equivalent_v_prediction(kind, gradient):
    options = {"guidance_scale": 40.0, "gradient": gradient}
    expected, losses = generate(guided_denoiser(kind, "v_prediction"), **options)
    actual, same_losses = generate(guided_denoiser(kind, "sample"), **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(same_losses, losses, rtol=0, atol=1e-4)


# --- autoguidance ---


def worse_unet(**changes):
    unet = tiny_unet(**changes).eval()
    torch.manual_seed(1)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_with_scale_zero_autoguidance_is_that_of_class_conditional_pipelines(kind, prediction_type):
    classes = {"num_class_embeds": 3}
    scheduler = kind(prediction_type=prediction_type)
    own = ClassConditionalPipeline(tiny_unet(**classes).eval(), scheduler)
    guide = ClassConditionalPipeline(worse_unet(**classes), DDIMScheduler())
    own.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 6, "output_type": "latent", "guide": guide, "guidance_interval": (0.1, 20.0)}
    expected = own([2, 0], generator=generators(3, 4), guidance_scale=2.5, **settings).images
    settings |= {"class_labels": [2, 0], "batch_size": 2}
    samples, unguided = (
        GuidedPipeline.from_pipe(own)(
            GREEN, 0.0, generator=generators(3, 4), autoguidance_scale=scale, **settings
        ).images
        for scale in (2.5, 1.0)
    )
    torch.testing.assert_close(samples, expected)
    assert (samples - unguided).abs().max() > 1e-2


@pytest.mark.parametrize("gradient", ["sample", "model"])
def test_autoguidance_and_a_loss_add_up(gradient):
    # each network is a line through the origin, so the guided prediction is one, too
    pipe = guided(DDIMScheduler(clip_sample=False), Slope(0.5))
    guide = guided(DDIMScheduler(clip_sample=False), Slope(0.3))
    combined = guided(DDIMScheduler(clip_sample=False), Slope(0.3 + 3.0 * (0.5 - 0.3)))
    expected, expected_losses = generate(combined, gradient=gradient)
    samples, losses = generate(pipe, gradient=gradient, guide=guide, autoguidance_scale=3.0)
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-4)
    assert (samples - generate(pipe, gradient=gradient)[0]).abs().max() > 0.1
    assert all(parameter.requires_grad for network in (pipe, guide) for parameter in network.unet.parameters())


def test_the_interval_is_that_of_autoguidance_and_leaves_the_loss_alone():
    pipe, guide = guided(), guided(unet=worse_unet())
    sizes = []
    guide.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    options = {"guide": guide, "autoguidance_scale": 2.0}
    samples, losses = generate(pipe, guidance_interval=(0.5, 5.0), **options)
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    inside = ((1 - alphas) / alphas) ** 0.5
    assert len(sizes) == ((inside > 0.5) & (inside <= 5)).sum() and 0 < len(sizes) < 4
    assert losses.isfinite().all()
    outside, _ = generate(pipe, guidance_interval=(1e6, 1e7), **options)
    assert torch.equal(outside, generate(pipe)[0]) and not torch.equal(outside, samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"autoguidance_scale": 2.0}, "for autoguidance, which needs a `guide`"),
        ({"guidance_interval": (0.2, 5.0)}, "for autoguidance, which needs a `guide`"),
        ({"guide": guided, "autoguidance_scale": 0.5}, "The scale of autoguidance is 0.5, but must be at least 1"),
        ({"guide": guided, "guidance_interval": (5.0, 0.2)}, "must be two noise levels"),
        ({"guide": lambda: guided(unet=worse_unet(sample_size=16))}, r"its image size .* \(16, 16\)"),
        ({"guide": lambda: guided(DDGANScheduler(), tiny_generator())}, "not work with the NCSNpp of a Denoising"),
    ],
)
def test_invalid_autoguidance_is_refused(options, message):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        generate(guided(), **options)


def test_autoguidance_of_a_ddgan_is_refused():
    pipe = guided(DDGANScheduler(), tiny_generator())
    with pytest.raises(ValueError, match="Autoguidance does not work with the NCSNpp of a Denoising Diffusion GAN"):
        generate(pipe, guide=guided(), autoguidance_scale=2.0)


def test_a_guide_needs_the_package():
    alone = runpy.run_path(str(ROOT / "pipelines" / "pipeline_guided.py"))["GuidedPipeline"]
    with pytest.raises(ValueError, match="A `guide` of a GuidedPipeline needs the package ddgan"):
        generate(alone(tiny_unet().eval(), DDIMScheduler()), guide=guided(), autoguidance_scale=2.0)


# --- the gradient ---


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_model_gradient_matches_finite_differences(prediction_type):
    unet = tiny_unet().eval().double()
    pipe = guided(DDIMScheduler(prediction_type=prediction_type, clip_sample=False), unet)
    latents = noise(2, 3, 8, 8, dtype=torch.float64)
    loss = lambda images: (images**2).mean((1, 2, 3))  # noqa: E731

    def at(x):
        return pipe(loss, 0.0, batch_size=2, num_inference_steps=2, latents=x).guidance_losses[0].double()

    # the losses are returned in float32, so the step is not small
    direction = noise(2, 3, 8, 8, dtype=torch.float64)
    slope = (at(latents + 0.01 * direction) - at(latents - 0.01 * direction)) / 0.02
    update = update_at_first_step(pipe, loss, latents, gradient="model")
    torch.testing.assert_close(-(update * direction).sum((1, 2, 3)), slope, rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("prediction_type", "factor"),
    [
        ("epsilon", lambda alpha_bar: alpha_bar**-0.5),
        ("sample", lambda alpha_bar: alpha_bar**0.5),
        ("v_prediction", lambda alpha_bar: alpha_bar**0.5),
    ],
)
def test_sample_gradient_is_that_of_the_formula_for_the_clean_image(prediction_type, factor):
    pipe = guided(DDIMScheduler(prediction_type=prediction_type))
    direction = noise(3, 8, 8)
    update = update_at_first_step(pipe, lambda images: (images * direction).sum((1, 2, 3)), noise(2, 3, 8, 8))
    expected = -factor(pipe.scheduler.alphas_cumprod[500].item()) * direction
    torch.testing.assert_close(update, expected.expand_as(update), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient", ["sample", "model"])
@pytest.mark.parametrize("clip", [{"clip_sample": True, "clip_sample_range": 1.5}, {"thresholding": True}])
def test_the_loss_sees_the_clipped_image_and_its_gradient_passes_the_clipping(clip, gradient):
    seen = []

    def loss(images):
        seen.append(images)
        return images.sum((1, 2, 3))

    latents = 4 * noise(1, 3, 8, 8)
    kind = {"prediction_type": "sample", "clip_sample": False}
    plain = update_at_first_step(guided(DDIMScheduler(**kind), Offset()), loss, latents, gradient=gradient)
    clipped = update_at_first_step(
        guided(DDIMScheduler(**{**kind, **clip}), Offset()), loss, latents, gradient=gradient
    )
    assert seen[0].abs().max() > 4
    assert seen[1].abs().max() <= (1.5 if "clip_sample" in clip else 1)
    torch.testing.assert_close(clipped, plain)


def test_the_loss_sees_the_x_0_that_the_step_uses():
    for kind in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        settings = inspect.signature(kind.__init__).parameters
        threshold = {"thresholding": True, "sample_max_value": 1.2} if "thresholding" in settings else {}
        pipe, seen = guided(kind(**threshold)), []

        def loss(images, seen=seen):
            seen.append(images.detach())
            return images.mean((1, 2, 3))

        predicted = []
        with recorded_steps(pipe.scheduler) as calls:
            generate(pipe, loss, guidance_scale=0.0)
        for i, (output, t, sample) in enumerate(calls):
            fresh = guided(kind(**threshold)).scheduler
            fresh.set_timesteps(4)
            fresh.set_begin_index(i) if hasattr(fresh, "set_begin_index") else None
            fresh.scale_model_input(sample, t)
            step = fresh.step(output, t, sample)
            predicted.append(fresh.model_outputs[-1] if hasattr(fresh, "model_outputs") else step.pred_original_sample)
        torch.testing.assert_close(torch.stack(seen), torch.stack(predicted), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_each_image_is_clipped_to_a_norm():
    latents, pipe = noise(2, 3, 8, 8), guided()
    loss = lambda images: (images * torch.tensor([1e-3, 10.0]).view(2, 1, 1, 1)).sum((1, 2, 3))  # noqa: E731
    free = update_at_first_step(pipe, loss, latents)
    bound = update_at_first_step(pipe, loss, latents, max_grad_norm=2.0, guidance_scale=3.0)
    torch.testing.assert_close(bound[0], 3 * free[0])
    torch.testing.assert_close(bound[1], 6 * free[1] / free[1].norm())


# --- schedules ---


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_a_scale_schedule_is_a_function_of_the_noise_level_at_the_timestep(kind):
    pipe, levels = guided(kind()), []
    generate(pipe, scale_schedule=lambda alpha_bar: levels.append(alpha_bar) or 1.0)
    expected = DDIMScheduler().alphas_cumprod[pipe.scheduler.timesteps.long()]
    assert levels == sorted(levels)
    torch.testing.assert_close(torch.tensor(levels), expected, rtol=0.01, atol=1e-4)  # UniPC rounds its timesteps


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("constant", lambda a: 1.0),
        ("alpha_bar", lambda a: a),
        ("sqrt_alpha_bar", lambda a: a**0.5),
        ("sqrt_one_minus_alpha_bar", lambda a: (1 - a) ** 0.5),
    ],
)
def test_named_schedules_compute_what_they_are_named_for(name, function):
    pipe = guided()
    assert torch.equal(generate(pipe, scale_schedule=name)[0], generate(pipe, scale_schedule=function)[0])
    figure = pipe.plot_scale_schedules(5)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    alpha_bars = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    assert len(lines) == 4
    np.testing.assert_allclose(lines[name], [function(a) for a in alpha_bars.tolist()])


def test_only_the_steps_from_start_to_end_are_guided():
    pipe = guided()
    with recorded_steps(pipe.scheduler) as calls:
        _, losses = generate(pipe, num_inference_steps=10, guidance_start=0.3, guidance_end=0.7)
    assert losses.isnan().all(1).tolist() == [not 3 <= i < 7 for i in range(10)]
    assert not losses[3:7].isnan().any()
    unguided, _ = generate(pipe, num_inference_steps=10, guidance_scale=0.0)
    assert torch.equal(generate(pipe, num_inference_steps=10, guidance_end=0.0)[0], unguided)
    with recorded_steps(pipe.scheduler) as free:
        generate(pipe, num_inference_steps=10, guidance_scale=0.0)
    assert [torch.equal(a[2], b[2]) for a, b in zip(calls, free, strict=True)] == [True] * 3 + [False] * 7


def test_a_loss_with_a_step_parameter_receives_the_step():
    steps = []

    def loss(images, step):
        steps.append(step)
        return GREEN(images)

    generate(guided(), loss)
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_scheduler_steps_once_per_network_evaluation(kind):
    pipe = guided(kind(), tiny_generator() if kind is DDGANScheduler else None)
    with recorded_steps(pipe.scheduler) as calls:
        generate(pipe, gradient="model")
    assert len(calls) == 4


# --- the network is not changed ---


@pytest.mark.parametrize("gradient", ["sample", "model"])
def test_parameters_get_no_gradients_and_stay_trainable(gradient):
    unet = tiny_unet().eval()
    unet.conv_in.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}

    def loss(images):
        assert not any(parameter.requires_grad for parameter in unet.parameters())
        if len(losses) == 2:
            raise KeyboardInterrupt
        losses.append(GREEN(images))
        return losses[-1]

    losses = []
    with pytest.raises(KeyboardInterrupt):
        generate(guided(unet=unet), loss, gradient=gradient)
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == before
    assert all(parameter.grad is None for parameter in unet.parameters())


def saved_bytes(**options) -> int:
    """Return the size of what autograd saves in one guided step."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel() * tensor.element_size()) or tensor, lambda tensor: tensor
    ):
        generate(num_inference_steps=1, **options)
    return sum(kept)


def test_sample_gradient_keeps_no_activations_of_the_network():
    images = 3 * 3 * 8 * 8 * 4
    assert saved_bytes(pipe=guided(), gradient="sample") <= 4 * images
    assert saved_bytes(pipe=guided(), gradient="model") > 40 * images


@pytest.mark.parametrize("network", [tiny_unet, tiny_generator])
def test_gradient_checkpointing_is_used_and_left_enabled(network):
    scheduler = DDGANScheduler() if network is tiny_generator else DDIMScheduler()
    pipe = guided(scheduler, network().eval())
    expected = generate(pipe, gradient="model")
    kept = saved_bytes(pipe=pipe, gradient="model")
    assert not pipe.unet.is_gradient_checkpointing
    pipe.unet.enable_gradient_checkpointing()
    actual = generate(pipe, gradient="model")
    assert pipe.unet.is_gradient_checkpointing
    torch.testing.assert_close(actual, expected)
    assert saved_bytes(pipe=pipe, gradient="model") < 0.7 * kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["sample", "model"])
def test_samples_stay_float32_with_a_half_precision_network(dtype, gradient):
    pipe = guided()
    expected, _ = generate(pipe, gradient=gradient)
    pipe.unet.to(dtype)
    with recorded_steps(pipe.scheduler) as calls:
        actual, _ = generate(pipe, gradient=gradient)
    assert all(sample.dtype == torch.float32 for _, _, sample in calls)
    # bfloat16 is not the same arithmetic on every CPU; unrelated samples are 0.5 apart
    assert (actual - expected).abs().mean() < 0.15


def test_a_compiled_network_works():
    pipe = guided()
    expected, _ = generate(pipe, num_inference_steps=1)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(generate(pipe, num_inference_steps=1)[0], expected)


# --- loading ---


def test_from_pipe_shares_the_components_of_any_pipeline():
    for own in (
        DDPMPipeline(tiny_unet().half(), DDPMScheduler()),
        DDGANPipeline(tiny_generator(), DDGANScheduler()),
        ClassConditionalPipeline(ContextUnet(n_feat=16, height=8), DDPMScheduler()),
    ):
        pipe = GuidedPipeline.from_pipe(own)
        assert pipe.unet is own.unet and pipe.scheduler is own.scheduler
    assert GuidedPipeline.from_pipe(DDPMPipeline(tiny_unet().half(), DDPMScheduler())).unet.dtype == torch.float16


def test_folders_of_other_pipelines_load_as_guided_ones(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    DDGANPipeline(tiny_generator(), DDGANScheduler()).save_pretrained(tmp_path / "ddgan")
    for folder, kind in (("ddpm", "UNet2DModel"), ("ddgan", "NCSNpp")):
        pipe = GuidedPipeline.from_pretrained(tmp_path / folder, trust_remote_code=True)
        assert isinstance(pipe, GuidedPipeline) and type(pipe.unet).__name__ == kind
        pipe.set_progress_bar_config(disable=True)
        assert generate(pipe)[1].shape == (4, 3)


def test_the_file_works_as_a_custom_pipeline(tiny_model):
    file = str(ROOT / "pipelines" / "pipeline_guided.py")
    pipe = DiffusionPipeline.from_pretrained(tiny_model, custom_pipeline=file, trust_remote_code=True)
    assert type(pipe).__name__ == "GuidedPipeline" and not isinstance(pipe, GuidedPipeline)
    pipe.set_progress_bar_config(disable=True)
    expected = generate(guided(DDPMScheduler(), GuidedPipeline.from_pretrained(tiny_model).unet))
    torch.testing.assert_close(generate(pipe), expected)


def test_the_file_works_as_a_custom_pipeline_for_folders_with_custom_code(tmp_path):
    torch.manual_seed(0)
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    DDGANPipeline(tiny_generator(), DDGANScheduler()).save_pretrained(tmp_path / "own")
    file = str(ROOT / "pipelines" / "pipeline_guided")
    for folder in ("plain", "own"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / folder, custom_pipeline=file, trust_remote_code=True)
        assert type(pipe).__name__ == "GuidedPipeline" and not isinstance(pipe, GuidedPipeline)
        pipe.set_progress_bar_config(disable=True)
        loaded = GuidedPipeline.from_pretrained(tmp_path / folder)
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(generate(pipe), generate(loaded))


@pytest.mark.parametrize("variance", ["fixed_small", "learned", "learned_range"])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_learned_variance_is_supported(kind, variance):
    learned = kind is DDPMScheduler and variance != "fixed_small"
    pipe = guided(kind(variance_type=variance) if learned else kind(), tiny_unet(out_channels=6 if learned else 3))
    if not learned:
        pipe.unet = tiny_unet(out_channels=6) if kind is not DDPMScheduler else pipe.unet
    samples, _ = generate(pipe, gradient="model")
    assert samples.shape == (3, 3, 8, 8)


# --- classes ---


@pytest.mark.parametrize("labels", [2, [2, 2], torch.tensor([2, 2], dtype=torch.uint8)])
@pytest.mark.parametrize("kind", ["unet", "class_conditioned", "context", "ddgan"])
def test_class_labels_reach_the_network(kind, labels):
    torch.manual_seed(0)
    network = {
        "unet": lambda: tiny_unet(num_class_embeds=3),
        "class_conditioned": lambda: ClassConditionedUnet(
            8, 3, 3, num_classes=3, block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1
        ),
        "context": lambda: ContextUnet(n_feat=16, height=8, n_cfeat=3),
        "ddgan": lambda: tiny_generator(num_class_embeds=3),
    }[kind]()
    for name, parameter in network.named_parameters():
        if "class_embedding" in name or "context" in name:
            torch.nn.init.normal_(parameter, std=3)
    pipe = guided(DDGANScheduler() if kind == "ddgan" else DDIMScheduler(), network.eval())
    two, _ = generate(pipe, seeds=(0, 1), class_labels=labels)
    assert torch.equal(two, generate(pipe, seeds=(0, 1), class_labels=[2, 2])[0])
    one_and_two, _ = generate(pipe, seeds=(0, 1), class_labels=[1, 2])
    assert torch.equal(one_and_two[1], two[1]) and not torch.allclose(one_and_two[0], two[0], atol=1e-3)
    invalid = [([2], "has 1 entries"), (3, "0 to 2"), ([-1, 0], "0 to 2"), ([[0], [1]], "one integer per image")]
    invalid.append(([0.5, 1.0], "must have 3 columns" if kind == "context" else "one integer per image"))
    for wrong, message in invalid:
        with pytest.raises(ValueError, match=message):
            generate(pipe, seeds=(0, 1), class_labels=wrong)
    with pytest.raises(ValueError, match="class_labels"):
        generate(pipe, seeds=(0, 1))


def test_contexts_reach_the_network_and_can_be_mixed():
    torch.manual_seed(0)
    pipe = guided(unet=ContextUnet(n_feat=16, height=8, n_cfeat=3).eval())
    half, _ = generate(pipe, seeds=(0, 1), class_labels=[0.5, 0.5, 0.0])
    assert torch.equal(half, generate(pipe, seeds=(0, 1), class_labels=torch.tensor([[0.5, 0.5, 0.0]] * 2))[0])
    assert not torch.equal(half, generate(pipe, seeds=(0, 1), class_labels=0)[0])


@pytest.mark.parametrize("names", [["ant", "bee", "cat"], {0: "ant", 1: "bee", 2: "cat"}])
def test_classes_can_be_named_and_the_null_class_is_accepted(names, tmp_path):
    torch.manual_seed(0)
    small = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet = ClassConditionedUnet(8, 3, 3, num_classes=3, class_dropout=0.1, id2label=names, **small).eval()
    guided(unet=unet).save_pretrained(tmp_path)
    pipe = GuidedPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    expected, _ = generate(pipe, class_labels=[2, 3, 1])
    assert torch.equal(generate(pipe, class_labels=["cat", 3, "bee"])[0], expected)
    assert torch.equal(generate(pipe, class_labels="cat")[0], generate(pipe, class_labels=2)[0])
    with pytest.raises(ValueError, match=r"no class 'dog'.*'ant', 'bee', 'cat'"):
        generate(pipe, class_labels="dog")
    with pytest.raises(ValueError, match=r"no class 'cat'.*id2label"):
        generate(guided(unet=tiny_unet(num_class_embeds=3)), class_labels="cat")


# --- outputs ---


def test_output_types_hold_the_same_images():
    pipe, options = guided(), {"batch_size": 2, "num_inference_steps": 3}
    latent, pt, array, pil = (
        pipe(GREEN, 5.0, generator=generators(0, 1), output_type=kind, **options).images
        for kind in ("latent", "pt", "np", "pil")
    )
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert np.array_equal(pt.permute(0, 2, 3, 1).numpy(), array)
    assert all(
        np.array_equal(np.asarray(image), (values * 255).round()) for image, values in zip(pil, array, strict=True)
    )
    images, losses = pipe(GREEN, 5.0, generator=generators(0, 1), output_type="pt", return_dict=False, **options)
    assert torch.equal(images, pt) and losses.shape == (3, 2)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_channels_become_modes(channels, mode):
    pipe = guided(unet=tiny_unet(in_channels=channels, out_channels=channels, sample_size=(8, 16)))
    (image,) = pipe(SymmetryLoss(), num_inference_steps=2).images
    assert image.mode == mode and image.size == (16, 8)


def test_losses_are_those_of_the_predicted_images_and_are_plotted(capsys):
    pipe, seen = guided(), []
    pipe.set_progress_bar_config()

    def loss(images):
        seen.append(GREEN(images))
        return seen[-1]

    output = pipe(loss, 5.0, batch_size=2, num_inference_steps=6)
    assert torch.equal(output.guidance_losses, torch.stack(seen).detach())
    assert f"loss={output.guidance_losses[-1].mean():.4g}" in capsys.readouterr().err
    lines = [line.get_ydata() for line in output.plot_losses().axes[0].lines]
    np.testing.assert_allclose(np.stack(lines[:2]), output.guidance_losses.T)
    np.testing.assert_allclose(lines[2], output.guidance_losses.mean(1))


def test_a_callback_can_change_the_sample_and_end_sampling():
    pipe, seen = guided(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    samples, losses = generate(pipe, callback_on_step_end=callback)
    assert seen == [(0, 750), (1, 500)]
    assert not samples.any() and losses[2:].isnan().all()


def test_default_is_40_steps_or_all_of_the_process():
    assert guided()(GREEN).guidance_losses.shape == (40, 1)
    assert guided(DDGANScheduler(), tiny_generator())(GREEN).guidance_losses.shape == (4, 1)


# --- invalid input ---


@pytest.mark.parametrize(
    "scheduler",
    [
        HeunDiscreteScheduler(),
        PNDMScheduler(),
        PNDMScheduler(skip_prk_steps=True),
        UnCLIPScheduler(),
        DDPMWuerstchenScheduler(),
        IPNDMScheduler.from_config(DDPMScheduler().config),  # its config holds the prediction_type of DDPM
        ScoreSdeVeScheduler(),
        CogVideoXDPMScheduler(),
        DDIMInverseScheduler(),
        DPMSolverMultistepInverseScheduler(),
        DPMSolverSinglestepScheduler(),
        EDMEulerScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_without_x_0_or_with_several_evaluations_per_step_are_refused(scheduler):
    for use in (generate, GuidedPipeline.from_pipe):
        with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} does not support guidance.*DDIM") as error:
            use(guided(scheduler))
        assert "\n" not in str(error.value)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside of `torch\.inference_mode`"):
        generate(guided())


def test_networks_with_other_inputs_are_refused():
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        GuidedPipeline(
            UNet2DConditionModel(
                8,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                cross_attention_dim=8,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            ),
            DDIMScheduler(),
        )


def test_latent_diffusion_pipelines_are_refused():
    own = LDMPipeline(VQModel(norm_num_groups=4, block_out_channels=(8,)), tiny_unet(), DDIMScheduler())
    with pytest.raises(ValueError, match=r"vqvae.*images themselves"):
        GuidedPipeline.from_pipe(own)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": lambda images: images.mean((2, 3))}, r"shape \(3, 3\)"),
        ({"loss": lambda images: 1.0}, "a float"),
        ({"loss": lambda images: images.detach().mean()}, "no gradient"),
        ({"gradient": "both"}, "'both'"),
        ({"scale_schedule": "alpha"}, "'alpha_bar'"),
        ({"guidance_start": 0.6, "guidance_end": 0.5}, "0.6"),
        ({"generator": generators(0)}, "list of 1"),
        ({"latents": torch.zeros(3, 3, 4, 4)}, r"\(3, 3, 8, 8\)"),
        ({"class_labels": 1}, "class"),
        ({"num_inference_steps": 2000}, "1000"),
        ({"max_grad_norm": 0}, "`max_grad_norm` is 0, but must be greater than 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0, but must be at least 1"),
        ({"seeds": ()}, "at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "latents"),
    ],
)
def test_invalid_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        generate(guided(), **wrong)
