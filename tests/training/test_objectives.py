"""The denoising loss against its formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddgan.training.objectives.denoising import ClassConditionalObjective, DenoisingObjective, MicroBatch
from ddgan.training.randomness import PerSampleRNG

IMAGES = torch.linspace(-1, 1, 16 * 3 * 8 * 8).view(16, 3, 8, 8)
KINDS = ["epsilon", "sample", "v_prediction"]


def noising(scheduler: DDPMScheduler) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The timesteps and noise that the objective draws for keys 0..15, and their signal level."""
    draws = PerSampleRNG(range(16), torch.device("cpu"))
    timesteps = draws.integers(1000)
    return timesteps, draws.normal(3, 8, 8), scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)


def loss(scheduler: DDPMScheduler, output: torch.Tensor, gamma: float | None = None) -> torch.Tensor:
    network = lambda noisy, timesteps, return_dict: (output,)  # noqa: E731
    samples = MicroBatch(IMAGES, None, PerSampleRNG(range(16), torch.device("cpu")), step=0)
    return DenoisingObjective(scheduler, gamma)(network, samples)["loss"]


def target(kind: str, noise: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * IMAGES
    return {"epsilon": noise, "sample": IMAGES, "v_prediction": velocity}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_prediction_has_no_loss_and_another_its_squared_error(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    _, noise, signal = noising(scheduler)
    exact = target(kind, noise, signal)
    assert loss(scheduler, exact).max() < 1e-10
    assert torch.allclose(loss(scheduler, exact + 0.5), torch.full((16,), 0.25), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_every_prediction_as_the_same_error_of_the_clean_image(kind):
    """An error d of x_0 costs min(SNR, gamma) d^2, whatever the network predicts."""
    scheduler = DDPMScheduler(prediction_type=kind)
    _, noise, signal = noising(scheduler)
    d = 0.1
    # what an error d of the clean image is as an error of the output: x_0 = (x - s n) / a = a x - s v
    deviation = (1 - signal).sqrt()
    factor = {"epsilon": signal.sqrt() / deviation, "sample": 1.0, "v_prediction": 1 / deviation}[kind]
    snr = (signal / (1 - signal)).flatten()
    expected = snr.clamp(max=0.1) * d**2
    assert torch.allclose(loss(scheduler, target(kind, noise, signal) + d * factor, gamma=0.1), expected, rtol=1e-3)
    assert snr.min() < 0.1 < snr.max()


def test_a_learned_variance_that_rides_along_is_left_alone():
    scheduler = DDPMScheduler(variance_type="learned_range")
    _, noise, _ = noising(scheduler)
    assert loss(scheduler, torch.cat([noise, torch.ones_like(noise)], dim=1)).max() < 1e-10


def test_logit_normal_timesteps_have_a_standard_normal_logit():
    seen = []

    def network(noisy, timesteps, return_dict):
        seen.append(timesteps)
        return (noisy,)

    count = 4000
    samples = MicroBatch(torch.zeros(count, 1, 1, 1), None, PerSampleRNG(range(count), torch.device("cpu")), step=0)
    DenoisingObjective(DDPMScheduler(100), timestep_sampling="logit_normal")(network, samples)
    assert seen[0].min() >= 0 and seen[0].max() <= 99
    logits = ((seen[0] + 0.5) / 100).logit()
    found = torch.tensor([(logits < bound).float().mean() for bound in (-1, 0, 1)])
    # the normal distribution function, and three standard deviations of a frequency
    assert torch.allclose(found, torch.tensor([0.1587, 0.5, 0.8413]), rtol=0, atol=3 * (0.25 / count) ** 0.5)


def labels_seen(keys, labels, class_dropout: float) -> list[int]:
    """What a network is told of samples with these keys and labels of 0..9."""
    seen = []

    def network(noisy, timesteps, class_labels, return_dict):
        seen.extend(class_labels.tolist())
        return (noisy,)

    draws = PerSampleRNG(keys, torch.device("cpu"))
    samples = MicroBatch(torch.zeros(len(keys), 1, 1, 1), torch.tensor(labels), draws, step=0)
    ClassConditionalObjective(DDPMScheduler(), 10, class_dropout)(network, samples)
    return seen


def test_the_null_class_stands_in_for_a_class_as_often_as_asked_for_and_depends_on_the_key_alone():
    count, probability = 4000, 0.2
    labels = [i % 10 for i in range(count)]
    assert labels_seen(range(count), labels, 0.0) == labels
    seen = labels_seen(range(count), labels, probability)
    assert all(found in (label, 10) for found, label in zip(seen, labels, strict=True))
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert abs(seen.count(10) / count - probability) < 3 * deviation
    assert labels_seen(range(7, count), labels[7:], probability) == seen[7:]


def test_draws_depend_on_the_key_alone_and_streams_are_independent():
    device = torch.device("cpu")
    both, one = PerSampleRNG([3, 4], device), PerSampleRNG([4], device)
    assert torch.equal(both.normal(5)[1:], one.normal(5))
    assert torch.equal(both.integers(1000)[1:], one.integers(1000))
    assert not torch.equal(PerSampleRNG([4], device, stream=1).normal(5), PerSampleRNG([4], device).normal(5))
