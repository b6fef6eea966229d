"""Files and checkpoints that are whole or not there, whenever the process ends."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from ..core.errors import InputError, RunError
from ..core.files import sync

_NAME = re.compile(r"step-(\d{8})")
_STATE = "state.json"


def remove_leftovers(folder: Path) -> None:
    """Remove what writes that were cut off left in a run folder under temporary names."""
    for path in [path for part in (".", "samples", "checkpoints") for path in (folder / part).glob(".tmp-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class Checkpoints:
    """The folder `checkpoints/` of a run: step-00001000/ and so on, each the whole state of training.

    A checkpoint is written to a temporary name, synced and renamed, so every folder `step-*` is complete; older ones
    are removed after that.

    Args:
        folder: where they are.
        limit: how many are kept; 0 keeps all.
    """

    def __init__(self, folder: Path, limit: int, accelerator: Accelerator):
        self.folder, self.limit, self.accelerator = folder, limit, accelerator

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        found = [_NAME.fullmatch(path.parent.name) for path in self.folder.glob(f"step-*/{_STATE}")]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def last(self) -> str:
        """The newest complete checkpoint in words."""
        steps = self.steps()
        return str(self.path(steps[-1])) if steps else "none: the run had not saved one yet"

    def save(self, step: int, state: dict, write: Callable[[Path], None]) -> None:
        """Save a checkpoint; called by every process.

        Args:
            state: the small facts that `load_state` gives back, as JSON.
            write: puts everything else into the folder that it is given; runs in every process.

        Raises:
            RunError: if it cannot be written, for want of space say; what was saved before is still there.
        """
        if step in self.steps():
            return
        temporary, final = self.folder / f".tmp-step-{step:08d}", self.path(step)
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            write(temporary)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
                for path in temporary.rglob("*"):
                    sync(path)
                shutil.rmtree(final, ignore_errors=True)  # there only if it is not complete
                os.replace(temporary, final)
                sync(self.folder)
        except Exception as error:  # OSError, or what torch's and safetensors' writers raise in its place
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunError(
                f"The checkpoint of step {step} could not be written to {self.folder}: {error}. The last good "
                f"checkpoint is {self.last()}. Make room, then go on with --resume_from_checkpoint latest."
            ) from error
        if self.accelerator.is_main_process and self.limit:
            self._remove(self.steps()[: -self.limit])

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a run that is taken up at this one will make anew."""
        self._remove([later for later in self.steps() if later > step])

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            leaving = self.folder / f".tmp-old-{step:08d}"  # so that one which is half removed counts as none
            os.replace(self.path(step), leaving)
            shutil.rmtree(leaving)

    def find(self, wanted: str) -> Path | None:
        """The folder that `--resume_from_checkpoint` means: a path, or `latest`, which is None where there is none.

        Raises:
            InputError: if the path is not a complete checkpoint of this run.
        """
        if wanted == "latest":
            steps = self.steps()
            return self.path(steps[-1]) if steps else None
        if not (Path(wanted) / _STATE).is_file() or Path(wanted).resolve().parent != self.folder.resolve():
            there = ", ".join(self.path(step).name for step in self.steps()) or "none"
            raise InputError(
                f"--resume_from_checkpoint {wanted} is not a complete checkpoint of this run. It has, in "
                f"{self.folder}: {there}. `latest` takes the newest."
            )
        return Path(wanted)


def load_state(checkpoint: Path) -> dict:
    """The facts that were given to `Checkpoints.save`."""
    return json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
