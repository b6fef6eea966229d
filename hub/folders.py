"""Read pipeline folders: text and JSON files, and which components and code they contain."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ..core.errors import InputError
from ..core.run_files import PIPELINE_FILE

_MODULE = re.compile(r"\w[\w.-]*")  # a package, or a Python file without its suffix; never a path


class PipelineIndex(NamedTuple):
    """The contents of a model_index.json that decide which files and classes are loaded.

    Attributes:
        class_name: class of the pipeline.
        module: Python file of that class, without the suffix; None for a class of an installed package.
        components: module and class name of each component; the module is a package, or a Python file in the
            component's folder, without the suffix.
    """

    class_name: str
    module: str | None
    components: dict[str, tuple[str, str]]


def read_index(folder: Path) -> PipelineIndex:
    """Read the model_index.json of a pipeline folder.

    Raises:
        InputError: if it is missing or damaged, or names a file outside of the folder.
    """
    file = folder / PIPELINE_FILE
    contents = read_json(file) if file.is_file() else {}
    index = parse_index(contents, folder)
    for name in contents.keys() - index.components.keys():
        if (folder / name / "config.json").is_file() or (folder / name / "scheduler_config.json").is_file():
            raise InputError(
                f"{file} is damaged: for the component {name}, whose folder exists, it has {contents[name]!r} instead "
                "of the names of a library and a class. Save the pipeline again."
            )
    return index


def parse_index(contents: dict[str, Any], location: str | Path) -> PipelineIndex:
    """Return the facts in the contents of a model_index.json.

    Args:
        contents: its contents.
        location: its folder or repository, for messages.

    Raises:
        InputError: if it names no class, or a file outside of the folder.
    """
    pipeline = contents.get("_class_name")
    module, class_name = pipeline if isinstance(pipeline, list) and len(pipeline) == 2 else (None, pipeline)
    if not class_name or not isinstance(class_name, str):
        raise InputError(
            f"{location} is not a pipeline folder: it has no {PIPELINE_FILE} that names a pipeline's class. Pass the "
            "folder that a training run or `save_pretrained` wrote."
        )
    components = {
        name: (value[0], value[1])
        for name, value in contents.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2
        if all(isinstance(part, str) and part for part in value)
    }
    file = f"{PIPELINE_FILE} of {location}"
    for name in components:
        if not name.isidentifier():
            raise InputError(f"{file} names a component {name!r}, which is not the name of a folder beside it.")
    for name in [module, *(library for library, _ in components.values())]:
        if name is not None and not (isinstance(name, str) and _MODULE.fullmatch(name)):
            raise InputError(f"{file} names a module {name!r}, which is neither a package nor a file in the folder.")
    return PipelineIndex(class_name, module, components)


def read_trained_steps(folder: Path) -> list[int]:
    """Return the numbers of sampling steps that the few-step pipeline in a folder was trained for, its default first.

    Empty for the folder of any other pipeline or of a model.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file).get("_num_inference_steps") or [] if file.is_file() else []


def code_classes(folder: Path) -> dict[str, str]:
    """Return the class in each Python file that Diffusers runs to load a pipeline folder, by its relative path.

    Empty for the folder of a model, which is loaded without custom code.
    """
    if not (folder / PIPELINE_FILE).is_file():
        return {}
    index = read_index(folder)
    named = {Path(f"{index.module}.py"): index.class_name} if index.module else {}
    named |= {Path(name, f"{module}.py"): class_name for name, (module, class_name) in index.components.items()}
    return {path.as_posix(): class_name for path, class_name in named.items() if (folder / path).is_file()}


def code_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of the files that `code_classes` returns, by its relative path."""
    return {path: hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in code_classes(folder)}


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
    """Read a JSON file that contains an object with at least one entry.

    Raises:
        InputError: if it does not contain one.
    """
    try:
        config = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{file} is damaged: it is not valid JSON ({error}). Save the pipeline again.") from None
    if not isinstance(config, dict) or not config:
        kind = "an empty JSON object" if config == {} else "not a JSON object"
        raise InputError(f"{file} is damaged: it is {kind}. Save the pipeline again.")
    return config
