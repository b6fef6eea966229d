"""Arguments shared by the commands that sample from a pipeline; nothing here imports PyTorch."""

from dataclasses import dataclass

from ..core.cli import Arguments, option
from ..core.errors import InputError
from ..core.locations import resolve_locations

MAX_CLASS_GUIDANCE_SCALE = 100  # of classifier-free guidance; scales above 10 are hardly ever useful

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
class PipelineArguments(Arguments):
    """The pipeline to sample from."""

    pipeline: str | None = option(
        None, "pipeline folder or Hub repository to sample from", objects="a DiffusionPipeline"
    )

    def __post_init__(self):
        super().__post_init__()
        resolve_locations(self, "pipeline")


@dataclass
class SamplingArguments(Arguments):
    """How to sample from a pipeline."""

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
        "scale of the noise that each DDGAN or DDIM step adds; at 0 only the initial noise and, for a DDGAN, z are "
        "random; above 1, a DDGAN's samples have more variety (default: 1 for a DDGAN, 0 for DDIM)",
        minimum=0,
    )
    guidance_scale: float | None = option(
        None,
        "scale of classifier-free guidance for a class-conditional pipeline or, with --autoguidance, of autoguidance "
        "(default: 1, no guidance)",
        minimum=1,
        maximum=MAX_CLASS_GUIDANCE_SCALE,
    )
    autoguidance: str | None = option(
        None,
        "guide with a worse version of the pipeline, such as one trained for fewer steps: folder or Hub "
        "repository; needs a --guidance_scale above 1",
        objects="a DiffusionPipeline",
    )
    class_guidance_scale: float | None = option(
        None,
        "with --autoguidance, scale of classifier-free guidance in addition to it (default: 1, none)",
        minimum=1,
        maximum=MAX_CLASS_GUIDANCE_SCALE,
    )
    guidance_interval: list[float] | None = option(
        None,
        "noise levels LOW HIGH, relative to images in [-1, 1], between which there is classifier-free guidance and "
        "autoguidance (default: all)",
        minimum=0,
    )
    dtype: str = option("fp32", "data type of the network", choices=DTYPES)
    trust_remote_code: bool = option(False, "run Python code that comes with the pipeline")

    @property
    def guidance(self) -> dict[str, float | list[float]]:
        """The scales and the interval of guidance that are set, by the names of the pipelines' arguments."""
        names = "guidance_scale", "class_guidance_scale", "guidance_interval"
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def autoguidance_flag(self) -> str:
        """The flag with the scale of autoguidance."""
        return "guidance_scale"

    def __post_init__(self):
        super().__post_init__()
        resolve_locations(self, "autoguidance")
        if self.autoguidance:
            flag = self.autoguidance_flag
            scale = getattr(self, flag)
            if scale is None:
                raise InputError(f"--autoguidance needs its scale: pass --{flag}, for example 1.5.")
            if scale < 1:
                raise InputError(f"--{flag} {scale:g}: with --autoguidance it must be at least 1 (no guidance).")
        elif self.class_guidance_scale is not None:
            raise InputError(
                "--class_guidance_scale is for classifier-free guidance in addition to --autoguidance: without that, "
                "pass --guidance_scale."
            )
        if interval := self.guidance_interval:
            if len(interval) != 2 or interval[0] >= interval[1]:
                raise InputError(
                    f"--guidance_interval {' '.join(f'{level:g}' for level in interval)}: pass two noise levels, the "
                    "lower one first, for example 0.2 5."
                )
            if self.autoguidance_flag == "guidance_scale" and self.guidance_scale is None:
                raise InputError("--guidance_interval needs guidance: pass --guidance_scale.")
