"""Guidance losses by name, from their short form in text: `color:teal`, `2*clip:a red rose`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..core.errors import InputError
from .arguments import clip_model_names, parse_number, split_loss
from .clip import CLIPLoss
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
    "saturation": lambda chroma: SaturationLoss(parse_number(chroma)),
    "total_variation": TotalVariationLoss,
    "symmetry": SymmetryLoss,
    "reference": lambda path: ReferenceLoss(Image.open(Path(path).expanduser())),
}
# called with the argument, the names of the CLIP model, and the device
CLIP_LOSSES: dict[str, Callable[..., GuidanceLoss]] = {
    "clip": CLIPLoss,
    "clip_image": lambda path, *model, device: CLIPLoss(Image.open(Path(path).expanduser()), *model, device=device),
}


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
    weight, name, argument = split_loss(text)
    try:
        if name in LOSSES:
            loss = LOSSES[name]() if argument is None else LOSSES[name](argument)
        else:
            loss = CLIP_LOSSES[name](argument, *clip_model_names(clip_model), device=device)
        return loss if weight is None else weight * loss
    except (OSError, ValueError) as error:
        raise InputError(f"The guidance loss {text!r} is invalid: {error}") from error


def includes_clip(loss: GuidanceLoss) -> bool:
    """Return whether a loss is a `CLIPLoss` or a sum that includes one."""
    terms = [term for _, term in loss.terms] if isinstance(loss, WeightedSum) else [loss]
    return any(isinstance(term, CLIPLoss) for term in terms)


def sum_losses(losses: Sequence[GuidanceLoss]) -> GuidanceLoss:
    """Add up one or more losses."""
    return sum(losses[1:], start=losses[0])
