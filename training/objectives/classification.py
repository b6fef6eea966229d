"""The classification objective: cross-entropy on augmented images."""

import torch
import torch.nn.functional as F

from ..randomness import PerSampleRNG
from .micro_batch import MicroBatch

ROTATION, SCALING, SHIFT = 10.0, 0.1, 0.08  # maxima: degrees, log scale, share of the image side
NOISE = 0.1  # maximum standard deviation, for images in [-1, 1]


class ClassificationObjective:
    """Cross-entropy of a classifier's logits, on augmented images.

    Args:
        augmentation: strength of the augmentation; see `augment`.
    """

    def __init__(self, augmentation: float = 1.0):
        self.augmentation = augmentation

    def __call__(self, network: torch.nn.Module, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Return the `loss` of each sample, (B,), and whether it is classified correctly: `accuracy`, 0 or 1."""
        assert batch.labels is not None
        logits = network(augment(batch.images, self.augmentation, batch.rng))
        return {
            "loss": F.cross_entropy(logits.float(), batch.labels, reduction="none"),
            "accuracy": (logits.argmax(1) == batch.labels).float(),
        }


def augment(images: torch.Tensor, strength: float, rng: PerSampleRNG) -> torch.Tensor:
    """Shift, rotate, scale and add noise to each image (B, C, H, W), in [-1, 1], independently.

    Args:
        strength: multiplier of the maxima `ROTATION`, `SCALING`, `SHIFT` and `NOISE`; 0 returns the images unchanged.
        rng: the random numbers of the samples.
    """
    if not strength:
        return images
    angle, scale, noise_level, *shift = ((rng.uniform(5) * 2 - 1) * strength).unbind(1)
    angle, scale = (angle * ROTATION).deg2rad(), (scale * SCALING).exp()
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    translation = 2 * SHIFT * torch.stack(shift, 1)  # the image side is 2 in grid coordinates
    affine = torch.cat([rotation * scale.view(-1, 1, 1), translation[:, :, None]], 2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    transformed = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    noise = rng.normal(*images.shape[1:]) * (noise_level * NOISE).view(-1, 1, 1, 1)
    return (transformed + noise).clamp(-1, 1)
