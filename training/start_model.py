"""Load the pretrained pipeline that fine-tuning starts from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, SchedulerMixin, UNet2DModel

from .. import ClassConditionalPipeline, ClassConditionedUnet
from ..core.errors import InputError, naming_file
from ..core.files import location_name
from ..core.locations import InMemory
from ..data.images import CHANNEL_MODES
from ..pipelines.pipeline_class_conditional import count_classes
from ..sampling.generation import class_names
from ..sampling.loading import load_pipeline, read_components
from ..sampling.steps import trained_steps

TrainedUNet = UNet2DModel | ClassConditionedUnet

# noise processes other than DDPM's, by the beginning of the scheduler's class name
_OTHER_PROCESSES = {
    "FlowMatch": "flow matching, in which the network predicts a velocity on straight paths from noise to images",
    "EDM": "EDM, which does not scale images down as it adds noise, and scales what the network sees and returns",
    "ScoreSdeVe": "variance exploding (VE), which does not scale images down as it adds noise",
    "KarrasVe": "variance exploding (VE), which does not scale images down as it adds noise",
    "DDGAN": "that of a Denoising Diffusion GAN, which samples in few steps already",
}


def load_start_model(
    start_model: str | InMemory,
    size: Sequence[int] | None = None,
    prediction_type: str | None = None,
    allow_classes: bool = False,
    allow_few_step: bool = True,
    trust_remote_code: bool = False,
) -> DDPMPipeline | ClassConditionalPipeline:
    """Load a pixel-space pipeline, its scheduler replaced by an equivalent `DDPMScheduler`.

    Args:
        start_model: a pipeline folder, a repository on the Hub, or a pipeline in memory, which is copied.
        size: height and width to train at (default: those of the model).
        prediction_type: what the network is trained to predict (default: same as the model).
        allow_classes: whether the network may be class-conditional.
        allow_few_step: whether it may be the result of few-step fine-tuning.
        trust_remote_code: whether to run Python code that comes with the pipeline.

    Returns:
        A `DDPMPipeline` with an unconditional `UNet2DModel`, or a `ClassConditionalPipeline` with a
        `ClassConditionedUnet` or a `UNet2DModel` with `num_class_embeds`, in float32 and without a learned variance.

    Raises:
        InputError: if the pipeline is not found, needs `trust_remote_code` or is of another kind, or if its UNet
            cannot take the size.
    """
    class_name, components = read_components(start_model)
    networks = "an unconditional UNet2DModel" + (" or a ClassConditionedUnet" if allow_classes else "")

    def unsupported(reason: str) -> InputError:
        parts = [f"{name} ({part})" for name, part in components.items()]
        return InputError(
            f"--start_model {start_model} is a {class_name} with the components {', '.join(parts)}: {reason}. "
            f"Fine-tuning needs a pixel-space pipeline with {networks} and a scheduler compatible with DDPM, such as "
            "google/ddpm-celebahq-256."
        )

    if reason := _unsupported_components(components):  # before the weights are downloaded
        raise unsupported(reason)
    pipeline = load_pipeline(start_model, trust_remote_code=trust_remote_code)
    unet = pipeline.unet
    if not isinstance(unet, TrainedUNet):
        raise unsupported(f"this command does not train a {type(unet).__name__}")
    if reason := _unsupported_process(pipeline.scheduler):
        raise unsupported(reason)
    if not allow_few_step and (steps := trained_steps(pipeline)):
        raise InputError(
            f"--start_model {start_model} is a few-step model already, for {' or '.join(map(str, steps))} steps: "
            "start from the model that it was made from."
        )
    classes = count_classes(unet)
    if isinstance(unet, UNet2DModel) and unet.class_embedding is not None and not classes:
        raise InputError(f"The UNet of {start_model} embeds classes, but its config has no num_class_embeds.")
    if classes and not allow_classes:
        raise InputError(
            f"The UNet of {start_model} is class-conditional; this script fine-tunes unconditional ones. "
            "ddgan train-class-conditional and ddgan few-step also take class-conditional ones."
        )
    _use_size(unet, start_model, size)
    remove_learned_variance(unet)
    unet.register_to_config(_name_or_path=location_name(start_model))  # not its path on this machine
    # the network will no longer be what few-step fine-tuning made it
    config = {name: value for name, value in pipeline.scheduler.config.items() if name != "_num_inference_steps"}
    scheduler = DDPMScheduler.from_config(config)
    if scheduler.config.variance_type in ("learned", "learned_range"):
        scheduler.register_to_config(variance_type="fixed_small")
    if prediction_type:
        scheduler.register_to_config(prediction_type=prediction_type)
    pipeline_class = ClassConditionalPipeline if classes else DDPMPipeline
    return pipeline_class(unet, scheduler)  # pyright: ignore[reportArgumentType]


def new_model(config: str, size: Sequence[int] | None = None, prediction_type: str | None = None) -> DDPMPipeline:
    """Return a pipeline with a new unconditional `UNet2DModel` and a `DDPMScheduler` with a linear noise schedule.

    Args:
        config: a config.json as Diffusers saves it, or the folder of a model or pipeline that contains it.
        size, prediction_type: see `load_start_model`; by default the size in the config, and epsilon.

    Raises:
        InputError: if it is not the config of such a network, or the network cannot take the size.
    """
    folder = Path(config)
    candidates = [folder, folder / "config.json", folder / "unet" / "config.json"]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise InputError(f"--model_config {config} has no config.json, neither itself nor in a subfolder unet.")
    with naming_file(path):
        values = json.loads(path.read_text(encoding="utf-8"))
    kind = values.get("_class_name", "UNet2DModel") if isinstance(values, dict) else "list of values"
    if kind != "UNet2DModel":
        raise InputError(f"--model_config {config} describes a {kind}; it must be the config of a UNet2DModel.")
    try:
        unet = UNet2DModel.from_config(values)
    except Exception as error:  # from Diffusers or PyTorch, depending on the value
        raise InputError(f"--model_config {config} is not the config of a UNet2DModel: {error}") from error
    assert isinstance(unet, UNet2DModel)
    if unet.class_embedding is not None:
        raise InputError(
            f"--model_config {config} is class-conditional. ddgan train-class-conditional trains such networks."
        )
    _use_size(unet, config, size)
    remove_learned_variance(unet)
    # with trailing timesteps, samples in a few steps start from noise (arXiv 2305.08891, sec. 3.3)
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.register_to_config(prediction_type=prediction_type or "epsilon")
    return DDPMPipeline(unet, scheduler)


def remove_learned_variance(unet: TrainedUNet) -> None:
    """Keep only the output channels that predict the image: no loss here trains a variance."""
    channels = unet.config.in_channels
    if unet.config.out_channels == channels:
        return
    conv_out = (unet if isinstance(unet, UNet2DModel) else unet.unet).conv_out
    conv_out.out_channels = channels
    for name, parameter in list(conv_out.named_parameters()):
        setattr(conv_out, name, torch.nn.Parameter(parameter.detach()[:channels].clone()))
    unet.register_to_config(out_channels=channels)


def _use_size(unet: TrainedUNet, name: str | InMemory, size: Sequence[int] | None) -> None:
    """Check that a network can be trained on images, and set their height and width.

    Raises:
        InputError: if not.
    """
    channels, outputs = unet.config.in_channels, unet.config.out_channels
    if channels not in CHANNEL_MODES:
        raise InputError(f"The UNet of {name} takes {channels} channels; images have 1 to 4.")
    config = unet.config if isinstance(unet, UNet2DModel) else unet.unet.config
    if config.time_embedding_type == "fourier":
        raise InputError(
            f"The UNet of {name} takes the logarithm of a noise level of a VE process (time_embedding_type: fourier), "
            "not a timestep of DDPM's."
        )
    if outputs not in (channels, 2 * channels):
        raise InputError(
            f"The UNet of {name} takes {channels} channels and returns {outputs}; it must return as many, or twice as "
            "many with a learned variance."
        )
    if size:
        _check_size(unet, name, size)
        unet.register_to_config(sample_size=size[0] if size[0] == size[1] else list(size))
    saved = unet.config.sample_size
    if saved is None:
        raise InputError(f"The config of the UNet of {name} has no sample_size: set it with --image_size.")
    sides = saved if isinstance(saved, (list, tuple)) else [saved, saved]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError(
            f"The sample_size in the config of the UNet of {name} is {saved!r}; it must be a positive integer, or a "
            "height and a width."
        )


def _unsupported_components(components: Mapping[str, str]) -> str | None:
    """Return why a pipeline with these components, class names by name, cannot be fine-tuned; None if it can."""
    others = components.keys() - {"unet", "scheduler"}
    reasons = []
    if any("vae" in name or "vq" in name or "Autoencoder" in components[name] for name in others):
        reasons.append("its network generates the latents of an autoencoder instead of pixels")
    if any("text_encoder" in name for name in others):
        reasons.append("it is conditioned on text")
    if others and not reasons:
        reasons.append("it has more components than a UNet and a scheduler")
    if not others and len(components) < 2:
        reasons.append("it has no UNet or no scheduler")
    return " and ".join(reasons) or None


def _unsupported_process(scheduler: SchedulerMixin) -> str | None:
    """Return why a scheduler cannot be replaced by a `DDPMScheduler`; None if it can."""
    name, prediction_type = type(scheduler).__name__, scheduler.config.get("prediction_type", "epsilon")
    if DDPMScheduler in scheduler.compatibles and prediction_type in ("epsilon", "sample", "v_prediction"):
        return None
    if prediction_type == "flow_prediction":
        process = _OTHER_PROCESSES["FlowMatch"]
    else:
        known = [process for start, process in _OTHER_PROCESSES.items() if name.startswith(start)]
        process = known[0] if known else "one that DDPMScheduler does not have"
    return f"the noise process of its scheduler is {process}"


def model_classes(pipeline: DiffusionPipeline) -> list[str] | None:
    """Return the class names of a pipeline in the order of their labels, None if it is unconditional.

    A class without a name is named by its label.
    """
    if not isinstance(pipeline, ClassConditionalPipeline):
        return None
    names = class_names(pipeline.unet)
    return [names.get(label, str(label)) for label in range(pipeline.num_classes)]


def _check_size(unet: TrainedUNet, start_model: str | InMemory, size: Sequence[int]) -> None:
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
