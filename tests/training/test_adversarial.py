"""Claims about the objectives of a Denoising Diffusion GAN."""

import math

import pytest
import torch
import torch.nn.functional as F

from ddgan import DDGANDiscriminator, DDGANScheduler, NCSNpp
from ddgan.conversion.ddgan_checkpoints import convert_discriminator, convert_generator
from ddgan.training.augmentation import DifferentiableAugmentation
from ddgan.training.objectives.adversarial import (
    DiscriminatorObjective,
    GANSetup,
    GeneratorObjective,
    GradientPenalties,
)
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG


class Recorded:
    """Replaces `PerSampleRNG` by recorded random numbers."""

    device = torch.device("cpu")

    def __init__(self, tensors, part):
        self.t = tensors[f"{part}/t"]
        # the reference implementation draws the noise of the noisier image first
        names = ("q_noise_second_drawn", "q_noise_first_drawn", "z", "posterior_noise")
        self.remaining = [tensors[f"{part}/{name}"] for name in names]

    def integers(self, high):
        return self.t

    def normal(self, *shape):
        numbers = self.remaining.pop(0)
        assert numbers.shape[1:] == shape
        return numbers


def statistics(network):
    """Sum and norm of each parameter, in float64."""
    return {name: (p.double().sum().item(), p.double().norm().item()) for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("variant", "gamma", "lazy_reg", "step"),
    [
        ("value", 0.05, 1, 0),
        ("variant_lazy15_step0", 0.05, 15, 0),
        ("variant_lazy15_step1", 0.05, 15, 1),
        ("variant_r1gamma20", 20, 1, 7),
    ],
)
def test_one_iteration_matches_the_recorded_one(golden, variant, gamma, lazy_reg, step):
    recorded, config, _ = golden("train_step")
    networks = {}
    for name, convert in (("generator_a", convert_generator), ("discriminator_small", convert_discriminator)):
        _, network_config, state_dict = golden(name)
        networks[name] = convert(state_dict, network_config).train()
    generator, discriminator = networks.values()
    gan = GANSetup(generator, discriminator, DDGANScheduler(config["num_timesteps"]))
    expected = {key.removeprefix(f"{variant}/"): value.item() for key, value in recorded.items() if variant in key}

    before = {name: statistics(network) for name, network in networks.items()}

    def update(network, objective, rate, part):
        optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(config["beta1"], config["beta2"]))
        batch = MicroBatch(recorded["input/real"], None, Recorded(recorded, part), step)
        values = {name: value.mean() for name, value in objective(network, batch).items()}
        values["loss"].backward()
        norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
        optimizer.step()
        return {name: value.item() for name, value in values.items()}, norm.item()

    d, d_norm = update(
        discriminator,
        DiscriminatorObjective(gan, GradientPenalties(gamma, interval=lazy_reg)),
        config["lr_d"],
        "d_step",
    )
    assert all(p.grad is None for p in generator.parameters())
    g, g_norm = update(generator, GeneratorObjective(gan), config["lr_g"], "g_step")

    r1 = 0 if d["r1"] != d["r1"] else d["r1"]
    assert r1 == pytest.approx(expected["R1_penalty"], rel=1e-5)
    assert d["loss"] - r1 == pytest.approx(expected["errD"], rel=2e-6)
    assert g["loss"] == pytest.approx(expected["errG"], rel=2e-5)
    assert d_norm == pytest.approx(expected["D_grad_norm"], rel=1e-5)
    assert g_norm == pytest.approx(expected["G_grad_norm"], rel=1e-4)

    if variant != "value":
        return
    for letter, network in (("G", "generator_a"), ("D", "discriminator_small")):
        after = statistics(networks[network])
        columns = [recorded[f"{letter}/{column}"].tolist() for column in ("sum_before", "l2_before")]
        columns += [recorded[f"{letter}/{column}"].tolist() for column in ("sum_after", "l2_after")]
        for *start, total, norm in zip(*columns, strict=True):
            name = min(after, key=lambda name: math.dist(before[network][name], start))
            if "to_k.bias" not in name:  # its gradient is rounding noise, which Adam turns into a full step
                assert after.pop(name) == (pytest.approx(total, abs=5e-5), pytest.approx(norm, abs=1e-6)), name
        assert all("to_k.bias" in name for name in after)


def tiny_gan(**changes):
    torch.manual_seed(0)
    generator = NCSNpp(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_resolutions=(),
        latent_dim=4,
        latent_embed_dim=8,
        latent_mapping_layers=1,
    )
    discriminator = DDGANDiscriminator(
        sample_size=8, base_channels=8, block_out_channels=(8, 8), down_blocks=(False, True), time_embed_dim=8
    )
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return GANSetup(generator, discriminator, DDGANScheduler(), **changes)


def micro_batch(step=0, count=8):
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return MicroBatch(images, None, PerSampleRNG(range(count), torch.device("cpu")), step)


def test_r1_is_due_at_its_interval_and_the_squared_norm_of_the_gradient():
    gan = tiny_gan()
    objective = DiscriminatorObjective(gan, GradientPenalties(3.0, interval=2))
    due, not_due = objective(gan.discriminator, micro_batch(step=4)), objective(gan.discriminator, micro_batch(step=5))
    assert not_due["r1"].isnan().all()
    torch.testing.assert_close(due["loss"] - due["r1"], not_due["loss"])

    t, less_noisy, noisier = gan.real_pair(micro_batch(step=4))
    less_noisy.requires_grad_()
    (gradient,) = torch.autograd.grad(gan.discriminator(less_noisy, t, noisier).sum(), less_noisy)
    torch.testing.assert_close(due["r1"], 3.0 / 2 * gradient.flatten(1).square().sum(1))


def gradient_norms(gan, batch):
    """Return the squared norms of D's gradient at the real and at the generated images of a batch."""
    t, less_noisy, noisier = gan.real_pair(batch)
    norms = []
    predicted, _ = gan.predict(gan.generator, batch, t, noisier)
    for images in (less_noisy, gan.less_noisy(batch, t, noisier, predicted).detach()):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(gan.discriminator(images, t, noisier).sum(), images)
        norms.append(gradient.flatten(1).square().sum(1))
    return norms


def test_the_squared_error_and_the_energy_score_are_terms_of_the_loss():
    gan, plain = tiny_gan(reconstruction_weight=3.0, energy_weight=2.0), tiny_gan()
    values = GeneratorObjective(gan)(gan.generator, micro_batch())
    batch = micro_batch()
    t, _, noisier = gan.real_pair(batch)
    again = gan.is_noisiest(t).nonzero()[:, 0]
    assert 0 < len(again) < len(t)
    first, second = gan.predict(gan.generator, batch, t, noisier, again)
    assert (first[again] - second).abs().mean() > 0

    def distance(a, b):
        return (a - b).flatten(1).norm(dim=1) / math.sqrt(a[0].numel())

    error = gan.scheduler.alphas_cumprod[t].float() * (first - batch.images).flatten(1).square().mean(1)
    torch.testing.assert_close(values["reconstruction"], 3.0 * error)
    to_images = distance(first[again], batch.images[again]) + distance(second, batch.images[again])
    score = torch.zeros(len(t)).index_copy(0, again, (to_images - distance(first[again], second)) / 2)
    torch.testing.assert_close(values["energy"], 2.0 * score, rtol=0, atol=2e-3)
    fake = gan.discriminate(gan.discriminator, batch, t, gan.less_noisy(batch, t, noisier, first), noisier)
    torch.testing.assert_close(values["loss"], F.softplus(-fake) + values["reconstruction"] + values["energy"])
    assert list(GeneratorObjective(plain)(plain.generator, micro_batch())) == ["loss"]


def test_the_energy_score_of_the_distribution_of_the_images_is_better_than_that_of_their_mean():
    """Images are black or white at random: predictions that are so as well have a lower score than gray ones."""
    generator = torch.Generator().manual_seed(0)
    images, first, second = (
        (torch.randint(2, (4000, 1, 1, 1), generator=generator) * 2.0 - 1).expand(-1, 3, 4, 4) for _ in range(3)
    )
    gray = torch.zeros(4000, 3, 4, 4)
    assert GANSetup.energy_score(images, first, second).mean() == pytest.approx(0.5, abs=0.05)
    assert GANSetup.energy_score(images, gray, gray).mean() == pytest.approx(1.0, abs=0.01)


def test_r2_is_the_penalty_of_generated_images():
    gan = tiny_gan()
    values = DiscriminatorObjective(gan, GradientPenalties(3.0, 5.0))(gan.discriminator, micro_batch())
    real, fake = gradient_norms(gan, micro_batch())
    torch.testing.assert_close(values["r1"], 3.0 / 2 * real)
    torch.testing.assert_close(values["r2"], 5.0 / 2 * fake)
    losses = F.softplus(-values["real"]) + F.softplus(values["fake"])
    torch.testing.assert_close(values["loss"], losses + values["r1"] + values["r2"])
    alone = DiscriminatorObjective(gan, GradientPenalties(0.0, 5.0))(gan.discriminator, micro_batch())
    assert torch.equal(alone["r2"], values["r2"]) and alone["r1"].isnan().all()


def test_finite_differences_estimate_the_penalties():
    gan = tiny_gan()
    objective = DiscriminatorObjective(gan, GradientPenalties(3.0, 5.0, finite_differences=True, step=1e-3))
    totals = torch.zeros(2)
    for seed in range(200):
        batch = micro_batch()
        batch.rng = MixedRNG(batch.rng, seed)
        values = objective(gan.discriminator, batch)
        totals += torch.stack([values["r1"].detach().sum(), values["r2"].detach().sum()])
    real, fake = gradient_norms(gan, micro_batch())
    torch.testing.assert_close(totals / 200, torch.stack([3 / 2 * real.sum(), 5 / 2 * fake.sum()]), rtol=0.1, atol=0)


class MixedRNG:
    """The numbers of a `PerSampleRNG` for the pairs and the generator, then those of a seed for the penalties."""

    def __init__(self, rng, seed):
        self.rng, self.generator, self.calls = rng, torch.Generator().manual_seed(seed), 0

    def integers(self, high):
        return self.rng.integers(high)

    def normal(self, *shape):
        self.calls += 1
        if self.calls <= 4:  # of the pair, of the latent and of the posterior
            return self.rng.normal(*shape)
        return torch.randn(len(self.rng.generators), *shape, generator=self.generator)


def test_the_relativistic_loss_compares_real_and_generated_images_with_the_same_noisier_image():
    gan = tiny_gan(loss="relativistic")
    values = DiscriminatorObjective(gan, GradientPenalties())(gan.discriminator, micro_batch())
    torch.testing.assert_close(values["loss"], F.softplus(values["fake"] - values["real"]))
    generator_loss = GeneratorObjective(gan)(gan.generator, micro_batch())["loss"]
    torch.testing.assert_close(generator_loss, F.softplus(values["real"] - values["fake"]))
    generator_loss.mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in gan.generator.parameters())


def test_instance_noise_is_added_to_clean_images_alone():
    gan, batch = tiny_gan(instance_noise=0.5), micro_batch()
    t = torch.tensor([0, 1, 2, 3] * 2)
    change = gan.add_instance_noise(batch, t, batch.images) - batch.images
    assert torch.equal(change.abs().amax((1, 2, 3)) > 0, t == 0)
    assert change[t == 0].std().item() == pytest.approx(0.5, rel=0.1)
    losses = [DiscriminatorObjective(gan, GradientPenalties()), GeneratorObjective(gan)]
    plain = tiny_gan()
    for noisy, network, objective in zip(
        losses,
        (gan.discriminator, gan.generator),
        (DiscriminatorObjective(plain, GradientPenalties()), GeneratorObjective(plain)),
        strict=True,
    ):
        counterpart = plain.discriminator if network is gan.discriminator else plain.generator
        assert not torch.allclose(noisy(network, micro_batch())["loss"], objective(counterpart, micro_batch())["loss"])


def test_r1_stays_in_float32_under_mixed_precision():
    gan = tiny_gan()
    objective = DiscriminatorObjective(gan, GradientPenalties(1.0))
    exact = objective(gan.discriminator, micro_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = objective(gan.discriminator, micro_batch())
    assert torch.equal(mixed["r1"], exact["r1"])
    assert torch.equal(mixed["real"], exact["real"])
    assert not torch.equal(mixed["fake"], exact["fake"])


def test_augmentations_do_as_documented_and_alike_for_all_images_of_a_sample():
    rng = PerSampleRNG(range(64), torch.device("cpu"))
    images = torch.rand(64, 3, 16, 24, generator=torch.Generator().manual_seed(0)) + 0.5
    moved = DifferentiableAugmentation(["translation"], rng, 16, 24)(images)
    reached = set()
    for before, after in zip(images, moved, strict=True):
        shifts = [
            (up, left)
            for up in range(-2, 3)
            for left in range(-3, 4)
            if torch.equal(
                F.pad(before, (3, 3, 2, 2))[:, 2 + up : 18 + up, 3 + left : 27 + left],
                after,
            )
        ]
        assert len(shifts) == 1
        reached |= set(shifts)
    assert len(reached) > 20

    cut = DifferentiableAugmentation(["cutout"], rng, 16, 24)(images)
    holes = (cut == 0).all(dim=1)
    assert torch.equal(cut[~holes[:, None].expand_as(cut)], images[~holes[:, None].expand_as(cut)])
    assert holes.any(dim=2).sum(1).max() == 8
    assert holes.any(dim=1).sum(1).max() == 12
    assert (holes.sum((1, 2)) > 0).all()

    color = DifferentiableAugmentation(["color"], rng, 16, 24)
    assert torch.equal(color(images), color(images))
    gray = images[:, :1].expand_as(images)
    assert (color(gray) - color(gray)[:, :1]).abs().max() < 1e-5  # gray stays gray
    shift = (color(images) - images).mean(dim=(1, 2, 3))
    assert shift.min() < -0.4
    assert shift.max() > 0.4
    assert shift.abs().max() <= 0.5 + 1e-5


def test_gradients_of_the_penalty_pass_through_every_augmentation():
    gan = tiny_gan(augment=["color", "translation", "cutout"])
    values = DiscriminatorObjective(gan, GradientPenalties(1.0))(gan.discriminator, micro_batch())
    values["r1"].sum().backward()
    assert all(p.grad.isfinite().all() for p in gan.discriminator.parameters() if p.grad is not None)
    assert gan.discriminator.conv_in.weight.grad.abs().max() > 0
