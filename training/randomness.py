"""Random numbers that depend on what they are drawn for, not on what was drawn before.

Every sample of every optimizer step has a key made from (seed, step, its position in the step). All that is random
about the sample is drawn from generators seeded by that key. So a step gives the same result however it is cut into
micro-batches and processes, and a run that is resumed needs no saved random state.
"""

from collections.abc import Sequence

import torch

_MASK = (1 << 64) - 1


def fold_in(*parts: int) -> int:
    """Mix integers into one of 64 bits (the finalizer of SplitMix64, applied part by part)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class PerSampleRNG:
    """Random tensors for a batch: sample i's part depends on `keys[i]`, the device's kind and the order of calls.

    Args:
        keys: one integer of 64 bits a sample.
        device: where the tensors are made.
        stream: tells apart several independent sets of draws for the same samples.
    """

    def __init__(self, keys: Sequence[int], device: torch.device, stream: int = 0):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(fold_in(k, stream)) for k in keys]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, (B, *shape)."""
        return torch.stack([torch.randn(shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return torch.stack([torch.rand(shape, generator=g, device=self.device) for g in self.generators])

    def integers(self, high: int) -> torch.Tensor:
        """Integers in 0 .. high-1, uniform, (B,)."""
        return torch.stack([torch.randint(high, (), generator=g, device=self.device) for g in self.generators])
