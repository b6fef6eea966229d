"""Measure how far samples of a model are from images, as a Frechet distance, and how far those are from one another.

    python measure.py path/to/model path/to/dataset [path/to/another/dataset ...]

The features are the 192 values of the picture at 8x8 (RGB, mean of 4x4 pixels, in 0..1), so that it needs no download;
the numbers compare with one another, not with an FID. As many samples as the first dataset has images, DDIM, 40 steps
(or a DDGAN's own), seeds from 1000 on. The floor is one half of the first dataset against the other, which halves the
number of images and so errs to the high side.
"""

import sys

import numpy as np
import torch
from datasets import load_dataset
from torch_fidelity import FeatureExtractorBase, calculate_metrics, register_feature_extractor
from tqdm import tqdm

from ddgan import DDGANPipeline
from ddgan.sampling.pipelines import load_pipeline, sample, with_scheduler


class Pixels(FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("pixels",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pixels"

    def forward(self, images):
        return (torch.nn.functional.avg_pool2d(images.float() / 255, 4).flatten(1),)


def images_of(folder: str) -> torch.Tensor:
    pictures = load_dataset(folder, split="train")["image"]
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).permute(0, 3, 1, 2)


def samples_of(folder: str, count: int) -> torch.Tensor:
    pipe, steps = load_pipeline(folder), None
    if not isinstance(pipe, DDGANPipeline):
        pipe, steps = with_scheduler(pipe, "ddim"), 40
    seeds = [*range(1000, 1000 + count)]
    batches = [sample(pipe, seeds[i : i + 32], steps) for i in tqdm(range(0, count, 32), "sampling")]
    arrays = [np.asarray(picture) for batch in batches for picture in batch]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    result = calculate_metrics(
        input1=_Images(a),
        input2=_Images(b),
        feature_extractor="pixels-8x8",
        fid=True,
        cuda=torch.cuda.is_available(),
        verbose=False,
        save_cpu_ram=True,
    )
    return result["frechet_inception_distance"]


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


register_feature_extractor("pixels-8x8", Pixels)
model, *folders = sys.argv[1:]
data = [images_of(folder) for folder in folders]
drawn = samples_of(model, len(data[0]))
for folder, images in zip(folders, data, strict=True):
    print(f"samples against {folder}: {distance(drawn, images):.3f}")
halves = data[0][torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))].chunk(2)
print(f"one half of {folders[0]} against the other: {distance(*halves):.3f}")
for folder, images in zip(folders[1:], data[1:], strict=True):
    print(f"{folders[0]} against {folder}: {distance(data[0], images):.3f}")
