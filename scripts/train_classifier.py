"""Train a small image classifier, for the class accuracy of conditional samples and as a feature extractor.

    python scripts/train_classifier.py --train_data_dir path/to/MNIST --output_dir mnist-classifier
    python scripts/train_classifier.py --dataset_name uoft-cs/cifar10 --widths 32 64 128 --random_flip --num_epochs 20

Labels come from the data: torchvision's MNIST-style folders, folders of images with one subfolder per class
(optionally in train/ and test/), or datasets with a label column. Without a test split, a tenth of the images is held
out for testing. The run folder is also an `ImageClassifier` folder.
From Python, call `ddgan.api.train_classifier`.
"""

from ddgan.commands.arguments import CLASSIFIER_ARGUMENTS
from ddgan.core.cli import parse_arguments
from ddgan.core.errors import run_command


def main(argv: list[str] | None = None) -> None:
    run(*parse(argv))


def parse(argv: list[str] | None = None, *more: type) -> tuple:
    """Parse the arguments of `run`, and those of `more` dataclasses."""
    return parse_arguments(*CLASSIFIER_ARGUMENTS, *more, argv=argv)


def run(*arguments) -> None:
    from ddgan.commands.train_classifier import train_classifier  # imports PyTorch and Diffusers, which takes seconds
    from ddgan.training.model_card import print_summary

    finished = train_classifier(*arguments)
    print_summary(finished)
    if finished.card:
        print(f"test accuracy  {finished.card.evaluation['accuracy']}")


if __name__ == "__main__":
    run_command(main)
