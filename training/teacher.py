"""Samples of a pretrained network together with the noise that they come from, as targets for few-step sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..core.files import fingerprint, replace_file
from .objectives.few_step import CLEAN, FewStepProcess, TeacherSamples
from .randomness import PerSampleRNG, fold_in

BATCH_SIZE = 16  # of sampling, whatever the number of processes, so that it does not change the samples


@dataclass
class Teacher:
    """A pretrained network as a deterministic sampler: DDIM (arXiv 2010.02502) with eta = 0.

    Args:
        network: the network; it predicts `process.prediction_type`.
        process: the transitions of the few-step sampler that learns from it.
        shape: channels, height and width of the images.
        steps: approximate number of steps.
        num_classes: number of classes, if it is class-conditional; sample i is of class i modulo this number.
        null_class: label of the null class, if there is one.
        class_dropout: probability of the null class instead of a class.
        guidance_scale: scale of classifier-free guidance towards the class; 1 turns it off.
    """

    network: torch.nn.Module
    process: FewStepProcess
    shape: tuple[int, int, int]
    steps: int
    num_classes: int | None = None
    null_class: int | None = None
    class_dropout: float = 0.0
    guidance_scale: float = 1.0

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the transitions and others between them, at equal distances, noisiest first."""
        nodes = self.process.timesteps.tolist()
        timesteps = []
        for noisier, cleaner in zip(nodes, [*nodes[1:], CLEAN], strict=True):
            length = noisier - cleaner
            parts = min(length, max(1, round(self.steps * length / (self.process.top + 1))))
            timesteps += [noisier - round(length * part / parts) for part in range(parts)]
        return timesteps

    @torch.no_grad()
    def samples(self, indices: Sequence[int], seed: int, device: torch.device) -> TeacherSamples:
        """Generate samples, each from noise that only depends on the seed and its index."""
        rng = PerSampleRNG([fold_in(seed, index) for index in indices], device)
        labels = None
        if self.num_classes is not None:
            labels = torch.tensor(indices, device=device) % self.num_classes
            if self.null_class is not None:
                labels = labels.masked_fill(rng.uniform() < self.class_dropout, self.null_class)
        sample = rng.normal(*self.shape)
        noisy, timesteps = [], [*self.timesteps, CLEAN]
        self.network.eval()
        levels = set(self.process.timesteps.tolist())
        for timestep, next_timestep in pairwise(timesteps):
            if timestep in levels:
                noisy.append(sample)
            t, s = (torch.full((len(indices),), step, device=device) for step in (timestep, next_timestep))
            image = self.process.predicted_image(self._output(sample, t, labels), sample, t).clamp(-1, 1)
            sample = self.process.deterministic_step(image, sample, t, s)
        self.network.train()
        return TeacherSamples(self.process.timesteps, torch.stack(noisy, dim=1).half(), sample.half(), labels)

    def _output(self, sample: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        def predict(**condition: torch.Tensor) -> torch.Tensor:
            return self.network(sample, t, **condition, return_dict=False)[0][:, : self.shape[0]].float()

        if labels is None:
            return predict()
        output = predict(class_labels=labels)
        if self.guidance_scale == 1 or self.null_class is None:
            return output
        unconditional = predict(class_labels=torch.full_like(labels, self.null_class))
        return unconditional + self.guidance_scale * (output - unconditional)


def generate_samples(teacher: Teacher, count: int, seed: int, contents: str, path: Path, accelerator: Accelerator):
    """Generate the samples of a teacher, distributed over all processes, and save them; called by every process.

    If the file at `path` has the same samples, from before an interruption, they are read from it.

    Args:
        count: number of samples.
        contents: hash of the teacher's weights.

    Returns:
        All samples, in every process.
    """
    facts = [count, seed, contents, teacher.timesteps, list(teacher.shape), teacher.process.timesteps.tolist()]
    facts += [teacher.num_classes, teacher.null_class, teacher.class_dropout, teacher.guidance_scale]
    key = fingerprint(facts)
    saved = _read(path, key) if accelerator.is_main_process else None
    found = [saved is not None]
    broadcast_object_list(found)
    tensors = _share(saved, accelerator) if found[0] else _generate(teacher, count, seed, accelerator)
    if not found[0] and accelerator.is_main_process:
        replace_file(path, lambda file: save_file(tensors, file, {"fingerprint": key}))
    accelerator.wait_for_everyone()
    return TeacherSamples(teacher.process.timesteps, tensors["noisy"], tensors["images"], tensors.get("labels"))


def _generate(teacher: Teacher, count: int, seed: int, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    processes, rank = accelerator.num_processes, accelerator.process_index
    rounds = -(-count // (BATCH_SIZE * processes))  # batches of each process
    batches = []
    for batch in tqdm(range(rank, rounds * processes, processes), "teacher", disable=rank > 0, unit="batch"):
        indices = range(batch * BATCH_SIZE, (batch + 1) * BATCH_SIZE)
        with accelerator.autocast():
            batches.append(teacher.samples(indices, seed, accelerator.device))

    def gather(parts: list[torch.Tensor]) -> torch.Tensor:
        gathered = accelerator.gather(torch.stack(parts))  # the batches of one process after those of another
        by_process = gathered.unflatten(0, (processes, rounds))
        return by_process.transpose(0, 1).flatten(0, 2)[:count].contiguous().cpu()

    tensors = {name: gather([getattr(b, name) for b in batches]) for name in ("noisy", "images")}
    if teacher.num_classes is not None:
        tensors["labels"] = gather([batch.labels for batch in batches])
    return tensors


def _share(tensors: dict[str, torch.Tensor] | None, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Send tensors from the main process to the others."""
    shapes = [tensors and {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}]
    broadcast_object_list(shapes)
    if tensors is None:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes[0].items()}
    return {name: broadcast(tensor.to(accelerator.device)).cpu() for name, tensor in tensors.items()}


def _read(path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """Return the samples in a file, or None if it has others or is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            same = (file.metadata() or {}).get("fingerprint") == key
        return load_file(path) if same else None
    except (OSError, SafetensorError):
        return None
