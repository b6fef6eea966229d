"""Objectives of the two networks of a Denoising Diffusion GAN (arXiv 2112.07804)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from ...models.discriminator_ddgan import DDGANDiscriminator
from ...models.unet_ncsnpp import NCSNpp
from ...schedulers.scheduling_ddgan import DDGANScheduler
from ..augmentation import DifferentiableAugmentation
from .micro_batch import MicroBatch

GANLoss = Literal["non_saturating", "relativistic"]
Augmentation = Callable[[torch.Tensor], torch.Tensor]

_SMALLEST_SQUARE = 1e-6  # keeps the gradient of a distance finite where both images are equal


@dataclass
class GANSetup:
    """The networks, the noise process and the loss that both objectives share.

    For a generator with another signature, override `predict` in a subclass.

    Args:
        generator: predicts the clean image from a noisy one, t and z.
        discriminator: classifies pairs of a less noisy and a noisier image at t as real or generated.
        scheduler: samples real pairs from the forward process, and the less noisy image of a generated pair from the
            posterior.
        augment: names of the differentiable augmentations of the pairs, real and generated ones alike.
        loss: "non_saturating" (arXiv 1406.2661), or "relativistic", which compares the logits of a real and a
            generated pair with the same noisier image (arXiv 1807.00734).
        instance_noise: standard deviation of noise that is added to clean images, real and generated ones, before the
            discriminator (arXiv 1610.04490).
        reconstruction_weight: weight of `squared_error` in the loss of the generator.
        energy_weight: weight of `energy_score` in the loss of the generator.
    """

    generator: NCSNpp
    discriminator: DDGANDiscriminator
    scheduler: DDGANScheduler
    augment: Sequence[str] = ()
    loss: GANLoss = "non_saturating"
    instance_noise: float = 0.0
    reconstruction_weight: float = 0.0
    energy_weight: float = 0.0

    def discriminator_loss(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """Return the loss (B,) of the discriminator from its logits (B,)."""
        if self.loss == "relativistic":
            return F.softplus(fake - real)
        return F.softplus(-real) + F.softplus(fake)

    def generator_loss(self, real: torch.Tensor | None, fake: torch.Tensor) -> torch.Tensor:
        """Return the loss (B,) of the generator from the logits (B,); only the relativistic one needs real pairs."""
        return F.softplus(-fake if real is None else real - fake)

    def real_pair(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return random timesteps (B,), and each image with less and with more noise."""
        t = batch.rng.integers(self.scheduler.config.num_train_timesteps)
        shape = batch.images.shape[1:]
        noise = batch.rng.normal(*shape), batch.rng.normal(*shape)
        return t, *self.scheduler.add_noise_pair(batch.images, t, noise=noise)

    def is_noisiest(self, t: torch.Tensor) -> torch.Tensor:
        """Return which timesteps (B,) are T-1, at which the noisier image is almost pure noise."""
        return t == self.scheduler.config.num_train_timesteps - 1

    def predict(
        self,
        generator: torch.nn.Module,
        batch: MicroBatch,
        t: torch.Tensor,
        noisier: torch.Tensor,
        again: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the generator's predictions of the clean images, each from a random latent z.

        Args:
            again: indices of the images that are predicted a second time, from other latents, in the same call of the
                generator.
        """
        z, labels = batch.rng.normal(self.generator.config.latent_dim), batch.labels
        if again is not None:
            z = torch.cat([z, batch.rng.normal(self.generator.config.latent_dim)[again]])
            t, noisier = torch.cat([t, t[again]]), torch.cat([noisier, noisier[again]])
            labels = labels if labels is None else torch.cat([labels, labels[again]])
        predicted = generator(noisier, t, z, labels, return_dict=False)[0]
        return predicted[: len(batch.images)], predicted[len(batch.images) :]

    def less_noisy(
        self, batch: MicroBatch, t: torch.Tensor, noisier: torch.Tensor, predicted: torch.Tensor
    ) -> torch.Tensor:
        """Sample less noisy images from the posterior, given predictions of the clean ones."""
        noise = batch.rng.normal(*noisier.shape[1:])
        return self.scheduler.step(predicted, t, noisier, variance_noise=noise, return_dict=False)[0]

    def squared_error(self, images: torch.Tensor, t: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error (B,) of predicted clean images, times the signal level `alphas_cumprod[t]`.

        It is minimized by the mean of all images that a noisy one can come from.
        """
        signal = self.scheduler.alphas_cumprod.to(t.device, torch.float32)[t]
        return signal * (predicted.float() - images).square().mean(dim=(1, 2, 3))

    @staticmethod
    def energy_score(images: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the energy score (B,) of two predictions of each clean image, from independent latents.

        It is their mean distance to the image minus half of their distance to each other (arXiv 2502.02483, equation
        8). Its expectation is minimized if predictions have the distribution of the images that a noisy one can come
        from. Distances are root mean squares over the pixels.
        """

        def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return ((a.float() - b.float()).square().mean(dim=(1, 2, 3)) + _SMALLEST_SQUARE).sqrt()

        return (distance(first, images) + distance(second, images) - distance(first, second)) / 2

    def add_instance_noise(self, batch: MicroBatch, t: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Return less noisy images of pairs; those without noise, at t = 0, get instance noise."""
        if not self.instance_noise:
            return image
        is_clean = (t == 0).view(-1, 1, 1, 1)
        return torch.where(is_clean, image + self.instance_noise * batch.rng.normal(*image.shape[1:]), image)

    def augmentation(self, batch: MicroBatch) -> Augmentation:
        """Return a random augmentation for each pair of a batch."""
        if not self.augment:
            return lambda images: images
        return DifferentiableAugmentation(self.augment, batch.rng, *batch.images.shape[2:])

    def discriminate(
        self,
        discriminator: Callable[..., torch.Tensor],
        batch: MicroBatch,
        t: torch.Tensor,
        less_noisy: torch.Tensor,
        noisier: torch.Tensor,
        augment: Augmentation | None = None,
    ) -> torch.Tensor:
        """Return the discriminator's logits, (B,) in float32, of pairs with this or a random augmentation."""
        augment = augment or self.augmentation(batch)
        return discriminator(augment(less_noisy), t, augment(noisier), batch.labels).float()


@dataclass
class GradientPenalties:
    """R1 for real pairs (arXiv 1801.04406) and R2 for generated ones, at intervals.

    Each is gamma / 2 times the squared norm of D's gradient with respect to the less noisy image of a pair; it is not
    multiplied by its interval. Both are computed in float32 even under mixed precision. (On a GPU with TF32, PyTorch
    rounds the inputs of its convolutions to TF32, unless `torch.backends.cudnn.conv.fp32_precision` is "ieee".)

    Args:
        r1_gamma: weight of R1; 0 turns it off.
        r2_gamma: weight of R2; 0 turns it off.
        interval: optimizer steps between penalties, starting at step 0.
        finite_differences: estimate the squared norm as (D(x + step noise) - D(x))^2 / step^2 with standard normal
            noise (arXiv 2501.08316), which needs no second derivative. For small steps it is exact on average, except
            that a logit also changes with the noise of the other pairs, through the minibatch standard deviation.
        step: standard deviation of that noise, for images in [-1, 1].
    """

    r1_gamma: float = 0.0
    r2_gamma: float = 0.0
    interval: int = 1
    finite_differences: bool = False
    step: float = 0.02

    def gammas(self, step: int) -> tuple[float, float]:
        """Return the weights of R1 and R2 in an optimizer step."""
        return (self.r1_gamma, self.r2_gamma) if step % self.interval == 0 else (0.0, 0.0)

    def __call__(
        self,
        gan: GANSetup,
        batch: MicroBatch,
        t: torch.Tensor,
        less_noisy: torch.Tensor,
        noisier: torch.Tensor,
        gamma: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits of pairs and their penalties, each (B,)."""
        network = gan.discriminator

        def in_float32(*inputs):  # bypasses the mixed precision and compilation of the module's `__call__`
            return type(network).forward(network, *inputs)

        augment = gan.augmentation(batch)
        with torch.autocast(less_noisy.device.type, enabled=False):
            if self.finite_differences:
                shifted = less_noisy + self.step * batch.rng.normal(*less_noisy.shape[1:])
                logits, shifted_logits = (
                    gan.discriminate(in_float32, batch, t, images, noisier, augment)
                    for images in (less_noisy, shifted)
                )
                squared_norm = ((shifted_logits - logits) / self.step).square()
            else:
                less_noisy = less_noisy.detach().requires_grad_()
                logits = gan.discriminate(in_float32, batch, t, less_noisy, noisier, augment)
                (gradient,) = torch.autograd.grad(logits.sum(), less_noisy, create_graph=True)
                squared_norm = gradient.square().sum(dim=(1, 2, 3))
        return logits, gamma / 2 * squared_norm


class DiscriminatorObjective:
    """The loss of a `GANSetup`, for pairs from the forward process and generated ones, plus gradient penalties."""

    def __init__(self, gan: GANSetup, penalties: GradientPenalties):
        self.gan, self.penalties = gan, penalties

    def __call__(self, discriminator: torch.nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return `loss`, D's logits of `real` and `fake` pairs, and the terms `r1` and `r2`, each (B,).

        The terms are NaN in steps without penalties; there is no `r2` if its weight is 0.
        """
        gan = self.gan
        t, less_noisy, noisier = gan.real_pair(batch)
        with torch.no_grad():
            predicted, _ = gan.predict(gan.generator, batch, t, noisier)
            fake_image = gan.less_noisy(batch, t, noisier, predicted)
        logits, values = [], {}
        for name, images, gamma in zip(
            ("r1", "r2"), (less_noisy, fake_image), self.penalties.gammas(batch.step), strict=True
        ):
            images = gan.add_instance_noise(batch, t, images)
            if gamma:
                of_images, values[name] = self.penalties(gan, batch, t, images, noisier, gamma)
            else:
                of_images = gan.discriminate(discriminator, batch, t, images, noisier)
            logits.append(of_images)
        real, fake = logits
        loss = gan.discriminator_loss(real, fake)
        for penalty in values.values():
            loss = loss + penalty
        if len(values) == len(logits) and isinstance(discriminator, DistributedDataParallel):
            # penalties bypass the wrapper, which averages gradients over the processes only after a forward pass
            pair = less_noisy[:1], t[:1], noisier[:1], None if batch.labels is None else batch.labels[:1]
            loss = loss + 0 * discriminator(*pair).float()
        without = torch.full_like(real, torch.nan)
        terms = {name: values.get(name, without) for name in ("r1", "r2") if name == "r1" or self.penalties.r2_gamma}
        return {"loss": loss, "real": real, "fake": fake, **terms}


class GeneratorObjective:
    """The loss of a `GANSetup` for generated pairs.

    The discriminator's parameters need no gradients here: the caller disables them until after the backward pass, as
    the training loop does.
    """

    def __init__(self, gan: GANSetup):
        self.gan = gan

    def __call__(self, generator: torch.nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return `loss`, (B,), and those of its terms `reconstruction` and `energy` that have a weight.

        The energy score is computed at the timestep T-1, where a noisy image can come from any image, and 0 at others.
        """
        gan = self.gan
        t, less_noisy, noisier = gan.real_pair(batch)
        again = gan.is_noisiest(t).nonzero()[:, 0] if gan.energy_weight else None
        predicted, second = gan.predict(generator, batch, t, noisier, again)
        fake_image = gan.less_noisy(batch, t, noisier, predicted)
        fake_image = gan.add_instance_noise(batch, t, fake_image)
        fake, real = gan.discriminate(gan.discriminator, batch, t, fake_image, noisier), None
        if gan.loss == "relativistic":
            with torch.no_grad():
                less_noisy = gan.add_instance_noise(batch, t, less_noisy)
                real = gan.discriminate(gan.discriminator, batch, t, less_noisy, noisier)
        loss, terms = gan.generator_loss(real, fake), {}
        if gan.reconstruction_weight:
            terms["reconstruction"] = gan.reconstruction_weight * gan.squared_error(batch.images, t, predicted)
        if again is not None:
            score = gan.energy_weight * gan.energy_score(batch.images[again], predicted[again], second)
            terms["energy"] = torch.zeros_like(loss).index_copy(0, again, score)
        return {"loss": loss + sum(terms.values()), **terms}
