"""Losses for guided sampling: color, saturation, symmetry, layout, CLIP, and their weighted sums."""
