"""Arguments shared by the scripts that sample from a pipeline."""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from ..core.cli import Arguments, option
from .loading import DTYPES, SCHEDULERS, load_pipeline


@dataclass
class SamplingArguments(Arguments):
    """The pipeline, and how to sample from it."""

    pipeline: str | None = option(None, "pipeline folder or Hub repository to sample from")
    seed: int = option(0, "seed of the first image; image i uses seed + i", minimum=0)
    scheduler: str = option("as-saved", "scheduler to sample with", choices=["as-saved", *SCHEDULERS])
    num_inference_steps: int | None = option(
        None,
        "denoising steps (default: as trained for a few-step pipeline, otherwise all for DDPM, 50 for other "
        "schedulers, or the pipeline's own default)",
        minimum=1,
    )
    dtype: str = option("fp32", "data type of the network", choices=DTYPES)
    trust_remote_code: bool = option(False, "run Python code that comes with the pipeline")

    def load(self, device: torch.device) -> DiffusionPipeline:
        """Load the pipeline, with its scheduler as saved.

        Raises:
            InputError: see `load_pipeline`.
        """
        assert self.pipeline is not None
        return load_pipeline(self.pipeline, DTYPES[self.dtype], self.trust_remote_code, device)
