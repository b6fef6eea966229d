"""Load a pipeline, hash its weights and replace its scheduler."""

import copy
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..core.errors import InputError
from ..core.locations import InMemory, hub_problem
from ..core.run_files import PIPELINE_FILE
from ..hub.folders import parse_index, read_json
from ..hub.installed import installed_class
from . import arguments
from .spacing import changed_spacing, with_usable_spacing
from .steps import default_steps

logger = logging.getLogger(__name__)

DTYPES = {flag: getattr(torch, name) for flag, name in arguments.DTYPES.items()}
SCHEDULERS = {flag: getattr(diffusers, name) for flag, name in arguments.SCHEDULERS.items()}

_PROBED_STEPS = 10  # sampling steps that every scheduler can take
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "original_sample", "trigflow")


def load_pipeline(
    path_or_repo: str | InMemory,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """Load a pipeline from a local folder or a Hub repository.

    Classes of this package are always those of the installed package, never the code in the folder or repository.

    Args:
        path_or_repo: A folder written by `save_pretrained` or a training run, the ID of a Hub repository, or a
            pipeline in memory, which is copied.
        dtype: Data type of the weights; None means float32.
        trust_remote_code: Whether to run custom Python code that comes with the pipeline.
        device: Device to move the pipeline to.

    Raises:
        InputError: If there is no such pipeline, it cannot be loaded, or it needs `trust_remote_code`.
    """
    if isinstance(path_or_repo, InMemory):
        pipe = copy.deepcopy(_pipeline_in_memory(path_or_repo))
        pipe.set_progress_bar_config(disable=True)
        dtype = dtype or torch.float32
        for component in pipe.components.values():
            parameters = component.parameters() if isinstance(component, torch.nn.Module) else ()
            if any(parameter.dtype != dtype for parameter in parameters):
                component.to(dtype)
        _check_components(pipe, path_or_repo)
        return pipe.to(device)
    with _pipeline_errors(path_or_repo):
        pipeline_class = installed_class(path_or_repo)
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        try:
            pipe = pipeline_class.from_pretrained(path_or_repo, **options)
        except OSError as error:
            if "no file named" not in str(error):
                raise
            try:
                pipe = pipeline_class.from_pretrained(path_or_repo, variant="fp16", **options)
            except (OSError, ValueError):
                raise error from None
            logger.info(f"{path_or_repo} has only weights in half precision (fp16), which are loaded.")
    _check_components(pipe, path_or_repo)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            realign_parameters(component)
    return pipe


def load_guide(args: arguments.SamplingArguments, device: str | torch.device) -> DiffusionPipeline | None:
    """Load the worse version of a pipeline that `--autoguidance` names; None without it.

    Raises:
        InputError: As for `load_pipeline`.
    """
    if args.autoguidance is None:
        return None
    return load_pipeline(args.autoguidance, DTYPES[args.dtype], args.trust_remote_code, device)


def _check_components(pipe: DiffusionPipeline, location: str | InMemory) -> None:
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            check_complete(component, f"The {name} of the pipeline {location}")
        elif isinstance(component, SchedulerMixin):
            if not isinstance(location, InMemory) and _has_no_values(component):
                raise InputError(
                    f"The config of the {name} of the pipeline {location} has no values, so its noise process is "
                    "unknown. Save or download it again."
                )
            # schedulers of other packages may have more prediction types, and check them
            if type(component).__module__.startswith("diffusers."):
                in_config = f"The prediction_type in the config of the {name} of the pipeline {location}"
                _check_prediction_type(component, in_config)


def _has_no_values(scheduler: SchedulerMixin) -> bool:
    """Return whether all values of a loaded scheduler are defaults because none is in its config."""
    parameters = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self", "kwargs"}
    return bool(parameters) and parameters <= set(scheduler.config.get("_use_default_values", []))


def _check_prediction_type(scheduler: SchedulerMixin, description: str) -> None:
    """Check that a scheduler of Diffusers supports the prediction type in its config, which only its steps look at.

    Args:
        description: The prediction type in the message.

    Raises:
        InputError: If not.
    """
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in _PREDICTION_TYPES:
        raise InputError(f"{description} is {prediction_type!r}; it must be one of {', '.join(_PREDICTION_TYPES)}.")
    probe, sample = copy.deepcopy(scheduler), torch.zeros(1, 1, 8, 8)
    try:
        with torch.random.fork_rng(devices=[]):
            probe.set_timesteps(min(_PROBED_STEPS, scheduler.config.get("num_train_timesteps", _PROBED_STEPS)))
            probe.scale_model_input(sample, probe.timesteps[0])
            probe.step(sample, probe.timesteps[0], sample)
    except Exception as error:  # a step also checks other things, which depend on the pipeline that takes it
        if isinstance(error, (ValueError, NotImplementedError)) and "prediction_type" in str(error):
            raise InputError(
                f"{description} is {prediction_type!r}, which a {type(scheduler).__name__} does not support."
            ) from error


def check_complete(network: torch.nn.Module, description: str) -> None:
    """Check that a network that Diffusers loaded has values for all its tensors.

    Diffusers leaves tensors that are not in the file of the weights on the meta device.

    Args:
        description: The network in the message, such as "The unet of the pipeline FOLDER".

    Raises:
        InputError: If a tensor is missing.
    """
    missing = [name for name, tensor in network.state_dict().items() if tensor.is_meta]
    if missing:
        names = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise InputError(f"{description} is incomplete: its weights lack {names}. Save or download it again.")


def read_components(path_or_repo: str | InMemory) -> tuple[str, dict[str, str]]:
    """Return the class name of a pipeline and those of its components, without downloading its weights.

    Raises:
        InputError: If there is no such pipeline.
    """
    if isinstance(path_or_repo, InMemory):
        pipe = _pipeline_in_memory(path_or_repo)
        return type(pipe).__name__, {name: type(part).__name__ for name, part in pipe.components.items()}
    with _pipeline_errors(path_or_repo):
        index: dict = DiffusionPipeline.load_config(path_or_repo)  # pyright: ignore[reportAssignmentType]
        parsed = parse_index(index, path_or_repo)
        return parsed.class_name, {name: class_name for name, (_, class_name) in parsed.components.items()}


def _pipeline_in_memory(location: InMemory) -> DiffusionPipeline:
    if not isinstance(location.value, DiffusionPipeline):
        raise InputError(f"{location} is not a pipeline: pass a DiffusionPipeline, or the path or name of one.")
    return location.value


@contextmanager
def _pipeline_errors(path_or_repo: str) -> Iterator[None]:
    """Turn the errors of Diffusers in loading a pipeline into those that users can act on."""
    folder = Path(path_or_repo)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(
            f"The folder {path_or_repo} holds no pipeline: it has no model_index.json. Pass a folder written by "
            "`save_pretrained` or a training run, not one of its subfolders."
        )
    place = "" if folder.is_absolute() else f" in {Path.cwd()}"
    missing = f"No pipeline {path_or_repo} was found: there is no such folder{place}, and "
    if not folder.is_dir() and (problem := hub_problem(path_or_repo)):
        raise InputError(missing + problem)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # damaged configs and weights make Diffusers raise almost anything
        if "trust_remote_code" in str(error):
            raise InputError(
                f"The pipeline {path_or_repo} contains custom Python code, which is not run unless you allow it. Read "
                "that code and, if you trust it, pass --trust_remote_code to a command that has this flag, or in "
                "Python trust_remote_code=True."
            ) from error
        if isinstance(error.__context__, GatedRepoError):  # Diffusers reports a missing repository
            raise InputError(
                f"The Hub repository {path_or_repo} is gated. Accept its terms on its page, then log in to the same "
                "account with `hf auth login` (or set HF_TOKEN)."
            ) from error
        reason = next(iter(str(error).strip().splitlines()), "")
        if not isinstance(error, (OSError, ValueError)) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        if folder.is_dir():
            _check_configs(folder)
            raise InputError(f"The pipeline in the folder {path_or_repo} cannot be loaded: {reason}") from error
        raise InputError(missing + (_hub_problem(error) or f"the Hugging Face Hub returned: {reason}")) from error


def _check_configs(folder: Path) -> None:
    """Check that the configs of a pipeline are JSON objects; Diffusers takes other values for repositories."""
    for pattern in (PIPELINE_FILE, "*/config.json", "*/scheduler_config.json"):
        for file in sorted(folder.glob(pattern)):
            read_json(file)


def _hub_problem(error: BaseException) -> str | None:
    """Return why a repository could not be read, if the Hub did not answer; Diffusers then reports a missing file."""
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    uncached = "and its files are not in the local cache. Pass the path of a folder, or"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return f"the Hugging Face Hub is not contacted because HF_HUB_OFFLINE is set, {uncached} unset HF_HUB_OFFLINE."
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        return f"the Hugging Face Hub cannot be reached ({causes[-1]}), {uncached} try again later."
    return None


def realign_parameters(network: torch.nn.Module) -> None:
    """Copy the parameters of a loaded network to aligned memory, in place.

    On a CPU they are memory-mapped from the safetensors file at arbitrary offsets, and kernels sum unaligned weights
    in a different order. With aligned weights, the results are bit-identical to those of the saved network.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()


def pipeline_hash(pipe: DiffusionPipeline) -> str:
    """Hash the weights and configs of a pipeline, because a training run may replace those in its folder."""
    digest = hashlib.blake2b(digest_size=16)
    for name, component in sorted(pipe.components.items()):
        config = {key: value for key, value in getattr(component, "config", {}).items() if not key.startswith("_")}
        digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        if isinstance(component, torch.nn.Module):
            for tensor in component.state_dict().values():
                digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def with_scheduler(pipe: DiffusionPipeline, name: str, num_inference_steps: int | None = None) -> DiffusionPipeline:
    """Return a pipeline with another scheduler that shares the networks and the scheduler config of `pipe`.

    If the saved scheduler clips the predicted image, so do the solvers that support this only as thresholding.

    Args:
        name: A key of `SCHEDULERS`, or `as-saved` for the scheduler of `pipe`.
        num_inference_steps: The number of steps that the pipeline will sample in, for which the spacing of the
            timesteps is changed if necessary, see `with_usable_spacing`. None means the default of `sample`.

    Raises:
        InputError: If the scheduler does not support the pipeline's noise process, such as that of a DDGAN, or the
            number of steps.
    """
    scheduler = pipe.scheduler if name == "as-saved" else _scheduler_by_name(pipe, name)
    replaced = copy.copy(pipe)
    replaced.scheduler = scheduler
    steps = num_inference_steps or default_steps(replaced)
    if steps and "timestep_spacing" in scheduler.config:
        replaced.scheduler = with_usable_spacing(scheduler, steps)
    return pipe if replaced.scheduler is pipe.scheduler else replaced


def ddim_usage(pipe: DiffusionPipeline, num_inference_steps: int) -> str:
    """Return the line of a model card's Python that samples like `with_scheduler(pipe, "ddim", ...)`."""
    scheduler = with_scheduler(pipe, "ddim", num_inference_steps).scheduler
    spacing = "".join(f', {name}="{value}"' for name, value in changed_spacing(pipe, scheduler).items())
    return f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{spacing})"


def _scheduler_by_name(pipe: DiffusionPipeline, name: str) -> SchedulerMixin:
    # without the list of values that were not passed: it would make a loaded pipeline sample in another way
    config = {key: value for key, value in pipe.scheduler.config.items() if key != "_use_default_values"}
    if SCHEDULERS[name] not in pipe.scheduler.compatibles:
        raise InputError(
            f"The {type(pipe.scheduler).__name__} of this {type(pipe).__name__} defines its own noise process, which "
            f"the scheduler {name} does not support. Use the scheduler as saved."
        )
    # thresholding with the default sample_max_value of 1 is plain clipping to [-1, 1]
    options = {"thresholding": True} if config.get("clip_sample") and name in ("dpmsolver", "unipc") else {}
    try:
        scheduler = SCHEDULERS[name].from_config(config, **options)
    except NotImplementedError:  # a schedule of betas that this class cannot compute
        betas = {"trained_betas": pipe.scheduler.betas.tolist(), "rescale_betas_zero_snr": False}
        scheduler = SCHEDULERS[name].from_config(config, **options, **betas)
    _check_prediction_type(scheduler, f"The prediction_type of this {type(pipe).__name__}")
    return scheduler


def with_own_scheduler(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a copy of a pipeline that shares its networks but not its scheduler, whose state changes in sampling."""
    scheduler = copy.deepcopy(pipe.scheduler)
    pipe = copy.copy(pipe)
    pipe.scheduler = scheduler
    return pipe
