"""Load the pretrained pipeline that fine-tuning starts from."""

from collections.abc import Sequence

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ..core.errors import InputError
from ..core.files import location_name
from ..data.images import CHANNEL_MODES
from ..sampling.loading import load_pipeline


def load_start_model(
    start_model: str,
    size: Sequence[int] | None = None,
    prediction_type: str | None = None,
    trust_remote_code: bool = False,
) -> DDPMPipeline:
    """Load a pipeline with an unconditional `UNet2DModel`, its scheduler replaced by an equivalent `DDPMScheduler`.

    Args:
        start_model: a pipeline folder or a repository on the Hub.
        size: height and width to train at (default: those of the model).
        prediction_type: what the network is trained to predict (default: same as the model).
        trust_remote_code: whether to run Python code that comes with the pipeline.

    Raises:
        InputError: if the pipeline is not found, needs `trust_remote_code` or is of another kind, or if its UNet
            cannot take the size.
    """
    pipeline = load_pipeline(start_model, trust_remote_code=trust_remote_code)
    unet = getattr(pipeline, "unet", None)
    if (
        not isinstance(unet, UNet2DModel)
        or set(pipeline.components) != {"unet", "scheduler"}
        or DDPMScheduler not in pipeline.scheduler.compatibles
    ):
        components = [f"{name} ({type(part).__name__})" for name, part in pipeline.components.items()]
        raise InputError(
            f"--start_model {start_model} is a {type(pipeline).__name__} with the components {', '.join(components)}. "
            "Fine-tuning needs a pixel-space pipeline of an unconditional UNet2DModel and a scheduler compatible with "
            "DDPM, such as google/ddpm-celebahq-256."
        )
    if unet.class_embedding is not None:
        raise InputError(
            f"The UNet of {start_model} is class-conditional; this script fine-tunes unconditional ones. "
            "train_class_conditional.py trains a class-conditional network from scratch."
        )
    if unet.config.in_channels not in CHANNEL_MODES:
        raise InputError(f"The UNet of {start_model} takes {unet.config.in_channels} channels; images have 1 to 4.")
    if size:
        _check_size(unet, start_model, size)
        unet.register_to_config(sample_size=size[0] if size[0] == size[1] else list(size))
    if unet.config.sample_size is None:
        raise InputError(f"The config of the UNet of {start_model} has no sample_size: set it with --image_size.")
    unet.register_to_config(_name_or_path=location_name(start_model))  # not its path on this machine
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if prediction_type:
        scheduler.register_to_config(prediction_type=prediction_type)
    return DDPMPipeline(unet, scheduler)  # pyright: ignore[reportArgumentType]


def _check_size(unet: UNet2DModel, start_model: str, size: Sequence[int]) -> None:
    halvings = len(unet.config.block_out_channels) - 1
    factor = 2**halvings
    if any(side < factor or side % factor for side in size):
        lower = [max(factor, side // factor * factor) for side in size]
        upper = [side + factor for side in lower]
        raise InputError(
            f"The UNet of {start_model} halves its input {halvings} times, so height and width must be multiples of "
            f"{factor}; {size[0]} x {size[1]} is not. The nearest possible sizes are {lower[0]} x {lower[1]} and "
            f"{upper[0]} x {upper[1]}."
        )


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """Return the height and width of the images that a UNet generates."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)
