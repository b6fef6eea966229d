"""Starting Accelerate as the user configured it, or explaining why that is not possible."""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, str_to_bool

from .errors import InputError

# settings of `accelerate config` that no command supports, as environment variables of the launcher
_UNSUPPORTED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
_ADVICE = "Change it with `accelerate config`, or pass a file of examples/accelerate with --config_file."

# environment variables in which launchers tell a process the number of processes, and which of them it is; the first
# one that is set counts
_WORLD_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_HOW_TO_START = (
    "`ddgan <command> --num_processes N` and `torchrun --nproc_per_node N script.py` start N processes, on GPUs or on "
    "the CPU."
)

logger = logging.getLogger(__name__)


@contextmanager
def one_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Let the main process go first, then one process of each other machine: the others find what these download."""
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        yield


def start_accelerate(grad_accumulation_steps: int | None = None, **options: Any) -> Accelerator:
    """Return an `Accelerator` that connects all processes of the launcher, on CPUs if there is no GPU.

    Args:
        grad_accumulation_steps: number of micro-batches that a training run accumulates itself.
        options: further arguments of `Accelerator`.

    Raises:
        InputError: if the configuration of Accelerate is not supported, this machine does not support it, or
            Accelerate does not connect the processes that a launcher has started.
    """
    for variable, name in _UNSUPPORTED.items():
        if str_to_bool(os.environ.get(variable, "false")):
            raise InputError(f"Accelerate is configured for {name}, which is not supported. {_ADVICE}")
    precision = options.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"Accelerate is configured for {precision} precision, which is not supported. {_ADVICE}")
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if grad_accumulation_steps and configured not in ("1", "auto", str(grad_accumulation_steps)):
        raise InputError(
            f"Accelerate is configured for {configured} gradient accumulation steps, but the run accumulates "
            f"{grad_accumulation_steps}: pass --grad_accumulation_steps {configured}, or change the configuration."
        )
    processes = _launched_processes()
    use_fsdp = str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false"))
    if processes > 1 or use_fsdp:
        # torchrun gives each process of a machine a GPU of its own; other launchers may show each process only one
        choose_device(int(os.environ["LOCAL_RANK"]) + 1 if "TORCHELASTIC_RUN_ID" in os.environ else 1, bool(use_fsdp))
    try:
        # the plugin keeps Accelerate from dividing the loss, too
        accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1), **options)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"Accelerate cannot start as it is configured: {str(error).rstrip('.')}. {_ADVICE}"
        ) from error
    if accelerator.num_processes != processes:
        raise InputError(
            f"A launcher has started {processes} processes, but Accelerate connects {accelerator.num_processes} of "
            f"them, so each would run the command on its own. {_HOW_TO_START}"
        )
    if accelerator.device.type == "cpu" and multiprocessing.parent_process() is not None:
        # in a fork of a process that has used OpenMP threads, such as a notebook, it would wait for new ones forever
        torch.set_num_threads(1)
    if not accelerator.is_main_process:  # all processes have the same input, so the warnings of one are enough
        logging.getLogger("ddgan").setLevel(logging.ERROR)
    return accelerator


@contextmanager
def no_state_left() -> Iterator[None]:
    """Remove the state of an `Accelerator` made within the block, which later ones in the process would share.

    They could not have another mixed precision, and `accelerate.notebook_launcher` would refuse to start. The state of
    an `Accelerator` made before is kept.
    """
    if AcceleratorState._shared_state:
        yield
        return
    had_devices = bool(PartialState._shared_state)
    try:
        yield
    finally:
        is_alone = not PartialState._shared_state or PartialState().num_processes == 1
        AcceleratorState._reset_state(reset_partial_state=is_alone and not had_devices)


def choose_device(needed: int, use_fsdp: bool) -> None:
    """Set the environment so that several processes use the CPU if this machine has no GPU.

    Args:
        needed: number of GPUs that the processes on this machine need.
        use_fsdp: whether Accelerate is configured for FSDP.

    Raises:
        InputError: if this machine has fewer GPUs than needed, or none for FSDP.
    """
    use_cpu = str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false"))
    available = 0 if use_cpu else _device_count()
    if use_fsdp and not available:
        raise InputError(
            "Accelerate is configured for FSDP, which needs GPUs, but none is visible, or ACCELERATE_USE_CPU is set. "
            "On the CPU, train without FSDP: omit --config_file, and set --num_processes."
        )
    if not available:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise Accelerate does not connect the processes
        if not use_cpu:
            logger.info("No GPU is visible: the processes run on the CPU.")
    elif needed > available:
        raise InputError(
            f"{needed} processes on this machine need as many GPUs, but it has {available}: start fewer "
            "(--num_processes of ddgan and Accelerate, --nproc_per_node of torchrun). To run on the CPU, set the "
            "environment variable ACCELERATE_USE_CPU=true."
        )


def _device_count() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _launched_processes() -> int:
    """Return the number of processes that a launcher has started for this command.

    Raises:
        InputError: if it has started one instead of several, or has not told the processes which one each is.
    """
    if torch.distributed.is_initialized():  # from Python, for example by a launcher of Accelerate
        return torch.distributed.get_world_size()
    variable = next((name for name in _WORLD_SIZE if os.environ.get(name)), None)
    if variable is None:
        if {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
            raise InputError(
                "`accelerate launch` has started one process instead of several: on the CPU it starts "
                f"several only with --multi_gpu, without --cpu. {_HOW_TO_START} If one is enough, set WORLD_SIZE=1."
            )
        return 1
    processes = int(os.environ[variable])
    if processes > 1 and not any(os.environ.get(name) for name in _RANK):
        raise InputError(
            f"{variable} is {processes}, but RANK is not set, so each of these processes would run the command on its "
            f"own. {_HOW_TO_START} On a cluster, see examples/slurm. If one is enough, set WORLD_SIZE=1."
        )
    return processes
