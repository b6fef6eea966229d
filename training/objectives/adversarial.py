"""What the two networks of a Denoising Diffusion GAN (arXiv 2112.07804) are trained to do."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...models.discriminator_ddgan import DDGANDiscriminator
from ...models.unet_ncsnpp import NCSNpp
from ...schedulers.scheduling_ddgan import DDGANScheduler
from ..augmentation import DifferentiableAugmentation
from .denoising import MicroBatch


@dataclass
class GANSetup:
    """What both objectives share.

    Args:
        generator: predicts the clean picture from the noisier one, t and z.
        discriminator: judges pairs of a less noisy and a noisier picture at t.
        scheduler: draws both pictures of a real pair, and the less noisy one of a generated pair from the posterior.
        augment: names of the differentiable augmentations that both kinds of pairs pass before they are judged.
    """

    generator: NCSNpp
    discriminator: DDGANDiscriminator
    scheduler: DDGANScheduler
    augment: Sequence[str] = ()

    def real_pair(self, samples: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps (B,), and of each picture the less noisy and the noisier sample."""
        t = samples.draws.integers(self.scheduler.config.num_train_timesteps)
        shape = samples.images.shape[1:]
        noise = samples.draws.normal(*shape), samples.draws.normal(*shape)
        return t, *self.scheduler.add_noise_pair(samples.images, t, noise=noise)

    def fake(self, generator: torch.nn.Module, samples: MicroBatch, t: torch.Tensor, noisier: torch.Tensor):
        """The generator's less noisy sample below a noisier one: from the posterior given the picture it predicts."""
        z = samples.draws.normal(self.generator.config.latent_dim)
        predicted = generator(noisier, t, z, samples.labels, return_dict=False)[0]
        noise = samples.draws.normal(*noisier.shape[1:])
        return self.scheduler.step(predicted, t, noisier, variance_noise=noise, return_dict=False)[0]

    def judge(
        self, discriminator, samples: MicroBatch, t: torch.Tensor, less_noisy: torch.Tensor, noisier: torch.Tensor
    ):
        """The discriminator's logits, (B,) in float32, of augmented pairs."""
        if self.augment:
            augment = DifferentiableAugmentation(self.augment, samples.draws, *noisier.shape[2:])
            less_noisy, noisier = augment(less_noisy), augment(noisier)
        return discriminator(less_noisy, t, noisier, samples.labels).float()


class DiscriminatorObjective:
    """softplus(-D(real pair)) + softplus(D(fake pair)), and at times the gradient penalty R1 (arXiv 1801.04406).

    R1 is r1_gamma / 2 times the squared norm of D's gradient with respect to the less noisy real sample; it is not
    multiplied by its interval. It is computed in float32 also where the rest is not (on a GPU that has TF32, PyTorch
    rounds the inputs of such convolutions to that, unless `torch.backends.cudnn.conv.fp32_precision` is "ieee").

    Args:
        r1_gamma: weight of R1.
        lazy_reg: R1 is in the loss of every step that this divides, counting from 0.
    """

    def __init__(self, adversaries: GANSetup, r1_gamma: float, lazy_reg: int):
        self.adversaries, self.r1_gamma, self.lazy_reg = adversaries, r1_gamma, lazy_reg

    def __call__(self, discriminator: torch.nn.Module, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """`loss`, D's logits on `real` and `fake` pairs, and the term `r1` where it is due, each (B,)."""
        ours = self.adversaries
        t, less_noisy, noisier = ours.real_pair(samples)
        with torch.no_grad():
            fake = ours.fake(ours.generator, samples, t, noisier)
        if self.r1_gamma and samples.step % self.lazy_reg == 0:
            real, r1 = self._penalized(samples, t, less_noisy, noisier)
        else:
            real, r1 = ours.judge(discriminator, samples, t, less_noisy, noisier), None
        fake = ours.judge(discriminator, samples, t, fake, noisier)
        loss = F.softplus(-real) + F.softplus(fake)
        if r1 is None:
            r1 = torch.full_like(loss, torch.nan)
        else:
            loss = loss + r1
        return {"loss": loss, "real": real, "fake": fake, "r1": r1}

    def _penalized(self, samples, t, less_noisy, noisier) -> tuple[torch.Tensor, torch.Tensor]:
        ours = self.adversaries
        network = ours.discriminator
        less_noisy = less_noisy.requires_grad_()

        def in_float32(*inputs):  # past the mixed precision and the compilation that the call of a module brings along
            return type(network).forward(network, *inputs)

        with torch.autocast(less_noisy.device.type, enabled=False):
            real = ours.judge(in_float32, samples, t, less_noisy, noisier)
            (gradient,) = torch.autograd.grad(real.sum(), less_noisy, create_graph=True)
            return real, self.r1_gamma / 2 * gradient.square().sum(dim=(1, 2, 3))


class GeneratorObjective:
    """softplus(-D(fake pair)), the non-saturating loss (arXiv 2112.07804, section 3.2).

    The discriminator's parameters need no gradients meanwhile: who calls this turns them off until after the backward
    pass, as the training loop does.
    """

    def __init__(self, adversaries: GANSetup):
        self.adversaries = adversaries

    def __call__(self, generator: torch.nn.Module, samples: MicroBatch) -> dict[str, torch.Tensor]:
        """`loss`, (B,)."""
        ours = self.adversaries
        t, _, noisier = ours.real_pair(samples)
        fake = ours.fake(generator, samples, t, noisier)
        return {"loss": F.softplus(-ours.judge(ours.discriminator, samples, t, fake, noisier))}
