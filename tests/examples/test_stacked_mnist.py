"""StackedMNIST is made from MNIST, and training reads it."""

import runpy
import sys

import numpy as np
from tiny import ROOT, write_idx

from ddgan.data.sources import open_source


def test_images_have_three_digits_and_the_label_of_all_three(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    labels = np.arange(10, dtype=np.uint8)
    digits = np.broadcast_to((20 * labels)[:, None, None], (10, 28, 28))  # the gray value shows the digit
    write_idx(raw / "train-images-idx3-ubyte", digits)
    write_idx(raw / "train-labels-idx1-ubyte", labels)
    script, output = ROOT / "examples" / "data" / "make_stacked_mnist.py", tmp_path / "stacked"
    monkeypatch.setattr(sys, "argv", [str(script), str(raw.parent), str(output), "--num_images", "50"])
    runpy.run_path(str(script), run_name="__main__")

    source = open_source(str(output), folder_as="images")
    assert len(source) == 50
    classes = source.labels(None)
    for i in range(50):
        image = np.asarray(source[i])
        assert image.shape == (28, 28, 3)
        assert np.array_equal(image, np.broadcast_to(image[0, 0], image.shape))
        assert int(classes.classes[classes.numbers[i]]) == image[0, 0] // 20 @ [100, 10, 1]
