"""Claims about the losses of few-step fine-tuning."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel

from ddgan import ClassConditionedUnet, UNetDiscriminator
from ddgan.training.objectives.few_step import (
    CLEAN,
    DiscriminatorObjective,
    FewStepProcess,
    FewStepSetup,
    GeneratorObjective,
    Transition,
)
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG

TINY = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def scheduler(**config):
    defaults = {"timestep_spacing": "trailing", "variance_type": "fixed_small", "clip_sample": False}
    return DDPMScheduler(**{**defaults, **config})


def tiny_setup(step_counts=(4, 1), **changes):
    torch.manual_seed(0)
    generator = UNet2DModel(**TINY)
    discriminator = UNetDiscriminator.from_unet(generator)
    for head in discriminator.heads:
        torch.nn.init.normal_(head.conv_out.weight)
    process = FewStepProcess(scheduler(prediction_type="v_prediction"), step_counts)
    return FewStepSetup(generator, discriminator, process, **changes)


def samples(keys=range(8), channels=3, labels=None):
    images = torch.rand(8, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    keys = list(keys)
    labels = labels if labels is None else labels[keys]
    return MicroBatch(images[keys], labels, PerSampleRNG(keys, torch.device("cpu")), 0)


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "epsilon"},
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample", "beta_schedule": "scaled_linear", "num_train_timesteps": 100},
        {"prediction_type": "epsilon", "trained_betas": [0.1, 0.2, 0.3, 0.5, 0.7], "num_train_timesteps": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_transitions_are_the_steps_of_the_scheduler(config, count):
    stock = scheduler(**config)
    process = FewStepProcess(stock, [count])
    stock.set_timesteps(count)
    assert process.transitions[:, 0].tolist() == stock.timesteps.tolist()
    assert process.transitions[:, 1].tolist() == [*stock.timesteps.tolist()[1:], CLEAN]
    x_t, output, noise = torch.randn(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, s in process.transitions:
        expected = stock.step(output, t, x_t, generator=torch.Generator().manual_seed(2))
        noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
        transition = Transition(t[None], s[None], x_t)
        image = process.predicted_image(output, x_t, transition.t)
        scale = image.abs().max().item()  # up to 157 times the noise for a network that predicts it
        torch.testing.assert_close(image, expected.pred_original_sample, rtol=0, atol=1e-6 * scale)
        sample = process.posterior_sample(image, transition, noise)
        torch.testing.assert_close(sample, expected.prev_sample, rtol=0, atol=2e-6 * scale)


def test_true_image_gives_the_forward_process_at_the_next_level():
    """The posterior of the forward process at t is the forward process at s: both have the same mean and variance."""
    process = FewStepProcess(scheduler(), [4])
    image, noise = torch.full((50_000, 1, 1, 1), 0.7), torch.randn(2, 50_000, 1, 1, 1)
    for t, s in process.transitions[1:]:
        t, s = t.expand(50_000), s.expand(50_000)
        transition = Transition(t, s, process.add_noise(image, t, noise[0]))
        x_s = process.posterior_sample(image, transition, noise[1])
        expected = process.add_noise(image, s, noise[0])
        assert x_s.mean().item() == pytest.approx(expected.mean().item(), abs=0.02)
        assert x_s.std().item() == pytest.approx(expected.std().item(), abs=0.02)


@pytest.mark.parametrize("objective", ["discriminator", "generator"])
def test_loss_of_a_sample_does_not_depend_on_its_micro_batch(objective):
    setup = tiny_setup(augment=("translation", "color"))
    if objective == "discriminator":
        network, compute = setup.discriminator, DiscriminatorObjective(setup, gamma=0.1)
    else:
        network, compute = setup.generator, GeneratorObjective(setup, 0.5)
    whole = compute(network, samples())
    parts = [compute(network, samples(keys)) for keys in (range(3), range(3, 8))]
    for name, values in whole.items():
        assert values.shape == (8,)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values, rtol=1e-4, atol=1e-5)


def test_gradients_reach_only_the_network_that_is_trained():
    setup = tiny_setup()
    DiscriminatorObjective(setup, gamma=0.1)(setup.discriminator, samples())["loss"].mean().backward()
    assert all(p.grad is None for p in setup.generator.parameters())
    assert all(p.grad is not None for p in setup.discriminator.parameters())
    setup.discriminator.zero_grad()
    setup.discriminator.requires_grad_(False)
    GeneratorObjective(setup, 0.5)(setup.generator, samples())["loss"].mean().backward()
    assert all(p.grad is not None for p in setup.generator.parameters())
    assert all(p.grad is None for p in setup.discriminator.parameters())


class Linear(torch.nn.Module):
    """A discriminator with two heads whose gradient is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.randn(2, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))

    def forward(self, sample, timestep):
        return sample.flatten(1) @ self.weight.T


def test_penalty_estimates_the_squared_gradients_at_real_and_generated_images():
    setup = tiny_setup()
    setup.discriminator = Linear()
    objective = DiscriminatorObjective(setup, gamma=0.3)
    keys = range(8)
    values = [
        objective(
            setup.discriminator, MicroBatch(samples().images, None, PerSampleRNG(keys, torch.device("cpu"), i), 0)
        )
        for i in range(100)
    ]
    r1 = 0.3 / 2 * setup.discriminator.weight.mean(0).square().sum().item()
    penalty = torch.cat([value["penalty"] for value in values]).mean().item()
    assert penalty == pytest.approx(2 * r1, rel=0.1)  # 1600 squares of normal numbers, each with a deviation of 1.4
    value = objective(setup.discriminator, samples())
    without = DiscriminatorObjective(setup, gamma=0.0)(setup.discriminator, samples())
    torch.testing.assert_close(value["loss"], without["loss"] + value["penalty"])


def test_accuracy_is_the_share_of_real_images_with_the_higher_logit():
    setup = tiny_setup()
    value = DiscriminatorObjective(setup, gamma=0.1)(setup.discriminator, samples())
    assert value["accuracy"].tolist() == (value["real"] > value["fake"]).float().tolist()


def test_generator_is_drawn_to_its_image_but_not_from_noise_alone():
    setup = tiny_setup(step_counts=[1])
    values = GeneratorObjective(setup, 0.5)(setup.generator, samples())
    assert not values["reconstruction"].any()
    torch.testing.assert_close(values["loss"], values["adversarial"])

    setup = tiny_setup(step_counts=[4])
    values = GeneratorObjective(setup, 0.5)(setup.generator, samples())
    batch = samples()
    transition = setup.transition(batch)
    image, _ = setup.generate(setup.generator, batch, transition, {})
    share = torch.where(transition.t == 999, 0, scheduler().alphas_cumprod[transition.t])
    distance = F.mse_loss(image, batch.images, reduction="none").mean((1, 2, 3))
    assert 0 < (share == 0).sum() < 8
    torch.testing.assert_close(values["reconstruction"], share * distance)
    torch.testing.assert_close(values["loss"], values["adversarial"] + 0.5 * share * distance)


def test_conversion_is_regression_to_v():
    setup = tiny_setup(step_counts=[4])
    objective = GeneratorObjective(setup, 0.5, conversion_steps=3)
    seen = []
    setup.generator.register_forward_hook(lambda module, args, output: seen.append((*args, output[0])))
    first = objective(setup.generator, samples())
    assert first["adversarial"].isnan().all()
    noisier, t, v = seen[0]
    signal = scheduler().alphas_cumprod[t][:, None, None, None]
    target = (signal.sqrt() * noisier - samples().images) / (1 - signal).sqrt()
    squares = (v - target).square().mean((1, 2, 3))
    torch.testing.assert_close(first["loss"], squares, rtol=1e-3, atol=0)  # alphas_cumprod[999] = 4e-5 is left out
    last = samples()
    last.step = 3
    assert objective(setup.generator, last)["adversarial"].isfinite().all()


def test_noisiest_image_is_noise_alone():
    setup = tiny_setup(step_counts=[1])
    first = setup.transition(samples())
    other = samples()
    other.images.zero_()
    assert torch.equal(setup.transition(other).noisier, first.noisier)


def test_instance_noise_is_for_clean_images_only_and_independent():
    setup = tiny_setup(instance_noise=1.0)
    s = torch.tensor([CLEAN, 249, CLEAN, 499, 749, CLEAN, CLEAN, CLEAN])
    batch = samples()
    timesteps, first, second = setup.prepare(batch, s, batch.images, batch.images)
    clean = s == CLEAN
    assert torch.equal(timesteps[~clean], s[~clean])
    assert torch.equal(first[~clean], batch.images[~clean])
    assert (timesteps[clean] < 250).all()
    assert not (first[clean] == second[clean]).any()

    timesteps, image = tiny_setup(instance_noise=0.0).prepare(samples(), s, batch.images)
    assert torch.equal(timesteps, s.clamp(min=0))
    assert torch.equal(image, batch.images)


def test_real_and_generated_images_are_augmented_alike():
    setup = tiny_setup(instance_noise=0.0, augment=("color", "cutout"))
    batch = samples()
    _, first, second = setup.prepare(batch, torch.full((8,), CLEAN), batch.images, batch.images)
    assert torch.equal(first, second)
    assert not torch.equal(first, batch.images)


def test_learned_variance_is_left_out():
    setup = tiny_setup(step_counts=[1])
    setup.generator = UNet2DModel(**TINY, out_channels=6)
    GeneratorObjective(setup, 0.5)(setup.generator, samples())["loss"].mean().backward()
    gradient = setup.generator.conv_out.weight.grad
    assert gradient[:3].any()
    assert not gradient[3:].any()


def test_both_networks_get_the_same_classes_and_the_null_class_at_its_rate():
    torch.manual_seed(0)
    generator = ClassConditionedUnet(**TINY, num_classes=3, class_dropout=0.5)
    discriminator = UNetDiscriminator.from_unet(generator)
    process = FewStepProcess(scheduler(), [2])
    setup = FewStepSetup(generator, discriminator, process, null_class=3, class_dropout=0.5)
    seen = []
    for network in (generator, discriminator):
        network.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
        )
    labels = torch.arange(8) % 3
    DiscriminatorObjective(setup, gamma=0.1)(discriminator, samples(channels=1, labels=labels))
    assert seen[1] == seen[0] * 4
    assert 0 < seen[0].count(3) < 8
    assert all(got in (label, 3) for got, label in zip(seen[0], labels.tolist(), strict=True))
