"""Post-hoc EMA: EMAs of any length, computed after training from snapshots of two of them.

The method of EDM2, arXiv 2312.02696, section 3 and appendix C. The weights after step t are averaged with a power
function: those of step s have the density (gamma + 1) s^gamma / t^(gamma + 1), so that the average always reaches back
over the same fraction of the run. Its length is the relative standard deviation of this density.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..core.errors import InputError
from ..core.files import digest_tensors, replace_file
from .arguments import MAX_EMA_LENGTH, NUM_SNAPSHOTS, RunArguments
from .run_folder import RunFolder
from .sharding import gather_shards, local_shards, num_shards

TRACKED_LENGTHS = (0.05, 0.1)  # as in the paper
# the largest error, relative to the norm of the power function, with which a length counts as solvable
MAX_ERROR = 0.1

_NAME = re.compile(r"step-(\d{8})\.safetensors")
_DIGEST = "digest"


def exponent(length: float) -> float:
    """Return the exponent gamma of the power function of a length (algorithm 2).

    Args:
        length: above 0 and below `MAX_EMA_LENGTH`.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def dot_products(step: Any, gamma: Any, other_step: Any, other_gamma: Any) -> Any:
    """Return the integrals over time of the products of power functions, float64 (algorithm 3).

    Args:
        step, gamma: the last steps t of the first functions, and their exponents.
        other_step, other_gamma: those of the second functions; all four are numbers or arrays, broadcast against each
            other.
    """
    ratio = step / other_step
    powers = ratio ** np.where(ratio < 1, other_gamma, -gamma)
    return (gamma + 1) * (other_gamma + 1) * powers / ((gamma + other_gamma + 1) * np.maximum(step, other_step))


class PosthocEMA:
    """The two EMAs of `--posthoc_ema` and their snapshots in the run folder; without the flag there are none.

    Args:
        network: the network whose trained parameters are averaged.
        args: whether they are.
        total_steps: the length of the run, over which the snapshots are spread evenly.
    """

    def __init__(self, network: torch.nn.Module, args: RunArguments, total_steps: int):
        self.network, self.folder = network, RunFolder(args.output_dir)
        self.exponents = [exponent(length) for length in TRACKED_LENGTHS] if args.posthoc_ema else []
        count = NUM_SNAPSHOTS if args.posthoc_ema else 0
        self.snapshot_steps = {-(-total_steps * i // count) for i in range(1, count + 1)}
        self.averages: list[list[torch.Tensor]] = []

    def prepare(self, accelerator: Accelerator) -> None:
        """Allocate the EMAs, once Accelerate has placed and sharded the network."""
        self.accelerator = accelerator
        # the training loop freezes networks for a time, so those parameters that are trained are remembered
        self.parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.averages = [[shard.detach().clone() for shard in self._shards()] for _ in self.exponents]

    def weights(self) -> list[torch.Tensor]:
        """Return the EMA weights, or the local shards of sharded ones; empty without `--posthoc_ema`."""
        return [tensor for average in self.averages for tensor in average]

    @property
    def snapshot_bytes(self) -> int:
        """Size of a snapshot."""
        return sum(parameter.nbytes for parameter in self.parameters.values()) * len(self.averages)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update the EMAs after an optimizer step, the first of which is 1 (section 3.1 of the paper)."""
        for average, gamma in zip(self.averages, self.exponents, strict=True):
            decay = (1 - 1 / step) ** (gamma + 1)  # 0 at step 1: the initial weights are not part of the average
            torch._foreach_lerp_(average, self._shards(), 1 - decay)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def save_snapshot(self, step: int) -> None:
        """Write the EMAs to the snapshot of a step; every process must call this.

        In float32, because sums of snapshots with coefficients of both signs amplify rounding errors.
        """
        tensors: dict[str, torch.Tensor] = {}
        for length, average in zip(TRACKED_LENGTHS, self.averages, strict=True):
            for (name, parameter), shard in zip(self.parameters.items(), average, strict=True):
                tensor = gather_shards(shard, parameter)
                if self.accelerator.is_main_process:
                    tensors[f"{length}/{name}"] = tensor.cpu().contiguous()
        if self.accelerator.is_main_process:
            metadata = {_DIGEST: digest_tensors(tensors)}
            replace_file(self.folder.ema_snapshot(step), lambda path: save_file(tensors, path, metadata))

    def remove_after(self, step: int) -> None:
        """Remove the snapshots of later steps, which a resumed run will reach again."""
        for later, path in _snapshot_files(self.folder).items():
            if later > step:
                path.unlink()

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the EMAs into a checkpoint: one file, or one for each process with FSDP."""
        if self.averages and (num_shards(self.accelerator) > 1 or self.accelerator.is_main_process):
            save_file({str(i): tensor.contiguous() for i, tensor in enumerate(self.weights())}, self._file(folder))
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Read the EMAs from a checkpoint."""
        if self.averages:
            tensors = load_file(self._file(folder))
            for i, tensor in enumerate(self.weights()):
                tensor.copy_(tensors[str(i)])

    def _file(self, folder: Path) -> Path:
        index = f"_{self.accelerator.process_index}" if num_shards(self.accelerator) > 1 else ""
        return folder / f"posthoc_ema{index}.safetensors"

    def _shards(self) -> list[torch.nn.Parameter]:
        return local_shards(self.parameters.values())


@dataclass(frozen=True)
class EMASnapshots:
    """The snapshots of a run, from which `weights` computes the weights of an EMA of any length.

    Attributes:
        files: the snapshots by step.
    """

    files: dict[int, Path]

    @classmethod
    def open(cls, folder: RunFolder) -> "EMASnapshots":
        """Read the snapshots of a run folder and check that they are intact.

        Raises:
            InputError: if there are none, or one is damaged.
        """
        files = _snapshot_files(folder)
        if not files:
            raise InputError(
                f"{folder.path} has no EMA snapshots, from which EMAs of other lengths are computed: train the model "
                "with --posthoc_ema. In a run without them, --ema_decay is final."
            )
        for path in files.values():
            _check_intact(path)
        return cls(files)

    @property
    def step(self) -> int:
        """The newest step; the computed EMAs are those of this step."""
        return max(self.files)

    def solve(self, length: float) -> tuple[np.ndarray, float]:
        """Return the sum of snapshots whose power function is closest to that of a length, by least squares.

        As in algorithm 3 of the paper, but with the condition that the coefficients sum to 1: a parameter that does
        not change during the run is then the same in all EMAs.

        Returns:
            The coefficients (lengths, snapshots), float64, and the norm of the difference between the power functions,
            relative to that of the wanted one.
        """
        steps = np.tile(np.array(list(self.files), dtype=np.float64), len(TRACKED_LENGTHS))
        gammas = np.repeat([exponent(tracked) for tracked in TRACKED_LENGTHS], len(self.files))
        step, gamma = float(self.step), exponent(length)
        matrix = dot_products(steps[:, None], gammas[:, None], steps, gammas)
        wanted = dot_products(steps, gammas, step, gamma)
        ones = np.ones((len(steps), 1))
        bordered = np.block([[matrix, ones], [ones.T, np.zeros((1, 1))]])  # with a Lagrange multiplier
        coefficients = np.linalg.solve(bordered, np.append(wanted, 1))[:-1]
        norm = dot_products(step, gamma, step, gamma)
        squared_error = norm - 2 * coefficients @ wanted + coefficients @ matrix @ coefficients
        return coefficients.reshape(len(TRACKED_LENGTHS), -1), float(max(squared_error, 0) / norm) ** 0.5

    def is_solvable(self, length: float) -> bool:
        """Return whether the snapshots determine the EMA of a length."""
        return 0 < length < MAX_EMA_LENGTH and self.solve(length)[1] <= MAX_ERROR

    def solvable_range(self) -> tuple[float, float]:
        """Return the shortest and the longest solvable length, in steps of a thousandth."""
        solvable = [length for length in np.arange(2, 1000 * MAX_EMA_LENGTH) / 1000 if self.is_solvable(length)]
        return float(min(solvable)), float(max(solvable))

    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the averaged parameters by name."""
        with safe_open(self.files[self.step], "pt") as file:
            keys = [key for key in file.keys() if key.startswith(f"{TRACKED_LENGTHS[0]}/")]  # noqa: SIM118
            return {key.partition("/")[2]: torch.Size(file.get_slice(key).get_shape()) for key in keys}

    def weights(self, length: float) -> dict[str, torch.Tensor]:
        """Return the parameters of the EMA of a length by name, float32; summed in float64."""
        coefficients, _ = self.solve(length)
        sums: dict[str, torch.Tensor] = {}
        for column, path in zip(coefficients.T, self.files.values(), strict=True):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  a safetensors file is no dictionary
                    tracked, _, name = key.partition("/")
                    term = file.get_tensor(key).double() * column[TRACKED_LENGTHS.index(float(tracked))]
                    sums[name] = sums[name] + term if name in sums else term
        return {name: tensor.float() for name, tensor in sums.items()}


def _snapshot_files(folder: RunFolder) -> dict[int, Path]:
    """Return the snapshots in a run folder by step, oldest first."""
    paths = sorted(folder.ema_snapshots.glob("step-*.safetensors"))
    return {int(match[1]): path for path in paths if (match := _NAME.fullmatch(path.name))}


def _check_intact(path: Path) -> None:
    try:
        with safe_open(path, "pt") as file:
            digest = (file.metadata() or {}).get(_DIGEST)
        intact = digest == digest_tensors(load_file(path))
    except (OSError, SafetensorError):
        intact = False
    if not intact:
        raise InputError(
            f"The EMA snapshot {path} is damaged. Move it out of the folder: most lengths can be computed from the "
            "other snapshots."
        )
