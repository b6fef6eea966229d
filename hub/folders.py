"""Pipeline folders that are complete in themselves: code beside the weights, in the form that plain Diffusers reads.

The text of this file is added to that of each pipeline that is saved, so that a pipeline which was loaded with nothing
but Diffusers can be saved the same way, any number of times. It needs the standard library alone.
"""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType


def complete_in_itself(pipeline_class: type) -> type:
    """
    Class decorator: `save_pretrained` and `push_to_hub` of this pipeline give folders that load anywhere.

    Beside the weights lie the files that define the pipeline and those of its components that are not Diffusers' or
    Transformers' own:

        model_index.json  pipeline_x_0123456789ab.py  unet/{config.json, unet_x_0123456789ab.py, ...}  scheduler/...

    Their names change with their contents, because Diffusers keeps the files of all pipelines in one folder, under
    these names. `AutoModel` loads a model alone, by its folder or, if the pipeline has only this one, by `subfolder`.
    No file tells from where something was loaded. Other versions of the files that are in the folder stay, and nothing
    refers to them: the folder can be loaded at any time while it is written.

    Diffusers executes such a file again at each load, in the same module: what a method finds under the name of a
    class of its file may be a newer class than that of its own object.

    Raises:
        ValueError: on saving, for a class whose file cannot travel: there is none, or it has relative imports.
    """

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes model_index.json, which Diffusers does when all else is saved and before it uploads anything."""
        folder = Path(json_file_path).parent
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)

        auto_map, models = {}, 0
        for name in self.components:
            library, class_name = index.get(name) or (None, None)
            module, in_config = sys.modules.get(library), {}
            if module is not None and library.partition(".")[0] not in ("diffusers", "transformers"):
                index[name] = [_add_code(folder / name, module, class_name), class_name]
                in_config = _auto_map(*index[name])
            for file in (folder / name).glob("*.json"):
                _edit_json(file, in_config if file.name == "config.json" else {})
            if (folder / name / "config.json").is_file():
                auto_map, models = auto_map or in_config, models + 1
        if models == 1:  # what AutoModel reads here it takes for every subfolder
            index |= auto_map

        module, class_name = sys.modules[type(self).__module__], type(self).__name__
        this_file = ""
        if module.__name__ != complete_in_itself.__module__:
            this_file = f"\n\n{Path(__file__).read_text(encoding='utf-8')}\n\ncomplete_in_itself({class_name})\n"
        index["_class_name"] = [_add_code(folder, module, class_name, this_file), class_name]
        _write(Path(json_file_path), _json_text(index))

    pipeline_class.to_json_file = to_json_file
    return pipeline_class


def _add_code(folder: Path, module: ModuleType, class_name: str, more_code: str = "") -> str:
    """Puts a module's file with `more_code` at its end into a folder; returns its name there, without the suffix."""
    source = getattr(module, "__file__", None)
    if source is None or module.__name__ == "__main__":
        raise ValueError(
            f"The class {class_name} cannot be saved with its code, because it was not imported from a file of its "
            "own. Define it in a file that imports installed packages only, and import it from there."
        )
    code = _read_code(Path(source)) + more_code
    if re.search(r"^\s*(from|import)\s+\.", code, re.MULTILINE):
        raise ValueError(
            f"The class {class_name} cannot be saved with its code, because {Path(source).name} has relative imports, "
            "and it travels alone. Have it import installed packages only."
        )
    stem = re.sub("_[0-9a-f]{12}$", "", Path(source).stem) + f"_{_digest(code)}"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{stem}.py", code)
    return stem


def _read_code(file: Path) -> str:
    """
    The text of a file. One that is named by its contents may not be whole for a moment, while Diffusers in another
    process copies it anew to where all its files of code lie: it is read again until it is, or for some seconds.
    """
    named = re.search("_([0-9a-f]{12})$", file.stem)
    for _ in range(100):
        code = file.read_text(encoding="utf-8")
        if named is None or _digest(code) == named[1]:
            break
        time.sleep(0.05)
    return code


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode("utf-8")).hexdigest()[:12]


def _auto_map(stem: str, class_name: str) -> dict:
    """What names a model's class to `AutoModel`, and keeps Diffusers from warning of it as an unknown setting."""
    return {"auto_map": {"AutoModel": f"{stem}.{class_name}"}, "_use_default_values": {"auto_map": True}}


def _edit_json(file: Path, more: dict) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config, dict) and (more or "_name_or_path" in config):
        config.pop("_name_or_path", None)
        _write(file, _json_text({**config, **more}))


def _json_text(config: dict) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _write(file: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is always whole."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, file)
