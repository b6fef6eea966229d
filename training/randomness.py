"""Random numbers keyed by sample, independent of the order in which they are generated.

Every sample of every optimizer step has a key made from (seed, step, its position in the step), which seeds the
generators of all its random numbers. A step therefore has the same result however it is split into micro-batches
and processes, but for dropout and what a network computes across a micro-batch (the minibatch standard deviation of
`DDGANDiscriminator`), and a run resumes without saved random state.

PyTorch's generator on a CPU uses only the lower 32 bits of its seed, on a GPU all 64. On a CPU, two of the B samples
of a step therefore share all their random numbers (timestep and noise, but not the crop and flip, whose generator uses
all bits) with a probability of about B^2 / 2^33: 8e-6 for B = 256, so about 8 of a million steps have such a pair.
Pairs of different steps, which are more frequent, are harmless: their images or weights differ. Wider seeds would
change the random numbers of all runs on a CPU, so that checkpoints would no longer resume bit-identically.
"""

from collections.abc import Sequence

import torch

_MASK = (1 << 64) - 1


def fold_in(*parts: int) -> int:
    """Hash integers to a single 64-bit integer, with the SplitMix64 finalizer after each of them."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class PerSampleRNG:
    """Random tensors for a batch; those of sample i depend only on `keys[i]`, the device type and the order of calls.

    Args:
        keys: one 64-bit integer per sample.
        device: where the tensors are created.
        stream: number of an independent set of random numbers for the same samples.
    """

    def __init__(self, keys: Sequence[int], device: torch.device, stream: int = 0):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(fold_in(key, stream)) for key in keys]

    def normal(self, *shape: int) -> torch.Tensor:
        """Return standard normal numbers, (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return uniform numbers in [0, 1), (B, *shape)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators])

    def integers(self, high: int) -> torch.Tensor:
        """Return uniform integers in 0 .. high-1, (B,)."""
        return torch.stack([torch.randint(high, (), generator=g, device=self.device) for g in self.generators])
