"""What of a folder is published, as others are to see it."""

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import SpaceCard

from ..errors import InputError
from .cards import CARD_NAME, is_repo_id
from .folders import SAMPLES, card_of_parts, code_files, is_unwritten, pipeline_parts

# what `save_pretrained` of models and schedulers writes
_PART_FILES = ("config.json", "*_config.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")
_TEXTS = (CARD_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_SPACE_FILES = (".py", ".md", ".txt", ".css", *_PICTURES)
_PACKAGE = Path(__file__).parents[1]


def pipeline_files(folder: Path) -> list[str]:
    """
    What is published of a pipeline folder, by paths in it.

    These are the parts of the pipeline, their code, the card, the pictures that it shows, and a licence. All else
    stays, whatever it is: checkpoints, optimizer states, logs, settings, tokens, editors' files.

    Raises:
        InputError: if it is not a pipeline folder.
    """
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"{folder} is not a pipeline folder: it has no model_index.json. Name the folder that a training run or "
            "`save_pretrained` wrote."
        )
    found = [
        file for part in pipeline_parts(folder) for pattern in _PART_FILES for file in (folder / part).glob(pattern)
    ]
    found += [folder / name for name in ("model_index.json", *code_files(folder), *_TEXTS)]
    if (folder / CARD_NAME).is_file():
        text = (folder / CARD_NAME).read_text(encoding="utf-8")
        shown = [folder / (found[1] or found[2]) for found in re.finditer(r'!\[[^]]*]\(([^)\s]+)|src="([^"]+)"', text)]
        found += [file for file in shown if _is_within(file, folder) and file.suffix.lower() in _PICTURES]
    return sorted({file.relative_to(folder).as_posix() for file in found if file.is_file()})


def snapshot(folder: Path, repo_id: str) -> TemporaryDirectory:
    """
    What is published of a pipeline folder, as it is now, in a folder of its own.

    Its files are hard links, which a later save does not touch, or copies where the filesystem has no links. The card
    loads the pipeline from `repo_id`, and no file says from where on this machine something was loaded. A pipeline
    without a card, or with one that nobody wrote, gets one that says what it consists of.

    Raises:
        InputError: if it is not a pipeline folder.
    """
    texts = {name: _for_others(folder / name, repo_id) for name in pipeline_files(folder)}
    if unwritten := needs_card(folder):  # its pictures are of the weights that there were when they were drawn
        texts = {name: text for name, text in texts.items() if name not in (CARD_NAME, SAMPLES)}
    taken = TemporaryDirectory(prefix=".tmp-upload-", dir=folder if os.access(folder, os.W_OK) else None)
    for name, text in texts.items():
        target = Path(taken.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            target.write_text(text, encoding="utf-8", newline="\n")
            continue
        link_or_copy(folder / name, target)
    if unwritten:
        add_card(Path(taken.name), repo_id)
    return taken


def needs_card(folder: Path) -> bool:
    """Whether a pipeline folder has no card, or one that nobody wrote."""
    return not (folder / CARD_NAME).is_file() or is_unwritten((folder / CARD_NAME).read_text(encoding="utf-8"))


def add_card(folder: Path, repo_id: str) -> None:
    """Put the card of what a pipeline consists of into its folder."""
    (folder / CARD_NAME).write_text(card_of_parts(folder, repo_id), encoding="utf-8", newline="\n")


def link_or_copy(file: Path, target: Path) -> None:
    """A hard link, which a file that is renamed over `file` does not touch, or a copy where there are no links."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copyfile(file, target)


def space_snapshot(folder: Path, repo_id: str) -> TemporaryDirectory:
    """
    What is published of a folder that holds a Space; hidden files stay.

    Its card names the model `repo_id`. This package lies beside the app in a folder of its name: a Space installs what
    the package indexes have, and runs the app with its folder as the first place to import from.

    Raises:
        InputError: if it is not such a folder.
    """
    if not (folder / CARD_NAME).is_file():
        raise InputError(
            f"There is no Space to upload: {folder} has no {CARD_NAME}. It comes with a clone of this project."
        )
    files = {file.relative_to(folder): file for file in folder.rglob("*") if file.suffix in _SPACE_FILES}
    files = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}
    taken = TemporaryDirectory()
    for name, file in {**files, **_package_files()}.items():
        target = Path(taken.name, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    card = SpaceCard.load(folder / CARD_NAME)
    card.data.models = [repo_id]
    card.data.title = repo_id.rpartition("/")[2]
    card.save(Path(taken.name, CARD_NAME))
    return taken


def _package_files() -> dict[Path, Path]:
    """The files of this package that are imported, and its licence, by where they lie beside a Space's app."""
    parts = [file for part in _PACKAGE.glob("*/__init__.py") for file in part.parent.glob("*.py")]
    files = [_PACKAGE / "__init__.py", _PACKAGE / "errors.py", _PACKAGE / "LICENSE", *parts]
    return {Path("ddgan", file.relative_to(_PACKAGE)): file for file in files if file.is_file()}


def _is_within(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def _for_others(file: Path, repo_id: str) -> str | None:
    """The text of a file as it is published, where that differs from the file."""
    if file.name == CARD_NAME:
        text = file.read_text(encoding="utf-8")
        load = re.compile(r'(from_pretrained\(")([^"]*)"')
        return load.sub(lambda found: found[0] if is_repo_id(found[2]) else f'{found[1]}{repo_id}"', text)
    if file.suffix == ".json":
        config = json.loads(file.read_text(encoding="utf-8"))
        origin = config.pop("_name_or_path", None) or ""
        if ("/" in origin or "\\" in origin) and not is_repo_id(origin):
            return json.dumps(config, indent=2, sort_keys=True) + "\n"
    return None
