"""Load a pipeline, hash its weights and replace its scheduler."""

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import GatedRepoError

from ..core.errors import InputError
from ..hub.folders import parse_index
from ..hub.installed import installed_class
from . import arguments

DTYPES = {flag: getattr(torch, name) for flag, name in arguments.DTYPES.items()}
SCHEDULERS = {flag: getattr(diffusers, name) for flag, name in arguments.SCHEDULERS.items()}


def load_pipeline(
    path_or_repo: str,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
) -> DiffusionPipeline:
    """Load a pipeline from a local folder or a Hub repository.

    Classes of this package are always those of the installed package, never the code in the folder or repository.

    Args:
        path_or_repo: A folder written by `save_pretrained` or a training run, or the ID of a Hub repository.
        dtype: Data type of the weights; None means float32.
        trust_remote_code: Whether to run custom Python code that comes with the pipeline.
        device: Device to move the pipeline to.

    Raises:
        InputError: If there is no such pipeline, it cannot be loaded, or it needs `trust_remote_code`.
    """
    with _pipeline_errors(path_or_repo):
        pipeline_class = installed_class(path_or_repo)
        pipe = pipeline_class.from_pretrained(path_or_repo, dtype=dtype, trust_remote_code=trust_remote_code)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            realign_parameters(component)
    return pipe


def read_components(path_or_repo: str) -> tuple[str, dict[str, str]]:
    """Return the class name of a pipeline and those of its components, without downloading its weights.

    Raises:
        InputError: If there is no such pipeline.
    """
    with _pipeline_errors(path_or_repo):
        index: dict = DiffusionPipeline.load_config(path_or_repo)  # pyright: ignore[reportAssignmentType]
    parsed = parse_index(index, path_or_repo)
    return parsed.class_name, {name: class_name for name, (_, class_name) in parsed.components.items()}


@contextmanager
def _pipeline_errors(path_or_repo: str) -> Iterator[None]:
    """Turn the errors of Diffusers in loading a pipeline into those that users can act on."""
    folder = Path(path_or_repo)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(
            f"The folder {path_or_repo} holds no pipeline: it has no model_index.json. Pass a folder written by "
            "`save_pretrained` or a training run, not one of its subfolders."
        )
    try:
        yield
    except (OSError, ValueError) as error:
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
        reason = str(error).strip().splitlines()[0]
        if folder.is_dir():
            raise InputError(f"The pipeline in the folder {path_or_repo} cannot be loaded: {reason}") from error
        place = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise InputError(
            f"No pipeline {path_or_repo} was found: there is no such folder{place}, and the Hugging Face Hub "
            f"returned: {reason}"
        ) from error


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


def with_scheduler(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """Return a pipeline with another scheduler that shares the networks and the scheduler config of `pipe`.

    If the saved scheduler clips the predicted image, so do the solvers that support this only as thresholding.

    Args:
        name: A key of `SCHEDULERS`, or `as-saved` to return `pipe` itself.

    Raises:
        InputError: If the scheduler does not support the pipeline's noise process, such as that of a DDGAN.
    """
    if name == "as-saved":
        return pipe
    config = pipe.scheduler.config
    if SCHEDULERS[name] not in pipe.scheduler.compatibles:
        raise InputError(
            f"The {type(pipe.scheduler).__name__} of this {type(pipe).__name__} defines its own noise process, which "
            f"the scheduler {name} does not support. Use the scheduler as saved."
        )
    # thresholding with the default sample_max_value of 1 is plain clipping to [-1, 1]
    options = {"thresholding": True} if config.get("clip_sample") and name in ("dpmsolver", "unipc") else {}
    pipe = copy.copy(pipe)
    pipe.scheduler = SCHEDULERS[name].from_config(config, **options)
    return pipe


def with_own_scheduler(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Return a copy of a pipeline that shares its networks but not its scheduler, whose state changes in sampling."""
    scheduler = copy.deepcopy(pipe.scheduler)
    pipe = copy.copy(pipe)
    pipe.scheduler = scheduler
    return pipe
