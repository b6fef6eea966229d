"""What a run leaves for people: its model card, a report on where things are, and its uploads."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..core.errors import InputError, RunError
from ..core.files import link_or_copy, replace_file, replace_folder
from ..evaluation.report import eval_results, number, title
from ..hub.cards import CARD_NAME, CardFacts, card_text, is_repo_id
from ..hub.folders import code_files
from ..hub.upload import BackgroundUpload, Repository, who_am_i
from .arguments import RunArguments
from .evaluator import EvaluationHistory

# what is the user's own affair: places on the machine, and where the model goes
_PRIVATE = {"output_dir", "train_data_dir", "resume_from_checkpoint", "hub_model_id", "hub_private", "push_to_hub"}


def settings_for_card(*arguments: Any) -> dict[str, Any]:
    """The hyper-parameters of a run by their flags' names; local paths are given by their last part."""
    values = {name: value for part in arguments for name, value in asdict(part).items()}
    return {
        name: Path(value).name if isinstance(value, str) and not is_repo_id(value) and "/" in value else value
        for name, value in values.items()
        if value is not None and name not in _PRIVATE
    }


def write_card(folder: Path, card: CardFacts, facts: dict[str, Any]) -> None:
    """Write the model card of a run folder: what the script says of the model, and the facts of the run."""
    images = f"{facts['images']:,} images" if facts["images"] else "a stream"
    processes = "one process" if facts["processes"] == 1 else f"{facts['processes']} processes"
    training = {
        "data": f"{card.dataset}, {images}",
        "trained for": f"{facts['steps']:,} of {facts['total_steps']:,} optimizer steps"
        + (f", {facts['epochs']:.1f} passes over the data" if facts["images"] else ""),
        "images a step": f"{facts['images_per_step']}, {processes}",
        **{k: f"{v:.4f}, mean of the last {facts['loss_steps']} steps" for k, v in facts["losses"].items()},
        "hardware": f"{facts['hardware']}, {facts['precision']}",
        "time": f"{facts['seconds'] / 60:.1f} minutes",
    }
    if facts["broken"]:
        training["images left out as broken"] = facts["broken"]
    known: EvaluationHistory = facts["evaluations"]
    if known.last:
        training["evaluations"] = f"{known.count}, which took {known.seconds / 60:.1f} minutes together"
        card = replace(card, **_evaluation_for_card(known, facts["steps"]))
    pictures = {
        "before_after.png": "The same seeds before and after.",
        **_grid_for_card(folder, facts["steps"]),
        "loss.png": "Training loss.",
        "eval.png": "Measured along the run.",
    }
    there = {name: caption for name, caption in pictures.items() if (folder / name).exists()}
    text = card_text(replace(card, training=training, images=there, code=code_files(folder)))
    replace_file(folder / CARD_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _newest_grid(folder: Path, step: int) -> Path | None:
    """The grid of samples in a run folder that is of this step or, of those before it, the last."""
    grids = (folder / "samples").glob("step-*.png")
    return max((path for path in grids if _step_of(path) <= step), key=_step_of, default=None)


def _step_of(grid: Path) -> int:
    return int(grid.stem.removeprefix("step-"))


def _grid_for_card(folder: Path, step: int) -> dict[str, str]:
    """The newest grid, with a caption that says of which step it is."""
    grid = _newest_grid(folder, step)
    if grid is None:
        return {}
    drawn = _step_of(grid)
    caption = f"Samples after {drawn:,} steps" if drawn else "Samples before training"
    if drawn != step:
        caption += f"; the weights here are those of step {step:,}"
    return {f"samples/{grid.name}": f"{caption}."}


def _evaluation_for_card(known: EvaluationHistory, step: int) -> dict[str, Any]:
    """What a card tells of the newest evaluation; its numbers are the model's own if they are of its step."""
    last, best = known.last, known.best
    table = {
        title(key): number(measure)
        + (f" (training images: {number(last.floors[name])})" if name in last.floors else "")
        for key, measure in last.measures.items()
        for name in [key.partition("@")[0]]
    }
    if best.step != step:
        table["best in the run"] = f"{best.in_words()}, after {best.step:,} steps: `best/` in the run folder"
    words = [f"{part.replace('_', ' ').capitalize()}: {text}." for part, text in last.protocol.items()]
    about = ["In brackets is what one half of the training images gives against the other."]
    if last.step != step:
        about.append(f"These are numbers of step {last.step:,}, not of the weights here.")
    results = eval_results(last.measures, last.dataset, last.split, last.protocol) if last.step == step else []
    return {"evaluation": table, "protocol": " ".join(about + words), "results": results}


def write_best(folder: Path, pipeline: DiffusionPipeline, card: CardFacts, facts: dict[str, Any]) -> None:
    """Write the pipeline with the best numbers so far, the run's newest grid and a card, for the one before."""
    usage = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{folder.name}"', card.usage)
    card = replace(card, title=f"{card.title}, best checkpoint", usage=usage)

    def write(temporary: Path) -> None:
        pipeline.save_pretrained(temporary)
        if grid := _newest_grid(folder.parent, facts["steps"]):
            (temporary / "samples").mkdir()
            link_or_copy(grid, temporary / "samples" / grid.name)
        write_card(temporary, card, facts)

    replace_folder(folder, write)


def report(folder: Path, facts: dict[str, Any]) -> None:
    """Print where things are."""
    known: EvaluationHistory = facts["evaluations"]
    trust = ", trust_remote_code=True" if code_files(folder) else ""
    lines = [
        f"\nStep {facts['steps']} of {facts['total_steps']} reached after {facts['seconds'] / 60:.1f} minutes.",
        f"{facts['waited']:.1%} of the training time went into waiting for data.",
        f"{facts['broken']} broken images were left out." if facts["broken"] else None,
        f"{known.count} evaluations took {known.seconds / 60:.1f} minutes of it." if known.last else None,
        "",
        f"model folder   {folder}",
        *(
            f"{name:<14} {folder / file}"
            for name, file in (("before, after", "before_after.png"), ("loss", "loss.png"), ("measured", "eval.png"))
            if (folder / file).exists()
        ),
        f"best model     {folder / 'best'}: step {known.best.step}, {known.best.in_words()}" if known.best else None,
        f"load it with   pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}{trust})",
    ]
    print("\n".join(line for line in lines if line is not None))


def repository_for(args: RunArguments) -> str:
    """The repository that a run is uploaded to, made before training so that what is wrong is known early.

    Raises:
        InputError: if nobody is logged in, the Hub does not answer, or the repository cannot be made.
    """
    try:
        user = who_am_i()
        repo_id = args.hub_model_id or args.model_save_name
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        Repository(repo_id).open(args.hub_private)
    except (InputError, RunError) as error:
        raise InputError(f"--push_to_hub: {error}") from error
    return repo_id


def finish_upload(background: BackgroundUpload, args: RunArguments) -> None:
    """Upload a finished run folder; a failure is told, and leaves the run as it is."""
    repository = background.repository
    print(f"uploading to   {repository.url}", flush=True)
    try:
        print(f"uploaded       {background.finish('Upload finished model').url}")
    except (Exception, KeyboardInterrupt) as error:  # whatever it is, the run itself is done and saved
        private = " --private" if args.hub_private else ""
        reason = str(error) or "The upload was stopped."
        print(
            f"\n{reason}\nThe model is whole in {args.output_dir}; this finishes the upload:\n"
            f"    python scripts/push_to_hub.py --folder {args.output_dir} --repo_id {repository.repo_id}{private}"
        )
