"""Choose the length of a run's EMA after training: measure samples of several lengths, and save the best pipeline."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from ..core.accelerator import start_accelerate
from ..core.errors import InputError, RunError, write_problem
from ..core.files import replace_folder
from ..core.locks import locked
from ..core.threads import one_thread_per_operation
from ..evaluation.extractors import ClassifierFeatures, FeatureExtractor
from ..evaluation.metrics import METRICS, available_metrics
from ..evaluation.references import Reference
from ..evaluation.reporting import check_card, format_value, full_title, metric_title, update_card
from ..evaluation.results import Results
from ..hub.arguments import CARD_NAME
from ..hub.cards import code_section, read_card, replace_loaded, string_literal, table
from ..hub.folders import code_files
from ..sampling.grids import image_grid
from ..sampling.groups import split_into_groups
from ..sampling.loading import load_pipeline
from ..training.posthoc_ema import EMASnapshots
from ..training.run_folder import RunFolder
from .arguments import ChooseEMAArguments
from .evaluate import PipelineSamples, load_references, measure, selected_extractor, user_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AS_SAVED = "as saved"  # the weights in the run folder, beside the lengths
PLOT, TABLE, GRID = "ema_lengths.png", "ema_lengths.json", "samples.png"
_GRID_IMAGES = 16

# parts of the card of a run that are about other weights: sample grids and plots with their captions, evaluations
_IMAGES = re.compile(r"^!\[[^]]*]\([^)]*\)\n\n\*.*\*\n\n", re.MULTILINE)
_EVALUATIONS = re.compile(r"^<!-- evaluation .*?<!-- end of evaluation \w+ -->\n*", re.MULTILINE | re.DOTALL)
_SECTIONS = re.compile(r"^## (?:Evaluation|Code)\b.*?(?=^## |^<details>|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class ChosenEMA:
    """The outcome of a comparison of EMA lengths.

    Attributes:
        folder: the pipeline with the best EMA.
        length: its length.
        step: the optimizer step of the EMAs.
        results: the results of every length, and those of the pipeline as the run has saved it (`None`).
        metric: key of the metric that selected the length, `name@images`.
    """

    folder: Path
    length: float
    step: int
    results: dict[float | None, Results]
    metric: str

    @property
    def metric_title(self) -> str:
        """Title of the metric that selected the length, with the network that measured it."""
        protocol = self.results[None].protocol
        classifier = protocol.classifier and protocol.classifier.name
        return full_title(self.metric, protocol.extractor.name, classifier)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline, loaded from its folder into the memory of the CPU."""
        return load_pipeline(str(self.folder))


def choose_ema(args: ChooseEMAArguments) -> ChosenEMA | None:
    """Compute the EMAs of several lengths, measure their samples, and save the best pipeline in the run folder.

    Returns:
        The outcome, in the main process.

    Raises:
        InputError: if the run has no snapshots, they do not determine the lengths, or the samples cannot be measured.
        RunError: if an image cannot be read, or a file cannot be written.
    """
    accelerator = start_accelerate()
    folder = RunFolder(str(args.run))
    if folder.posthoc.exists() and not (folder.posthoc / TABLE).is_file():
        raise InputError(
            f"{folder.posthoc}, where the pipeline with the chosen EMA is saved, exists and was not written by this "
            "command: rename it."
        )
    snapshots = EMASnapshots.open(folder)
    _check_lengths(args, snapshots)
    extractor = selected_extractor(args.evaluation(), accelerator)
    pipeline = load_pipeline(str(args.run), trust_remote_code=args.trust_remote_code)
    _check_network(pipeline, snapshots, folder)
    chosen = None
    if (card := folder.path / CARD_NAME).is_file():
        check_card(card)
    with locked(folder.path, accelerator, "--run"):
        evaluation = args.evaluation(pipeline)
        with one_thread_per_operation(accelerator.device) as threads, user_errors(RunError):
            samples = PipelineSamples(evaluation, accelerator)
            references = load_references(samples, extractor, evaluation, accelerator, threads)
        _check_metric(args, extractor, references[0])
        results: dict[float | None, Results] = {}
        for length in (None, *args.lengths):
            if length is not None:
                _set_weights(pipeline, snapshots, length)
            measured = measure(args.evaluation(pipeline), accelerator, extractor=extractor, references=references)
            if measured:
                key = _metric_key(args.best_metric, measured)
                results[length] = measured
                title = metric_title(key, measured.protocol.extractor.name)
                print(f"{_name(length)}: {title} {format_value(measured.metrics[key])}")
        if accelerator.is_main_process:
            chosen = _choose(args, folder, snapshots, results)
            _set_weights(pipeline, snapshots, chosen.length)
            samples = PipelineSamples(args.evaluation(pipeline), accelerator)
            groups = split_into_groups(min(_GRID_IMAGES, samples.count), samples.batch_size, samples.offset)
            with one_thread_per_operation(accelerator.device):
                grid = image_grid([image for group in groups for image in samples.sampler(group)])
            try:
                replace_folder(folder.posthoc, lambda path: _write(path, chosen, pipeline, grid, snapshots, folder))
            except OSError as error:
                raise RunError(
                    f"The pipeline cannot be written to {folder.posthoc}: {write_problem(error)}. Once the cause is "
                    "fixed, repeat the command: the samples that were measured are cached."
                ) from error
            _print_outcome(chosen)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return chosen


def _check_lengths(args: ChooseEMAArguments, snapshots: EMASnapshots) -> None:
    unsolvable = [f"{length:g}" for length in args.lengths if not snapshots.is_solvable(length)]
    if unsolvable:
        shortest, longest = snapshots.solvable_range()
        raise InputError(
            f"--lengths {' '.join(unsolvable)}: the {len(snapshots.files)} EMA snapshots in {args.run} determine only "
            f"EMAs with lengths from about {shortest:g} to {longest:g}. Pass --lengths in this range."
        )


def _check_metric(args: ChooseEMAArguments, extractor: FeatureExtractor, reference: Reference | None) -> None:
    """Check that the samples can be measured with the metric that selects the length."""
    inputs = set(extractor.metric_inputs)
    if args.class_labels is not None and (args.classifier or isinstance(extractor, ClassifierFeatures)):
        inputs.add("confusion")
    has_statistics = reference is not None and reference.facts.statistics is not None
    if has_statistics:
        inputs.discard("reference")
    measured = available_metrics(inputs)
    if args.best_metric not in measured:
        cause = "with the mean and covariance of the reference alone" if has_statistics else "with these flags"
        raise InputError(
            f"--best_metric is {args.best_metric}, which cannot be measured {cause} and {extractor.name}. These can: "
            f"{', '.join(measured)}."
        )


def _check_network(pipeline: DiffusionPipeline, snapshots: EMASnapshots, folder: RunFolder) -> None:
    """Check that the snapshots are of the network in the run folder."""
    parameters = {name: parameter.shape for name, parameter in pipeline.unet.named_parameters()}
    for name, shape in snapshots.shapes().items():
        if parameters.get(name) != shape:
            found = tuple(parameters[name]) if name in parameters else "no such parameter"
            raise InputError(
                f"The EMA snapshots in {folder.ema_snapshots} are of another network than the pipeline in "
                f"{folder.path}: their {name} has the shape {tuple(shape)}, but the pipeline has {found}."
            )


def _set_weights(pipeline: DiffusionPipeline, snapshots: EMASnapshots, length: float) -> None:
    parameters = dict(pipeline.unet.named_parameters())  # frozen ones keep their values
    with torch.no_grad():
        for name, weights in snapshots.weights(length).items():
            parameters[name].copy_(weights)


def _metric_key(name: str, results: Results) -> str:
    """Return the key `name@images` of a metric."""
    return next(key for key in results.metrics if key.partition("@")[0] == name)


def _choose(
    args: ChooseEMAArguments, folder: RunFolder, snapshots: EMASnapshots, results: dict[float | None, Results]
) -> ChosenEMA:
    metric = METRICS[args.best_metric]
    key = _metric_key(args.best_metric, results[None])
    best = args.lengths[0]
    for length in args.lengths:
        if metric.is_better(results[length].metrics[key].value, results[best].metrics[key].value):
            best = length
    return ChosenEMA(folder.posthoc, best, snapshots.step, results, key)


def _name(length: float | None) -> str:
    return AS_SAVED if length is None else f"length {length:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _write(
    path: Path,
    chosen: ChosenEMA,
    pipeline: DiffusionPipeline,
    grid: Image.Image,
    snapshots: EMASnapshots,
    folder: RunFolder,
) -> None:
    """Write the pipeline, its samples, its card, and the comparison of the lengths into a folder."""
    pipeline.save_pretrained(path)
    grid.save(path / GRID)
    _plot(chosen).savefig(path / PLOT, dpi=110)
    values = {
        _name(length): {key: metric.to_json() for key, metric in results.metrics.items()}
        for length, results in chosen.results.items()
    }
    best = chosen.results[chosen.length]
    content = {
        "length": chosen.length,
        "metric": chosen.metric,
        "step": chosen.step,
        "snapshots": len(snapshots.files),
        "metrics": values,
        **best.protocol.as_dict(),
        "warnings": best.warnings,
    }
    (path / TABLE).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    card = path / "README.md"
    card.write_text(_card(chosen, snapshots, folder, path), encoding="utf-8", errors="replace")
    update_card(card, best)


def _card(chosen: ChosenEMA, snapshots: EMASnapshots, folder: RunFolder, path: Path) -> str:
    """Return the model card of a run with what it says about other weights replaced by the chosen EMA."""
    card = read_card(folder.path)
    for pattern in (_EVALUATIONS, _SECTIONS, _IMAGES):
        card = pattern.sub("", card)
    folder_name = string_literal(folder.posthoc.name)
    card = replace_loaded(card, lambda call, _: f"{call[1]}from_pretrained({folder_name}")
    title = f"{folder.path.resolve().name}, EMA length {chosen.length:g}"
    card, found = re.subn(r"^# .*$", lambda _: f"# {title}", card, count=1, flags=re.MULTILINE)
    if not found:  # somebody has removed or replaced the card of the run
        card = f"{card.rstrip()}\n\n# {title}\n".lstrip()
    samples = "Samples of consecutive seeds, generated like those of the evaluation below."
    head, heading, rest = card.partition("\n## ")
    card = f"{head.rstrip()}\n\n![{samples}]({GRID})\n\n*{samples}*\n{heading}{rest}"
    model_card = ModelCard(card)
    model_card.data.eval_results, model_card.data.model_name = None, title
    sections = [str(model_card).rstrip(), _section(chosen, snapshots)]
    if code := code_files(path):
        sections.append(code_section(code))
    return "\n\n".join(sections) + "\n"


def _section(chosen: ChosenEMA, snapshots: EMASnapshots) -> str:
    """Return the section of the card about the choice."""
    rows = {
        _name(length): format_value(results.metrics[chosen.metric]) + (" (chosen)" if length == chosen.length else "")
        for length, results in chosen.results.items()
    }
    title = chosen.metric_title
    caption = f"{title} by EMA length."
    return (
        "## EMA length\n\nThe weights are an EMA with a power function "
        f"([arXiv 2312.02696](https://arxiv.org/abs/2312.02696)) at step {chosen.step:,}, with a standard deviation "
        f"of {chosen.length:g} times the number of steps, computed after training from {len(snapshots.files)} "
        f"snapshots. This length was selected by {title} among those below, where `{AS_SAVED}` are the weights that "
        f"the run itself saved. The protocol is that of the evaluation below.\n\n{table(rows)}\n\n"
        f"![{caption}]({PLOT})\n\n*{caption}*"
    )


def _plot(chosen: ChosenEMA) -> "Figure":
    """Plot the metric over the lengths, with the weights as saved and the floor as lines."""
    from matplotlib.figure import Figure

    lengths = [length for length in chosen.results if length is not None]
    values = [chosen.results[length].metrics[chosen.metric].value for length in lengths]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, values, "o-", markersize=4)
    axes.plot(chosen.length, values[lengths.index(chosen.length)], "*", color="C1", markersize=13, label="chosen")
    saved = chosen.results[None]
    axes.axhline(saved.metrics[chosen.metric].value, color="C2", linewidth=1, label=AS_SAVED)
    if floor := saved.floors.get(chosen.metric.partition("@")[0]):
        axes.axhline(floor.value, color="0.6", linestyle="--", linewidth=1, label="floor (halves of the reference)")
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("EMA length (standard deviation relative to the steps of the run)")
    axes.set_ylabel(chosen.metric_title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _print_outcome(chosen: ChosenEMA) -> None:
    """Print all headline metrics by length, the warnings, and the files."""
    shown = [
        key
        for key in chosen.results[None].metrics
        if METRICS[key.partition("@")[0]].is_headline or key == chosen.metric
    ]
    extractor = chosen.results[None].protocol.extractor.name
    rows = [["", *(metric_title(key, extractor) for key in shown)]]
    for length, results in chosen.results.items():
        mark = " *" if length == chosen.length else ""
        rows.append([_name(length) + mark, *(format_value(results.metrics[key]) for key in shown)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for warning in chosen.results[chosen.length].warnings:
        print(f"\nwarning: {warning}")
    print(f"\npipeline with the EMA of length {chosen.length:g}: {chosen.folder}")
    print(f"all metrics with their protocol: {chosen.folder / TABLE}")
    print(f"curve: {chosen.folder / PLOT}")
