"""Save the configs of the embedded pipelines again, with the current classes and without code: `make models`.

To embed the result of a training run, copy its folder here and run this script. It removes the copies of the package's
code that every saved pipeline contains, because a clone uses the package itself. Weights are not changed.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from ddgan.core.files import replace_file
from ddgan.hub.cards import CARD_NAME, code_section, read_card
from ddgan.hub.export import write_json
from ddgan.hub.folders import code_files, read_json
from ddgan.sampling.loading import load_pipeline


def remove_code(folder: Path) -> None:
    """Remove the code files of a pipeline folder, and their list from its model card."""
    files = code_files(folder)
    card = read_card(folder).replace(f"{code_section(files)}\n\n", "")
    replace_file(folder / CARD_NAME, lambda path: path.write_text(card, encoding="utf-8"))
    for file in files:
        (folder / file).unlink()


def save_configs(folder: Path) -> None:
    """Write the JSON files of a pipeline folder as the current classes do, but naming the package instead of files."""
    with TemporaryDirectory() as temporary:
        load_pipeline(str(folder)).save_pretrained(temporary)
        code = code_files(Path(temporary))
        for file in Path(temporary).rglob("*.json"):
            config = read_json(file)
            for name in ("_name_or_path", "_use_default_values", "auto_map"):
                config.pop(name, None)
            for name, value in config.items():
                if name == "_class_name" and isinstance(value, list):
                    config[name] = value[1]
                elif isinstance(value, list) and f"{name}/{value[0]}.py" in code:
                    config[name] = ["ddgan", value[1]]
            write_json(folder / file.relative_to(temporary), config)


if __name__ == "__main__":
    for index in sorted(Path(__file__).parent.glob("*/model_index.json")):
        remove_code(index.parent)
        save_configs(index.parent)
