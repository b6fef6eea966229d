"""Start a command in this process or, with Accelerate's launcher, in several."""

import copy
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

from yaml import YAMLError

from .cli import Arguments, option
from .errors import InputError
from .locations import resolve_paths


@dataclass
class LaunchArguments(Arguments):
    """The processes in which a command runs."""

    _argument_group_name = "processes"

    num_processes: int | None = option(
        None,
        "number of processes on all machines, one per GPU, or on the CPU of machines without GPUs (default: as "
        "configured in Accelerate, otherwise one for each GPU)",
        minimum=1,
    )
    config_file: str | None = option(
        None,
        "configuration of Accelerate, such as examples/accelerate/several_gpus.yaml (default: that of `accelerate "
        "config`, if there is one)",
    )
    num_machines: int | None = option(None, "number of machines; start the command on each of them", minimum=1)
    machine_rank: int | None = option(None, "rank of this machine, from 0", minimum=0)
    main_process_ip: str | None = option(None, "IP address of the machine of rank 0")
    main_process_port: int | None = option(
        None, "port for the communication of processes (default: a free one)", minimum=0, maximum=65_535
    )

    def __post_init__(self):
        super().__post_init__()
        resolve_paths(self, "config_file")
        if self.config_file is None and (self.num_machines or 1) == 1:
            for name in ("machine_rank", "main_process_ip"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(
                        f"--{name} {value} is for runs on several machines: set --num_machines, too, or a "
                        "--config_file with it."
                    )


def launch(args: LaunchArguments, command: list[str], run: Callable[[], None]) -> None:
    """Call `run` if one process suffices, or if this is one of several; otherwise start `python -m ddgan` in each.

    Args:
        command: the arguments of `python -m ddgan`.

    Raises:
        InputError: if Accelerate rejects the arguments, or there are fewer GPUs than processes, or none for FSDP.
        SystemExit: if a process fails. It has then printed the reason, which the launcher does not repeat.
    """
    if "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:  # a launcher has started this process
        run()
        return
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_simple_launcher_cmd_env

    from .accelerator import choose_device

    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it lists the defaults that it chooses
    flags = [text for name, value in asdict(args).items() if value is not None for text in (f"--{name}", str(value))]
    options = launch_command_parser().parse_args([*flags, "--quiet", "--module", "ddgan", *command])
    try:
        chosen, *_ = _validate_launch_command(copy.copy(options))
    except (ValueError, TypeError, AttributeError, OSError, YAMLError) as error:  # of any value in a --config_file
        where = f" with --config_file {args.config_file}" if args.config_file else ""
        reason = " ".join(str(error).split())
        raise InputError(f"Accelerate cannot start the processes{where}: {reason}") from error
    machines = chosen.num_machines or 1
    names = ("machine_rank", "main_process_ip", "main_process_port")
    if machines > 1 and (missing := [f"--{name}" for name in names if getattr(chosen, name) is None]):
        raise InputError(
            f"--num_machines {machines} needs {', '.join(missing)}, or a --config_file with these values."
        )
    distributed = any((chosen.use_fsdp, chosen.use_deepspeed, chosen.use_megatron_lm, chosen.tpu))
    if not distributed and (chosen.num_processes or 1) <= 1 and machines == 1:
        _, environment = prepare_simple_launcher_cmd_env(chosen)
        environment.pop("OMP_NUM_THREADS")  # the launcher's default is one thread
        environment["WORLD_SIZE"] = "1"
        os.environ.update(environment | os.environ)
        run()
        return
    options.multi_gpu = not distributed
    if chosen.main_process_port is None:
        options.main_process_port = 0
    choose_device(chosen.num_processes // machines, bool(chosen.use_fsdp))
    _start(options)


def _start(options: Namespace) -> None:
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options.signals_to_handle = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on to the processes
    logging.disable()  # the launcher would report at length that a process has failed
    try:
        launch_command(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(
            f"\nerror: process {rank} was killed by {name}; SIGKILL often means that memory ran out", file=sys.stderr
        )
        sys.exit(128 - failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    finally:
        logging.disable(logging.NOTSET)
