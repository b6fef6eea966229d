"""Guidance on the command line: losses, colors and CLIP models as text; nothing here imports PyTorch."""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ..core.errors import InputError

MAX_GUIDANCE_SCALE = 1e6  # of a loss; the scale that an image needs grows with its number of pixels
DEFAULT_MODEL = "openai/clip-vit-base-patch32"
# default guidance scales times the number of sampling steps, see `default_guidance_scale`
_DEFAULT_STRENGTH = 40.0 * 40
# the losses of `registry.parse_loss`, and how --help shows them
LOSS_FORMS = {
    "color": "color:#BB2266",
    "saturation": "saturation:<0 to 1>",
    "total_variation": "total_variation",
    "symmetry": "symmetry",
    "reference": "reference:<image file>",
    "clip": "clip:<sentence>",
    "clip_image": "clip_image:<image file>",
}
MIRRORS = "left-right", "top-bottom"  # of `symmetry`, which takes one of them as an optional argument
TOWARDS_HELP = f"guidance losses, each name, name:argument or weight*name:argument: {', '.join(LOSS_FORMS.values())}"
CLIP_MODEL_HELP = (
    "CLIP model: Hub ID or folder of a Transformers model, or for open_clip hf-hub:<id> or an architecture and its "
    f"pretrained tag (default: {DEFAULT_MODEL})"
)


class LossText(NamedTuple):
    """The parts of `name`, `name:argument` or `weight*name:argument`."""

    weight: float | None
    name: str
    argument: str | None


def default_guidance_scale(num_inference_steps: int) -> float:
    """Return the default scale of guidance with a loss: 40 in 40 steps.

    Each step moves the sample by the scale times a gradient, so for the same effect in fewer steps the scale grows in
    inverse proportion to their number.
    """
    return _DEFAULT_STRENGTH / num_inference_steps


def split_loss(text: str) -> LossText:
    """Split the short form of a guidance loss in text.

    Raises:
        InputError: If there is no such loss, color or image file, an argument is missing or not taken, or the weight
            is not a number or 0.
    """
    weight, star, name, colon, argument = _parts(text)
    try:
        if name not in LOSS_FORMS:
            raise ValueError(f"there is no loss {name!r}. Choose from {', '.join(LOSS_FORMS)}.")
        form = LOSS_FORMS[name]
        if ":" in form and not argument.strip():
            raise ValueError(f"it needs an argument: {form}.")
        if colon and name == "total_variation":
            raise ValueError(f"{name} takes no argument.")
        if colon and name == "symmetry" and argument not in MIRRORS:
            raise ValueError(f"the symmetry must be {' or '.join(map(repr, MIRRORS))}.")
        if name == "color":
            parse_color(argument)
        if name == "saturation" and not 0 <= parse_number(argument) <= 1:
            raise ValueError("the saturation must be from 0 (gray) to 1 (pure colors).")
        if form.endswith(":<image file>") and not os.path.isfile(os.path.expanduser(argument)):
            raise ValueError(f"there is no file {argument}.")
        if star and not parse_number(weight):
            raise ValueError("with the weight 0 it has no effect: omit it.")
        return LossText(parse_number(weight) if star else None, name, argument if colon else None)
    except ValueError as error:
        raise InputError(f"The guidance loss {text!r} is invalid: {error}") from error


def needs_clip(text: str) -> bool:
    """Return whether the short form of a guidance loss in text, which need not be valid any more, is one with CLIP."""
    return _parts(text)[2].startswith("clip")


def _parts(text: str) -> tuple[str, str, str, str, str]:
    """Return weight, star, name, colon and argument of a loss in text; parts that it does not have are empty."""
    weight, star, unweighted = text.partition("*")
    if not star or ":" in weight:  # the star, if any, is part of the argument
        weight, star, unweighted = "", "", text
    return weight, star, *unweighted.partition(":")


def parse_number(text: str) -> float:
    """Parse a finite number.

    Raises:
        ValueError: If the text is not a finite number.
    """
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"{text!r} is not a finite number.")


def parse_color(text: str) -> tuple[float, float, float]:
    """Return red, green and blue in [0, 1] of a CSS color: `#BB2266`, `teal`, `hsl(200, 80%, 50%)`.

    Raises:
        InputError: If the color is invalid.
    """
    from PIL import ImageColor

    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError:
        raise InputError(
            f"{text!r} is not a known color. Use '#BB2266', a CSS name such as 'teal' or, in Python, red, green and "
            "blue from 0 to 1."
        ) from None
    return red / 255, green / 255, blue / 255


def clip_model_names(clip_model: str | Sequence[str] | None) -> list[str]:
    """Return the arguments `model` and, for open_clip, `pretrained` of `CLIPLoss`; None means the default model.

    Raises:
        InputError: If there are more than two names.
    """
    names = [clip_model] if isinstance(clip_model, str) else list(clip_model or [DEFAULT_MODEL])
    if len(names) > 2:
        raise InputError(
            f"--clip_model {' '.join(names)}: it takes one name, or an open_clip architecture and its pretrained tag."
        )
    return names
