"""Guidance losses by name, and their short form in text: `color:teal`, `2*clip:a red rose`."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..core.errors import InputError
from .clip import DEFAULT_MODEL, CLIPLoss
from .losses import (
    ColorLoss,
    GuidanceLoss,
    ReferenceLoss,
    SaturationLoss,
    SymmetryLoss,
    TotalVariationLoss,
    WeightedSum,
)

# called with the argument as text, if there is one
LOSSES: dict[str, Callable[..., GuidanceLoss]] = {
    "color": ColorLoss,
    "saturation": lambda chroma: SaturationLoss(_number(chroma)),
    "total_variation": TotalVariationLoss,
    "symmetry": SymmetryLoss,
    "reference": lambda path: ReferenceLoss(Image.open(Path(path).expanduser())),
}
# called with the argument, the names of the CLIP model, and the device
CLIP_LOSSES: dict[str, Callable[..., GuidanceLoss]] = {
    "clip": CLIPLoss,
    "clip_image": lambda path, *model, device: CLIPLoss(Image.open(Path(path).expanduser()), *model, device=device),
}

TOWARDS_HELP = (
    "guidance losses, each name, name:argument or weight*name:argument: color:#BB2266, saturation:<0 to 1>, "
    "total_variation, symmetry, reference:<image file>, clip:<sentence>, clip_image:<image file>"
)
CLIP_MODEL_HELP = (
    "CLIP model: Hub ID or folder of a Transformers model, or for open_clip hf-hub:<id> or an architecture and its "
    f"pretrained tag (default: {DEFAULT_MODEL})"
)


def parse_loss(
    text: str, clip_model: str | Sequence[str] | None = None, device: str | torch.device | None = None
) -> GuidanceLoss:
    """Create a guidance loss from its short form in text.

    Args:
        text: `name`, `name:argument` or `weight*name:argument`, where `name` is a key of `LOSSES` or `CLIP_LOSSES`.
        clip_model: The CLIP model, as for `clip_model_names`.
        device: Device of the CLIP model, as for `CLIPLoss`.

    Raises:
        InputError: If there is no such loss, or the weight or the argument is invalid.
    """
    weight, star, unweighted = text.partition("*")
    if not star or ":" in weight:  # the star, if any, is part of the argument
        star, unweighted = "", text
    name, colon, argument = unweighted.partition(":")
    try:
        if name in LOSSES:
            loss = LOSSES[name](argument) if colon else LOSSES[name]()
        elif name in CLIP_LOSSES:
            if not argument:
                raise InputError(f"{name} needs an argument.")
            loss = CLIP_LOSSES[name](argument, *clip_model_names(clip_model), device=device)
        else:
            raise InputError(f"there is no loss {name!r}. Choose from {', '.join([*LOSSES, *CLIP_LOSSES])}.")
        return _number(weight) * loss if star else loss
    except TypeError as error:  # of a constructor without parameters, or with required ones
        reason = f"{name} {'takes no' if colon else 'needs an'} argument."
        raise InputError(f"The guidance loss {text!r} is invalid: {reason}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"The guidance loss {text!r} is invalid: {error}") from error


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number.")
    return number


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


def includes_clip(loss: GuidanceLoss) -> bool:
    """Return whether a loss is a `CLIPLoss` or a sum that includes one."""
    terms = [term for _, term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    return any(isinstance(term, CLIPLoss) for term in terms)


def sum_losses(losses: Sequence[GuidanceLoss]) -> GuidanceLoss:
    """Add up one or more losses."""
    return sum(losses[1:], start=losses[0])
