"""Model card, summary and final upload of a run."""

import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, ModelMixin

from ..core.errors import InputError, RunError
from ..core.files import link_or_copy, replace_file, replace_folder
from ..core.locations import is_url, url_name
from ..core.run_files import PIPELINE_FILE
from ..evaluation.reporting import format_value, full_title, model_index_entries
from ..hub.cards import CardFacts, card_text, is_repo_id, replace_loaded, string_literal
from ..hub.folders import code_files, read_trained_steps
from ..hub.upload import BackgroundUpload, Repository, who_am_i
from ..sampling.loading import load_pipeline
from .arguments import RunArguments
from .evaluator import EvaluationHistory
from .plan import BatchPlan
from .progress import RunProgress
from .run_folder import RunFolder, step_of_grid
from .tracking import VALIDATION_LOSS, lowest_validation_loss, read_metrics

logger = logging.getLogger(__name__)

# arguments that do not belong on a card: local paths and upload settings
_PRIVATE = {"output_dir", "train_data_dir", "data_dir", "resume_from_checkpoint", "dry_run"}
_PRIVATE |= {"hub_model_id", "hub_private", "push_to_hub"}
_LOSS_STEPS = 100  # newest steps over which the losses on the card are averaged
# columns of metrics.csv as rows of the card
_LOSS_NAMES = {"loss": "training loss", "g_loss": "generator loss", "d_loss": "discriminator loss"}


@dataclass(frozen=True)
class RunFacts:
    """The facts of a run for its model card and its summary.

    Attributes:
        network: class and size of the network that is saved.
        image_size: size and channels of the images.
        step: optimizer steps taken, of `total_steps`.
        epochs: passes over the data.
        num_images: images in the data; None for a stream.
        global_batch_size: images in an optimizer step.
        processes: number of processes.
        precision: arithmetic precision of the training.
        hardware: name of the device.
        losses: by column, the means over the last `loss_steps` steps, which are of one stage of the run.
        validation: the newest validation loss and the lowest, if the run has any.
        seconds: total time, including the time before the run was resumed.
        waiting_share: share of the training time spent waiting for data.
        broken_images: images skipped because they cannot be read.
        evaluations: the newest and the best evaluation.
    """

    network: str
    image_size: str
    step: int
    total_steps: int
    epochs: float
    num_images: int | None
    global_batch_size: int
    processes: int
    precision: str
    hardware: str
    losses: dict[str, float]
    loss_steps: int
    validation: str | None
    seconds: float
    waiting_share: float
    broken_images: int
    evaluations: EvaluationHistory


@dataclass(frozen=True)
class FinishedRun:
    """The result of a training run.

    Attributes:
        folder: the run folder, which `from_pretrained` of the trained pipeline or model loads.
        facts: the facts of the run; None in processes other than the main one.
        card: the facts for the model card that the script knows; None like `facts`.
        upload: the outcome of the upload to the Hub, if there was one.
        overview: sizes, memory and disk space of a dry run, which ends before the first step, by name.
    """

    folder: Path
    facts: RunFacts | None = None
    card: CardFacts | None = None
    upload: str | None = None
    overview: dict[str, str] | None = None

    @property
    def files(self) -> RunFolder:
        """The paths of its files."""
        return RunFolder(self.folder)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, one for each optimizer step; values that a step does not have are NaN.

        With a validation loss there is also a row of step 0, which has no other loss.
        """
        return read_metrics(self.files.metrics)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The trained pipeline with its EMA weights, loaded from the folder into the memory of the CPU."""
        return load_pipeline(str(self.folder))


def collect_facts(
    folder: RunFolder,
    progress: RunProgress,
    plan: BatchPlan,
    total_steps: int,
    accelerator: Accelerator,
    network: str,
    image_size: str,
    held_out: int | None,
    last_stage: int,
) -> RunFacts:
    """Return the facts of a run so far; only the main process has its metrics.

    Args:
        network: class and size of the network that is saved.
        image_size: size and channels of the images.
        held_out: number of images held out for the validation loss.
        last_stage: the step at which the last stage begins; see `TrainingJob`.
    """
    step = progress.step
    all_rows = read_metrics(folder.metrics)
    rows = [row for row in all_rows[-_LOSS_STEPS:] if row["step"] > last_stage or step <= last_stage]
    columns = [name for name in (rows[0] if rows else {}) if name.endswith("loss") and name != VALIDATION_LOSS]
    return RunFacts(
        network=network,
        image_size=image_size,
        step=step,
        total_steps=total_steps,
        epochs=plan.epoch(step),
        num_images=plan.num_images,
        global_batch_size=plan.global_batch_size,
        processes=accelerator.num_processes,
        precision=describe_precision(accelerator),
        hardware=describe_hardware(accelerator),
        losses={
            name: fmean(values) for name in columns if (values := [row[name] for row in rows if not isnan(row[name])])
        },
        loss_steps=len(rows),
        validation=_describe_validation(all_rows, held_out) if held_out else None,
        seconds=progress.clock.total_seconds,
        waiting_share=progress.clock.waiting_share,
        broken_images=len(progress.broken),
        evaluations=progress.evaluations,
    )


def _describe_validation(rows: list[dict[str, float]], held_out: int) -> str | None:
    """Describe the newest validation loss in metrics.csv and the lowest; None if there is none."""
    lowest = lowest_validation_loss(rows)
    if lowest is None:
        return None
    newest = next(row for row in reversed(rows) if not isnan(row[VALIDATION_LOSS]))
    value, step = newest[VALIDATION_LOSS], int(newest["step"])
    more = "the lowest" if step == lowest[1] else f"lowest {lowest[0]:.4f} at step {lowest[1]:,}"
    images = "1 held-out image" if held_out == 1 else f"{held_out:,} held-out images"
    return f"{value:.4f} at step {step:,}, {more}; of {images}"


def describe_hardware(accelerator: Accelerator) -> str:
    """Return the name of the device that this process trains on."""
    device = accelerator.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores" if device.type == "cpu" else device.type.upper()


def describe_precision(accelerator: Accelerator) -> str:
    """Return the precision of the networks' arithmetic, for cards and protocols."""
    mixed = accelerator.mixed_precision
    return "fp32" if mixed == "no" else f"{mixed}, mixed"


def settings_for_card(*arguments: Any) -> dict[str, Any]:
    """Return the hyperparameters of a run by flag name, with local paths and URLs cut to their last part."""
    values = {name: value for part in arguments for name, value in asdict(part).items()}
    return {
        name: _without_folder(value) if isinstance(value, str) else value
        for name, value in values.items()
        if value is not None and name not in _PRIVATE
    }


def _without_folder(text: str) -> str:
    if is_url(text):
        return url_name(text)
    return Path(text).name if "/" in text and not is_repo_id(text) else text


def write_card(folder: RunFolder, card: CardFacts, facts: RunFacts) -> None:
    """Write the model card of a run from the facts of the script and those of the run."""
    data = f"{facts.num_images:,} images" if facts.num_images else "a stream"
    processes = "one process" if facts.processes == 1 else f"{facts.processes} processes"
    training: dict[str, Any] = {
        "network": facts.network,
        "image size": facts.image_size,
        "data": f"{card.dataset}, {data}",
        "trained for": f"{facts.step:,} of {facts.total_steps:,} optimizer steps"
        + (f", {_significant(facts.epochs)} epochs" if facts.num_images else ""),
        "global batch size": f"{facts.global_batch_size}, {processes}",
        **{
            _LOSS_NAMES.get(name, name): f"{loss:.4f}, mean of the last {facts.loss_steps} steps"
            for name, loss in facts.losses.items()
        },
        **({"validation loss": facts.validation} if facts.validation else {}),
        "hardware": f"{facts.hardware}, {facts.precision}",
        "time": f"{facts.seconds / 60:.1f} minutes",
    }
    if facts.broken_images:
        training["broken images skipped"] = facts.broken_images
    evaluations = facts.evaluations
    if evaluations.last:
        training["evaluations"] = f"{evaluations.count}, {evaluations.seconds / 60:.1f} minutes in total"
        card = replace(card, **_evaluation_for_card(evaluations, facts.step))
    grids = {folder.grid(facts.step, name): caption for name, caption in card.grids_after.items()}
    grids |= {folder.grid(0, name): caption for name, caption in card.grids_before.items()}
    is_last = facts.step == facts.total_steps  # a longer run still has the file of the shorter one before
    if len(grids) > 1 and is_last and folder.before_after.exists():  # shows them all
        grids = {folder.before_after: "Samples before and after training, from the same seeds."}
    captions = {
        **grids,
        folder.loss_plot: "Training loss.",
        folder.eval_plot: "Evaluations during training.",
    }
    samples = _existing(folder, _grid_for_card(folder, facts.step))
    images = {name: caption for name, caption in _existing(folder, captions).items() if name not in samples}
    card = replace(card, training=training, samples=samples, images=images, code=code_files(folder.path))
    text = card_text(card)
    # names of files and folders may have bytes that are not UTF-8
    replace_file(folder.card, lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def _significant(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"


def _existing(folder: RunFolder, captions: Mapping[Path, str]) -> dict[str, str]:
    """Return the captions of the existing images by their names relative to the folder."""
    return {path.relative_to(folder.path).as_posix(): caption for path, caption in captions.items() if path.exists()}


def _grid_for_card(folder: RunFolder, step: int) -> dict[Path, str]:
    """Return the newest grid up to a step, with a caption that names the grid's own step."""
    grid = folder.newest_grid(step)
    if grid is None:
        return {}
    grid_step = step_of_grid(grid)
    caption = f"Samples after {grid_step:,} optimizer steps" if grid_step else "Samples before training"
    if grid_step != step:
        caption += f"; these weights are from step {step:,}"
    return {grid: f"{caption}."}


def _evaluation_for_card(evaluations: EvaluationHistory, step: int) -> dict[str, Any]:
    """Return the card fields of the newest evaluation, which is of the saved weights only at the same step."""
    last, best = evaluations.last, evaluations.best
    assert last is not None and best is not None
    networks = (last.extractor, last.extractor)
    table = {
        full_title(key, *networks): format_value(metric)
        + (f" (floor: {format_value(last.floors[name])})" if name in last.floors else "")
        for key, metric in last.metrics.items()
        for name in [key.partition("@")[0]]
    }
    if best.step != step:
        table["best in the run"] = f"{best.summary()}, after {best.step:,} steps: `best/` in the run folder"
    protocol = [f"{part.replace('_', ' ').capitalize()}: {text}." for part, text in last.protocol.items()]
    notes = ["In parentheses: the floor (real-vs-real baseline), one half of the training images against the other."]
    if last.step != step:
        notes.append(f"These numbers are from step {last.step:,}, not from the weights here.")
    text = "\n\n".join([" ".join(notes + protocol), *(f"**Warning:** {warning}" for warning in last.warnings)])
    results = []
    if last.step == step:
        results = model_index_entries(last.metrics, last.dataset, last.split, last.protocol, *networks)
    return {"evaluation": table, "protocol": text, "results": results}


def write_best(folder: RunFolder, pipeline: DiffusionPipeline | ModelMixin, card: CardFacts, facts: RunFacts) -> None:
    """Replace `best/` of a run with this pipeline, the newest grid and a card of its own."""
    best_name = string_literal(folder.best.name)
    usage = replace_loaded(card.usage, lambda call, _: f"{call[1]}from_pretrained({best_name}")
    card = replace(card, title=f"{card.title}, best checkpoint", usage=usage)

    def write(temporary: Path) -> None:
        pipeline.save_pretrained(temporary)
        best = RunFolder(temporary)
        if grid := folder.newest_grid(facts.step):
            copy = best.grid(step_of_grid(grid))
            copy.parent.mkdir()
            link_or_copy(grid, copy)
        write_card(best, card, facts)

    replace_folder(folder.best, write)


def print_summary(run: FinishedRun) -> None:
    """Print the outcome of a run and its files; does nothing in processes other than the main one."""
    if run.overview:
        print("\n".join(["\nThis is a dry run: nothing was written.\n", *format_rows(run.overview)]))
    facts = run.facts
    if facts is None:
        return
    folder, evaluations = RunFolder(run.folder), facts.evaluations
    trust = ", trust_remote_code=True" if code_files(run.folder) else ""
    files = {"before, after": folder.before_after, "loss": folder.loss_plot, "evaluations": folder.eval_plot}
    lines = [
        f"\nReached step {facts.step} of {facts.total_steps} after {facts.seconds / 60:.1f} minutes.",
        f"{facts.waiting_share:.1%} of the training time was spent waiting for data.",
    ]
    if facts.broken_images:
        lines.append(f"Broken images skipped: {facts.broken_images}.")
    if evaluations.last:
        lines.append(f"Evaluations: {evaluations.count}, {evaluations.seconds / 60:.1f} minutes in total.")
    lines += ["", f"run folder     {run.folder}"]
    lines += format_rows({name: path for name, path in files.items() if path.exists()})
    if best := evaluations.best:
        lines.append(f"best model     {folder.best}: step {best.step}, {best.summary()}")
    if (run.folder / PIPELINE_FILE).exists():
        lines.append(f"load it with   pipe = diffusers.DiffusionPipeline.from_pretrained({str(run.folder)!r}{trust})")
        if not trust and (steps := read_trained_steps(run.folder)):  # the pipelines with code use this by default
            lines.append(f"sample with    image = pipe(num_inference_steps={steps[0]}).images[0]")
    if run.upload:
        lines.append(run.upload)
    print("\n".join(lines))


def format_rows(rows: Mapping[str, Any]) -> list[str]:
    """Return a line for each name and value, in two columns."""
    return [f"{name:<14} {value}" for name, value in rows.items()]


def repository_id(args: RunArguments) -> str:
    """Return the repository to upload a run to, `user/name`, which need not exist yet.

    Raises:
        InputError: if no user is logged in, the Hub does not respond, or the name is not valid.
    """
    with _naming_flag():
        user = who_am_i()
        repo_id = args.hub_model_id or args.model_save_name
        return Repository(repo_id if "/" in repo_id else f"{user}/{repo_id}").repo_id


def create_repository(repo_id: str, private: bool) -> None:
    """Create the repository of a run if it does not exist, once everything else of the run has been checked.

    Raises:
        InputError: if the Hub does not respond, or the repository cannot be created.
    """
    with _naming_flag():
        Repository(repo_id).open(private)


@contextmanager
def _naming_flag() -> Iterator[None]:
    try:
        yield
    except (InputError, RunError) as error:
        raise InputError(f"--push_to_hub: {error}") from error


def finish_upload(background: BackgroundUpload, args: RunArguments) -> str:
    """Upload a finished run folder and return a description of the outcome; a failure does not affect the run."""
    repository = background.repository
    logger.info("Uploading to %s", repository.url)
    try:
        return f"uploaded       {background.finish('Upload finished model').url}"
    except (Exception, KeyboardInterrupt) as error:  # in any case, the run is finished and saved
        command = ["--folder", args.output_dir, "--repo_id", repository.repo_id]
        command += ["--private"] if args.hub_private else []
        reason = str(error) or "The upload was interrupted."
        return (
            f"\n{reason}\nThe model is complete in {args.output_dir}; to finish the upload:\n"
            f"    ddgan push {shlex.join(command)}"
        )
