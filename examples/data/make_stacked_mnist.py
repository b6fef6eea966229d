"""Create StackedMNIST from MNIST: images whose three channels are three random digits, with 1,000 classes.

    python examples/data/make_stacked_mnist.py path/to/MNIST stacked-mnist [--num_images 128000]

Writes a folder in torchvision's layout with images (N, 28, 28, 3) and labels 100 a + 10 b + c, for --train_data_dir
and --class_conditional. The default number of images is that of PacGAN (Lin et al. 2018, arXiv 1712.04086).
"""

import argparse
from pathlib import Path

import numpy as np
from torchvision.datasets.mnist import read_image_file, read_label_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path, help="MNIST in torchvision's layout: the folder that contains raw/")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--num_images", type=int, default=128_000, help="number of images (default: 128000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random digits (default: 0)")
    args = parser.parse_args()

    raw = args.mnist / "raw"
    digits = read_image_file(str(raw / "train-images-idx3-ubyte")).numpy()
    labels = read_label_file(str(raw / "train-labels-idx1-ubyte")).numpy()
    indices = np.random.default_rng(args.seed).integers(len(digits), size=(args.num_images, 3))
    output = args.output / "raw"
    output.mkdir(parents=True)
    write_idx(output / "train-images-idx3-ubyte", np.moveaxis(digits[indices], 1, 3), type_code=8)
    write_idx(output / "train-labels-idx1-ubyte", (labels[indices] @ [100, 10, 1]).astype(">i4"), type_code=12)


def write_idx(path: Path, array: np.ndarray, type_code: int) -> None:
    """Write an IDX file, the format of MNIST: two zeros, type code, number of dimensions, dimensions, data."""
    header = bytes([0, 0, type_code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.tobytes())


if __name__ == "__main__":
    main()
