"""Smoke test: load a pipeline with Diffusers alone and sample one image.

    python -P standalone_check.py <folder> <image.npy> <folder for samples or ""> <"trust_remote_code" or "">

`hub.upload.sample_standalone` runs it in a process of its own. The image is that of seed 0 after two steps, (H, W, C)
in [0, 1]. With a folder, the sample images of a model card are saved there too.
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

if __name__ == "__main__":
    folder, image_file, samples_folder, trust = sys.argv[1:]
    # the check must not use an installed package
    sys.modules["ddgan"] = None  # pyright: ignore[reportArgumentType]
    samples = runpy.run_path(str(Path(__file__).with_name("samples.py")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads may sum in another order
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=bool(trust))
    pipe.set_progress_bar_config(disable=True)
    np.save(image_file, pipe(**samples["sample_arguments"](pipe, 1, 2), output_type="np").images[0])  # pyright: ignore[reportCallIssue]
    if samples_folder:
        torch.set_num_threads(threads)
        samples["save_samples"](pipe, Path(samples_folder))
