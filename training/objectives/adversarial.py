"""Objectives of the two networks of a Denoising Diffusion GAN (arXiv 2112.07804)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...models.discriminator_ddgan import DDGANDiscriminator
from ...models.unet_ncsnpp import NCSNpp
from ...schedulers.scheduling_ddgan import DDGANScheduler
from ..augmentation import DifferentiableAugmentation
from .micro_batch import MicroBatch


@dataclass
class GANSetup:
    """The networks and the noise process that both objectives share.

    For a generator with another signature, override `predict` in a subclass.

    Args:
        generator: predicts the clean image from a noisy one, t and z.
        discriminator: classifies pairs of a less noisy and a noisier image at t as real or generated.
        scheduler: samples real pairs from the forward process, and the less noisy image of a generated pair from the
            posterior.
        augment: names of the differentiable augmentations of the pairs, real and generated ones alike.
    """

    generator: NCSNpp
    discriminator: DDGANDiscriminator
    scheduler: DDGANScheduler
    augment: Sequence[str] = ()

    def real_pair(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return random timesteps (B,), and each image with less and with more noise."""
        t = batch.rng.integers(self.scheduler.config.num_train_timesteps)
        shape = batch.images.shape[1:]
        noise = batch.rng.normal(*shape), batch.rng.normal(*shape)
        return t, *self.scheduler.add_noise_pair(batch.images, t, noise=noise)

    def predict(
        self, generator: torch.nn.Module, batch: MicroBatch, t: torch.Tensor, noisier: torch.Tensor
    ) -> torch.Tensor:
        """Return the generator's prediction of the clean image, from a random latent z."""
        z = batch.rng.normal(self.generator.config.latent_dim)
        return generator(noisier, t, z, batch.labels, return_dict=False)[0]

    def fake(
        self, generator: torch.nn.Module, batch: MicroBatch, t: torch.Tensor, noisier: torch.Tensor
    ) -> torch.Tensor:
        """Return a generated less noisy image, sampled from the posterior given the predicted clean image."""
        predicted = self.predict(generator, batch, t, noisier)
        noise = batch.rng.normal(*noisier.shape[1:])
        return self.scheduler.step(predicted, t, noisier, variance_noise=noise, return_dict=False)[0]

    def discriminate(
        self,
        discriminator: Callable[..., torch.Tensor],
        batch: MicroBatch,
        t: torch.Tensor,
        less_noisy: torch.Tensor,
        noisier: torch.Tensor,
    ) -> torch.Tensor:
        """Return the discriminator's logits, (B,) in float32, of augmented pairs."""
        if self.augment:
            augment = DifferentiableAugmentation(self.augment, batch.rng, *noisier.shape[2:])
            less_noisy, noisier = augment(less_noisy), augment(noisier)
        return discriminator(less_noisy, t, noisier, batch.labels).float()


class DiscriminatorObjective:
    """softplus(-D(real pair)) + softplus(D(fake pair)), plus the gradient penalty R1 (arXiv 1801.04406) at intervals.

    R1 is r1_gamma / 2 times the squared norm of D's gradient with respect to the less noisy real image; it is not
    multiplied by its interval. It is computed in float32 even under mixed precision. (On a GPU with TF32, PyTorch
    rounds the inputs of its convolutions to TF32, unless `torch.backends.cudnn.conv.fp32_precision` is "ieee".)

    Args:
        gan: the networks and the noise process.
        r1_gamma: weight of R1.
        lazy_reg: interval of R1 in optimizer steps, starting at step 0.
    """

    def __init__(self, gan: GANSetup, r1_gamma: float, lazy_reg: int):
        self.gan, self.r1_gamma, self.lazy_reg = gan, r1_gamma, lazy_reg

    def __call__(self, discriminator: torch.nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return `loss`, D's logits of `real` and `fake` pairs, and the term `r1` (NaN if not due), each (B,)."""
        gan = self.gan
        t, less_noisy, noisier = gan.real_pair(batch)
        with torch.no_grad():
            fake_image = gan.fake(gan.generator, batch, t, noisier)
        r1_due = self.r1_gamma and batch.step % self.lazy_reg == 0
        if r1_due:
            real, r1 = self._real_logits_and_r1(batch, t, less_noisy, noisier)
        else:
            real = gan.discriminate(discriminator, batch, t, less_noisy, noisier)
            r1 = torch.full_like(real, torch.nan)
        fake = gan.discriminate(discriminator, batch, t, fake_image, noisier)
        loss = F.softplus(-real) + F.softplus(fake)
        return {"loss": loss + r1 if r1_due else loss, "real": real, "fake": fake, "r1": r1}

    def _real_logits_and_r1(
        self, batch: MicroBatch, t: torch.Tensor, less_noisy: torch.Tensor, noisier: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        network = self.gan.discriminator
        less_noisy = less_noisy.requires_grad_()

        def in_float32(*inputs):  # bypasses the mixed precision and compilation of the module's `__call__`
            return type(network).forward(network, *inputs)

        with torch.autocast(less_noisy.device.type, enabled=False):
            real = self.gan.discriminate(in_float32, batch, t, less_noisy, noisier)
            (gradient,) = torch.autograd.grad(real.sum(), less_noisy, create_graph=True)
            return real, self.r1_gamma / 2 * gradient.square().sum(dim=(1, 2, 3))


class GeneratorObjective:
    """softplus(-D(fake pair)), the non-saturating loss (arXiv 2112.07804, section 3.2).

    The discriminator's parameters need no gradients here: the caller disables them until after the backward pass, as
    the training loop does.
    """

    def __init__(self, gan: GANSetup):
        self.gan = gan

    def __call__(self, generator: torch.nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return `loss`, (B,)."""
        gan = self.gan
        t, _, noisier = gan.real_pair(batch)
        fake_image = gan.fake(generator, batch, t, noisier)
        return {"loss": F.softplus(-gan.discriminate(gan.discriminator, batch, t, fake_image, noisier))}
