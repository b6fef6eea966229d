"""The training loop, independent of what is trained."""

import logging
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..core.cli import changed_values, write_config
from ..core.errors import RunError, write_problem
from ..core.files import replace_file, replace_tree
from ..core.locks import locked
from ..hub.upload import BackgroundUpload
from .arguments import RunArguments
from .checkpoints import BestPipeline, Checkpoints, PreparedState, StreamPosition, resume_invariants
from .evaluator import Evaluation, Evaluator
from .job import Sampler, TrainedNetwork, TrainingJob
from .loading import Batch, TrainingData
from .model_card import (
    FinishedRun,
    RunFacts,
    collect_facts,
    create_repository,
    describe_precision,
    finish_upload,
    write_best,
    write_card,
)
from .objectives.micro_batch import MicroBatch
from .overview import count_parameters, describe_size, format_duration, opening, overview, saved_bytes
from .posthoc_ema import PosthocEMA
from .progress import RunProgress
from .randomness import PerSampleRNG, fold_in
from .run_folder import RunFolder
from .sample_grids import sample_grid
from .sharding import full_tensor, gather_pipeline, local_shards, original_class
from .step_log import StepLog
from .stopping import RunStopped, StopRequest
from .tracking import (
    VALIDATION_LOSS,
    MetricsFile,
    log_image,
    lowest_validation_loss,
    plot_evaluations,
    plot_losses,
    read_metrics,
    start_trackers,
)

_LOG_EVERY = 10  # optimizer steps whose numbers are read back from the device together

logger = logging.getLogger(__name__)


@dataclass
class _Prepared:
    """A network of the job, its optimizer and its learning-rate schedule as Accelerate has wrapped them."""

    spec: TrainedNetwork
    model: Any
    optimizer: Any
    lr_schedule: Any

    def column(self, name: str) -> str:
        """Return the name of a column of this network in metrics.csv."""
        return f"{self.spec.name}_{name}" if self.spec.name else name


class Trainer:
    """Runs a job from its first or resumed step to the last.

    In each step every process trains on its shard of a global batch of `batch_size x grad_accumulation_steps x
    processes` images. The gradient is that of the mean loss over the global batch, also if the last global batch of an
    epoch is short.

    Creating a trainer places the networks on their devices but writes no files; `train` does.

    Args:
        job: the networks, losses and optimizers.
        data: the training images.
        args: the length of the run, and what it logs and saves.
        accelerator: prepares the networks and connects the processes.
        evaluator: measures samples during training.
        repo_id: the repository to upload to, in the main process.
    """

    def __init__(
        self,
        job: TrainingJob,
        data: TrainingData,
        args: RunArguments,
        accelerator: Accelerator,
        evaluator: Evaluator | None = None,
        repo_id: str | None = None,
    ):
        self.job, self.data, self.args, self.accelerator = job, data, args, accelerator
        self.evaluator, self.repo_id = evaluator, repo_id
        self.plan = data.plan
        self.folder = RunFolder(args.output_dir)
        if job.sampler:
            # raises an error before anything is written if it cannot be sampled
            job.sampler.protocol(job.pipeline)  # pyright: ignore[reportArgumentType]
        self.total_steps = data.total_steps(args)

        self.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.networks: list[_Prepared] = []
        peak_rates = [[group["lr"] for group in spec.optimizer.param_groups] for spec in job.networks]
        for spec in job.networks:
            spec.network.train().to(memory_format=self.memory_format)
            if args.compile:
                spec.network.compile()
            lr_schedule = spec.lr_schedule(spec.optimizer, self.total_steps - spec.first_step)
            self.networks.append(_Prepared(spec, *accelerator.prepare(spec.network, spec.optimizer, lr_schedule)))
        job.ema.prepare(accelerator)
        self.posthoc_ema = PosthocEMA(job.ema.network, args, self.total_steps)
        self.posthoc_ema.prepare(accelerator)

        self.progress = RunProgress(accelerator)
        self.position = StreamPosition(accelerator, streaming=self.plan.num_images is None)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints,
            args.checkpoints_total_limit,
            accelerator,
            parts=[
                self.progress,
                PreparedState(accelerator, [network.lr_schedule for network in self.networks], peak_rates),
                job.ema,
                self.posthoc_ema,
                self.position,
                BestPipeline(accelerator, self.folder, self.progress),
            ],
            invariants=resume_invariants(job, self.plan, accelerator, args.posthoc_ema),
        )
        self.step_log = StepLog(accelerator, self.plan, self.checkpoints)
        self.logged_steps, self.time_is_estimated = 0, False
        self.checked_step: int | None = None  # whose weights are known to be finite
        # opened by `train`, the first two only in the main process
        self.metrics: MetricsFile | None = None
        self.lowest_validation: tuple[float, int] | None = None  # the value, and its step
        self.upload: BackgroundUpload | None = None
        self.stop: StopRequest
        self.bar: tqdm

    # -----------------------------------------------------------------------------------------------------------------
    # Lifecycle of a run

    def train(self) -> FinishedRun:
        """Train to the last step, and save the pipeline, its samples and its card, with the run folder locked.

        Raises:
            InputError: if another command is writing to the run folder, the run cannot resume from the checkpoint, a
                tracker does not start, or the Hub refuses the repository.
            RunError: if a loss is not finite, an image is broken, or files cannot be read or written.
            RunStopped: on SIGTERM, SIGUSR1 or Ctrl-C, after saving a checkpoint.
        """
        with locked(self.folder.path, self.accelerator):
            return self._train()

    def preview(self) -> FinishedRun:
        """Do everything up to the first step without writing anything, and describe the run.

        Raises:
            InputError: if the run cannot resume from the checkpoint.
            RunError: if an image of the first step cannot be read.
        """
        self.folder.check_usable(resuming=bool(self.args.resume_from_checkpoint))
        checkpoint = (
            self.checkpoints.find(self.args.resume_from_checkpoint) if self.args.resume_from_checkpoint else None
        )
        step = self.checkpoints.check(checkpoint, self.total_steps) if checkpoint else 0
        with closing(self.data.batches(0, 1, None)) as batches:
            batch = next(batches)
        activations = None if self.job.prepare else [self._activations(i, batch) for i in range(len(self.networks))]
        rows = overview(
            self.job, self.data, self.args, self.total_steps, self.accelerator, self.posthoc_ema, step, activations
        )
        return FinishedRun(self.folder.path, overview=rows if self.accelerator.is_main_process else None)

    def _activations(self, index: int, batch: Batch) -> int:
        """Return the bytes that the loss of one network keeps for the backward pass of a micro-batch.

        They grow linearly with the number of images, from what is kept once, such as weights in another precision.
        """
        network, device = self.networks[index], self.accelerator.device
        assert batch.images is not None
        others = [other.spec.network for other in self.networks if other is not network]
        kept = []
        for copies in ([0], [0, 0]):
            labels = None if batch.labels is None else batch.labels[copies].to(device)
            rng = PerSampleRNG([batch.keys[0]] * len(copies), device, index)
            images = batch.images[copies].to(device).contiguous(memory_format=self.memory_format)
            loss = partial(network.spec.objective, network.model, MicroBatch(images, labels, rng, 0))
            with _frozen(others), self.accelerator.no_sync(network.model):
                kept.append(saved_bytes(loss, [other.spec.network for other in self.networks]))
        of_one, of_two = kept
        return of_one + (self.args.batch_size - 1) * (of_two - of_one)

    def _train(self) -> FinishedRun:
        try:
            self._start()
            self._run_until_stopped()
        except BaseException as error:
            # after an error in one of several processes, the others would not join in
            if self.accelerator.num_processes == 1 or isinstance(error, RunStopped):
                self.accelerator.end_training()
            raise
        self.accelerator.end_training()
        return self._finish()

    def _run_until_stopped(self) -> None:
        try:
            with StopRequest(self.accelerator) as self.stop:
                self._run_steps()
        except RunStopped as stopped:
            logger.warning(
                f"Stopped by {stopped.signal_name} after step {self.progress.step}. Saved: {self.checkpoints.last()}. "
                "Resume with --resume_from_checkpoint latest."
            )
            raise
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"The run in {self.folder.path} failed: {write_problem(error)}. The last good checkpoint is "
                f"{self.checkpoints.last()}. Once the cause is fixed, resume with --resume_from_checkpoint latest."
            ) from error

    def _start(self) -> None:
        """Resume from a checkpoint if requested, and open the outputs of the run."""
        args, is_main = self.args, self.accelerator.is_main_process
        self.folder.check_usable(resuming=bool(args.resume_from_checkpoint))  # another run may have ended meanwhile
        self.accelerator.wait_for_everyone()
        checkpoint = self.checkpoints.find(args.resume_from_checkpoint) if args.resume_from_checkpoint else None
        step = self.checkpoints.check(checkpoint, self.total_steps) if checkpoint else 0
        if args.resume_from_checkpoint and checkpoint is None:
            logger.info(f"There is no checkpoint in {self.folder.checkpoints} yet: a new run starts.")
        if is_main:
            self.folder.remove_leftovers()
        start_trackers(self.accelerator, args, {k: v for part in self.job.arguments for k, v in vars(part).items()})
        if self.repo_id:
            create_repository(self.repo_id, args.hub_private)
        self.progress.clock.start(self.plan.images_seen(step))
        with self.progress.clock.paused():
            if step < self.total_steps and self.job.prepare:
                self.job.prepare(self.folder)
            if checkpoint:
                self.checkpoints.load(checkpoint)
                if step < self.total_steps:
                    logger.info(f"Resuming from {checkpoint}, step {step} of {self.total_steps}.")
                else:
                    logger.info(
                        f"The run in {self.folder.path} is complete: all {step:,} steps are done. Choose another "
                        "--output_dir for a new run, or raise --num_epochs or --max_train_steps to continue this one."
                    )
                if changes := changed_values(self.folder.config, *self.job.arguments):
                    logger.info(f"Settings changed since the last start: {', '.join(changes)}.")
        if is_main:
            self.checkpoints.set_aside_damaged()
            self.checkpoints.remove_after(step)
            self.posthoc_ema.remove_after(step)  # after the checkpoints that need them
            self._write_config()
            self.metrics = MetricsFile(self.folder.metrics, step)
            self.lowest_validation = lowest_validation_loss(read_metrics(self.folder.metrics))
        self.upload = BackgroundUpload(self.folder.path, self.repo_id) if self.repo_id else None
        logger.info(opening(self.job, self.data, self.total_steps, self.accelerator))

    def _run_steps(self) -> None:
        """Train to the last step, with everything that is due along the way.

        Methods that write files first call `_check_weights`, which raises if a loss or a weight is not finite, so
        nothing is overwritten.
        """
        args = self.args
        due, step = self._samplers_due(), self.progress.step
        # a resumed run has its grid already; that of step 0 may be of an earlier attempt
        self._save_samples({name: due[name] for name in due if not (step and self.folder.grid(step, name).exists())})
        batches = self.data.batches(self.progress.step, self.total_steps, self.position.value)
        # closing ends the data loader workers; messages are printed above the progress bar
        with closing(batches), self._progress_bar() as self.bar, logging_redirect_tqdm(tqdm_class=tqdm):
            try:
                # the run may have been stopped at this step, before or during these
                self._save_ema_snapshot()
                if self._validation_due():
                    self._validate()
                if self._evaluation_due():
                    self._evaluate()
                while self.progress.step < self.total_steps:
                    self._train_step(batches)
                    self.bar.update()
                    self.stop.raise_if_requested()
                    if self._due(_LOG_EVERY):
                        self._log()
                    self._save_ema_snapshot()
                    if self._validation_due():
                        self._validate()
                    # before the evaluation, whose best pipeline is shown with this grid
                    self._save_samples(self._samplers_due())
                    if self._evaluation_due():
                        self._evaluate()
                    if self._due(args.checkpointing_steps) or self._is_last_step():
                        self._save_checkpoint()
                    if self._due(args.save_model_every) and not self._is_last_step():
                        self._save_model()
            except RunStopped:
                self._save_checkpoint()
                raise
        self._save_model()

    def _finish(self) -> FinishedRun:
        """In the main process, let the script add to the run and its card, rewrite the card and upload."""
        if not self.accelerator.is_main_process:
            return FinishedRun(self.folder.path)
        self.job.finish(self.folder, self.progress.step)
        facts = self._facts()
        write_card(self.folder, self.job.card, facts)
        upload = finish_upload(self.upload, self.args) if self.upload else None
        return FinishedRun(self.folder.path, facts, self.job.card, upload)

    # -----------------------------------------------------------------------------------------------------------------
    # A step

    def _train_step(self, batches: Iterator[Batch]) -> None:
        step, accelerator = self.progress.step, self.accelerator
        global_batch = self._read_global_batch(batches)
        # the network's own random numbers (dropout) depend only on step and process; seeded after the data loader,
        # which uses the same generator
        torch.manual_seed(fold_in(self.plan.seed, step, -1 - accelerator.process_index))
        scale = 1 / self.plan.global_batch(step)[2]
        device = accelerator.device
        inputs = [self._on_device(batch) for batch in global_batch]
        rates: dict[str, float] = {}
        sums: dict[str, torch.Tensor] = {}
        norms: dict[str, torch.Tensor] = {}
        for stream, network in enumerate(self.networks):
            if step < network.spec.first_step:
                continue
            if (step - network.spec.first_step) % network.spec.interval:
                network.lr_schedule.step()
                continue
            model = network.model
            with _frozen(other.spec.network for other in self.networks if other is not network):
                for i, batch in enumerate(global_batch):
                    micro_batch = MicroBatch(*inputs[i], PerSampleRNG(batch.keys, device, stream), step)
                    with accelerator.no_sync(model) if i + 1 < len(global_batch) else nullcontext():
                        values = network.spec.objective(model, micro_batch)
                        values = {name: value.sum() * (batch.weight * scale) for name, value in values.items()}
                        # gradients are averaged over processes, but the mean over the global batch is a sum over them
                        accelerator.backward(values["loss"] * accelerator.num_processes)
                    for name, value in values.items():
                        column = network.column(name)
                        sums[column] = sums.get(column, 0) + value.detach()
            norm = accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or torch.inf)
            norms[network.column("grad_norm")] = full_tensor(norm)  # pyright: ignore[reportArgumentType]
            network.optimizer.step()
            network.optimizer.zero_grad()
            rates[network.column("learning_rate")] = network.lr_schedule.get_last_lr()[0]
            network.lr_schedule.step()
        self.job.ema.step()
        self.progress.step += 1
        self.posthoc_ema.step(self.progress.step)
        self.step_log.add(self.progress.step, rates, sums, norms)

    def _read_global_batch(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return this process's micro-batches of the next step."""
        with self._saved_before_failing(), self.progress.clock.waiting():
            global_batch = [next(batches) for _ in range(self.plan.micro_batches(self.progress.step))]
        self.position.value = global_batch[-1].position
        self.progress.broken.update(name for batch in global_batch for name in batch.broken)
        return global_batch

    @contextmanager
    def _saved_before_failing(self) -> Iterator[None]:
        """Save a checkpoint if an image cannot be read within the context."""
        try:
            yield
        except RunError:
            if self.accelerator.num_processes == 1:  # the other processes would not join the save
                self._save_checkpoint()
            raise

    def _log(self) -> None:
        """Read back the numbers of the steps since the last call, check them, and log them."""
        rows = self.step_log.read()
        if not rows:
            return
        newest = rows[-1]
        speed = self.progress.clock.images_per_second(int(newest["images"]))
        self.logged_steps += len(rows)
        self._estimate_time(speed)
        if self.metrics:
            if not self.folder.config.exists():
                logger.warning(
                    f"{self.folder.path} was removed or renamed during the run, which continues to write to it."
                )
                self._write_config()
            self.metrics.append(rows)
        # the newest value of each column: some, such as a lazy penalty, have none at most steps
        tracked = {
            name: value for row in rows for name, value in row.items() if name != "step" and not math.isnan(value)
        }
        self.accelerator.log(tracked | {"images_per_second": speed}, step=self.progress.step)
        rate = next(value for name, value in newest.items() if name.endswith("learning_rate"))
        self.bar.set_postfix(
            {name: f"{value:.4f}" for name, value in newest.items() if name.endswith("loss")}
            | {"lr": f"{rate:.1e}", "images/s": f"{speed:.1f}"}
            | ({"broken": len(self.progress.broken)} if self.progress.broken else {})
        )
        if (warning := self.job.monitor(rows)) and self.accelerator.is_main_process:
            self.bar.write(warning)

    def _estimate_time(self, speed: float) -> None:
        """Log, once, how long the remaining steps will take at this speed, in images per second."""
        remaining = self.plan.images_seen(self.total_steps) - self.plan.images_seen(self.progress.step)
        if self.time_is_estimated or self.logged_steps < _LOG_EVERY or not remaining:
            return
        self.time_is_estimated = True
        validation = ", validation losses" if self.data.validation_plan else ""
        evaluations = ", evaluations" if self.evaluator else ""
        logger.info(
            f"The remaining steps will take about {format_duration(remaining / speed)}, without sample "
            f"grids{validation}{evaluations} and saves."
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Cadence

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _is_last_step(self) -> bool:
        return self.progress.step == self.total_steps

    def _samplers_due(self) -> dict[str, Sampler]:
        """Return the samplers of the grids of this step, by name; the ordinary grid has the name ""."""
        job, step = self.job, self.progress.step
        if job.sampler is None:
            return {}
        ordinary: dict[str, Sampler] = {"": partial(job.sampler, job.pipeline)}  # pyright: ignore[reportArgumentType]
        if step == 0:
            return ordinary | job.start_samplers
        if self._is_last_step():
            return ordinary | job.final_samplers
        return ordinary if self._due(self.args.log_samples_every) else {}

    def _validation_due(self) -> bool:
        if self.data.validation_plan is None:
            return False
        return self._due(self.data.validation_every) or self._is_last_step()  # also at step 0, before training

    def _evaluation_due(self) -> bool:
        if self.evaluator is None:
            return False
        return self.evaluator.due(self.progress.step, self.total_steps, self.progress.evaluations)

    # -----------------------------------------------------------------------------------------------------------------
    # Samples, validation losses, evaluations and saves

    def _save_samples(self, samplers: dict[str, Sampler]) -> None:
        """Sample the fixed seeds of the run with the EMA weights, then save and log a grid for each sampler."""
        if not samplers:
            return
        self._check_weights()
        step = self.progress.step
        for name, sampler in samplers.items():
            with self.progress.clock.paused():
                with self.job.ema.applied():
                    grid = sample_grid(sampler, self.job, self.args, self.accelerator)
                if grid is not None:
                    replace_file(self.folder.grid(step, name), grid.save)
                    log_image(self.accelerator, f"samples{name and f'_{name}'}", grid, step)

    @torch.no_grad()
    def _validate(self) -> None:
        """Compute the loss of the EMA weights on the held-out images, with the same random numbers each time.

        Raises:
            RunStopped: if a stop was requested; the resumed run repeats the computation.
        """
        self._check_weights()
        step = self.progress.step
        with (
            self.progress.clock.paused(),
            self._saved_before_failing(),
            self.job.ema.applied(),
            closing(self.data.validation_batches()) as batches,
        ):
            loss = self.accelerator.reduce(sum(self._validation_losses(batches)), reduction="sum")
        value = loss.item() / self.data.validation_samples  # pyright: ignore[reportAttributeAccessIssue]
        self.accelerator.log({VALIDATION_LOSS: value}, step=step)
        if self.metrics:
            first: dict[str, float] = {} if step else {"epoch": 0.0, "images": 0}  # a row of its own
            self.metrics.amend(first | {VALIDATION_LOSS: value})
            if self.lowest_validation is None or value < self.lowest_validation[0]:
                self.lowest_validation = value, step
            lowest, at = self.lowest_validation
            best = ", the lowest so far" if at == step else f" (lowest: {lowest:.4f}, step {at})"
            self.bar.write(f"step {step}: validation loss {value:.4f}{best if step else ', before training'}")

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the images of a micro-batch, in the memory format of the networks, and its labels on the device."""
        assert batch.images is not None
        device = self.accelerator.device
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        return batch.images.to(device, non_blocking=True).contiguous(memory_format=self.memory_format), labels

    def _validation_losses(self, batches: Generator[Batch, None, None]) -> Iterator[torch.Tensor]:
        """Iterate over the sums of the losses of this process's micro-batches."""
        network, device = self.networks[0], self.accelerator.device
        for batch in batches:
            self.stop.raise_if_requested()
            micro_batch = MicroBatch(*self._on_device(batch), PerSampleRNG(batch.keys, device), self.progress.step)
            self.progress.broken.update(batch.broken)
            yield network.spec.objective(network.model, micro_batch)["loss"].sum() * batch.weight

    def _evaluate(self) -> None:
        """Measure samples of the EMA weights, log the results, and keep the pipeline if it is the best so far.

        Raises:
            RunStopped: if a stop was requested; the resumed run repeats the evaluation.
        """
        self._check_weights()
        step, pipeline, sampler = self.progress.step, self.job.pipeline, self.job.sampler
        evaluations, clock, is_main = self.progress.evaluations, self.progress.clock, self.accelerator.is_main_process
        evaluator, start = self.evaluator, clock.seconds
        assert sampler is not None and evaluator is not None  # otherwise no evaluation is due
        with clock.paused():
            with self.job.ema.applied():
                sampling_protocol = {
                    "weights": "averaged (EMA)" if self.job.ema.enabled else "as trained",
                    **sampler.protocol(pipeline),  # pyright: ignore[reportArgumentType]
                    "dtype": describe_precision(self.accelerator),
                }
                evaluation = evaluator.measure(
                    partial(sampler, pipeline),  # pyright: ignore[reportArgumentType]
                    step,
                    sampling_protocol,
                    self.stop.raise_if_requested,
                )
                seconds = clock.seconds - start
                is_best = evaluations.add(evaluation, seconds)
                if is_best:
                    gathered = gather_pipeline(pipeline, self.accelerator)
                    if is_main:
                        write_best(self.folder, gathered, self.job.card, self._facts())
            if self.metrics:
                self.metrics.amend(evaluation.values())
            self.accelerator.log(evaluation.values() | {"evaluation_seconds": seconds}, step=step)
            self.accelerator.wait_for_everyone()
        if is_main:
            earlier_best = None if is_best else evaluations.best
            best = f" (best: step {earlier_best.step})" if earlier_best else ", the best so far"
            self.bar.write(f"step {step}: {evaluation.summary()}{best}; it took {seconds:.0f} s")
            for warning in evaluation.warnings if evaluations.count == 1 else ():
                self.bar.write(f"warning: {warning}")
            monitor = self.job.evaluation_monitor
            if monitor and (warning := monitor(evaluation, self._earlier_evaluations(evaluation))):
                self.bar.write(warning)

    def _earlier_evaluations(self, evaluation: Evaluation) -> list[dict[str, float]]:
        """Return the rows of metrics.csv with the evaluations before this one that are comparable with it."""
        steps = range(self.progress.evaluations.since, evaluation.step)
        rows = [row for row in read_metrics(self.folder.metrics) if row["step"] in steps]
        return [row for row in rows if not any(math.isnan(row.get(key, math.nan)) for key in evaluation.metrics)]

    def _save_ema_snapshot(self) -> None:
        """Write a snapshot of the EMAs of `--posthoc_ema` at the steps that have one."""
        if self.progress.step in self.posthoc_ema.snapshot_steps:
            self._check_weights()
            with self.progress.clock.paused():
                self.posthoc_ema.save_snapshot(self.progress.step)

    def _save_checkpoint(self) -> None:
        self._check_weights()
        with self.progress.clock.paused():
            self.checkpoints.save(self.progress.step)

    def _save_model(self) -> None:
        """Write the pipeline with its EMA weights, the plots and the card into the run folder."""
        self._check_weights()
        with self.progress.clock.paused():
            self.accelerator.wait_for_everyone()
            with self.job.ema.applied():
                pipeline = gather_pipeline(self.job.pipeline, self.accelerator)
                if self.accelerator.is_main_process:
                    replace_tree(self.folder.path, pipeline.save_pretrained)
            if self.accelerator.is_main_process:
                plot_losses(self.folder.metrics, self.folder.loss_plot, self.job.last_stage)
                if self.progress.evaluations.last:
                    plot_evaluations(self.folder.metrics, self.folder.eval_plot, self.progress.evaluations)
                write_card(self.folder, self.job.card, self._facts())
                if self.upload and not self._is_last_step():
                    self.upload.push(f"Step {self.progress.step} of {self.total_steps}")
            self.accelerator.wait_for_everyone()

    def _check_weights(self) -> None:
        """Log the steps so far, and check the weights that the last one has left; every process must call this.

        Raises:
            RunError: if a loss or a weight is not finite.
        """
        self._log()
        if self.checked_step == self.progress.step:
            return
        weights = [p for network in self.networks for p in local_shards(network.spec.network.parameters())]
        weights += self.job.ema.weights()
        broken = sum((~tensor.isfinite().all()).float() for tensor in weights)
        if self.accelerator.reduce(broken, reduction="sum") > 0:  # pyright: ignore[reportOperatorIssue]
            raise RunError(
                f"The weights after step {self.progress.step} are not finite. Nothing was overwritten. The last good "
                f"checkpoint is {self.checkpoints.last()}. A lower learning rate usually helps; resume with "
                "--resume_from_checkpoint latest."
            )
        self.checked_step = self.progress.step

    def _write_config(self) -> None:
        replace_file(self.folder.config, lambda path: write_config(path, *self.job.arguments))

    def _facts(self) -> RunFacts:
        network = self.job.ema.network
        return collect_facts(
            self.folder,
            self.progress,
            self.plan,
            self.total_steps,
            self.accelerator,
            network=f"{original_class(network).__name__}, {count_parameters(network)[1]:,} parameters",
            image_size=describe_size(self.data.preprocessing),
            held_out=self.data.validation_plan and self.data.validation_plan.num_images,
            last_stage=self.job.last_stage,
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.total_steps,
            initial=self.progress.step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        )


@contextmanager
def _frozen(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the context, the parameters of these networks need no gradients; gradients still flow through them."""
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
