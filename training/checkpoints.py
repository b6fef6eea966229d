"""Checkpoints, written atomically and verified: neither an interrupted save nor a damaged file is resumed from."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import broadcast_object_list, gather_object

from ..core.errors import InputError, RunError, is_lost_connection, write_problem
from ..core.files import copy_folder, digest_files, fingerprint, replace_folder, sync, unused_path
from .job import TrainingJob
from .lr_schedules import set_peak_rates
from .optimizers import has_8bit_state
from .plan import BatchPlan
from .progress import RunProgress
from .run_folder import RunFolder
from .sharding import num_shards

_NAME = re.compile(r"step-(\d{8})")
_STATE = "state.json"
_FILES, _CHECKSUM = "files", "checksum"  # keys of state.json: size and digest of each other file; digest of state.json
# files that each process writes; their names contain its index
_WRITTEN_BY = re.compile(r"(?:^|/)(?:random_states|ema|posthoc_ema|stream|_)_(\d+)[._]")

_OPTIMIZER_SETTINGS = ("betas", "eps", "weight_decay")  # of Adam and AdamW

# readable names of the keys in state.json that a resumed run must share with its checkpoint
_INVARIANTS = {
    "images": "number of images",
    "images_per_step": "global batch size",
    "seed": "seed",
    "processes": "number of processes",
    "averaged weights": "EMA weights",
    "post-hoc EMA": "--posthoc_ema",
    "shards": "FSDP shards",
    "trained parameters": "trained parameters (their fingerprint)",
    "prediction type": "prediction type",
    "sampling steps": "numbers of sampling steps",
    "scaled gradients": "fp16 gradient scaling",
    "8-bit optimizer": "--use_8bit_adam",
}

# values in checkpoints of earlier versions, which did not save them
_EARLIER = {"post-hoc EMA": False}

# why some of these need the same number of processes
_REASONS = {
    "processes": "each process has its own position in the stream: start the same number of processes",
    "shards": "with FSDP, each process saves its own shards: start the same number of processes, and use FSDP only if "
    "the earlier run did",
}

logger = logging.getLogger(__name__)


class StatefulPart(Protocol):
    """A part of the training state that checkpoints contain; every process saves and loads it."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write files into a checkpoint folder, and return the entries for its state.json."""
        ...

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Restore the part from a checkpoint folder and the contents of its state.json."""
        ...


class PreparedState:
    """The state of the objects that Accelerate prepared: networks, optimizers, schedules and gradient scaler.

    A resumed run keeps its own peak learning rates and optimizer settings, not those of the checkpoint.
    """

    def __init__(self, accelerator: Accelerator, schedules: Sequence[AcceleratedScheduler], peaks: list[list[float]]):
        self.accelerator, self.schedules, self.peaks = accelerator, schedules, peaks

    def save(self, folder: Path) -> dict[str, Any]:
        self.accelerator.save_state(str(folder))
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        groups = [group for optimizer in self.accelerator._optimizers for group in optimizer.param_groups]
        own = [{name: group[name] for name in _OPTIMIZER_SETTINGS} for group in groups]
        self.accelerator.load_state(str(folder))
        groups = [group for optimizer in self.accelerator._optimizers for group in optimizer.param_groups]
        for group, settings in zip(groups, own, strict=True):
            group.update(settings)
        for schedule, rates in zip(self.schedules, self.peaks, strict=True):
            set_peak_rates(schedule.scheduler, rates)


class StreamPosition:
    """The position of each process in its stream of images.

    Attributes:
        value: the position after the newest batch; None at the start.
    """

    def __init__(self, accelerator: Accelerator, streaming: bool):
        self.file_name = f"stream_{accelerator.process_index}.json"
        self.streaming, self.value = streaming, None

    def save(self, folder: Path) -> dict[str, Any]:
        if self.streaming:
            (folder / self.file_name).write_text(json.dumps(self.value), encoding="utf-8")
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        if self.streaming:
            self.value = json.loads((folder / self.file_name).read_text(encoding="utf-8"))


class BestPipeline:
    """The folder of the best pipeline so far; loading removes one that a later step has written."""

    def __init__(self, accelerator: Accelerator, run_folder: RunFolder, progress: RunProgress):
        self.accelerator, self.folder, self.progress = accelerator, run_folder.best, progress

    def save(self, folder: Path) -> dict[str, Any]:
        if self.accelerator.is_main_process and self.progress.evaluations.best and self.folder.is_dir():
            copy_folder(self.folder, folder / self.folder.name)
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        saved = folder / self.folder.name
        if saved.is_dir():
            replace_folder(self.folder, partial(copy_folder, saved))
        else:
            shutil.rmtree(self.folder, ignore_errors=True)


class Checkpoints:
    """The checkpoints of a run: folders step-00001000/ and so on, each with the full training state.

    A checkpoint is written under a temporary name, synced and renamed, so every folder `step-*` is complete. Older
    checkpoints are removed only after that. Its state.json has the size and digest of every file and a checksum of its
    own, which are verified before anything is loaded.

    Args:
        folder: the folder that contains them.
        limit: number of newest checkpoints to keep; 0 keeps all.
        parts: the parts of the training state to save.
        invariants: values that a run must share with a checkpoint to resume from it, keyed like `_INVARIANTS`.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        accelerator: Accelerator,
        parts: Sequence[StatefulPart],
        invariants: dict[str, Any],
    ):
        self.folder, self.limit, self.accelerator = folder, limit, accelerator
        self.parts, self.invariants = parts, invariants
        self.damaged: dict[Path, str] = {}  # checkpoints that `find` has skipped, with the reason

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, oldest first."""
        names = [_NAME.fullmatch(path.parent.name) for path in self.folder.glob(f"step-*/{_STATE}")]
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def last(self) -> str:
        """Describe the newest complete checkpoint, for messages."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else "none: the run had not saved one yet"

    def save(self, step: int) -> None:
        """Save a checkpoint, unless the step has one; every process must call this.

        Raises:
            RunError: if it cannot be written, for example because the disk is full; earlier checkpoints remain.
        """
        if step in self.steps():
            return
        temporary, final = self.folder / f".tmp-step-{step:08d}", self.path(step)
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            state: dict[str, Any] = {}
            for part in self.parts:
                state |= part.save(temporary)
            self.accelerator.wait_for_everyone()
            digests = dict(gather_object(self._sync_and_digest(temporary)))
            if self.accelerator.is_main_process:
                state |= self.invariants | {_FILES: digests}
                state[_CHECKSUM] = fingerprint(json.loads(json.dumps(state)))
                (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
                for path in [temporary / _STATE, *filter(Path.is_dir, temporary.rglob("*")), temporary]:
                    sync(path)
                shutil.rmtree(final, ignore_errors=True)  # exists only if it is incomplete
                os.replace(temporary, final)
                sync(self.folder)
        except Exception as error:  # torch and safetensors raise errors of their own instead of OSError
            if is_lost_connection(error):  # the other processes may still be writing
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"The checkpoint of step {step} could not be written to {self.folder}: {write_problem(error)}. The "
                f"last good checkpoint is {self.last()}. Once the cause is fixed, resume with "
                "--resume_from_checkpoint latest."
            ) from error
        if self.accelerator.is_main_process and self.limit:
            self._remove(self.steps()[: -self.limit])

    def find(self, name: str) -> Path | None:
        """Return the checkpoint folder for `--resume_from_checkpoint`: a path, or `latest`, which may not exist yet.

        Every process must call this. `latest` skips damaged checkpoints, which `set_aside_damaged` then keeps.

        Raises:
            InputError: if a path is not a complete checkpoint of this run, or is damaged, or if all are damaged.
        """
        if name == "latest":
            return self._newest_intact()
        if not (Path(name) / _STATE).is_file() or Path(name).resolve().parent != self.folder.resolve():
            complete = ", ".join(self.path(step).name for step in self.steps()) or "none"
            raise InputError(
                f"--resume_from_checkpoint {name} is not a complete checkpoint of this run. Those in {self.folder} "
                f"are: {complete}. `latest` takes the newest."
            )
        if damage := self._damage(Path(name)):
            raise InputError(
                f"The checkpoint {name} is damaged: {damage}. --resume_from_checkpoint latest takes the newest one "
                "that is intact."
            )
        return Path(name)

    def set_aside_damaged(self) -> None:
        """Rename the damaged checkpoints that `find` has skipped, so that the run can save these steps again."""
        for checkpoint, damage in self.damaged.items():
            aside = unused_path(self.folder / f"damaged-{checkpoint.name}")
            os.replace(checkpoint, aside)
            logger.warning(f"The checkpoint {checkpoint} is damaged: {damage}. It is kept as {aside.name}.")
        self.damaged.clear()

    def check(self, checkpoint: Path, total_steps: int) -> int:
        """Check that this run can resume from a checkpoint, and return its step.

        Raises:
            InputError: if it cannot resume exactly, or ends before the checkpoint.
        """
        state = load_state(checkpoint)
        for key, value in self.invariants.items():
            saved = state.get(key, _EARLIER.get(key, value))  # earlier versions saved fewer keys
            if saved != value:
                advice = _REASONS.get(
                    key,
                    "use the settings in the config.yaml of the run folder, the same images and the same global batch "
                    "size (--batch_size x --grad_accumulation_steps x processes)",
                )
                raise InputError(
                    f"{checkpoint} was saved with {_INVARIANTS[key]} = {saved}, but this run has {value}, so the "
                    f"run cannot resume exactly; {advice}, or start a new run in another folder."
                )
        if state["step"] > total_steps:
            raise InputError(
                f"{checkpoint} is beyond the {total_steps} steps of this run. Increase --max_train_steps or "
                "--num_epochs, or resume from an earlier checkpoint."
            )
        return state["step"]

    def load(self, checkpoint: Path) -> None:
        """Restore all parts from a checkpoint that `check` has accepted; every process must call this.

        Raises:
            InputError: if a checkpoint of an earlier version, which has no digests, cannot be read.
        """
        state = load_state(checkpoint)
        try:
            for part in self.parts:
                part.load(checkpoint, state)
        except Exception as error:  # of many kinds: torch, safetensors and pickle have their own
            if _FILES in state:
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"The checkpoint {checkpoint} cannot be loaded: {reason}. If it is damaged, resume from an earlier "
                "one."
            ) from error

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which the resumed run will reach again."""
        self._remove([later for later in self.steps() if later > step])

    def _newest_intact(self) -> Path | None:
        """Return the newest checkpoint that is not damaged, and remember the damaged ones."""
        folders = sorted((path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)
        for checkpoint in broadcast_object_list([folders])[0]:
            damage = self._damage(checkpoint)
            if damage is None:
                return checkpoint
            self.damaged[checkpoint] = damage
        if self.damaged:
            damages = "; ".join(f"{checkpoint.name}: {damage}" for checkpoint, damage in self.damaged.items())
            raise InputError(
                f"All checkpoints in {self.folder} are damaged ({damages}), so the run cannot be resumed. Start a new "
                "run in another folder, for example from the model that this one has saved."
            )
        return None

    def _damage(self, checkpoint: Path) -> str | None:
        """Return what is damaged in a checkpoint, if anything; every process must call this and verifies its files."""
        found = gather_object([self._damage_of_own_files(checkpoint)])
        return next(filter(None, found), None)

    def _damage_of_own_files(self, checkpoint: Path) -> str | None:
        try:
            state = load_state(checkpoint)
        except FileNotFoundError:
            return f"{_STATE} is missing"
        except (OSError, ValueError) as error:
            return f"{_STATE} cannot be read ({error})"
        checksum = state.pop(_CHECKSUM, None)
        if checksum is None and _FILES not in state:  # saved by an earlier version
            return None if "step" in state else f"{_STATE} is incomplete"
        if checksum != fingerprint(state):
            return f"{_STATE} does not match its checksum"
        names = self._own_files(state[_FILES])
        paths = [checkpoint / name for name in names]
        try:
            for name, path in zip(names, paths, strict=True):
                if (size := path.stat().st_size) != state[_FILES][name][0]:
                    return f"{name} has {size} bytes instead of {state[_FILES][name][0]}"
            for name, digest in zip(names, digest_files(paths), strict=True):
                if list(digest) != state[_FILES][name]:
                    return f"the contents of {name} have changed"
        except OSError as error:
            path = Path(error.filename or checkpoint)
            return f"{path.relative_to(checkpoint).as_posix()} cannot be read ({error.strerror})"
        return None

    def _sync_and_digest(self, folder: Path) -> list[tuple[str, tuple[int, str]]]:
        """Flush this process's files in a folder to disk, and return the digest of each."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = self._own_files(path.relative_to(folder).as_posix() for path in files)
        digests = digest_files(folder / name for name in names)
        for name in names:
            sync(folder / name)
        return list(zip(names, digests, strict=True))

    def _own_files(self, names: Iterable[str]) -> list[str]:
        """Return the files that this process digests: those that it writes, in a run with as many processes."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        writers = {name: int(match[1]) if (match := _WRITTEN_BY.search(name)) else 0 for name in names}
        return sorted(name for name, writer in writers.items() if writer % count == index)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            removed = self.folder / f".tmp-old-{step:08d}"  # a partly removed checkpoint must not count as complete
            os.replace(self.path(step), removed)
            shutil.rmtree(removed)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Raises:
        OSError, ValueError: if it does not exist or is damaged.
    """
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{_STATE} is not a JSON object")
    return state


def resume_invariants(
    job: TrainingJob, plan: BatchPlan, accelerator: Accelerator, posthoc_ema: bool
) -> dict[str, Any]:
    """Return the values that a run must share with a checkpoint to resume from it, keyed like `_INVARIANTS`.

    Args:
        posthoc_ema: whether the run has `--posthoc_ema`.
    """
    trained_parameters = [
        [name, *parameter.shape]
        for trained in job.networks
        for name, parameter in trained.network.named_parameters()
        if parameter.requires_grad
    ]
    scheduler = getattr(job.pipeline, "scheduler", None)
    return {
        "images": plan.num_images,
        "images_per_step": plan.global_batch_size,
        "seed": plan.seed,
        **({"processes": plan.processes} if plan.num_images is None else {}),
        "averaged weights": job.ema.enabled,
        "post-hoc EMA": posthoc_ema,
        "shards": num_shards(accelerator),
        "trained parameters": fingerprint(trained_parameters),
        **({"prediction type": scheduler.config.prediction_type} if scheduler else {}),
        **({"sampling steps": steps} if scheduler and (steps := scheduler.config.get("_num_inference_steps")) else {}),
        "scaled gradients": accelerator.scaler is not None,
        "8-bit optimizer": any(has_8bit_state(trained.optimizer) for trained in job.networks),
    }
