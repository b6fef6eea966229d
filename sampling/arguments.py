"""Arguments shared by the commands that sample from a pipeline; nothing here imports PyTorch."""

from dataclasses import dataclass

from ..core.cli import Arguments, option
from ..core.locations import resolve_locations

# flag -> name in Diffusers and in PyTorch
SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
VARY_COLUMNS = 8  # images in a row with one fixed and one varied source of randomness
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass
class SamplingArguments(Arguments):
    """The pipeline, and how to sample from it."""

    pipeline: str | None = option(
        None, "pipeline folder or Hub repository to sample from", objects="a DiffusionPipeline"
    )
    seed: int = option(0, "seed of the first image; image i uses seed + i", minimum=0)
    scheduler: str = option("as-saved", "scheduler to sample with", choices=["as-saved", *SCHEDULERS])
    num_inference_steps: int | None = option(
        None,
        "denoising steps (default: as trained for a few-step pipeline, otherwise all for DDPM, 50 for other "
        "schedulers, or the pipeline's own default)",
        minimum=1,
    )
    eta: float | None = option(
        None,
        "scale of the noise that DDGAN and DDIM steps add; 0 is deterministic after the first noise and, for a DDGAN, "
        "z (default: 1 for a DDGAN, 0 for DDIM)",
        minimum=0,
        maximum=1,
    )
    dtype: str = option("fp32", "data type of the network", choices=DTYPES)
    trust_remote_code: bool = option(False, "run Python code that comes with the pipeline")

    def __post_init__(self):
        super().__post_init__()
        resolve_locations(self, "pipeline")
