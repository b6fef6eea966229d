"""Samples of a pretrained pipeline, with the noisy images that lead to them, as targets for few-step sampling."""

import logging
import time
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
from ..core.errors import RunError, write_problem
from ..core.files import digest_tensors, fingerprint, replace_file
from ..sampling.generation import image_size
from ..sampling.loading import pipeline_hash
from .objectives.few_step import CLEAN, FewStepProcess, TeacherSamples
from .randomness import PerSampleRNG, fold_in

logger = logging.getLogger(__name__)

_BATCH_SIZE = 16  # the rounding of a network's arithmetic may depend on it, so not on the number of processes
_FINGERPRINT, _DIGEST = "fingerprint", "digest"  # metadata of a file of samples
_WRITE_INTERVAL = 60  # seconds between writes


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
        sample = rng.normal(unet.config.in_channels, *image_size(unet.config))
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

    Those that the file already has, because a run is resumed, are not generated again.

    Args:
        count: number of samples.
        path: the file, written once a minute. The samples are mapped from it into memory, where all processes of a
            machine share them.

    Raises:
        RunError: if the file cannot be written.
    """
    facts = [pipeline_hash(teacher.pipeline), teacher.timesteps, teacher.process.timesteps.tolist()]
    file = _SampleFile(path, fingerprint([*facts, teacher.guidance_scale, count, seed]))
    written = [file.count() if accelerator.is_main_process else 0]
    broadcast_object_list(written)
    if written[0] < count:
        _generate(teacher, range(written[0], count), seed, file, accelerator)
        accelerator.wait_for_everyone()
    return TeacherSamples(teacher.process.timesteps, **load_file(path))


def _generate(teacher: Teacher, indices: range, seed: int, file: "_SampleFile", accelerator: Accelerator) -> None:
    """Generate the samples of these indices; the main process writes them to the file, after those it has."""
    rank, batch = accelerator.process_index, _BATCH_SIZE
    parts = [file.read()] if indices.start and accelerator.is_main_process else []
    last_write = time.monotonic()
    starts = indices[:: batch * accelerator.num_processes]
    for start in tqdm(starts, "sampling the start model", unit="batch", disable=rank > 0):
        own = range(start + rank * batch, start + (rank + 1) * batch)
        with accelerator.autocast():
            gathered = accelerator.gather(teacher.sample(own, seed, accelerator.device))
        if accelerator.is_main_process:
            parts.append({name: part[: indices.stop - start].cpu() for name, part in gathered.items()})
            if start == starts[-1] or time.monotonic() > last_write + _WRITE_INTERVAL:
                parts = [{name: torch.cat([part[name] for part in parts]) for name in parts[0]}]
                file.write(parts[0])
                last_write = time.monotonic()


@dataclass
class _SampleFile:
    """The first samples of a teacher in a safetensors file, with their digest and a fingerprint of what made them."""

    path: Path
    fingerprint: str

    def count(self) -> int:
        """Return the number of samples in the file; 0 if there is none, or it is damaged or has other samples."""
        if not self.path.exists():
            return 0
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get(_FINGERPRINT) != self.fingerprint:
                return 0
            tensors = self.read()
            if metadata.get(_DIGEST) in (None, digest_tensors(tensors)):  # earlier versions wrote no digest
                return len(tensors["images"])
        except (OSError, SafetensorError):
            pass
        logger.warning(f"{self.path} is damaged; its samples of the start model are generated again.")
        return 0

    def read(self) -> dict[str, torch.Tensor]:
        """Return the tensors of `TeacherSamples` by name."""
        return load_file(self.path)

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replace the file.

        Raises:
            RunError: if it cannot be written.
        """
        try:
            metadata = {_FINGERPRINT: self.fingerprint, _DIGEST: digest_tensors(tensors)}
            replace_file(self.path, lambda path: save_file(tensors, path, metadata))
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"The samples of the start model could not be written to {self.path}: {write_problem(error)}. Free "
                "some space, or use fewer of them (--teacher_samples), then run the same command again."
            ) from error
