"""Smoke test: load a pipeline with nothing but Diffusers and sample one image.

    python -P standalone_check.py <folder or repository> <image.npy> <revision or ""> <sample folder or "">

hub/upload.py starts it as a process of its own. The picture is that of seed 0 after two steps, (H, W, C) in [0, 1].
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

if __name__ == "__main__":
    place, picture, revision, samples = sys.argv[1:]
    sys.modules["ddgan"] = None  # where this package is installed, it must not be needed either
    folders = runpy.run_path(str(Path(__file__).with_name("export.py")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several might sum in another order
    pipe = DiffusionPipeline.from_pretrained(place, revision=revision or None, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    np.save(picture, pipe(**folders["sample_arguments"](pipe, 1, 2), output_type="np").images[0])
    if samples:
        torch.set_num_threads(threads)
        folders["draw_samples"](pipe, Path(samples))
