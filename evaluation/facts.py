"""The protocol of an evaluation: everything that its numbers depend on.

Each dataclass has one fixed representation in JSON, which result files, cached features and model cards share.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

CLIP_GUIDANCE = "clip_guidance"  # key of `SampleFacts.settings`: the CLIP model that guided the samples

_PACKAGES = (
    "diffusers-ddgan",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "torch-fidelity",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class ImageProperties:
    """Properties of a set of images.

    Attributes:
        size: `WIDTHxHEIGHT`, or that sizes differ.
        channels: 1 (gray) or 3 (color).
        format: file format, or several joined by `and`.
    """

    size: str
    channels: int
    format: str


@dataclass(frozen=True)
class SampleFacts:
    """The origin of samples and how they were generated.

    Attributes:
        count: number of samples.
        properties: size, channels and format.
        origin: where the samples are from, for example a pipeline and its hash.
        settings: how they were generated, for example seeds and scheduler.
    """

    count: int
    properties: ImageProperties
    origin: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**self.origin, "images": self.count, **self.settings, **asdict(self.properties)}


@dataclass(frozen=True)
class ExtractorFacts:
    """The network that computed features or classes.

    Attributes:
        name: name of the network.
        digest: fingerprint of its weights.
        resize: how images are resized to the input of the network.
    """

    name: str
    digest: str
    resize: str

    def as_dict(self) -> dict[str, str]:
        return {"extractor": self.name, "extractor_digest": self.digest, "resize": self.resize}


@dataclass(frozen=True)
class ReferenceFacts:
    """The reference images or saved statistics; unknown facts are None.

    Attributes:
        name: name of the data set.
        split: its split.
        contents: hash of the images.
        images: number of images.
        of: number of images that they are a random subset of.
        size: `WIDTHxHEIGHT` of the image files.
        channels: 1 (gray) or 3 (color), as measured.
        format: file format of the images.
        value_range: stated values of black and white in the files.
        measured_at: `WIDTHxHEIGHT` at which the images were compared.
        preparation: how they were brought to that size.
        extractor: name of the network, of features that were read from a file.
        extractor_digest: fingerprint of its weights.
        resize: how the images were resized to the input of the network.
        device: type of the device that computed the features.
        statistics: description of saved statistics; then there are no images.
    """

    name: str
    split: str | None = None
    contents: str | None = None
    images: int | None = None
    of: int | None = None
    size: str | None = None
    channels: int | None = None
    format: str | None = None
    value_range: str | None = None
    measured_at: str | None = None
    preparation: str | None = None
    extractor: str | None = None
    extractor_digest: str | None = None
    resize: str | None = None
    device: str | None = None
    statistics: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ReferenceFacts":
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class EvaluationProtocol:
    """The protocol of one evaluation; missing parts are None.

    Attributes:
        classifier: the network that predicted classes or digits.
        versions: installed packages that the numbers depend on.
    """

    samples: SampleFacts
    reference: ReferenceFacts | None
    held_out: ReferenceFacts | None
    extractor: ExtractorFacts
    classifier: ExtractorFacts | None
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "samples": self.samples.as_dict(),
            "reference": self.reference and self.reference.as_dict(),
            "held_out": self.held_out and self.held_out.as_dict(),
            "extractor": self.extractor.as_dict(),
            "classifier": self.classifier and asdict(self.classifier),
            "versions": self.versions,
        }

    def descriptions(self) -> dict[str, str]:
        """Describe each part in one line of text, for tables and model cards."""
        return {
            part: ", ".join(_describe(name, value) for name, value in facts.items() if value is not None)
            for part, facts in self.as_dict().items()
            if facts
        }


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that a number depends on."""
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _describe(name: str, value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return str(value) if name in ("name", "extractor") else f"{name.replace('_', ' ')} {value}"
