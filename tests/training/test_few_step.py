"""Claims about the losses of few-step fine-tuning."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddgan import ClassConditionedUnet, UNetDiscriminator
from ddgan.training.lr_schedules import two_stage_schedule
from ddgan.training.objectives.few_step import (
    CLEAN,
    DiscriminatorObjective,
    FewStepProcess,
    FewStepSetup,
    GeneratorObjective,
    TeacherSamples,
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


def samples(keys=range(8), channels=3, labels=None, step=0):
    images = torch.rand(8, channels, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    keys = list(keys)
    labels = labels if labels is None else labels[keys]
    return MicroBatch(images[keys], labels, PerSampleRNG(keys, torch.device("cpu")), step)


def generator_objective(setup, distillation_steps=0, distillation_weight=0.5):
    """The objective with a random teacher of five samples."""
    objective = GeneratorObjective(setup, distillation_steps, distillation_weight)
    timesteps = setup.process.timesteps
    images = torch.randn(5, len(timesteps) + 1, 3, 8, 8, generator=torch.Generator().manual_seed(2)).half()
    objective.teacher = TeacherSamples(timesteps, images[:, :-1], images[:, -1])
    return objective


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
    process, seeded = FewStepProcess(scheduler(), [4]), torch.Generator().manual_seed(0)
    image, noise = torch.full((50_000, 1, 1, 1), 0.7), torch.randn(2, 50_000, 1, 1, 1, generator=seeded)
    for t, s in process.transitions[1:]:
        t, s = t.expand(50_000), s.expand(50_000)
        transition = Transition(t, s, process.add_noise(image, t, noise[0]))
        x_s = process.posterior_sample(image, transition, noise[1])
        expected = process.add_noise(image, s, noise[0])
        assert x_s.mean().item() == pytest.approx(expected.mean().item(), abs=0.02)
        assert x_s.std().item() == pytest.approx(expected.std().item(), abs=0.02)


@pytest.mark.parametrize("objective", ["discriminator", "generator"])
def test_loss_of_a_sample_does_not_depend_on_its_micro_batch(objective):
    setup = tiny_setup()
    if objective == "discriminator":
        network, compute = setup.discriminator, DiscriminatorObjective(setup, gamma=0.1)
    else:
        network, compute = setup.generator, generator_objective(setup)
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
    generator_objective(setup)(setup.generator, samples())["loss"].mean().backward()
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


@pytest.mark.parametrize(
    ("step", "weight", "parts"),
    [
        (1, 0.5, {"distillation": 1.0}),
        (1, 0.0, {"distillation": 1.0}),
        (2, 0.5, {"distillation": 0.5, "adversarial": 1.0}),
        (2, 0.0, {"adversarial": 1.0}),
    ],
)
def test_the_generator_is_distilled_alone_and_then_trained_with_both_losses(step, weight, parts):
    setup = tiny_setup()
    calls = []
    setup.generator.register_forward_hook(lambda *args: calls.append(args))
    values = generator_objective(setup, 2, weight)(setup.generator, samples(step=step))
    assert values.keys() == {"loss", *parts}
    torch.testing.assert_close(values["loss"], sum(weight * values[name] for name, weight in parts.items()))
    assert len(calls) == 1  # DistributedDataParallel needs a single call


def test_distillation_is_the_distance_to_the_image_that_the_noisy_image_leads_to():
    setup = tiny_setup(step_counts=[4])
    objective = generator_objective(setup, 1)
    noisy, target = objective.teacher.random_samples(samples())
    image = setup.process.predicted_image(setup.generator(noisy.images, noisy.t).sample, noisy.images, noisy.t)
    expected = (image - target).square().mean((1, 2, 3))
    torch.testing.assert_close(objective(setup.generator, samples())["distillation"], expected)


def test_each_sample_of_a_teacher_has_its_timestep_and_class():
    timesteps = torch.tensor([999, 499])
    images = 10.0 * torch.arange(6)[:, None, None, None]
    noisy = images[:, None] + torch.arange(2)[:, None, None, None]
    teacher = TeacherSamples(timesteps, noisy.half(), images.half(), torch.arange(6))
    (noisy, t, conditions), target = teacher.random_samples(samples())
    assert torch.equal(10 * conditions["class_labels"], target.flatten())
    assert torch.equal(timesteps[(noisy - target).flatten().long()], t)
    assert len(t.unique()) == 2 and len(target.unique()) > 2
    assert noisy.dtype == target.dtype == torch.float32


def test_each_stage_has_a_warmup_and_a_decay_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.5)
    schedule = two_stage_schedule(optimizer, 300, first_stage=100, first_peak=4.0)
    rates = []
    for _ in range(300):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for start, stop, peak in ((0, 100, 2.0), (100, 300, 0.5)):
        stage = torch.tensor(rates[start:stop]) / peak
        length, middle = stop - start, (stop - start) // 2
        torch.testing.assert_close(stage[:20], torch.arange(1, 21) / 20)
        assert (stage[20:middle] == 1).all()
        torch.testing.assert_close(stage[middle:], torch.arange(middle, 0, -1) * 2 / length)


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
    timesteps, first, second = setup.add_instance_noise(batch, s, batch.images, batch.images)
    clean = s == CLEAN
    assert torch.equal(timesteps[~clean], s[~clean])
    assert torch.equal(first[~clean], batch.images[~clean])
    assert (timesteps[clean] < 250).all()
    assert not (first[clean] == second[clean]).any()

    timesteps, image = tiny_setup(instance_noise=0.0).add_instance_noise(samples(), s, batch.images)
    assert torch.equal(timesteps, s.clamp(min=0))
    assert torch.equal(image, batch.images)


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
