"""Model cards: written from the facts of a run or, where these are unknown, from the contents of a pipeline folder."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeGuard

from diffusers import DiffusionPipeline
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Template
from yaml import YAMLError

from .. import __version__
from ..core.errors import InputError
from ..core.files import location_name
from ..core.locations import InMemory
from .arguments import CARD_NAME
from .export import content_hash
from .folders import code_files, read_index, read_text, read_trained_steps
from .samples import SAMPLES, samples_caption, save_samples, shows_samples

logger = logging.getLogger(__name__)

_TEMPLATE = Template(
    """\
{% macro show(images) %}
{% for file, caption in images.items() %}
![{{ caption }}]({{ file }})

*{{ caption }}*

{% endfor %}
{% endmacro %}
---
{{ metadata }}
---

# {{ one_line(facts.title) }}

{{ one_line(facts.summary) }}

{{ show(facts.samples) -}}
## Use

```python
{{ facts.usage.strip() }}
```

## License

{{ license_note }}

{% if facts.training %}
## {{ facts.training_heading }}

{{ table(facts.training) }}

Made with {{ packages() }}.

{% endif %}
{{ show(facts.images) -}}
{% if facts.evaluation %}
## Evaluation

{{ table(facts.evaluation) }}

{{ facts.protocol }}

{% endif %}
{% for heading, text in facts.sections.items() %}
## {{ heading }}

{{ text }}

{% endfor %}
{% if facts.settings %}
<details><summary>All settings</summary>

{{ table(facts.settings) }}

</details>

{% endif %}
{% if facts.code %}
{{ code_section(facts.code) }}

{% endif %}
## Limits

{{ facts.limits }}
""",
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
# last line of an auto-generated card; its first words and the hash of the text above are the same in all versions
_SIGNATURE = "<!-- Pushing this pipeline updates this auto-generated card, unless it was edited: {} -->\n"
_LOADED = re.compile(r'(\w*\.?)from_pretrained\(("(?:[^"\\\n]|\\.)*")')
_SIGNED = re.compile(r"\n<!-- Pushing .*: ([0-9a-f]{12}) -->\n$")


@dataclass
class CardFacts:
    """Contents of a model card.

    Attributes:
        title: name of the model.
        summary: what was trained on what, in one paragraph.
        usage: Python that loads the model and generates an image.
        settings: hyper-parameters by flag name.
        training: facts of the run, as rows of a table.
        training_heading: heading of that table.
        samples: sample grids, shown first: captions by file name, relative to the card's folder.
        images: likewise further images, shown with the facts of the run.
        grids_before, grids_after: captions of the grids of step 0 to compare the samples with, and of further ones of
            the last step, by the names of their samplers (see `TrainingJob`).
        base_model: id or name of the model that training started from.
        license: license of the weights as the Hub's identifier, if known.
        license_name, license_link: name and URL of a license that has no identifier (`license` is "other").
        license_note: sentence about the license, in place of the one derived from the fields above.
        limits: what the model is not good at, in one paragraph.
        evaluation: measurements, as rows of a table.
        protocol: description of how they were measured.
        results: the same measurements for the metadata (model-index).
        sections: Markdown of further sections, by heading.
        code: SHA-256 of each file that loading with `trust_remote_code` runs; see `folders.code_files`.
        dataset: id or name of the training data.
        data_license: license of the training data as the Hub's identifier, if known.
        task: pipeline tag on the Hub.
        tags: further tags, besides `diffusers` and the task.
    """

    title: str
    summary: str
    usage: str
    settings: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    training_heading: str = "Training"
    samples: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    grids_before: dict[str, str] = field(default_factory=dict)
    grids_after: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_note: str | None = None
    limits: str = (
        "The model generates images like those it was trained on, at the size it was trained at, and may reproduce "
        "images of its training data."
    )
    evaluation: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    results: list[EvalResult] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    data_license: str | None = None
    task: str = "unconditional-image-generation"
    tags: list[str] = field(default_factory=list)


def card_text(facts: CardFacts) -> str:
    """Return a model card as Markdown with metadata."""
    base_model = facts.base_model if is_repo_id(facts.base_model) else None
    metadata = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="diffusers",
        pipeline_tag=facts.task,
        base_model=base_model,
        base_model_relation=base_model and "finetune",
        datasets=[facts.dataset] if is_repo_id(facts.dataset) else None,
        tags=["diffusers", facts.task, *facts.tags],
        model_name=facts.title if facts.results else None,
        eval_results=facts.results or None,
    )
    return _TEMPLATE.render(
        metadata=metadata.to_yaml(),
        facts=facts,
        license_note=(facts.license_note or _license_note(facts)) + _data_license_note(facts),
        packages=_packages,
        table=table,
        one_line=_one_line,
        code_section=code_section,
    )


def table(rows: Mapping[str, Any]) -> str:
    """Return a Markdown table of two columns without headings."""
    cells = [[_one_line(str(cell)).replace("|", "\\|") for cell in row] for row in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def string_literal(text: str) -> str:
    """Return Python's literal of a text, in double quotes, as in the code on model cards."""
    return json.dumps(text, ensure_ascii=False)


def replace_loaded(code: str, replace: Callable[[re.Match, str], str]) -> str:
    """Rewrite the beginning of each `from_pretrained("...")` in Python code.

    Args:
        replace: takes a match, whose first group is the name before `from_pretrained`, and the text of the literal;
            returns what to put in its place: code up to and including the literal.
    """

    def rewrite(call: re.Match) -> str:
        try:
            return replace(call, json.loads(call[2]))
        except ValueError:  # an escape sequence that JSON does not have
            return replace(call, call[2][1:-1])

    return _LOADED.sub(rewrite, code)


def code_section(code: dict[str, str]) -> str:
    """Return the section of a model card that lists code files with their SHA-256."""
    rows = {f"`{name}`": f"SHA-256 `{digest}`" for name, digest in code.items()}
    return f"## Code\n\n`trust_remote_code=True` runs these files of this repository:\n\n{table(rows)}"


def read_card(folder: Path) -> str:
    """Return the text of a folder's model card; empty if it has none.

    Raises:
        InputError: if the card is not UTF-8.
    """
    file = folder / CARD_NAME
    return read_text(file) if file.is_file() else ""


def is_autogenerated(card: str) -> bool:
    """Return whether a model card has no text written by a person, so that it can be replaced.

    This holds for an unedited card from this or an earlier version of `autogenerated_card`, the template of Diffusers,
    and metadata alone, as the Hub's website writes it.
    """
    if signature := _SIGNED.search(card):
        return content_hash(card[: signature.start()]) == signature[1]
    metadata = REGEX_YAML_BLOCK.match(card)
    if not card[metadata.end() if metadata else 0 :].strip():
        return True
    description = re.search(r"^This is the model card of .* automatically generated\.$", card, re.MULTILINE)
    data = ModelCardData(library_name="diffusers")
    return bool(description) and card == str(ModelCard.from_template(data, model_description=description[0]))


def autogenerated_card(folder: Path, repo_id: str) -> str:
    """Return a model card for a pipeline folder, written from the contents of the folder alone.

    Args:
        folder: pipeline folder; the card shows its sample images, see `save_samples`.
        repo_id: repository that the folder will be loaded from.
    """
    index = read_index(folder)
    components = [f"`{class_name}` ({name})" for name, (_, class_name) in index.components.items()]
    code, caption = code_files(folder), samples_caption(folder / SAMPLES)
    trust = ", trust_remote_code=True" if code else ""
    summary = f"A `{index.class_name}` of {' and '.join(components)}."
    usage = f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{repo_id}"{trust})'
    if steps := read_trained_steps(folder):
        summary += f" It was trained for `num_inference_steps={' or '.join(map(str, steps))}`."
        if not code:  # the pipelines that come with code use this number by default
            usage += f"\nimage = pipe(num_inference_steps={steps[0]}).images[0]"
    facts = CardFacts(
        title=repo_id.rpartition("/")[2],
        summary=summary,
        usage=usage,
        settings={},
        samples={SAMPLES: caption} if caption else {},
        limits="The training data and the image quality are unknown: this card was written from the files alone.",
        license_note="The license of the weights is the one in the metadata of this card. If there is none, it is "
        "unknown: find out before you redistribute them.",
        code=code,
    )
    return _sign(card_text(facts))


def write_autogenerated_card(folder: Path, repo_id: str) -> None:
    """Write an auto-generated card to a pipeline folder, keeping further metadata of an existing card.

    Raises:
        InputError: if the existing card or its metadata cannot be read.
    """
    card = add_metadata(autogenerated_card(folder, repo_id), read_card(folder))
    (folder / CARD_NAME).write_text(card, encoding="utf-8", newline="\n")


def add_metadata(card: str, other: str) -> str:
    """Add metadata of another card, such as a license, to an auto-generated one, whose own entries are kept.

    Raises:
        InputError: if the metadata of the other card cannot be read.
    """
    try:
        metadata = RepoCard(other).data.to_dict()
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The metadata of the existing {CARD_NAME} cannot be read: {reason}. Fix it.") from None
    merged = RepoCard(_SIGNED.sub("", card))
    merged.data = CardData(**{**metadata, **merged.data.to_dict()})
    return _sign(str(merged))


def with_model_card(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """Class decorator on top of `self_contained`: `push_to_hub` replaces auto-generated cards by new ones.

    New cards show sample images, which are generated during the push. If an edited card still shows them, they are
    generated again too. A card written by a person is kept: that of the folder or else of the repository.
    """
    upload_folder = pipeline_class._upload_folder

    def _upload_folder(self, working_dir, repo_id, *args, **kwargs):
        folder = Path(working_dir)
        if (folder / CARD_NAME).is_file():  # Diffusers' template or the repository's card; none with `subfolder`
            if is_autogenerated(self._folder_card or ""):
                self._folder_card = read_card(folder)
            generate = is_autogenerated(self._folder_card)
            if generate or shows_samples(self._folder_card):
                save_samples(self, folder)
            if generate:
                write_autogenerated_card(folder, repo_id)
                self._folder_card = read_card(folder)
        return upload_folder(self, working_dir, repo_id, *args, **kwargs)

    pipeline_class._upload_folder = _upload_folder
    return pipeline_class


def license_of(model: str | InMemory) -> dict[str, Any]:
    """Return the license on the card of a pipeline folder or a repository on the Hub, as fields of `CardFacts`.

    Empty if it is unknown. A relative link to a license text in the repository becomes a full URL. A pipeline in
    memory has the license of the one that it was loaded from.
    """
    model = model.name if isinstance(model, InMemory) else model
    try:
        card = ModelCard.load(Path(model) / CARD_NAME if Path(model).is_dir() else model)
    except Exception:  # no card, no network or no permission to read: the new card says that the license is unknown
        return {}
    values = {name: card.data.get(name) for name in ("license", "license_name", "license_link")}
    link = values["license_link"]
    if link and "://" not in link:
        values["license_link"] = hf_hub_url(model, link) if is_repo_id(model) else None
    return {name: value for name, value in values.items() if value}


def carry_over_license(model: str | InMemory) -> dict[str, Any]:
    """Return `license_of` the start model of a run, and log that the card of the run will state this license."""
    facts = license_of(model)
    if facts:
        name = facts.get("license_name") or facts.get("license") or facts["license_link"]
        logger.info(
            f"License: the model card will state {name}, carried over from the card of {location_name(model)}. Check "
            "that it allows what you want to do, and that the license of the training images agrees with it."
        )
    return facts


def is_repo_id(name: str | None) -> TypeGuard[str]:
    """Return whether a name has the form of a repository on the Hub, `user/name`, and is not a local path."""
    if not name or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _sign(text: str) -> str:
    return f"{text}\n{_SIGNATURE.format(content_hash(text))}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _packages() -> str:
    used = ["diffusers", "torch", *(["accelerate"] if find_spec("accelerate") else [])]  # of the extra [train]
    versions = [f"{name} {version(name)}" for name in used]
    return ", ".join([f"diffusers-ddgan {__version__}", *versions])


def _data_license_note(facts: CardFacts) -> str:
    if not facts.data_license:
        return ""
    return (
        f" The license of the training images, {facts.dataset}, is `{facts.data_license}`, according to their dataset "
        "card: comply with it when you publish the model or its images."
    )


def _license_note(facts: CardFacts) -> str:
    if facts.license:
        name = f"`{facts.license_name or facts.license}`"
        name = f"[{name}]({facts.license_link})" if facts.license_link else name
        return f"License of the weights: {name}, carried over from the base model."
    if facts.base_model:
        return "The license of the base model is not known: look it up before redistributing the weights."
    return "Trained from scratch: whoever trained it chooses the license of the weights, subject to that of the data."
