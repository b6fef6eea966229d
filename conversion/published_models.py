"""Training arguments of the published checkpoints of Denoising Diffusion GANs."""

# arguments in which the published models differ
PUBLISHED_MODELS = {
    "cifar10": {"image_size": 32, "ch_mult": [1, 2, 2, 2], "num_timesteps": 4},
    "celebahq_256": {"image_size": 256, "ch_mult": [1, 1, 2, 2, 4, 4], "num_timesteps": 2},
    "lsun_church_256": {"image_size": 256, "ch_mult": [1, 1, 2, 2, 4, 4], "num_timesteps": 4},
}
# arguments that all published models share
COMMON_ARGUMENTS = {
    "num_channels": 3,
    "centered": True,
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
    "resamp_with_conv": True,
    "conditional": True,
    "fir": True,
    "fir_kernel": [1, 3, 3, 1],
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "embedding_type": "positional",
    "fourier_scale": 16.0,
    "not_use_tanh": False,
    "beta_min": 0.1,
    "beta_max": 20.0,
    "use_geometric": False,
}
