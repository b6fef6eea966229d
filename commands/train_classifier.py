"""Train a small image classifier, for the class accuracy of conditional samples and as a feature extractor."""

import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import torch
from huggingface_hub import EvalResult
from tqdm.auto import tqdm

from ..core.cli import default_of
from ..core.errors import InputError, RunError
from ..data.arguments import check_value_range
from ..data.sources import ImageSource, Labels, MissingSplitError
from ..evaluation.classifier import ImageClassifier
from ..evaluation.references import ReferenceImages, describe_images, evenly_spaced
from ..hub.cards import CardFacts, string_literal
from ..training.arguments import LabelArguments
from ..training.ema import EMA
from ..training.job import TrainedNetwork, TrainingJob
from ..training.loading import hold_out, open_training_source
from ..training.lr_schedules import lr_schedule
from ..training.model_card import FinishedRun, settings_for_card
from ..training.objectives.classification import NOISE, ROTATION, SCALING, SHIFT, ClassificationObjective
from ..training.optimizers import adamw
from ..training.run_folder import RunFolder
from ..training.session import Session
from ..training.tracking import MetricsFile
from .arguments import (
    ClassifierArguments,
    ClassifierDataArguments,
    ClassifierLearningRateArguments,
    ClassifierRunArguments,
)

HELD_OUT = 0.1  # share of the images held out, if there is no test split
WARMUP = 1 / 20  # share of the optimizer steps


def train_classifier(
    run: ClassifierRunArguments,
    learning_rate: ClassifierLearningRateArguments,
    data_args: ClassifierDataArguments,
    label_args: LabelArguments,
    args: ClassifierArguments,
) -> FinishedRun:
    """Train an `ImageClassifier` from scratch with cross-entropy and AdamW, and measure its test accuracy.

    Raises:
        InputError: if the arguments are invalid.
        RunError: if an image cannot be read, or the run fails after it has started.
    """
    session = Session.open(run)
    train_source, test_source, test_name = open_splits(data_args, args.test_split, run.seed)
    labels = train_source.labels(label_args.label_column)
    if len(labels.classes) < 2:
        raise InputError(
            f"A classifier needs at least two classes; the data has {', '.join(labels.classes) or 'none'}."
        )
    channels, size = input_shape(train_source, data_args)
    torch.manual_seed(run.seed)  # same initial weights in every process and every run with this seed
    network = ImageClassifier(size, channels, len(labels.classes), tuple(args.widths), dict(enumerate(labels.classes)))
    test_labels = renumber(test_source.labels(label_args.label_column), labels.classes)
    test_images = TestImages(test_name, run.batch_size, check_value_range(data_args.value_range))
    if session.accelerator.is_main_process:  # only this process tests
        test_images.read(test_source, test_labels, network, data_args.skip_broken_images)
    data = session.load_data(data_args, channels, (size, size), label_args, train_source)

    arguments = (run, learning_rate, data_args, label_args, args)
    card = card_facts(network, data.name, *arguments)

    def measure_accuracy(folder: RunFolder, step: int) -> None:
        saved = ImageClassifier.from_pretrained(folder.path).to(session.accelerator.device)
        accuracy, table = test_images.accuracy(saved)
        MetricsFile(folder.metrics, step).amend({"test_accuracy": accuracy})
        card.evaluation = table
        card.results = [
            EvalResult(
                task_type=card.task,
                dataset_type=data.name,
                dataset_name=data.name,
                metric_type="accuracy",
                metric_value=round(accuracy, 4),
            )
        ]

    job = TrainingJob(
        networks=[
            TrainedNetwork(
                network=network,
                objective=ClassificationObjective(args.augmentation),
                optimizer=adamw(network.parameters(), learning_rate),
                lr_schedule=lambda optimizer, steps: lr_schedule(
                    optimizer, steps, replace(learning_rate, lr_warmup_steps=warmup_steps(learning_rate, steps))
                ),
            )
        ],
        pipeline=network,
        ema=EMA(network, run),
        finish=measure_accuracy,
        card=card,
        arguments=arguments,
    )
    return session.train(job, data)


def warmup_steps(args: ClassifierLearningRateArguments, total_steps: int) -> int:
    """Return `--lr_warmup_steps`, by default a share of all steps."""
    return int(WARMUP * total_steps) if args.lr_warmup_steps is None else args.lr_warmup_steps


# ---------------------------------------------------------------------------------------------------------------------
# Labeled images


def open_splits(
    args: ClassifierDataArguments, test_split: str | None, seed: int
) -> tuple[ImageSource, ImageSource, str]:
    """Open the images to train on and those to test on; the third value describes the latter.

    Raises:
        InputError: if the images are not found, there is no split `test_split`, or too few images to hold some out.
    """
    source = open_training_source(args)
    if test_split or source.split != "all":
        try:
            test_source = open_training_source(replace(args, split=test_split or "test"))
            if test_source.split != source.split:
                return source, test_source, "the test split"
            if test_split:
                raise InputError(f"--test_split {test_split} names the images to train on. Name another split.")
        except MissingSplitError:
            if test_split:
                raise
    return *hold_out(source, HELD_OUT, seed), "held out"


def input_shape(source: ImageSource, args: ClassifierDataArguments) -> tuple[int, int]:
    """Return the input channels and the side length of a classifier for these images."""
    images = ReferenceImages(source, args.skip_broken_images)
    size = args.image_size or min(images.image(0).size)
    return describe_images([images.image(i) for i in evenly_spaced(len(source))]).channels, size


def renumber(labels: Labels, classes: list[str]) -> list[int]:
    """Return the class of each test image as its number among the classes of the training images.

    Raises:
        InputError: if a test image has another class.
    """
    unknown = set(labels.classes) - set(classes)
    if unknown:
        raise InputError(
            f"The test images have classes missing from the training images: {', '.join(sorted(unknown))}."
        )
    assert labels.numbers is not None
    return [classes.index(labels.classes[number]) for number in labels.numbers]


class TestImages:
    """Test images of a classifier, held in memory.

    Args:
        name: description of the images for the card.
        batch_size: number of images classified at a time.
        value_range: see `Preprocessing`.
    """

    def __init__(self, name: str, batch_size: int, value_range: tuple[float, float] | None = None):
        self.name, self.batch_size, self.value_range = name, batch_size, value_range

    def read(self, source: ImageSource, labels: list[int], network: ImageClassifier, skip_broken: bool) -> None:
        """Read all images at the input size of a classifier.

        Raises:
            RunError: at an image that cannot be read, unless broken images are skipped.
        """
        size = network.config.sample_size
        images, pixels, numbers = ReferenceImages(source, value_range=self.value_range), [], []
        for i, number in enumerate(tqdm(labels, "reading the test images", leave=False)):
            try:
                pixels.append(images.pixels(i, network.config.in_channels, size, size))
                numbers.append(number)
            except RunError:
                if not skip_broken:
                    raise
        self.pixels, self.labels = torch.stack(pixels), torch.tensor(numbers)

    @torch.no_grad()
    def accuracy(self, classifier: ImageClassifier) -> tuple[float, dict[str, str]]:
        """Return the accuracy of a classifier, and a table for the card that also has the accuracy of each class."""
        predictions = [
            classifier(batch.to(classifier.device).float() / 127.5 - 1).argmax(1).cpu()
            for batch in self.pixels.split(self.batch_size)
        ]
        correct = (torch.cat(predictions) == self.labels).double()
        accuracy = correct.mean().item()
        table = {"accuracy": f"{accuracy:.2%} of {len(correct):,} images ({self.name})"}
        for number, name in enumerate(classifier.class_names):
            of_class = correct[self.labels == number]
            table[f"accuracy of {name}"] = f"{of_class.mean().item():.2%}" if len(of_class) else "no images"
        return accuracy, table


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def card_facts(
    network: ImageClassifier,
    dataset: str,
    run: ClassifierRunArguments,
    learning_rate: ClassifierLearningRateArguments,
    data_args: ClassifierDataArguments,
    label_args: LabelArguments,
    args: ClassifierArguments,
) -> CardFacts:
    """Return the contents of the card, without the accuracy."""
    config, folder = network.config, run.folder_name
    arguments = (run, learning_rate, data_args, label_args, args)
    location = [f"--{'dataset_name' if data_args.dataset_name else 'train_data_dir'}", dataset]
    command = [*location, "--output_dir", folder, *changed_flags(*arguments)]
    strength = args.augmentation
    return CardFacts(
        title=run.model_save_name,
        summary="A small classifier for evaluating generated images. Its predictions give the class accuracy of "
        "conditional samples; its penultimate layer gives the features for distances between distributions. It takes "
        f"{'grayscale' if config.in_channels == 1 else 'RGB'} images of {config.sample_size}x{config.sample_size} "
        f"pixels in {config.num_classes} classes, and has {network.num_parameters():,} parameters and "
        f"{config.widths[-1]} features.",
        usage=USAGE.format(
            folder=string_literal(folder),
            shape=f"(N, {config.in_channels}, {config.sample_size}, {config.sample_size})",
        ),
        settings=settings_for_card(*arguments),
        limits="It recognizes only the classes and the kind of images that it was trained on.",
        protocol="The test images were not used for training. They are center-cropped and not augmented.",
        sections={
            "Augmentation": f"Rotation by up to {strength * ROTATION:g} degrees, scaling by {strength * SCALING:.0%}, "
            f"translation by {strength * SHIFT:.0%}{', horizontal flips' if data_args.random_flip else ''}, noise of "
            f"standard deviation up to {strength * NOISE:g} where white is 1 and black -1.",
            "Reproduction": f"```bash\nddgan train-classifier {shlex.join(command)}\n```",
        },
        dataset=dataset,
        task="image-classification",
    )


def changed_flags(*arguments: Any) -> Iterator[str]:
    """Return the flags of all settings that differ from their defaults, except names and locations."""
    settings = settings_for_card(*arguments)
    for argument in chain.from_iterable(map(fields, arguments)):
        default = default_of(argument)
        value = settings.get(argument.name, default)
        if value == default or argument.name in ("model_save_name", "dataset_name", "report_to"):
            continue
        yield f"--{'no_' if value is False else ''}{argument.name}"
        if not isinstance(value, bool):
            yield from map(str, value if isinstance(value, list) else [value])


USAGE = """
from ddgan.evaluation.classifier import ImageClassifier

classifier = ImageClassifier.from_pretrained({folder})
logits = classifier(images)  # images: {shape} in [-1, 1]
features = classifier.features(images)
"""
