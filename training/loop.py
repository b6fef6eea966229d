"""The training loop: steps, accumulation, averaging, logging, saving, resuming. It does not know what it trains."""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ..core.cli import write_config
from ..core.errors import InputError, RunError
from ..core.files import copy_folder, fingerprint, replace_file, replace_folder, replace_tree
from ..hub.upload import BackgroundUpload
from .arguments import RunArguments
from .checkpoints import Checkpoints, load_state, remove_leftovers
from .evaluator import EvaluationHistory, Evaluator
from .job import TrainingJob
from .loading import Batch, TrainingData
from .model_card import finish_upload, report, write_best, write_card
from .objectives.denoising import MicroBatch
from .randomness import PerSampleRNG, fold_in
from .sharding import local, reshard, whole, whole_pipeline
from .stopping import RunStopped, StopRequest
from .tracking import (
    MetricsFile,
    log_image,
    plot_evaluations,
    plot_losses,
    read_metrics,
    start_trackers,
    tracker_names,
)

_CONFIG = "config.yaml"
_OWN_FILES = ("model_index.json", "README.md", "metrics.csv", "loss.png", "eval.png", "before_after.png")
_BEST = "best"
_LOG_EVERY = 10  # optimizer steps whose losses are read back from the device at once
_MAX_SKIPPED_STEPS = (
    50  # steps that float16's scaler leaves out, each at half the scale of the one before: no scale is left
)


def prepare_accelerator(args: RunArguments) -> Accelerator:
    """Check that the run folder can be used, and start Accelerate.

    Raises:
        InputError: if the folder holds another run that is not to be resumed, a tracker is not installed, or the
            machine cannot do the mixed precision.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is a file; it must be a folder, or not there yet.")
    others = [name for name in _OWN_FILES if (folder / name).exists()]
    if others and not (folder / _CONFIG).exists():
        raise InputError(
            f"{folder} holds {' and '.join(others)}, which no run made and this one would overwrite. Name another "
            "folder with --output_dir."
        )
    if (folder / _CONFIG).exists() and not args.resume_from_checkpoint:
        raise InputError(
            f"{folder} already holds a run. Go on with it: --resume_from_checkpoint latest. Or keep it and name "
            "another folder with --output_dir."
        )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=tracker_names(args.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU. On a CPU train with bf16, or with no.")
    if accelerator.distributed_type == DistributedType.FSDP and (args.channels_last or not accelerator.is_fsdp2):
        raise InputError(
            "With FSDP, training needs its version 2 (fsdp_version: 2, as in examples/accelerate/fsdp.yaml) and goes "
            "without --channels_last: FSDP shards contiguous parameters only."
        )
    accelerator.wait_for_everyone()  # until all have looked at the folder, in which the first will write
    return accelerator


class Trainer:
    """Runs a job from its first or its resumed step to its last.

    In a step every process trains on its share of a window of `batch_size x grad_accumulation_steps x processes`
    images, and the gradient is that of the mean loss over the window, also where the window is short.

    Args:
        job: what is trained.
        data: on what.
        args: for how long, and what is shown and kept.
        accelerator: where.
        repo_id: the repository that saves are uploaded to, in the main process.
        evaluator: measures what is drawn along the way.
    """

    def __init__(
        self,
        job: TrainingJob,
        data: TrainingData,
        args: RunArguments,
        accelerator: Accelerator,
        repo_id: str | None = None,
        evaluator: Evaluator | None = None,
    ):
        self.job, self.data, self.args, self.accelerator, self.evaluator = job, data, args, accelerator, evaluator
        self.plan = data.plan
        self.folder = Path(args.output_dir)
        self.total_steps = args.max_train_steps or args.num_epochs * (self.plan.steps_per_epoch or 0)
        if not self.total_steps:
            raise InputError("A stream has no known length: say how long to train with --max_train_steps.")
        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
        self.models, self.optimizers, self.schedules = [], [], []
        self.peak_rates = [[group["lr"] for group in player.optimizer.param_groups] for player in job.players]
        for player in job.players:
            player.network.train().to(memory_format=self.memory_format)
            if args.compile:
                player.network.compile()
            schedule = player.schedule(player.optimizer, self.total_steps)
            prepared = accelerator.prepare(player.network, player.optimizer, schedule)
            for kept, part in zip((self.models, self.optimizers, self.schedules), prepared, strict=True):
                kept.append(part)
        self.ema = (
            EMAModel(
                local(job.averaged.parameters()),
                decay=args.ema_decay,
                use_ema_warmup=True,
                inv_gamma=args.ema_inv_gamma,
                power=args.ema_power,
                foreach=True,
            )
            if args.ema_decay
            else None
        )
        self.checkpoints = Checkpoints(self.folder / "checkpoints", args.checkpoints_total_limit, accelerator)
        self.step, self.seconds, self.position, self.broken = 0, 0.0, None, set()
        self.evaluations = EvaluationHistory()
        checkpoint = args.resume_from_checkpoint and self.checkpoints.find(args.resume_from_checkpoint)
        if checkpoint:
            self._resume(checkpoint)
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            if checkpoint and (checkpoint / _BEST).is_dir():
                replace_folder(self.folder / _BEST, partial(copy_folder, checkpoint / _BEST))
            elif checkpoint:  # what is there is of steps which are made anew
                shutil.rmtree(self.folder / _BEST, ignore_errors=True)
            self.checkpoints.remove_after(self.step)
        start_trackers(accelerator, args, {k: v for part in job.arguments for k, v in vars(part).items()})
        if accelerator.is_main_process:
            replace_file(self.folder / _CONFIG, lambda path: write_config(path, *job.arguments))
        self.metrics = MetricsFile(self.folder / "metrics.csv", self.step) if accelerator.is_main_process else None
        self.upload = BackgroundUpload(self.folder, repo_id) if repo_id else None
        self.pending = []  # what `_train_step` leaves of the steps not yet logged
        self.skipped = 0  # steps, one after the other, with a gradient that is not finite
        self.clock = _Clock(mark=(0.0, self.plan.images_seen(self.step)))

    def run(self) -> None:
        """Train to the end, then save the pipeline, its pictures and its card.

        Raises:
            RunError: if a loss is not finite, an image is broken, or files cannot be read or written any more.
        """
        try:
            with StopRequest(self.accelerator) as stop:
                self._run(stop)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"The run in {self.folder} could not go on: {error}. The last good checkpoint is "
                f"{self.checkpoints.last()}. When the cause is removed, go on with --resume_from_checkpoint latest."
            ) from error
        self.accelerator.end_training()

    def _run(self, stop: "StopRequest") -> None:
        if self._samples_due() and not self.sample_path(self.step).exists():  # at the start, or where it was stopped
            self._show_samples()
        batches = self.data.batches(self.step, self.total_steps, self.position)
        # closing ends the processes that read images ahead
        with (
            closing(batches),
            tqdm(
                total=self.total_steps,
                initial=self.step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                disable=not self.accelerator.is_main_process,
            ) as progress,
        ):
            if self._evaluation_due() and self._evaluate(progress, stop):  # the run had been stopped at this step
                progress.close()
                stop.leave(self.step, self.checkpoints.last())
            while self.step < self.total_steps:
                try:
                    self._train_step(batches)
                except RunError:
                    if self.accelerator.num_processes == 1:  # the others would not know of it
                        self._log(progress)
                        self._save_checkpoint()
                    raise
                progress.update()
                stopping, last = stop.requested(), self.step == self.total_steps
                samples_due = not stopping and self._samples_due()
                evaluation_due = not stopping and self._evaluation_due()
                model_due = not last and not stopping and _due(self.step, self.args.save_model_every)
                checkpoint_due = stopping or last or _due(self.step, self.args.checkpointing_steps)
                if samples_due or evaluation_due or model_due or checkpoint_due or _due(self.step, _LOG_EVERY):
                    self._log(progress)
                if samples_due:  # before the evaluation, whose best pipeline is shown with them
                    self._show_samples()
                if evaluation_due:
                    stopping = self._evaluate(progress, stop)
                if checkpoint_due or stopping:
                    self._save_checkpoint()
                if stopping:
                    progress.close()
                    stop.leave(self.step, self.checkpoints.last())
                if model_due:
                    self._save_model()
        self._save_model()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        step, accelerator = self.step, self.accelerator
        with self.clock.waiting():
            window = [next(batches) for _ in range(self.plan.micro_batches(step))]
        # what a network draws by itself (dropout) depends on the step and the process alone; seeded after the data
        # loader, which draws too
        torch.manual_seed(fold_in(self.plan.seed, step, -1 - accelerator.process_index))
        self.position = window[-1].position
        self.broken.update(name for batch in window for name in batch.broken)
        scale = 1 / self.plan.global_batch(step)[2]
        device = accelerator.device
        images = [
            batch.images.to(device, non_blocking=True).contiguous(memory_format=self.memory_format) for batch in window
        ]
        labels = [None if batch.labels is None else batch.labels.to(device, non_blocking=True) for batch in window]
        row, sums, norms = {}, {}, {}
        for i, player in enumerate(self.job.players):
            model, optimizer, prefix = self.models[i], self.optimizers[i], f"{player.name}_" if player.name else ""
            with _frozen(other.network for other in self.job.players if other is not player):
                for j, batch in enumerate(window):
                    samples = MicroBatch(images[j], labels[j], PerSampleRNG(batch.keys, device, stream=i), step)
                    with accelerator.no_sync(model) if j + 1 < len(window) else nullcontext():
                        values = player.objective(model, samples)
                        values = {name: value.sum() * (batch.weight * scale) for name, value in values.items()}
                        # gradients are averaged over processes, but the window's mean loss is a sum over them
                        accelerator.backward(values["loss"] * accelerator.num_processes)
                    for name, value in values.items():
                        sums[prefix + name] = sums.get(prefix + name, 0) + value.detach()
            norm = whole(accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or torch.inf))
            norms[f"{prefix}grad_norm"] = norm
            optimizer.step()
            optimizer.zero_grad()
            row[f"{prefix}learning_rate"] = self.schedules[i].get_last_lr()[0]
            self.schedules[i].step()
        if self.ema:
            self.ema.step(local(self.job.averaged.parameters()))
        self.step += 1
        self.pending.append(_Logged({"step": self.step} | row, sums, norms))

    def _log(self, progress: tqdm) -> None:
        """Read back the numbers of the steps since the last call, check them, and log them."""
        if not self.pending:
            return
        table = torch.stack([torch.stack(list(logged.sums.values())) for logged in self.pending])
        sums = self.accelerator.reduce(table, reduction="sum").tolist()
        norms = torch.stack([torch.stack(list(logged.norms.values())) for logged in self.pending]).tolist()
        rows = []
        for logged, step_sums, step_norms in zip(self.pending, sums, norms, strict=True):
            step = logged.row["step"]
            row = {"step": step, "epoch": self.plan.epoch(step), "images": self.plan.images_seen(step)}
            row |= logged.row | dict(zip(logged.sums, step_sums, strict=True))
            row |= dict(zip(logged.norms, step_norms, strict=True))
            losses = {name: value for name, value in row.items() if name.endswith("loss")}
            self.skipped = 0 if all(map(math.isfinite, step_norms)) else self.skipped + 1
            # in half precision a gradient that is not finite is met by the scaler: it leaves the step out
            most = 0 if self.accelerator.scaler is None else _MAX_SKIPPED_STEPS
            is_finite = all(map(math.isfinite, losses.values()))
            if not is_finite or self.skipped > most:
                before = f", like those of the {most} before it," if most else ""
                what = f"gradient of step {step}{before}" if is_finite else f"loss of step {step}"
                raise RunError(
                    f"The {what} is not finite ({_in_words(row)}). Nothing was overwritten. The last good checkpoint "
                    f"is {self.checkpoints.last()}. A lower learning rate, or bf16 in place of fp16, usually helps; "
                    "go on with --resume_from_checkpoint latest."
                )
            rows.append(row)
        self.pending.clear()
        speed = self.clock.images_per_second(rows[-1]["images"])
        if self.metrics is not None:
            self.metrics.append(rows)
        shown = {name: value for name, value in rows[-1].items() if name.endswith("loss")}
        rate = next(value for name, value in rows[-1].items() if name.endswith("learning_rate"))
        # the newest value of each: some are not there at every step, as that of a lazy penalty
        tracked = {
            name: value for row in rows for name, value in row.items() if name != "step" and not math.isnan(value)
        }
        self.accelerator.log(tracked | {"images_per_second": speed}, step=self.step)
        progress.set_postfix(
            {name: f"{value:.4f}" for name, value in shown.items()}
            | {"lr": f"{rate:.1e}", "images/s": f"{speed:.1f}"}
            | ({"broken": len(self.broken)} if self.broken else {})
        )
        if (warning := self.job.watch(rows)) and self.accelerator.is_main_process:
            progress.write(warning)

    @contextmanager
    def averaged_weights(self):
        """Inside, the averaged network holds its EMA weights and is in evaluation mode; outside it never does."""
        network = self.job.averaged
        if self.ema:
            self.ema.store(local(network.parameters()))
            self.ema.copy_to(local(network.parameters()))
        network.eval()
        try:
            yield self.job.pipeline
        finally:
            network.train()
            reshard(network)
            if self.ema:
                self.ema.restore(local(network.parameters()))

    def _evaluation_due(self) -> bool:
        return self.evaluator is not None and self.evaluator.due(self.step, self.total_steps, self.evaluations)

    def _evaluate(self, progress: tqdm, stop: "StopRequest") -> bool:
        """Measure pictures of the averaged weights, log the numbers, and keep the pipeline if it is the best yet.

        Returns:
            whether it was given up because the run is to stop.
        """
        started = time.perf_counter()
        with self.clock.paused():
            with self.averaged_weights() as averaged:
                drawn = {
                    "weights": "averaged (EMA)" if self.ema else "as trained",
                    **self.job.sampler.protocol(averaged),
                    "dtype": self._precision(),
                }
                try:
                    found = self.evaluator.measure(
                        partial(self.job.sampler, averaged), self.step, drawn, stop.raise_if_requested
                    )
                except RunStopped:
                    return True
                seconds = time.perf_counter() - started
                is_best = self.evaluations.add(found, seconds)
                if is_best:
                    pipeline = whole_pipeline(averaged, self.accelerator)
                    if self.accelerator.is_main_process:
                        write_best(self.folder / _BEST, pipeline, self.job.card, self.facts())
            if self.accelerator.is_main_process:
                self.metrics.amend(found.values())
            self.accelerator.log(found.values() | {"evaluation_seconds": seconds}, step=self.step)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            best = ", the best so far" if is_best else f" (best: step {self.evaluations.best.step})"
            progress.write(f"step {self.step}: {found.summary()}{best}; it took {seconds:.0f} s")
            if self.evaluations.count == 1:
                for warning in found.warnings:
                    progress.write(f"warning: {warning}")
        return False

    def _samples_due(self) -> bool:
        return self.step in (0, self.total_steps) or _due(self.step, self.args.log_samples_every)

    def _show_samples(self) -> None:
        """Sample the run's fixed seeds, a part in each process, and save and track the grid."""
        numbers = list(range(self.args.num_samples))
        with self.clock.paused(), self.averaged_weights() as pipeline, torch.no_grad():
            with self.accelerator.split_between_processes(numbers, apply_padding=True) as mine:
                labels = self.job.labels and [self.job.labels[i] for i in mine]
                pictures, at_once = [], self.args.batch_size  # which fit into the memory, as the training does
                for start in range(0, len(mine), at_once):
                    part = slice(start, start + at_once)
                    seeds = [self.args.seed + i for i in mine[part]]
                    pictures += self.job.sampler(pipeline, seeds, labels and labels[part])
                drawn = dict(zip(mine, pictures, strict=True))
            if self.accelerator.num_processes > 1:
                gathered = [None] * self.accelerator.num_processes
                torch.distributed.all_gather_object(gathered, drawn)
                drawn = {number: picture for part in gathered for number, picture in part.items()}
        if self.accelerator.is_main_process:
            grid = self.job.grid([drawn[number] for number in numbers])
            replace_file(self.sample_path(self.step), grid.save)
            log_image(self.accelerator, "samples", grid, self.step)

    def sample_path(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:08d}.png"

    def _save_model(self) -> None:
        """Write the pipeline with its averaged weights, the loss curve and the card into the run folder."""
        with self.clock.paused():
            self.accelerator.wait_for_everyone()
            with self.averaged_weights() as averaged:
                pipeline = whole_pipeline(averaged, self.accelerator)
                if self.accelerator.is_main_process:
                    replace_tree(self.folder, pipeline.save_pretrained)
            if self.accelerator.is_main_process:
                metrics = self.folder / "metrics.csv"
                plot_losses(metrics, self.folder / "loss.png")
                if self.evaluations.last:
                    plot_evaluations(metrics, self.folder / "eval.png", self.evaluations)
                write_card(self.folder, self.job.card, self.facts())
                if self.upload and self.step < self.total_steps:
                    self.upload.push(f"Step {self.step} of {self.total_steps}")
            self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Write the card once more, when all pictures are there, say where things are, and upload them."""
        facts = self.facts()
        write_card(self.folder, self.job.card, facts)
        report(self.folder, facts)
        if self.upload:
            finish_upload(self.upload, self.args)

    def facts(self) -> dict[str, Any]:
        """What is known of the run so far, for the model card."""
        device = self.accelerator.device
        last = read_metrics(self.folder / "metrics.csv")[-100:]
        return {
            "steps": self.step,
            "total_steps": self.total_steps,
            "epochs": self.plan.epoch(self.step),
            "images": self.plan.num_images,
            "images_seen": self.plan.images_seen(self.step),
            "images_per_step": self.plan.global_batch_size,
            "processes": self.accelerator.num_processes,
            "precision": self._precision(),
            "hardware": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {os.cpu_count()} cores",
            "losses": {k: sum(row[k] for row in last) / len(last) for k in last[0] if k.endswith("loss")},
            "loss_steps": len(last),
            "seconds": self.seconds + self.clock.seconds(),
            "waited": self.clock.share_waited(),
            "broken": len(self.broken),
            "evaluations": self.evaluations,
        }

    def _precision(self) -> str:
        mixed = self.accelerator.mixed_precision
        return "fp32" if mixed == "no" else f"{mixed}, mixed"

    def _save_checkpoint(self) -> None:
        if self.accelerator.num_processes > 1:
            found = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(found, self.broken)
            self.broken = set().union(*found)
        state = {
            "step": self.step,
            "seconds": self.seconds + self.clock.seconds(),
            "broken": sorted(self.broken),
            "evaluations": self.evaluations.to_json(),
            **self._resume_invariants(),
        }
        with self.clock.paused():
            self.checkpoints.save(self.step, state, self._write_checkpoint)

    def _resume_invariants(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it."""
        plan = self.plan
        identity = {"images": plan.num_images, "images_per_step": plan.global_batch_size, "seed": plan.seed}
        if plan.num_images is None:
            identity["processes"] = plan.processes
        trained = [
            [name, *parameter.shape]
            for player in self.job.players
            for name, parameter in player.network.named_parameters()
            if parameter.requires_grad
        ]
        return identity | {
            "averaged weights": self.ema is not None,
            "shards": self.shards,
            "trained parameters": fingerprint(trained),
            "prediction type": self.job.pipeline.scheduler.config.prediction_type,
            "scaled gradients": self.accelerator.scaler is not None,
        }

    def _write_checkpoint(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if self.ema and (self.shards > 1 or self.accelerator.is_main_process):
            tensors = {str(i): tensor.contiguous() for i, tensor in enumerate(self.ema.shadow_params)}
            save_file(tensors, folder / self._ema_file())
        if self.accelerator.is_main_process and self.evaluations.best and (self.folder / _BEST).is_dir():
            copy_folder(self.folder / _BEST, folder / _BEST)
        if self.plan.num_images is None:
            (folder / self._stream_file()).write_text(json.dumps(self.position), encoding="utf-8")

    def _ema_file(self) -> str:
        return f"ema_{self.accelerator.process_index}.safetensors" if self.shards > 1 else "ema.safetensors"

    def _stream_file(self) -> str:
        return f"stream_{self.accelerator.process_index}.json"

    def _resume(self, checkpoint: Path) -> None:
        state = load_state(checkpoint)
        for name, value in self._resume_invariants().items():
            if state.get(name, value) != value:  # earlier versions saved fewer
                raise InputError(
                    f"{checkpoint} was made with {name} = {state[name]}, but this run has {value}, so it cannot go on "
                    "from there exactly. Keep the images, the network and what of it is trained, what it predicts, "
                    "--seed, --ema_decay, fp16 or not, and --batch_size x --grad_accumulation_steps x processes as "
                    "they were, or start another run from the saved model."
                )
        if state["step"] > self.total_steps:
            raise InputError(
                f"{checkpoint} is further than the {self.total_steps} steps that this run is to have. Give more with "
                "--max_train_steps or --num_epochs, or name an earlier checkpoint."
            )
        self.accelerator.load_state(str(checkpoint))
        for schedule, rates in zip(self.schedules, self.peak_rates, strict=True):
            _set_peak_rates(schedule.scheduler, rates)
        if self.ema:
            tensors = load_file(checkpoint / self._ema_file())
            self.ema.shadow_params = [tensors[str(i)].to(self.accelerator.device) for i in range(len(tensors))]
            self.ema.optimization_step = state["step"]
        if self.plan.num_images is None:
            self.position = json.loads((checkpoint / self._stream_file()).read_text(encoding="utf-8"))
        self.step, self.seconds, self.broken = state["step"], state["seconds"], set(state["broken"])
        self.evaluations = EvaluationHistory.from_json(state.get("evaluations", {}))  # earlier versions saved none
        self.accelerator.print(f"Going on from {checkpoint}, step {self.step} of {self.total_steps}.")


def _set_peak_rates(schedule: torch.optim.lr_scheduler.LambdaLR, rates: list[float]) -> None:
    """Put this run's learning rates in place of the checkpoint's, at the same point of their course."""
    schedule.base_lrs = rates
    for group, rate, course in zip(schedule.optimizer.param_groups, rates, schedule.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * course(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


@contextmanager
def _frozen(networks: Iterable[torch.nn.Module]):
    """Inside, the parameters of these networks need no gradients; gradients still pass through."""
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _in_words(row: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:g}"
        for name, value in row.items()
        if name.endswith(("loss", "grad_norm", "learning_rate"))
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclass
class _Logged:
    """A step that is not yet logged: numbers known here, sums over processes and norms, both still on the device."""

    row: dict[str, float]
    sums: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]


@dataclass
class _Clock:
    """Where the time of a run goes: training, waiting for data, and pauses for samples and saving."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    away: float = 0.0
    mark: tuple[float, int] = (0.0, 0)  # when, and after how many images, the speed was last asked for

    @contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.away += time.perf_counter() - start

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def share_waited(self) -> float:
        return self.waited / max(self.seconds() - self.away, 1e-9)

    def images_per_second(self, images: int) -> float:
        """Images trained on per second since the last call."""
        now = self.seconds() - self.away
        then, before = self.mark
        self.mark = (now, images)
        return (images - before) / max(now - then, 1e-9)
