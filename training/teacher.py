"""Samples of a pretrained pipeline, with the noisy images that lead to them, as targets for few-step sampling."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDPMPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .. import ClassConditionalPipeline
from ..core.errors import RunError
from ..core.files import fingerprint, replace_file
from ..sampling.loading import pipeline_hash
from .objectives.few_step import CLEAN, FewStepProcess, TeacherSamples
from .randomness import PerSampleRNG, fold_in
from .start_model import image_size

_BATCH_SIZE = 16  # the rounding of a network's arithmetic may depend on it, so not on the number of processes
_FINGERPRINT = "fingerprint"  # metadata of a file of samples


@dataclass
class Teacher:
    """A pretrained pipeline as a deterministic sampler: DDIM (arXiv 2010.02502) with eta = 0, clipping to [-1, 1].

    Args:
        pipeline: the pipeline, unconditional or class-conditional.
        process: its noise process, with the transitions of the few-step sampler that learns from it.
        steps: approximate number of steps for a sample; at least those of the transitions are taken.
        guidance_scale: scale of classifier-free guidance, which needs a null class; 1 turns it off.
    """

    pipeline: DDPMPipeline | ClassConditionalPipeline
    process: FewStepProcess
    steps: int
    guidance_scale: float = 1.0

    @property
    def timesteps(self) -> list[int]:
        """The timesteps of the transitions and, evenly spaced, others between them, noisiest first."""
        nodes = [*self.process.timesteps.tolist(), CLEAN]
        timesteps = []
        for noisier, cleaner in pairwise(nodes):
            length = noisier - cleaner
            parts = min(length, max(1, round(self.steps * length / (self.process.top + 1))))
            timesteps += [noisier - round(length * part / parts) for part in range(parts)]
        return timesteps

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Generate samples; the noise and the class of each depend only on the seed and its index.

        Sample i of a class-conditional pipeline has class i modulo the number of classes or, as often as in the
        training of the pipeline, the null class.

        Returns:
            the tensors of `TeacherSamples` by name, images in float16.
        """
        rng = PerSampleRNG([fold_in(seed, index) for index in indices], device)
        labels = self._labels(indices, rng)
        unet = self.pipeline.unet.eval()
        sample = rng.normal(unet.config.in_channels, *image_size(unet))
        noisy, nodes = [], set(self.process.timesteps.tolist())
        for timestep, next_timestep in pairwise([*self.timesteps, CLEAN]):
            if timestep in nodes:
                noisy.append(sample)
            t, s = (torch.full((len(indices),), step, device=device) for step in (timestep, next_timestep))
            image = self.process.predicted_image(self._output(sample, t, labels), sample, t).clamp(-1, 1)
            sample = self.process.deterministic_step(image, sample, t, s)
        unet.train()
        tensors = {"noisy": torch.stack(noisy, dim=1).half(), "images": sample.half()}
        return tensors if labels is None else tensors | {"labels": labels}

    def _labels(self, indices: Sequence[int], rng: PerSampleRNG) -> torch.Tensor | None:
        pipeline = self.pipeline
        if not isinstance(pipeline, ClassConditionalPipeline):
            return None
        labels = torch.tensor(indices, device=rng.device) % pipeline.num_classes
        if pipeline.has_null_class:
            labels = labels.masked_fill(rng.uniform() < pipeline.unet.config.class_dropout, pipeline.num_classes)
        return labels

    def _output(self, sample: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        unet, pipeline = self.pipeline.unet, self.pipeline
        if labels is None:
            return unet(sample, t).sample.float()
        output = unet(sample, t, labels).sample.float()
        if self.guidance_scale == 1:
            return output
        unconditional = unet(sample, t, torch.full_like(labels, pipeline.num_classes)).sample.float()
        return unconditional + self.guidance_scale * (output - unconditional)


def generate_samples(teacher: Teacher, count: int, seed: int, path: Path, accelerator: Accelerator) -> TeacherSamples:
    """Generate samples of a teacher on all processes, and write them to a file; every process must call this.

    If the file already has them, because a run is resumed, they are not generated again.

    Args:
        count: number of samples.
        path: the file. The samples are mapped from it into memory, where all processes of a machine share them.

    Raises:
        RunError: if the file cannot be written.
    """
    facts = [pipeline_hash(teacher.pipeline), teacher.timesteps, teacher.process.timesteps.tolist()]
    key = fingerprint([*facts, teacher.guidance_scale, count, seed])
    is_written = [accelerator.is_main_process and _fingerprint(path) == key]
    broadcast_object_list(is_written)
    if not is_written[0]:
        tensors = _generate(teacher, count, seed, accelerator)
        if accelerator.is_main_process:
            try:
                replace_file(path, lambda file: save_file(tensors, file, {_FINGERPRINT: key}))
            except (OSError, SafetensorError) as error:
                raise RunError(
                    f"The samples of the start model could not be written to {path}: {error}. Free some space, or use "
                    "fewer of them (--teacher_samples), then run the same command again."
                ) from error
        accelerator.wait_for_everyone()
    return TeacherSamples(teacher.process.timesteps, **load_file(path))


def _generate(teacher: Teacher, count: int, seed: int, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return the tensors of the samples in the main process."""
    rank, batch = accelerator.process_index, _BATCH_SIZE
    tensors: dict[str, torch.Tensor] = {}
    starts = range(0, count, batch * accelerator.num_processes)
    for start in tqdm(starts, "sampling the start model", unit="batch", disable=rank > 0):
        indices = range(start + rank * batch, start + (rank + 1) * batch)
        with accelerator.autocast():
            gathered = accelerator.gather(teacher.sample(indices, seed, accelerator.device))
        if accelerator.is_main_process:
            for name, part in gathered.items():
                if name not in tensors:
                    tensors[name] = torch.empty((count, *part.shape[1:]), dtype=part.dtype)
                tensors[name][start : start + len(part)] = part[: count - start]
    return tensors


def _fingerprint(path: Path) -> str | None:
    """Return the fingerprint of the samples in a file; None if there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(_FINGERPRINT)
    except (OSError, SafetensorError):
        return None
