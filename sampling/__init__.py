"""Sampling from a trained pipeline: loading it, one image per seed, denoising traces, image grids."""
