"""Train a small image classifier, for the class accuracy of conditional samples and as a feature extractor.

    python scripts/train_classifier.py --train_data_dir path/to/MNIST --output_dir mnist-classifier
    python scripts/train_classifier.py --dataset_name uoft-cs/cifar10 --widths 32 64 128 --random_flip --num_epochs 20

Labels come from the data: torchvision's MNIST-style folders, folders of images with one subfolder per class
(optionally in train/ and test/), or datasets with a label column. Without a test split, a tenth of the images is held
out for testing. The result is an `ImageClassifier` folder with a model card.
"""

import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from huggingface_hub import EvalResult, ModelCardData
from tqdm import tqdm

from ddgan.core.cli import option, parse_arguments, require_at_least
from ddgan.core.errors import InputError, run_command
from ddgan.core.files import location_name, replace_tree
from ddgan.data.images import BrokenImageError, to_bytes
from ddgan.data.preprocessing import Preprocessing, read_image
from ddgan.data.sources import ImageSource, MissingSplitError, open_source
from ddgan.evaluation.classifier import NORM_GROUPS, ImageClassifier
from ddgan.evaluation.references import ReferenceImages, describe_images, evenly_spaced
from ddgan.hub.cards import CARD_NAME, is_repo_id

HELD_OUT = 0.1  # share of the images, if there is no test split
WARMUP = 0.05  # share of the optimizer steps
ROTATION, SCALING, SHIFT = 10.0, 0.1, 0.08  # maxima: degrees, log scale, share of the image side
NOISE = 0.1  # maximum standard deviation, for images in [-1, 1]


@dataclass
class ClassifierArguments:
    """Data, size and training settings of the classifier."""

    _alternatives = ({"dataset_name", "train_data_dir"},)

    dataset_name: str | None = option(None, "Hub dataset, or a local dataset file or folder")
    dataset_config: str | None = option(None, "configuration of the dataset, if it has several")
    split: str = option("train", "training split")
    test_split: str | None = option(
        None,
        "split for the test accuracy (default: `test` if it exists, else a tenth of the images is held out)",
    )
    image_column: str | None = option(None, "column with the images (default: the first image column)")
    label_column: str | None = option(None, "column with the labels (default: the first class-label column)")
    train_data_dir: str | None = option(
        None, "folder or .zip file of images with one subfolder per class, MNIST-style folder, or .npz file"
    )
    image_size: int | None = option(
        None, "height and width of the input (default: the shorter side of the first image)"
    )
    augmentation: float = option(1.0, "strength of random shifts, rotations, scaling and noise; 0 disables them")
    random_flip: bool = option(False, "flip images horizontally with probability 0.5")
    output_dir: str = option("classifier", "folder to save the classifier in")
    widths: list[int] | None = option(None, "channels of each block (default: 16 32 64 96)")
    batch_size: int = option(128, "batch size")
    num_epochs: int = option(6, "number of epochs")
    learning_rate: float = option(4e-3, "peak learning rate of AdamW")
    seed: int = option(0, "random seed; runs with the same seed and settings are identical")

    def __post_init__(self):
        if bool(self.dataset_name) == bool(self.train_data_dir):
            raise InputError("Pass the labeled images with either --dataset_name or --train_data_dir.")
        require_at_least(1, self, "image_size", "batch_size", "num_epochs")
        require_at_least(0, self, "augmentation")
        self.widths = self.widths or [16, 32, 64, 96]
        if any(width < 1 or width % NORM_GROUPS for width in self.widths):
            raise InputError(
                f"--widths {' '.join(map(str, self.widths))}: the widths must be multiples of {NORM_GROUPS}."
            )


@dataclass
class LabelledImages:
    """Images (N, C, H, W), uint8, and their labels (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(ClassifierArguments, argv=argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    train, test, names, test_name = load_data(args)
    model = ImageClassifier(
        train.images.shape[-1], train.images.shape[1], len(names), tuple(args.widths), dict(enumerate(names))
    ).to(device)  # pyright: ignore[reportArgumentType]
    start = time.perf_counter()
    fit(model, train, args)
    minutes = (time.perf_counter() - start) / 60
    correct = predict(model, test.images, args.batch_size) == test.labels
    accuracy = correct.double().mean().item()
    accuracies = {name: correct[test.labels == label].double().mean().item() for label, name in enumerate(names)}

    output = Path(args.output_dir)
    card = card_text(args, model, train, test, test_name, accuracy, accuracies, minutes)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        (folder / CARD_NAME).write_text(card, encoding="utf-8")

    replace_tree(output, write)
    print(f"test accuracy: {accuracy:.2%} of {len(test.labels):,} images ({test_name})")
    print(f"classifier folder: {output}")


def fit(model: ImageClassifier, data: LabelledImages, args: ClassifierArguments) -> None:
    """Train with cross-entropy, AdamW and a cosine learning-rate schedule on augmented images."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, weight_decay=0.05)
    steps = args.num_epochs * -(-len(data.labels) // args.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    model.train()
    with tqdm(total=steps, unit="step") as progress:
        for epoch in range(args.num_epochs):
            for indices in torch.randperm(len(data.labels), generator=generator).split(args.batch_size):
                images = augment(to_float(data.images[indices]), args.augmentation, args.random_flip, generator)
                logits = model(images.to(model.device))
                loss = F.cross_entropy(logits, data.labels[indices].to(model.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
            progress.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.4f}")
    model.eval()


def augment(images: torch.Tensor, strength: float, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Shift, rotate, scale, optionally flip and add noise to each image (N, C, H, W), in [-1, 1], independently."""
    count = len(images)

    def uniform(maximum: float, *shape: int) -> torch.Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * maximum * strength

    angle, scale = uniform(ROTATION).deg2rad(), uniform(SCALING).exp()
    flip_sign = (torch.rand(count, generator=generator) < 0.5) * -2.0 + 1.0 if flip else torch.ones(count)
    rotation = torch.stack([angle.cos() * flip_sign, -angle.sin(), angle.sin() * flip_sign, angle.cos()], 1).view(
        -1, 2, 2
    )
    affine = torch.cat(
        [rotation * scale.view(-1, 1, 1), 2 * uniform(SHIFT, 2, 1)], 2
    )  # the image side is 2 in grid coordinates
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    transformed = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    noise = torch.randn(images.shape, generator=generator) * uniform(NOISE, 1, 1, 1)
    return (transformed + noise).clamp(-1, 1)


@torch.no_grad()
def predict(model: ImageClassifier, images: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the most likely class of each image (N, C, H, W), uint8."""
    return torch.cat([model(to_float(batch).to(model.device)).argmax(1).cpu() for batch in images.split(batch_size)])


def to_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Labeled images


def load_data(args: ClassifierArguments) -> tuple[LabelledImages, LabelledImages, list[str], str]:
    """Images to learn from, images to test on, the names of the classes, and what the test images are in words.

    Raises:
        InputError: what is named is not found, has no labels or fewer than two classes, or has a broken image.
    """
    source, test_source = open_splits(args)
    labels = source.labels(args.label_column)
    names = labels.classes
    if len(names) < 2:
        raise InputError(f"A classifier needs at least two classes; the data has {', '.join(names) or 'none'}.")
    images = ReferenceImages(source)
    size = args.image_size or min(images.image(0).size)
    channels = describe_images([images.image(i) for i in evenly_spaced(len(source))]).channels
    preprocessing = Preprocessing(channels, size, size, center_crop=True)
    data = LabelledImages(read_all(source, preprocessing), torch.tensor(labels.numbers))
    if test_source:
        labels = test_source.labels(args.label_column)
        unknown = set(labels.classes) - set(names)
        if unknown:
            raise InputError(f"The test images have classes that the others have not: {', '.join(sorted(unknown))}.")
        numbers = torch.tensor([names.index(name) for name in labels.classes])[labels.numbers]
        return data, LabelledImages(read_all(test_source, preprocessing), numbers), names, "the test split"
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(args.seed))
    held_out = max(1, round(HELD_OUT * len(source)))
    test, train = (LabelledImages(data.images[part], data.labels[part]) for part in order.tensor_split([held_out]))
    return train, test, names, "held out"


def open_splits(args: ClassifierArguments) -> tuple[ImageSource, ImageSource | None]:
    """Open the images to learn from, and those of the test split; None if there is no such split."""
    open_split = partial(
        open_source,
        args.train_data_dir or args.dataset_name,  # pyright: ignore[reportArgumentType]
        config=args.dataset_config,
        image_column=args.image_column,
        folder_as="images" if args.train_data_dir else "dataset",
    )
    source = open_split(args.split)
    if source.split == "all":
        return source, None
    try:
        return source, open_split(args.test_split or "test")
    except MissingSplitError:
        if args.test_split:
            raise
        return source, None


def read_all(source: ImageSource, preprocessing: Preprocessing) -> torch.Tensor:
    """Read all images of a source, (N, C, H, W), uint8."""
    images = torch.empty(
        len(source), preprocessing.channels, preprocessing.height, preprocessing.width, dtype=torch.uint8
    )
    for i in tqdm(range(len(source)), "reading images", leave=False):
        try:
            pixels = preprocessing.finish(read_image(source[i], preprocessing), sample_key=i)
        except BrokenImageError as error:
            raise InputError(f"An image cannot be read: {source.name(i)}: {error}. Repair or remove it.") from None
        images[i] = to_bytes(pixels)
    return images


# ---------------------------------------------------------------------------------------------------------------------
# The model card


def card_text(
    args: ClassifierArguments,
    model: ImageClassifier,
    train: LabelledImages,
    test: LabelledImages,
    test_name: str,
    accuracy: float,
    accuracies: dict[str, float],
    minutes: float,
) -> str:
    """The card as Markdown: accuracy, data, settings, use."""
    dataset = location_name(args.dataset_name or args.train_data_dir)  # pyright: ignore[reportArgumentType]
    title = Path(args.output_dir).resolve().name
    size, channels = model.config.sample_size, model.config.in_channels
    result = EvalResult(
        task_type="image-classification",
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type="accuracy",
        metric_value=round(accuracy, 4),
    )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-classification",
        datasets=[dataset] if is_repo_id(dataset) else None,
        model_name=title,
        eval_results=[result],
    )
    facts = {
        "accuracy": f"{accuracy:.2%} of {len(test.labels):,} images ({test_name})",
        "data": f"{dataset}, {len(train.labels):,} images in {len(accuracies)} classes",
        "input": f"{size}x{size}, {'grayscale' if channels == 1 else 'RGB'}, in [-1, 1]",
        "parameters": f"{model.num_parameters():,}, {model.config.widths[-1]} features",
        "augmentation": f"rotation up to {args.augmentation * ROTATION:g} degrees, scaling by "
        f"{args.augmentation * SCALING:.0%}, translation by {args.augmentation * SHIFT:.0%}"
        + (", horizontal flips" if args.random_flip else "")
        + f", noise of standard deviation up to {args.augmentation * NOISE:g} where white is 1 and black -1",
        "time": f"{minutes:.1f} minutes, {device_name(model)}, torch {version('torch')}",
    }
    source_flag = "--dataset_name" if args.dataset_name else "--train_data_dir"
    paths = {"output_dir", "dataset_name", "train_data_dir"}
    settings = {name: value for name, value in asdict(args).items() if value is not None and name not in paths}
    flags = [source_flag, dataset, "--output_dir", title, *to_flags(settings)]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        "A small classifier for evaluating generated images. Its predictions give the class accuracy of conditional "
        "samples; its penultimate layer gives the features for distances between distributions.",
        "## Use\n\n```python\nfrom ddgan.evaluation.classifier import ImageClassifier\n\n"
        f'classifier = ImageClassifier.from_pretrained("{title}")\n'
        f"logits = classifier(images)  # images: (N, {channels}, {size}, {size}) in [-1, 1]\n"
        "features = classifier.features(images)\n```",
        f"## Training\n\n{table(facts)}",
        "## Accuracy per class\n\n"
        + table({name: "no images" if math.isnan(value) else f"{value:.2%}" for name, value in accuracies.items()}),
        f"## Reproduction\n\n```bash\npython scripts/train_classifier.py {shlex.join(flags)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def to_flags(settings: dict[str, object]) -> list[str]:
    """Return the command-line flags for these settings."""
    flags = []
    for name, value in settings.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, values)]
    return flags


def table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def device_name(model: ImageClassifier) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''}"


if __name__ == "__main__":
    run_command(main)
