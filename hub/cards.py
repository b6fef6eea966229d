"""Model cards written from what is known of a run, never from placeholders."""

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from .. import __version__
from ..core.errors import InputError
from .export import _digest, is_unwritten

CARD_NAME = "README.md"


@dataclass
class CardFacts:
    """What a model card tells.

    Attributes:
        title: name of the model.
        summary: what was trained on what, in one paragraph.
        usage: Python that loads the model and makes an image.
        settings: hyper-parameters by their flags' names.
        training: what happened in the run, as rows of a table.
        origin: heading of that table.
        pictures: captions by file names relative to the card's folder.
        base_model: id or name of the model that was started from.
        license: licence of the weights, in the Hub's short form, where known.
        license_name, license_link: of a licence that the Hub has no short form for (`other`), and where its text is.
        license_note: a sentence on it, in place of the usual one.
        evaluation: what was measured of the model, as rows of a table.
        protocol: what these numbers depend on, in words.
        results: the same for the metadata, its model-index.
        code: SHA-256 of each file that loading with `trust_remote_code` runs, see hub/export.py.
        dataset: id or name of the data.
        tags: the Hub's tags beside `unconditional-image-generation`.
    """

    title: str
    summary: str
    usage: str
    settings: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    origin: str = "Training"
    pictures: dict[str, str] = field(default_factory=dict)
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_note: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    protocol: str = ""
    results: list[EvalResult] = field(default_factory=list)
    code: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    tags: list[str] = field(default_factory=list)


def card_text(facts: CardFacts) -> str:
    """The card as Markdown with its metadata."""
    base_model = facts.base_model if is_repo_id(facts.base_model) else None
    data = ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        base_model=base_model,
        base_model_relation=base_model and "finetune",
        datasets=[facts.dataset] if is_repo_id(facts.dataset) else None,
        tags=["diffusers", "unconditional-image-generation", *facts.tags],
        model_name=facts.title if facts.results else None,
        eval_results=facts.results or None,
    )
    if facts.license_note:
        license_line = facts.license_note
    elif facts.license:
        name = f"`{facts.license_name or facts.license}`"
        name = f"[{name}]({facts.license_link})" if facts.license_link else name
        license_line = f"Licence of the weights: {name}, carried over from the model that was started from."
    elif facts.base_model:
        license_line = (
            "The licence of the model that was started from is not known here: look it up before passing this on."
        )
    else:
        license_line = (
            "Trained from scratch: whoever trained it chooses the licence of the weights, minding the data's."
        )
    others = [f"{name} {version(name)}" for name in ("diffusers", "torch", "accelerate")]
    packages = ", ".join([f"diffusers-ddgan {__version__}", *others])
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {facts.title}",
        facts.summary,
        *(f"![{caption}]({name})\n\n*{caption}*" for name, caption in facts.pictures.items()),
        f"## Use\n\n```python\n{facts.usage.strip()}\n```",
        *([f"## {facts.origin}\n\n{_table(facts.training)}\n\nMade with {packages}."] if facts.training else []),
        *([f"## Evaluation\n\n{_table(facts.evaluation)}\n\n{facts.protocol}"] if facts.evaluation else []),
        *(
            [f"<details><summary>All settings</summary>\n\n{_table(facts.settings)}\n\n</details>"]
            if facts.settings
            else []
        ),
        *(
            [f"## Code\n\n`trust_remote_code=True` runs these files of this repository:\n\n{_table(hashes)}"]
            if (hashes := {f"`{name}`": f"SHA-256 `{digest}`" for name, digest in facts.code.items()})
            else []
        ),
        f"## Limits and licence\n\nIt draws what it was trained on, at the size it was trained at, and may repeat "
        f"images of its training data. {license_line}",
    ]
    return "\n\n".join(parts) + "\n"


def nobody_wrote(card: str) -> bool:
    """Whether a card has no words of anybody: it is unwritten, or metadata alone, as the Hub's website makes it."""
    metadata = REGEX_YAML_BLOCK.match(card)
    return is_unwritten(card) or (metadata is not None and not card[metadata.end() :].strip())


def with_metadata(card: str, other: str) -> str:
    """
    A card of `card_of_parts` with what the metadata of another card says beside its own; it stays an unwritten one.

    Raises:
        InputError: if the other card's metadata cannot be read.
    """
    made = RepoCard(card)
    try:
        theirs = RepoCard(other).data.to_dict()
    except (YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The metadata of the {CARD_NAME} that is there cannot be read: {reason}. Mend it.") from None
    made.data = CardData(**{**theirs, **made.data.to_dict()})
    text, made_by = str(made).rsplit("\n<!-- ", 1)
    return f"{text}\n<!-- {re.sub('[0-9a-f]{12}', _digest(text), made_by)}"


def license_of(model: str) -> dict[str, str]:
    """The licence on a model's card, of a folder, else of a repository on the Hub: `CardFacts` by their names.

    Empty where none is known. A text that lies in the repository is named by its address there.
    """
    try:
        card = ModelCard.load(Path(model) / CARD_NAME if Path(model).is_dir() else model)
    except Exception:  # no card, no network, or no right to read: the card then says that the licence is not known
        return {}
    found = {name: card.data.get(name) for name in ("license", "license_name", "license_link")}
    link = found["license_link"]
    if link and "://" not in link:
        found["license_link"] = hf_hub_url(model, link) if is_repo_id(model) else None
    return {name: value for name, value in found.items() if value}


def is_repo_id(name: str | None) -> bool:
    """Whether a name can stand for a repository on the Hub, as `user/name`."""
    if not name or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
