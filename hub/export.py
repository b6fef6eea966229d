"""Pipeline folders that are complete in themselves: code beside the weights, in the form that plain Diffusers reads.

The text of this file is added to that of each pipeline that is saved, so that a pipeline which was loaded with nothing
but Diffusers can be saved and pushed the same way, any number of times. It needs nothing that Diffusers does not.
"""

import hashlib
import inspect
import json
import os
import re
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers.utils import make_image_grid
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SAMPLES = "card_samples.png"


def self_contained(pipeline_class: type) -> type:
    """
    Class decorator: `save_pretrained` and `push_to_hub` of this pipeline give folders that load anywhere.

    Beside the weights lie the files that define the pipeline and those of its components that are not Diffusers' or
    Transformers' own:

        model_index.json  pipeline_x_0123456789ab.py  unet/{config.json, unet_x_0123456789ab.py, ...}  scheduler/...

    Their names change with their contents, because Diffusers keeps the files of all pipelines in one folder, under
    these names. `AutoModel` loads a model alone, by its folder or, if the pipeline has only this one, by `subfolder`.
    No file tells from where something was loaded. Other versions of the files that are in the folder stay, and nothing
    refers to them: the folder can be loaded at any time while it is written.

    What is pushed to the Hub has the card of `card_of_parts` in the place of the template that Diffusers fills in with
    nothing, with pictures that are drawn then. A card that somebody wrote stays: that of the folder, or else that of
    the repository.

    Diffusers executes such a file again at each load, in the same module: what a method finds under the name of a
    class of its file may be a newer class than that of its own object.

    Raises:
        ValueError: on saving, for a class whose file cannot travel: there is none, or it has relative imports.
    """

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes model_index.json, which Diffusers does when all else is saved and before it uploads anything."""
        folder = Path(json_file_path).parent
        self._own_card = _read_text(folder / "README.md")  # the next that Diffusers writes
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
        if module.__name__ != self_contained.__module__:
            this_file = f"\n\n{Path(__file__).read_text(encoding='utf-8')}\n\ncomplete_in_itself({class_name})\n"
        index["_class_name"] = [_add_code(folder, module, class_name, this_file), class_name]
        _write(Path(json_file_path), _json_text(index))

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """Uploads what was saved, which Diffusers does when it has put its card there."""
        file = Path(working_dir, "README.md")
        card = self._own_card if self._own_card and not is_unwritten(self._own_card) else _read_text(file)
        if card and (is_unwritten(card) or shows_samples(card)):
            draw_samples(self, file.parent)
        if card:
            _write(file, card_of_parts(file.parent, repo_id) if is_unwritten(card) else card)
        return super(pipeline_class, self)._upload_folder(working_dir, repo_id, *args, **kwargs)

    pipeline_class.to_json_file = to_json_file
    pipeline_class._upload_folder = _upload_folder
    return pipeline_class


def pipeline_parts(folder: Path) -> dict[str, str]:
    """The class names of a pipeline's parts, by the names of the parts."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: class_name for name, (_, class_name) in pairs.items() if class_name}


def code_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of code that Diffusers runs when it loads a pipeline folder, by its path in there."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    named = [Path(f"{index['_class_name'][0]}.py")] if isinstance(index["_class_name"], list) else []
    named += [Path(name, f"{index[name][0]}.py") for name in pipeline_parts(folder)]
    there = [path for path in named if (folder / path).is_file()]
    return {path.as_posix(): hashlib.sha256((folder / path).read_bytes()).hexdigest() for path in there}


def card_of_parts(folder: Path, repo_id: str) -> str:
    """The model card of a pipeline folder of which nothing is known but what it holds, as the repository `repo_id`."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    parts = [f"`{class_name}` ({part})" for part, class_name in pipeline_parts(folder).items()]
    rows = [f"| `{file}` | SHA-256 `{digest}` |" for file, digest in code_files(folder).items()]
    trust = ", trust_remote_code=True" if rows else ""
    caption = _caption(folder / SAMPLES)
    lines = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        "- diffusers",
        "- unconditional-image-generation",
        "---",
        f"\n# {repo_id.rpartition('/')[2]}",
        f"\nA `{name if isinstance(name, str) else name[1]}` of {' and '.join(parts)}.",
        *([f"\n![{caption}]({SAMPLES})\n\n*{caption}*"] if caption else []),
        "\n## Use",
        "\n```python\nfrom diffusers import DiffusionPipeline",
        f'\npipe = DiffusionPipeline.from_pretrained("{repo_id}"{trust})\n```',
    ]
    if rows:
        lines += ["\n## Code", "\n`trust_remote_code=True` runs these files of this repository:"]
        lines += ["\n| | |", "|---|---|", *rows]
    lines += [
        "\n## Limits and licence",
        "\nWhat it was trained on, what it draws well, and the licence of the weights are not known here: look them "
        "up before passing this on.",
    ]
    text = "\n".join(lines) + "\n"
    return f"{text}\n<!-- Pushing this pipeline renews the card, until somebody changes it: {_digest(text)} -->\n"


def draw_samples(pipe: Any, folder: Path) -> None:
    """
    Puts the pictures that `card_of_parts` shows into a folder, in the place of those of earlier weights.

    They are of seeds 0 to 8, of a network's classes in turn. If they cannot be drawn there are none, which a warning
    says. A file of that name which this function has not made stays.
    """
    file = folder / SAMPLES
    if file.exists() and not _caption(file):
        return
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    in_training = [module for network in networks for module in network.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        arguments = sample_arguments(pipe, 9)
        images = pipe(**arguments).images
        how = [f"Seeds 0 to 8, {len(pipe.scheduler.timesteps)} steps"]
        how += ["the classes in turn"] * ("class_labels" in arguments) + ["no guidance"] * ("loss" in arguments)
        caption = PngInfo()
        caption.add_text("Caption", f"{', '.join(how)}; nothing left out.")
        factor = max(1, 96 // max(images[0].size))
        images = [image.resize((factor * image.width, factor * image.height), Image.NEAREST) for image in images]
        temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
        make_image_grid(images, 3, 3).save(temporary, pnginfo=caption)
        os.replace(temporary, file)
    except Exception as error:  # whatever it is, it is no reason not to publish the weights
        file.unlink(missing_ok=True)
        warnings.warn(f"The model card has no pictures, because none could be drawn: {error}", stacklevel=2)
    finally:
        for module in in_training:
            module.training = True


def _caption(file: Path) -> str | None:
    """How the pictures were drawn that `draw_samples` has put into a file; None if it has not."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("Caption")
    except OSError:  # there is none, or something else
        return None


def sample_arguments(pipe: Any, count: int, num_inference_steps: int | None = None) -> dict[str, Any]:
    """What a pipeline is called with for the pictures of the seeds from 0 on, of a network's classes in turn.

    Args:
        num_inference_steps: None leaves it to the pipeline, up to 50.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {"generator": [torch.Generator().manual_seed(seed) for seed in range(count)]}
    if steps := num_inference_steps or accepted["num_inference_steps"].default:
        arguments["num_inference_steps"] = min(steps, 50, pipe.scheduler.config.get("num_train_timesteps", 50))
    if "loss" in accepted:  # which does not move them
        arguments |= {"loss": lambda images: images.square().mean((1, 2, 3)), "guidance_scale": 0.0}
    if "class_labels" in accepted:
        sizes = [pipe.unet.config.get(name) for name in ("num_classes", "n_cfeat", "num_class_embeds")]
        if classes := next(filter(None, sizes), None):
            arguments["class_labels"] = [seed % classes for seed in range(count)]
    if "batch_size" in accepted:
        arguments["batch_size"] = count
    return arguments


def shows_samples(card: str) -> bool:
    """Whether a card shows the pictures of `draw_samples`, as one that somebody has changed may still do."""
    return f"]({SAMPLES})" in card


def is_unwritten(card: str) -> bool:
    """Whether a card is as `card_of_parts` made it, or the template of Diffusers."""
    if made := re.search(r"\n<!-- Pushing .*: ([0-9a-f]{12}) -->\n$", card):
        return _digest(card[: made.start()]) == made[1]
    said = re.search(r"^This is the model card of .* automatically generated\.$", card, re.MULTILINE)
    metadata = ModelCardData(library_name="diffusers")
    return bool(said) and card == str(ModelCard.from_template(metadata, model_description=said[0]))


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


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write(file: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is always whole."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, file)
