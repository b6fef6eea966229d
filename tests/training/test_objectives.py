"""Claims about the denoising objectives: their losses follow the formulas."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddgan.training.objectives.denoising import ClassConditionalObjective, DenoisingObjective
from ddgan.training.objectives.micro_batch import MicroBatch
from ddgan.training.randomness import PerSampleRNG

IMAGES = torch.linspace(-1, 1, 16 * 3 * 8 * 8).view(16, 3, 8, 8)
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def noising(scheduler: DDPMScheduler) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The timesteps and noise of the objective for keys 0..15, and their alphas_cumprod."""
    rng = PerSampleRNG(range(16), torch.device("cpu"))
    timesteps = rng.integers(1000)
    return timesteps, rng.normal(3, 8, 8), scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)


def loss(scheduler: DDPMScheduler, output: torch.Tensor, gamma: float | None = None) -> torch.Tensor:
    network = lambda noisy, timesteps, return_dict: (output,)  # noqa: E731
    batch = MicroBatch(IMAGES, None, PerSampleRNG(range(16), torch.device("cpu")), step=0)
    return DenoisingObjective(scheduler, gamma)(network, batch)["loss"]


def target(prediction_type: str, noise: torch.Tensor, signal: torch.Tensor) -> torch.Tensor:
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * IMAGES
    return {"epsilon": noise, "sample": IMAGES, "v_prediction": velocity}[prediction_type]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_exact_prediction_has_no_loss_and_another_its_squared_error(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    _, noise, signal = noising(scheduler)
    exact = target(prediction_type, noise, signal)
    assert loss(scheduler, exact).max() < 1e-10
    assert torch.allclose(loss(scheduler, exact + 0.5), torch.full((16,), 0.25), atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_every_prediction_as_the_same_error_of_the_clean_image(prediction_type):
    """An error d of x_0 costs min(SNR, gamma) d^2, whatever the network predicts."""
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    _, noise, signal = noising(scheduler)
    d = 0.1
    # the error of the output that equals an error d of the clean image: x_0 = (x - s n) / a = a x - s v
    deviation = (1 - signal).sqrt()
    factor = {"epsilon": signal.sqrt() / deviation, "sample": 1.0, "v_prediction": 1 / deviation}[prediction_type]
    snr = (signal / (1 - signal)).flatten()
    expected = snr.clamp(max=0.1) * d**2
    assert torch.allclose(
        loss(scheduler, target(prediction_type, noise, signal) + d * factor, gamma=0.1), expected, rtol=1e-3
    )
    assert snr.min() < 0.1 < snr.max()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_finite_without_any_signal(prediction_type):
    scheduler = DDPMScheduler(
        num_train_timesteps=1, prediction_type=prediction_type, trained_betas=[1.0], timestep_spacing="trailing"
    )
    assert scheduler.alphas_cumprod.max() == 0
    losses = loss(scheduler, torch.zeros(16, 3, 8, 8), gamma=5)
    assert losses.isfinite().all()
    assert (losses > 0).all() == (prediction_type == "epsilon")  # an image without any signal says nothing about x_0


def test_logit_normal_timesteps_have_a_standard_normal_logit():
    seen = []

    def network(noisy, timesteps, return_dict):
        seen.append(timesteps)
        return (noisy,)

    count = 4000
    batch = MicroBatch(torch.zeros(count, 1, 1, 1), None, PerSampleRNG(range(count), torch.device("cpu")), step=0)
    DenoisingObjective(DDPMScheduler(100), timestep_sampling="logit_normal")(network, batch)
    assert seen[0].min() >= 0 and seen[0].max() <= 99
    logits = ((seen[0] + 0.5) / 100).logit()
    frequencies = torch.tensor([(logits < bound).float().mean() for bound in (-1, 0, 1)])
    # the normal distribution function, and three standard deviations of a frequency
    assert torch.allclose(frequencies, torch.tensor([0.1587, 0.5, 0.8413]), rtol=0, atol=3 * (0.25 / count) ** 0.5)


def labels_seen(keys, labels, class_dropout: float) -> list[int]:
    """The labels that a network gets for samples with these keys and labels of 0..9."""
    seen = []

    def network(noisy, timesteps, class_labels, return_dict):
        seen.extend(class_labels.tolist())
        return (noisy,)

    rng = PerSampleRNG(keys, torch.device("cpu"))
    batch = MicroBatch(torch.zeros(len(keys), 1, 1, 1), torch.tensor(labels), rng, step=0)
    ClassConditionalObjective(DDPMScheduler(), 10, class_dropout)(network, batch)
    return seen


def test_the_null_class_has_the_given_probability_and_depends_on_the_key_alone():
    count, probability = 4000, 0.2
    labels = [i % 10 for i in range(count)]
    assert labels_seen(range(count), labels, 0.0) == labels
    seen = labels_seen(range(count), labels, probability)
    assert all(seen_label in (label, 10) for seen_label, label in zip(seen, labels, strict=True))
    deviation = (probability * (1 - probability) / count) ** 0.5
    assert abs(seen.count(10) / count - probability) < 3 * deviation
    assert labels_seen(range(7, count), labels[7:], probability) == seen[7:]
