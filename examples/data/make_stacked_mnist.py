"""Create StackedMNIST from MNIST: images whose three channels are three random digits, with 1,000 classes.

    python examples/data/make_stacked_mnist.py path/to/MNIST stacked-mnist [--num_images 128000]

Writes a folder with the file images.npz, for --train_data_dir and --class_conditional: `arr_0` has the images, uint8,
(N, 28, 28, 3), and `arr_1` their labels 100 a + 10 b + c. The default number of images is that of PacGAN (Lin et al.
2018, arXiv 1712.04086).
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
    args.output.mkdir(parents=True)
    images, stacked_labels = np.moveaxis(digits[indices], 1, 3), labels[indices] @ [100, 10, 1]
    np.savez(args.output / "images.npz", images, stacked_labels)


if __name__ == "__main__":
    main()
