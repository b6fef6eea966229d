"""Read pipeline folders: text and JSON files, and which components and code they contain."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..core.errors import InputError


def pipeline_components(folder: Path) -> dict[str, str]:
    """Return the class name of each component of a pipeline folder."""
    return component_classes(read_json(folder / "model_index.json"))


def component_classes(index: dict[str, Any]) -> dict[str, str]:
    """Return the class name of each component in the contents of a model_index.json."""
    return {name: class_name for name, (_, class_name) in _component_pairs(index).items()}


def read_trained_steps(folder: Path) -> list[int]:
    """Return the numbers of sampling steps that the few-step pipeline in a folder was trained for, its default first.

    Empty for the folder of any other pipeline or of a model.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file).get("_num_inference_steps") or [] if file.is_file() else []


def code_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each Python file that Diffusers runs to load a pipeline folder, by its relative path.

    Empty for the folder of a model, which is loaded without custom code.
    """
    file = folder / "model_index.json"
    if not file.is_file():
        return {}
    index = read_json(file)
    named = [Path(f"{index['_class_name'][0]}.py")] if isinstance(index["_class_name"], list) else []
    named += [Path(name, f"{module}.py") for name, (module, _) in _component_pairs(index).items()]
    existing = [path for path in named if (folder / path).is_file()]
    return {path.as_posix(): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in existing}


def read_text(file: Path) -> str:
    """Read a text file.

    Raises:
        InputError: if it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file} is not UTF-8 text: save it in that encoding.") from None


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        InputError: if it does not contain one.
    """
    try:
        config = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: it is not valid JSON ({error}). Save the pipeline again.") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is damaged: it is not a JSON object. Save the pipeline again.")
    return config


def _component_pairs(index: dict[str, Any]) -> dict[str, list[str]]:
    """Return the module and class name of each component in a model_index.json."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: pair for name, pair in pairs.items() if len(pair) == 2 and pair[1]}
