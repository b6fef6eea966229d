"""Images per second of decoding and resizing JPEG files, 512x512 to 256x256, on one thread.

    python benchmarks/bench_data.py

compares the data loading of the training scripts with torchvision's decoder and with plain loops over Pillow. In each
round every variant reads the same files from memory, one after the other, so that the ratios hold while other work
comes and goes.
"""

import argparse
import io
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from common import hardware
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as TF

from ddgan.data.preprocessing import Preprocessing, read_image

LARGE, SMALL = 512, 256


def photo(seed: int) -> bytes:
    """Return a JPEG file with the detail of a photo: noise whose amplitude falls with its frequency."""
    random = np.random.default_rng(seed)
    pixels = np.zeros((LARGE, LARGE, 3))
    for level in range(1, 10):
        noise = Image.fromarray(random.integers(0, 256, (2**level, 2**level, 3), dtype=np.uint8))
        pixels += np.asarray(noise.resize((LARGE, LARGE), Image.Resampling.BICUBIC)) * 0.6**level
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


PREPROCESSING = Preprocessing(3, SMALL, SMALL)


def this_package(content: bytes) -> torch.Tensor:
    return read_image(content, PREPROCESSING)


def torchvision_decoder(content: bytes) -> torch.Tensor:
    image = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    assert isinstance(image, torch.Tensor)
    return TF.resize(image, [SMALL, SMALL], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pillow(content: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return _tensor(image.resize((SMALL, SMALL), Image.Resampling.BICUBIC))


def pillow_draft(content: bytes) -> torch.Tensor:
    """Let the decoder halve the size: it transforms 4x4 instead of 8x8 coefficients of each block."""
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (SMALL, SMALL))
    return _tensor(image.convert("RGB"))


def decoding_only(content: bytes) -> torch.Tensor:
    return _tensor(Image.open(io.BytesIO(content)).convert("RGB"))


VARIANTS: dict[str, Callable[[bytes], torch.Tensor]] = {
    "this package": this_package,
    "torchvision: `decode_jpeg`, `resize`": torchvision_decoder,
    "plain Pillow: `convert`, `resize`": pillow,
    "Pillow in draft mode, which halves the size": pillow_draft,
    "Pillow, without resizing": decoding_only,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = [photo(seed) for seed in range(args.images)]
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, read in VARIANTS.items():
            started = time.process_time()
            for content in files:
                read(content)
            seconds[name].append(time.process_time() - started)
    size = sum(map(len, files)) / len(files) / 1000
    print(
        f"{hardware()}; {args.images} files of {size:.0f} kB on average, {args.rounds} rounds; seconds are CPU time\n"
    )
    print("| | images per second | relative to this package | difference of pixels: largest, mean |")
    print("|---|--:|--:|--:|")
    expected = [this_package(content).float() for content in files]
    for name, read in VARIANTS.items():
        ratio = median(a / b for a, b in zip(seconds["this package"], seconds[name], strict=True))
        difference = ""
        if name != "Pillow, without resizing":
            differences = [(read(f).float() - e).abs() for f, e in zip(files, expected, strict=True)]
            largest = max(d.max().item() for d in differences)
            difference = f"{largest:.0f}, {sum(d.mean().item() for d in differences) / len(files):.2f}"
        print(f"| {name} | {args.images / median(seconds[name]):.0f} | {ratio:.2f} | {difference} |")
