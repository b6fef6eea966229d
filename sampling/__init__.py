"""Sampling from a finished pipeline: loading it, one image per seed, denoising traces, image grids."""
