"""Draws one picture of a pipeline with nothing but Diffusers, to see what people will meet who load it.

    python -P alone.py <folder or repository> <picture.npy> <revision, or nothing>

hub/upload.py starts it as a process of its own.
"""

import inspect
import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    """A picture of seed 0 after two steps, (H, W, C) in [0, 1], where need be of class 0 and pulled towards grey."""
    accepted = inspect.signature(pipe.__call__).parameters
    arguments = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    if "loss" in accepted:
        arguments["loss"] = lambda images: images.square().mean((1, 2, 3))
    if "class_labels" in accepted and any(
        pipe.unet.config.get(name) for name in ("num_class_embeds", "num_classes", "n_cfeat")
    ):
        arguments["class_labels"] = [0]
    return pipe(**arguments).images[0]


if __name__ == "__main__":
    place, picture, revision = sys.argv[1:]
    sys.modules["ddgan"] = None  # where this package is installed, it must not be needed either
    torch.set_num_threads(1)  # several might sum in another order
    pipe = DiffusionPipeline.from_pretrained(place, revision=revision or None, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    np.save(picture, draw(pipe))
