"""An extension of Diffusers: fine-tuning, Denoising Diffusion GANs, class-conditional models and guided sampling."""

from importlib import import_module

__version__ = "0.1.0"

# imported on first access, so that `import ddgan` is fast
_EXPORTS = {
    "DDGANScheduler": ".schedulers.scheduling_ddgan",
    "DDGANSchedulerOutput": ".schedulers.scheduling_ddgan",
    "NCSNpp": ".models.unet_ncsnpp",
    "DDGANDiscriminator": ".models.discriminator_ddgan",
    "UNetDiscriminator": ".models.discriminator_unet",
    "ClassConditionedUnet": ".models.unet_class_conditioned",
    "ContextUnet": ".models.unet_context",
    "DDGANPipeline": ".pipelines.pipeline_ddgan",
    "ClassConditionalPipeline": ".pipelines.pipeline_class_conditional",
    "GuidedPipeline": ".pipelines.pipeline_guided",
    "GuidanceLoss": ".guidance.losses",
    "ColorLoss": ".guidance.losses",
    "SaturationLoss": ".guidance.losses",
    "TotalVariationLoss": ".guidance.losses",
    "SymmetryLoss": ".guidance.losses",
    "ReferenceLoss": ".guidance.losses",
    "CLIPLoss": ".guidance.clip",
}
__all__ = [*_EXPORTS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)


def __dir__():
    return sorted([*globals(), *_EXPORTS])
