"""What of a folder is published, as others are to see it."""

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote

from huggingface_hub import SpaceCard

from ..core.errors import InputError
from ..core.files import link_or_copy
from .cards import CARD_NAME, is_repo_id, nobody_wrote, with_metadata
from .export import SAMPLES, card_of_parts, code_files, pipeline_parts

# what `save_pretrained` of models and schedulers writes
_PART_FILES = ("config.json", "*_config.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")
_TEXTS = (CARD_NAME, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
# ![caption](name), ![caption](<name>), src="name", src='name'
_SHOWN = re.compile(r"""!\[[^]]*]\((?:<([^>]+)>|([^)\s]+))|src=(["'])(.+?)\3""")
_SPACE_FILES = (".py", ".md", ".txt", ".css", *_PICTURES)
_PACKAGE = Path(__file__).parents[1]


def pipeline_files(folder: Path) -> list[str]:
    """
    What is published of a pipeline folder, by paths in it.

    These are the parts of the pipeline, their code, the card, the pictures that it shows, and a licence. All else
    stays, whatever it is: checkpoints, optimizer states, logs, settings, tokens, editors' files.

    Raises:
        InputError: if it is not a pipeline folder, or its model_index.json or its card cannot be read.
    """
    index = folder / "model_index.json"
    if not index.is_file() or "_class_name" not in _read_json(index):
        raise InputError(
            f"{folder} is not a pipeline folder: it has no model_index.json that names a pipeline's class. Name the "
            "folder that a training run or `save_pretrained` wrote."
        )
    found = [
        file for part in pipeline_parts(folder) for pattern in _PART_FILES for file in (folder / part).glob(pattern)
    ]
    found += [folder / name for name in ("model_index.json", *code_files(folder), *_TEXTS)]
    if (folder / CARD_NAME).is_file():
        card = _read(folder / CARD_NAME)
        shown = [Path(unquote(name[1] or name[2] or name[4])) for name in _SHOWN.finditer(card)]
        found += [folder / name for name in shown if name.suffix.lower() in _PICTURES and _is_within(name, folder)]
    return sorted({file.relative_to(folder).as_posix() for file in found if file.is_file()})


def snapshot(folder: Path, repo_id: str) -> TemporaryDirectory:
    """
    What is published of a pipeline folder, as it is now, in a folder of its own.

    Its files are hard links, which a later save does not touch, or copies where the filesystem has no links. The card
    loads the pipeline from `repo_id`, and no file says from where on this machine something was loaded. A pipeline
    without a card, or with one that nobody wrote, gets one that says what it consists of.

    Raises:
        InputError: if it is not a pipeline folder, or its card or a JSON file of it cannot be read.
    """
    texts = {name: _for_others(folder / name, repo_id) for name in pipeline_files(folder)}
    if unwritten := needs_card(folder):  # its pictures are of the weights that there were when they were drawn
        texts.pop(SAMPLES, None)
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
    """Whether a pipeline folder has no card, or one that nobody wrote.

    Raises:
        InputError: if the card is not UTF-8.
    """
    return not (folder / CARD_NAME).is_file() or nobody_wrote(_read(folder / CARD_NAME))


def add_card(folder: Path, repo_id: str) -> None:
    """Put the card of what a pipeline consists of into its folder, with the further metadata of the one there.

    Raises:
        InputError: if the one there cannot be read.
    """
    file, card = folder / CARD_NAME, card_of_parts(folder, repo_id)
    if file.is_file():
        card = with_metadata(card, _read(file))
    file.write_text(card, encoding="utf-8", newline="\n")


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
    files = [_PACKAGE / "__init__.py", _PACKAGE / "__init__.py", _PACKAGE / "LICENSE", *parts]
    return {Path("ddgan", file.relative_to(_PACKAGE)): file for file in files if file.is_file()}


def _is_within(name: Path, folder: Path) -> bool:
    """Whether a path, as a card in a folder names it, stays in there, and so does what it leads to."""
    whole = (folder / name).resolve()
    return not name.is_absolute() and ".." not in name.parts and whole.is_relative_to(folder.resolve())


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not a text in UTF-8: save it as one.") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is damaged, it is no JSON: {error}. Save the pipeline anew.") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is damaged, it is no JSON object. Save the pipeline anew.")
    return config


def _for_others(file: Path, repo_id: str) -> str | None:
    """The text of a file as it is published, where that differs from the file."""
    if file.name == CARD_NAME:
        load = re.compile(r'(\w*\.?)from_pretrained\("([^"]*)"')
        return load.sub(lambda call: _call_for_others(call, file.parent, repo_id), _read(file))
    if file.suffix == ".json":
        config = _read_json(file)
        origin = config.pop("_name_or_path", None) or ""
        if ("/" in origin or "\\" in origin) and not is_repo_id(origin):
            return json.dumps(config, indent=2, sort_keys=True) + "\n"
    return None


def _call_for_others(call: re.Match, folder: Path, repo_id: str) -> str:
    """A `from_pretrained` on a card as it is published: what it loads from the card's folder, it loads from `repo_id`.

    So does that of any pipeline which is on no repository, for the folder may have had another name.
    """
    caller, place = call.groups()
    part = _part_of(folder, place)
    if is_repo_id(place) or not (caller.endswith("Pipeline.") or part):
        return call[0]
    whole = caller.endswith("Pipeline.") or part == "."
    return f'{caller}from_pretrained("{repo_id}"' + ("" if whole else f', subfolder="{part}"')


def _part_of(folder: Path, place: str) -> str | None:
    """The path within a folder that `place` is, seen from here or from beside the folder; None if it is elsewhere."""
    folder = folder.resolve()
    for path in ((base / place).resolve() for base in (Path(), folder.parent)):
        if path.is_relative_to(folder) and path.is_dir():
            return path.relative_to(folder).as_posix()
    return None
