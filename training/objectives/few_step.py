"""Losses that turn a pretrained diffusion network into a sampler of a few posterior steps, with a discriminator."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from ...models.discriminator_unet import UNetDiscriminator
from .micro_batch import MicroBatch

CLEAN = -1  # the timestep of images without noise


class Transition(NamedTuple):
    """One posterior step per sample: the timesteps before and after it, (B,), and the noisier image x_t."""

    t: torch.Tensor
    s: torch.Tensor
    noisier: torch.Tensor


class NoisyImages(NamedTuple):
    """Inputs of the generator: images x_t, (B, C, H, W), their timesteps, (B,), and labels as keyword arguments."""

    images: torch.Tensor
    t: torch.Tensor
    conditions: dict[str, torch.Tensor]


class FewStepProcess:
    """The transitions of samplers that take a few steps of q(x_s | x_t, x_0) along a DDPM noise process.

    They are the steps of `DDPMScheduler` with `variance_type="fixed_small"` and without clipping: from each of its
    timesteps to the next, and from the last to clean images.

    Args:
        scheduler: the noise process, the spacing of timesteps, and what the network predicts.
        step_counts: numbers of steps of the samplers, each at most `num_train_timesteps`.

    Attributes:
        top: the noisiest timestep of the noise process.
        transitions: the timesteps before and after each step, (number of steps, 2).
        timesteps: the timesteps at which steps begin, noisiest first.
    """

    def __init__(self, scheduler: DDPMScheduler, step_counts: Sequence[int]):
        self.prediction_type = scheduler.config.prediction_type
        self.top = scheduler.config.num_train_timesteps - 1
        self.alphas_cumprod = scheduler.alphas_cumprod.double()
        transitions = []
        for count in step_counts:
            scheduler.set_timesteps(count)
            timesteps = [*scheduler.timesteps.tolist(), CLEAN]
            transitions += pairwise(timesteps)
        self.transitions = torch.tensor(transitions)
        self.timesteps = self.transitions[:, 0].unique().flip(0)

    def add_noise(self, images: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return sqrt(alphas_cumprod) images + sqrt(1 - alphas_cumprod) noise; the images themselves at `CLEAN`."""
        signal = self._alphas_cumprod(timesteps)
        return _scale(signal.sqrt(), images) + _scale((1 - signal).sqrt(), noise)

    def predicted_image(self, output: torch.Tensor, noisier: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return x_0, (B, C, H, W), from the network's output at x_t."""
        signal = self._alphas_cumprod(t)
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "epsilon":
            return _scale(signal.rsqrt(), noisier) - _scale(((1 - signal) / signal).sqrt(), output)
        return _scale(signal.sqrt(), noisier) - _scale((1 - signal).sqrt(), output)

    def posterior_sample(self, image: torch.Tensor, transition: Transition, noise: torch.Tensor) -> torch.Tensor:
        """Sample x_s, (B, C, H, W), from q(x_s | x_t, x_0), equation (7) of arXiv 2006.11239 for steps of any size."""
        signal_t, signal_s = self._alphas_cumprod(transition.t), self._alphas_cumprod(transition.s)
        alpha = signal_t / signal_s
        mean = _scale(signal_s.sqrt() * (1 - alpha) / (1 - signal_t), image)
        mean = mean + _scale(alpha.sqrt() * (1 - signal_s) / (1 - signal_t), transition.noisier)
        return mean + _scale(((1 - signal_s) / (1 - signal_t) * (1 - alpha)).sqrt(), noise)

    def deterministic_step(
        self, image: torch.Tensor, noisier: torch.Tensor, t: torch.Tensor, s: torch.Tensor
    ) -> torch.Tensor:
        """Return x_s with the same noise as in x_t, equation (12) of arXiv 2010.02502 for sigma = 0."""
        signal_t, signal_s = self._alphas_cumprod(t), self._alphas_cumprod(s)
        noise = _scale((1 - signal_t).rsqrt(), noisier) - _scale((signal_t / (1 - signal_t)).sqrt(), image)
        return _scale(signal_s.sqrt(), image) + _scale((1 - signal_s).sqrt(), noise)

    def _alphas_cumprod(self, timesteps: torch.Tensor) -> torch.Tensor:
        table = torch.cat([self.alphas_cumprod, torch.ones_like(self.alphas_cumprod[:1])])  # the last is CLEAN's
        return table.to(timesteps.device)[timesteps]


class TeacherSamples:
    """Images that a pretrained network generated, and the noisy images that its deterministic sampler went through.

    Args:
        timesteps: the timesteps at which the steps of the few-step sampler begin, (L,).
        noisy: the noisy images at these timesteps, (N, L, C, H, W).
        images: the images that they lead to, (N, C, H, W) in [-1, 1].
        labels: their classes, (N,), if there are any.
    """

    def __init__(
        self, timesteps: torch.Tensor, noisy: torch.Tensor, images: torch.Tensor, labels: torch.Tensor | None = None
    ):
        self.timesteps, self.noisy, self.images, self.labels = timesteps, noisy, images, labels

    def random_samples(self, samples: MicroBatch) -> tuple[NoisyImages, torch.Tensor]:
        """Return, for each sample of a micro-batch, a random noisy image and the image that it leads to."""
        rng, device = samples.rng, samples.images.device
        i, level = rng.integers(len(self.images)).cpu(), rng.integers(len(self.timesteps)).cpu()
        noisy, images = self.noisy[i, level].to(device).float(), self.images[i].to(device).float()
        conditions = {} if self.labels is None else {"class_labels": self.labels[i].to(device)}
        return NoisyImages(noisy, self.timesteps[level].to(device), conditions), images


@dataclass
class FewStepSetup:
    """Networks and settings that both objectives share.

    Args:
        generator: the pretrained network.
        discriminator: classifies images at a noise level as real or generated; None in a run of distillation alone.
        process: the transitions to learn.
        instance_noise: probability that the discriminator gets clean images with noise of a timestep in the lowest
            quarter, so that it cannot rely on fine details too early (arXiv 2405.14867).
        null_class: label of the null class, if the network has one.
        class_dropout: probability of the null class.
    """

    generator: torch.nn.Module
    discriminator: UNetDiscriminator | None
    process: FewStepProcess
    instance_noise: float = 0.5
    null_class: int | None = None
    class_dropout: float = 0.0

    def conditions(self, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """The class labels as keyword arguments of both networks; none for unconditional ones."""
        if samples.labels is None:
            return {}
        labels = samples.labels
        if self.null_class is not None:
            labels = labels.masked_fill(samples.rng.uniform() < self.class_dropout, self.null_class)
        return {"class_labels": labels}

    def transition(self, samples: MicroBatch) -> Transition:
        """A random transition for each sample, with x_t made from its image."""
        transitions = self.process.transitions.to(samples.images.device)
        t, s = transitions[samples.rng.integers(len(transitions))].unbind(1)
        noise = samples.rng.normal(*samples.images.shape[1:])
        noisier = self.process.add_noise(samples.images, t, noise)
        return Transition(t, s, torch.where(_per_image(t == self.process.top), noise, noisier))

    def predict(self, generator: torch.nn.Module, *inputs: NoisyImages) -> list[torch.Tensor]:
        """Return the images that the generator predicts for each of the inputs, in a single call of it."""
        noisy, t = torch.cat([part.images for part in inputs]), torch.cat([part.t for part in inputs])
        conditions = {name: torch.cat([part.conditions[name] for part in inputs]) for name in inputs[0].conditions}
        output = generator(noisy, t, **conditions, return_dict=False)[0].float()
        images = self.process.predicted_image(output, noisy, t)
        return list(images.split([len(part.images) for part in inputs]))

    def less_noisy(self, samples: MicroBatch, image: torch.Tensor, transition: Transition) -> torch.Tensor:
        """Return x_s given the predicted image."""
        return self.process.posterior_sample(image, transition, samples.rng.normal(*image.shape[1:]))

    def real(self, samples: MicroBatch, transition: Transition) -> torch.Tensor:
        """Return x_s of the forward process."""
        return self.process.add_noise(samples.images, transition.s, samples.rng.normal(*samples.images.shape[1:]))

    def add_instance_noise(
        self, samples: MicroBatch, s: torch.Tensor, *images: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return timesteps and images for the discriminator; clean images may get noise, independent of each other."""
        rng, shape = samples.rng, images[0].shape[1:]
        noised = (rng.uniform() < self.instance_noise) & (s == CLEAN)
        timesteps = torch.where(noised, rng.integers(max(1, (self.process.top + 1) // 4)), s)
        images = tuple(
            torch.where(_per_image(noised), self.process.add_noise(part, timesteps, rng.normal(*shape)), part)
            for part in images
        )
        return timesteps.clamp(min=0), *images


class DiscriminatorObjective:
    """softplus(-D(real)) + softplus(D(generated)) with the gradient penalties R1 and R2, in every step.

    gamma / 2 |dD/dx|^2 is estimated for real and generated images as gamma / (2 step^2) |D(x + step noise) - D(x)|^2
    (arXiv 2501.08316), which needs no second derivative.

    Args:
        gamma: weight of the penalties.
        step: standard deviation of the noise, for images in [-1, 1].
    """

    def __init__(self, setup: FewStepSetup, gamma: float, step: float = 0.02):
        self.setup, self.gamma, self.step = setup, gamma, step

    def __call__(self, discriminator: torch.nn.Module, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """Return `loss`, the mean logits of `real` and `fake` images, the `penalty`, and `accuracy`, each (B,).

        `accuracy` is 1 where the real image has the higher logit. It is 0.5 on average for a discriminator that cannot
        tell them apart, also where the penalties keep its logits close to zero.
        """
        setup = self.setup
        conditions = setup.conditions(samples)
        transition = setup.transition(samples)
        with torch.no_grad():
            (image,) = setup.predict(setup.generator, NoisyImages(transition.noisier, transition.t, conditions))
            generated = setup.less_noisy(samples, image, transition)
        real = setup.real(samples, transition)
        timesteps, real, fake = setup.add_instance_noise(samples, transition.s, real, generated)
        images = [real, fake]
        if self.gamma:
            images += [part + self.step * samples.rng.normal(*part.shape[1:]) for part in images]
        count = len(images)
        conditions = {name: labels.repeat(count) for name, labels in conditions.items()}
        logits = discriminator(torch.cat(images), timesteps.repeat(count), **conditions).float().chunk(count)
        real, fake = logits[:2]
        penalty = torch.zeros(len(real), device=real.device)
        for part, shifted in zip(logits, logits[2:], strict=False):  # no pairs without penalties
            penalty = penalty + self.gamma / (2 * self.step**2) * (shifted - part).mean(1).square()
        loss = (F.softplus(-real) + F.softplus(fake)).mean(1) + penalty
        real, fake = real.mean(1), fake.mean(1)
        return {"loss": loss, "real": real, "fake": fake, "penalty": penalty, "accuracy": (real > fake).float()}


class GeneratorObjective:
    """First distillation alone, then the sum of softplus(-D(generated)) and the weighted distillation loss.

    The distillation loss is the mean squared distance between the predicted image and the one that the deterministic
    sampler of the pretrained network reaches from the same noisy image (arXiv 2101.02388). It does not depend on what
    that network predicts, so a network that predicted the noise learns to predict v (arXiv 2202.00512) on the way: at
    high noise levels x_0 computed from the noise multiplies its error, by 157 at the last timestep of DDPM's schedule.

    Args:
        distillation_steps: optimizer steps of distillation alone.
        distillation_weight: weight of its loss in the steps after them.

    Attributes:
        teacher: samples of the pretrained network, to be set before the first step that needs them.
    """

    teacher: TeacherSamples | None = None

    def __init__(self, setup: FewStepSetup, distillation_steps: int, distillation_weight: float):
        self.setup = setup
        self.distillation_steps, self.distillation_weight = distillation_steps, distillation_weight

    def __call__(self, generator: torch.nn.Module, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """Return `loss` and those of its parts that this step has, `distillation` and `adversarial`, each (B,)."""
        setup, is_adversarial = self.setup, samples.step >= self.distillation_steps
        weight = self.distillation_weight if is_adversarial else 1.0
        inputs, targets, transition, conditions = [], None, None, {}
        if weight:
            assert self.teacher is not None
            noisy, targets = self.teacher.random_samples(samples)
            inputs.append(noisy)
        if is_adversarial:
            transition, conditions = setup.transition(samples), setup.conditions(samples)
            inputs.append(NoisyImages(transition.noisier, transition.t, conditions))
        images = setup.predict(generator, *inputs)  # in a single call, as DistributedDataParallel requires

        values = {"loss": samples.images.new_zeros(len(samples.images))}
        if targets is not None:
            values["distillation"] = (images[0] - targets).square().mean(dim=(1, 2, 3))
            values["loss"] = values["loss"] + weight * values["distillation"]
        if transition is not None:
            assert setup.discriminator is not None
            generated = setup.less_noisy(samples, images[-1], transition)
            timesteps, generated = setup.add_instance_noise(samples, transition.s, generated)
            logits = setup.discriminator(generated, timesteps, **conditions).float()
            values["adversarial"] = F.softplus(-logits).mean(1)
            values["loss"] = values["loss"] + values["adversarial"]
        return values


def _per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _scale(factors: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return _per_image(factors.to(images.dtype)) * images
