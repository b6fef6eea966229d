"""Self-contained pipeline folders: the code of a pipeline is saved beside its weights, in a form that Diffusers loads.

This file is appended to the file of each pipeline that is saved, so that a pipeline loaded with Diffusers alone can be
saved and pushed the same way, any number of times. It reads the source files of the pipeline's classes and writes to
the saved folder, nothing else.
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType


def self_contained(pipeline_class: type) -> type:
    """Class decorator: `save_pretrained` and `push_to_hub` write folders that Diffusers alone can load.

    See `add_code` for the layout of a folder. A push uploads the model card that the folder had before it was saved.
    Without one, the card in the repository stays as it is: the empty template of Diffusers is not uploaded.

    Raises:
        ValueError: on saving, for a class whose file cannot be copied: there is none, or it has relative imports.
    """

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write model_index.json. Diffusers calls this after saving the components and before writing its card."""
        folder = Path(json_file_path).parent
        card = folder / "README.md"
        self._folder_card = card.read_text(encoding="utf-8") if card.is_file() else None
        add_code(folder, json.loads(self.to_json_string()), type(self))

    def _upload_folder(self, working_dir: str | os.PathLike, *args, **kwargs):
        """Upload a saved folder. Diffusers calls this after writing its card."""
        card = Path(working_dir, "README.md")
        if self._folder_card is None:
            card.unlink(missing_ok=True)
        else:
            _write(card, self._folder_card)
        return super(pipeline_class, self)._upload_folder(working_dir, *args, **kwargs)

    pipeline_class.to_json_file = to_json_file
    pipeline_class._upload_folder = _upload_folder
    return pipeline_class


def add_code(folder: Path, index: dict, pipeline_class: type) -> None:
    """Write the code of a saved pipeline beside its weights, and model_index.json, which names that code, last.

    Only the files of classes that belong neither to Diffusers nor to Transformers are written:

        model_index.json  pipeline_x_0123456789ab.py  unet/{config.json, unet_x_0123456789ab.py, ...}  scheduler/...

    File names contain a hash of the contents, because Diffusers copies the code of all pipelines into one folder under
    these names. Files of other versions stay, but nothing refers to them, so the folder can be loaded at any time
    while it is written. `AutoModel` loads a network from its own folder or, if it is the only one of the pipeline, by
    `subfolder`. Local paths are removed from all JSON files.

    Args:
        folder: contains the saved components.
        index: contents of model_index.json: each component as [module, class name].
        pipeline_class: class of the pipeline. Its methods must not refer to the class by name: Diffusers runs a
            pipeline's file again in the same module at each load, so that the name may refer to a newer class.
    """
    index.pop("_name_or_path", None)
    auto_maps = []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2:
            continue
        (library, class_name), auto_map = value, {}
        if library in sys.modules and library.partition(".")[0] not in ("diffusers", "transformers"):
            stem = _write_code(folder / name, sys.modules[library], class_code(sys.modules[library], class_name))
            index[name] = [stem, class_name]
            # the second entry keeps Diffusers from warning about the first as an unknown setting
            auto_map = {"auto_map": {"AutoModel": f"{stem}.{class_name}"}, "_use_default_values": {"auto_map": True}}
        for file in (folder / name).glob("*.json"):
            _update_json(file, auto_map if file.name == "config.json" else {})
        if (folder / name / "config.json").is_file():
            auto_maps.append(auto_map)
    if len(auto_maps) == 1:  # AutoModel applies this entry to every subfolder
        index |= auto_maps[0]

    module, class_name = sys.modules[pipeline_class.__module__], pipeline_class.__name__
    index["_class_name"] = [_write_code(folder, module, pipeline_code(module, class_name)), class_name]
    write_json(folder / "model_index.json", index)


def class_code(module: ModuleType, class_name: str) -> str:
    """Return the code that is saved for a component: the file of its class.

    Raises:
        ValueError: if it cannot be copied.
    """
    source = getattr(module, "__file__", None)
    if source is None or module.__name__ == "__main__":
        raise ValueError(
            f"The class {class_name} cannot be saved with its code, because it was not imported from a file of its "
            "own. Define it in a file that imports installed packages only, and import it from there."
        )
    code = _read_code(Path(source))
    if re.search(r"^\s*(from|import)\s+\.", code, re.MULTILINE):
        raise ValueError(
            f"The class {class_name} cannot be saved with its code, because {Path(source).name} has relative imports, "
            "which do not work in a copy of the file. Import installed packages only."
        )
    return code


def pipeline_code(module: ModuleType, class_name: str) -> str:
    """Return the code that is saved for a pipeline: the file of its class, followed by this one."""
    code = class_code(module, class_name)
    if module.__name__ == add_code.__module__:  # the pipeline's file already ends with this one
        return code
    return f"{code}\n\n{Path(__file__).read_text(encoding='utf-8')}\n\nself_contained({class_name})\n"


def content_hash(text: str) -> str:
    """Return the first 12 hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def write_json(file: Path, config: dict) -> None:
    """Write a JSON file with sorted keys."""
    _write(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_code(folder: Path, module: ModuleType, code: str) -> str:
    """Write the code of a class from a module to a folder; return the file's name without the suffix."""
    stem = re.sub("_[0-9a-f]{12}$", "", Path(str(module.__file__)).stem) + f"_{content_hash(code)}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{stem}.py", code)
    return stem


def _read_code(file: Path) -> str:
    """Read a Python file. Wait, for up to 5 seconds, until its contents match the hash in its name, if it has one.

    Another process may be loading the same pipeline: Diffusers then overwrites the file in place.
    """
    expected = re.search("_([0-9a-f]{12})$", file.stem)
    for _ in range(100):
        code = file.read_text(encoding="utf-8")
        if expected is None or content_hash(code) == expected[1]:
            break
        time.sleep(0.05)
    return code


def _update_json(file: Path, entries: dict) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config, dict) and (entries or "_name_or_path" in config):
        config.pop("_name_or_path", None)
        write_json(file, {**config, **entries})


def _write(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that no reader sees a partial file."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, file)
