"""Evaluate a pipeline, or existing images, against reference images, and report the protocol of every metric."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from ..core.accelerator import one_process_first, start_accelerate
from ..core.errors import InputError, RunError, write_problem
from ..core.extras import missing_extra
from ..core.files import contains_files, fingerprint, location_name, remove_temporary_files, replace_file
from ..core.locations import InMemory
from ..core.locks import locked
from ..core.threads import one_thread_per_operation
from ..data.arguments import check_value_range
from ..data.images import color_channels, upright_size
from ..data.preprocessing import Preprocessing, low_contrast
from ..data.remote import local_copy
from ..data.sources import ImageSource, check_dataset_options, open_source
from ..evaluation.arguments import MIN_IMAGES, STACKED_MNIST_SAMPLES
from ..evaluation.coverage import confusion_matrix_plot
from ..evaluation.extractors import ClassifierFeatures, FeatureExtractor, load_extractor
from ..evaluation.facts import CLIP_GUIDANCE, SampleFacts
from ..evaluation.features import Features, extract_features, locked_parts
from ..evaluation.metrics import MIN_HELD_OUT
from ..evaluation.references import (
    Reference,
    ReferenceImages,
    describe_images,
    evenly_spaced,
    measure_reference,
    random_subset,
)
from ..evaluation.reporting import check_card, format_table, update_card
from ..evaluation.results import Results, compute_results
from ..evaluation.saved_references import holds_statistics, read_features, read_statistics, save_statistics
from ..pipelines.pipeline_class_conditional import MAX_LISTED_CLASSES
from ..sampling.generation import class_names, parse_class_labels, sample
from ..sampling.groups import GroupSampler, group_size
from ..sampling.loading import DTYPES, load_guide, load_pipeline, pipeline_hash, with_scheduler
from ..sampling.spacing import changed_spacing
from .arguments import DEFAULT_NUM_IMAGES, EvaluateArguments
from .generate import clip_guidance

logger = logging.getLogger("ddgan")


def evaluate(args: EvaluateArguments) -> Results | None:
    """Measure the samples, write the results, and print them.

    Returns:
        The results, in the main process.

    Raises:
        InputError: if the samples, the reference or the extractor cannot be used.
        RunError: if an image cannot be read, or the results cannot be written.
    """
    started = time.perf_counter()
    accelerator = start_accelerate()
    if args.update_card:
        check_card(args.card)

    def report(results: Results) -> None:
        with user_errors(InputError), naming_output(args):
            write_results(results, args, round(time.perf_counter() - started, 1))
        print_results(results, args)

    results = measure(args, accelerator, report)
    accelerator.end_training()
    return results


def measure(
    args: EvaluateArguments,
    accelerator: Accelerator,
    report: Callable[[Results], None] | None = None,
    extractor: FeatureExtractor | None = None,
    references: tuple[Reference | None, Reference | None] | None = None,
) -> Results | None:
    """Measure the samples; every process must call this.

    Args:
        report: called with the results in the main process, before the features of the samples are removed from the
            cache. Without it they are kept, so that the same samples are not generated again.
        extractor: that of `args`, if it is loaded already.
        references: the result of `load_references` for `args`, if they are loaded already.

    Returns:
        The results, in the main process.

    Raises:
        InputError, RunError: see `evaluate`.
    """
    for package in ("torch-fidelity", "matplotlib"):
        if find_spec(package.replace("-", "_")) is None:
            raise InputError(f"{missing_extra(package, 'eval')}.")
    with one_thread_per_operation(accelerator.device) as threads:
        extractor = extractor or selected_extractor(args, accelerator)
        with user_errors(InputError):
            classifier = select_classifier(args, extractor, accelerator.device)
        samples = PipelineSamples(args, accelerator) if args.pipeline else StoredSamples(args, classifier, accelerator)
        requested = None if args.stacked_mnist else requested_classes(samples, classifier)
        if args.stacked_mnist and samples.facts.properties.channels != 3:
            raise InputError("--stacked_mnist counts digits in three channels, but the images are gray.")
        if references is None:
            with user_errors(RunError):
                references = load_references(samples, extractor, args, accelerator, threads)
        reference, held_out = references
        folder = parts_folder(samples, extractor, classifier, args)
        results = None
        with saving_images(args, folder, accelerator), locked_parts(folder, accelerator) as parts:
            with user_errors(RunError):
                features = extract_sample_features(samples, extractor, classifier, args, accelerator, threads, parts)
            if features is not None:
                facts = samples.facts
                with user_errors(InputError):
                    results = compute_results(facts, features, extractor, reference, held_out, classifier, requested)
                if report:
                    report(results)
                if report and parts:
                    shutil.rmtree(parts, ignore_errors=True)
    return results


def selected_extractor(args: EvaluateArguments, accelerator: Accelerator) -> FeatureExtractor:
    """Load the feature extractor of the arguments.

    Raises:
        InputError: if it cannot be loaded.
    """
    assert args.feature_extractor is not None
    with user_errors(InputError):
        return load_extractor(args.feature_extractor, args.extractor_weights, accelerator.device)


@contextmanager
def user_errors(kind: type[Exception]):
    """Turn library errors into user errors without a traceback."""
    try:
        yield
    except (InputError, RunError):
        raise
    except (ValueError, ImportError) as error:
        raise kind(str(error)) from error


@contextmanager
def naming_output(args: EvaluateArguments) -> Iterator[None]:
    """Report results that cannot be written; the features of the samples are kept."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"The results cannot be written to {args.output}: {write_problem(error)}. Repeat the command with another "
            "--output: the samples that were measured are cached."
        ) from error


def select_classifier(
    args: EvaluateArguments, extractor: FeatureExtractor, device: torch.device
) -> ClassifierFeatures | None:
    """Return the classifier that predicts classes or digits, or None if neither is needed.

    Raises:
        InputError: if there is no classifier, or it does not have these classes.
    """
    if args.class_labels is None and not args.stacked_mnist:
        return None
    classifier = extractor
    if args.classifier and args.classifier != args.feature_extractor:
        classifier = load_extractor(args.classifier, device=device)
    if not isinstance(classifier, ClassifierFeatures):
        if args.pipeline and not args.classifier and not args.stacked_mnist:
            return None  # the classes are only for sampling
        flag = "--stacked_mnist" if args.stacked_mnist else "--class_labels"
        raise InputError(f"{flag} needs the predictions of a classifier: pass its folder with --classifier.")
    classes = classifier.network.config.num_classes
    if args.stacked_mnist and (classes, classifier.channels) != (10, 1):
        raise InputError(f"--stacked_mnist needs a classifier of ten gray digits, which {classifier.name} is not.")
    return classifier


def requested_classes(
    samples: "PipelineSamples | StoredSamples", classifier: ClassifierFeatures | None
) -> list[int] | None:
    """Return the requested classes as numbered by the classifier; None without classes.

    The classes of a pipeline are those of the classifier with the same names. If no name agrees, or one of the two has
    no names, they are matched by number.

    Raises:
        InputError: if the classifier does not have a requested class.
    """
    if samples.labels is None or classifier is None:
        return None
    known, names = classifier.network.class_names, samples.class_names
    wanted = [names.get(label, label) if isinstance(label, int) else label for label in samples.labels]
    # existing images have the names of the classifier
    if not names or any(name in known for name in names.values()):
        numbers = [known.index(name) if name in known else name for name in wanted]
    else:
        numbers_by_name: dict[int | str, int] = {name: label for label, name in names.items()}
        numbers = [numbers_by_name.get(name, name) for name in wanted]
        logger.warning(
            f"The classes of the pipeline ({_listed(names.values())}) and of the classifier {classifier.name} "
            f"({_listed(known)}) have different names, so they are matched by number."
        )
    if unknown := [str(number) for number in numbers if number not in range(len(known))]:
        raise InputError(
            f"--class_labels {' '.join(dict.fromkeys(unknown))}: the classifier {classifier.name} has the classes 0 "
            f"to {len(known) - 1}, named {_listed(known)}."
        )
    return [int(number) for number in numbers]


def _listed(names: Iterable[str]) -> str:
    """Return the first names, for a message."""
    first = list(islice(names, MAX_LISTED_CLASSES + 1))
    return ", ".join(first[:MAX_LISTED_CLASSES]) + (", ..." if len(first) > MAX_LISTED_CLASSES else "")


# ---------------------------------------------------------------------------------------------------------------------
# Samples


class PipelineSamples:
    """Samples that a pipeline generates on demand.

    Attributes:
        count: number of samples.
        labels: their requested classes, used in turn, as labels or names; None without classes.
        class_names: the names of the classes by label, if there are any.
        facts: how they are generated.
        preprocessing: conversion to tensors, with their channels, height and width.
        batch_size: number of samples in a batch.
        offset: position of sample 0 in its batch.
    """

    def __init__(self, args: EvaluateArguments, accelerator: Accelerator):
        self.args = args
        self.count = args.num_images or (STACKED_MNIST_SAMPLES if args.stacked_mnist else DEFAULT_NUM_IMAGES)
        assert args.pipeline is not None
        loaded = load_pipeline(args.pipeline, DTYPES[args.dtype], args.trust_remote_code, accelerator.device)
        contents = pipeline_hash(loaded)
        pipe = with_scheduler(loaded, args.scheduler, args.num_inference_steps)
        self.class_names = class_names(getattr(pipe, "unet", None))
        self.labels = args.class_labels and parse_class_labels(args.class_labels, self.class_names)
        eta: dict[str, Any] = {} if args.eta is None else {"eta": args.eta}
        guide = load_guide(args, accelerator.device)
        guidance: dict[str, Any] = args.guidance
        options = {**eta, **guidance, **({"guide": guide} if guide else {})}
        self.batch_size = group_size(pipe, args.batch_size)
        self.sampler = GroupSampler(pipe, self.batch_size, args.seed, args.num_inference_steps, self.labels, options)
        self.offset = self.sampler.offset
        first_label = self.labels and self.labels[:1]
        (first,) = sample(pipe, [args.seed], args.num_inference_steps, first_label, **options)
        self.preprocessing = Preprocessing(color_channels(first), first.height, first.width)
        if args.autoguidance and guide:
            guidance |= {
                "autoguidance": location_name(args.autoguidance),
                "autoguidance_contents": pipeline_hash(guide),
            }
        self.facts = SampleFacts(
            count=self.count,
            properties=describe_images([first]),
            origin={"pipeline": location_name(args.pipeline), "contents": contents},
            settings={
                "seeds": f"{args.seed} to {args.seed + self.count - 1}",
                "scheduler": type(pipe.scheduler).__name__,
                **changed_spacing(loaded, pipe.scheduler),
                "num_inference_steps": len(pipe.scheduler.timesteps),
                **eta,
                "class_labels": self.labels,
                **guidance,
                "dtype": args.dtype,
                "device": accelerator.device.type,
                "batch_size": self.batch_size,
            },
        )

    def batch(self, indices: range) -> torch.Tensor:
        """Generate samples of a batch (N, C, H, W), uint8."""
        images = self.sampler(indices)
        if self.args.save_images:
            for i, image in zip(indices, images, strict=True):
                replace_file(Path(self.args.save_images) / f"{i:06d}.png", image.save)
        return torch.stack([self.preprocessing.load(image) for image in images])


class StoredSamples:
    """Existing images, all of one size, with the same attributes as `PipelineSamples`."""

    def __init__(self, args: EvaluateArguments, classifier: ClassifierFeatures | None, accelerator: Accelerator):
        assert args.images is not None
        self.class_names = dict(enumerate(classifier.network.class_names)) if classifier else {}
        self.labels = args.class_labels and parse_class_labels(args.class_labels, self.class_names)
        self.args, self.batch_size, self.offset = args, args.batch_size, 0
        self.source = open_source(args.images, image_column=args.image_column)
        self.images = ReferenceImages(self.source, value_range=check_value_range(args.value_range))
        total = len(self.source)
        self.count = args.num_images or total
        if self.count > total:
            raise InputError(f"--num_images is {self.count}, but {args.images} has {total} images.")
        if self.count < MIN_IMAGES:
            raise InputError(f"{args.images} has {total} images; there must be at least {MIN_IMAGES} to measure.")
        self.indices = range(self.count) if args.class_labels is not None else random_subset(total, self.count)
        guidance = None if isinstance(args.images, InMemory) else clip_guidance(Path(args.images))
        self.facts = SampleFacts(
            count=self.count,
            properties=describe_images([self.images.image(self.indices[i]) for i in evenly_spaced(self.count)]),
            origin={
                "source": location_name(args.images),
                "contents": self.images.fingerprint(self.indices, accelerator),
            },
            settings={
                "class_labels": self.labels,
                "order": "natural order of the files, or as stored" if self.labels else None,
                "value_range": args.value_range,
                **({CLIP_GUIDANCE: guidance} if guidance else {}),
            },
        )
        width, height = upright_size(self.images.image(self.indices[0]))
        self.preprocessing = Preprocessing(self.facts.properties.channels, height, width)

    def batch(self, indices: range) -> torch.Tensor:
        """Read images (N, C, H, W), uint8."""
        channels, height, width = self.preprocessing.channels, self.preprocessing.height, self.preprocessing.width
        source_indices = [self.indices[i] for i in indices]
        for i in source_indices:
            size = upright_size(self.images.image(i))
            if size != (width, height):
                raise RunError(
                    f"The images differ in size: {self.source.name(self.indices[0])} is {width}x{height}, "
                    f"{self.source.name(i)} is {size[0]}x{size[1]}. Measure images of one size at a time."
                )
        pixels = torch.stack([self.images.pixels(i, channels, height, width) for i in source_indices])
        if indices.start == 0 and (warning := low_contrast(pixels / 127.5 - 1)):
            logger.warning(f"{self.args.images}: {warning}")
        return pixels


def extract_sample_features(
    samples: PipelineSamples | StoredSamples,
    extractor: FeatureExtractor,
    classifier: ClassifierFeatures | None,
    args: EvaluateArguments,
    accelerator: Accelerator,
    threads: int,
    parts: Path | None,
) -> Features | None:
    """Extract the features of all samples, and the classes or digits that the classifier predicts.

    Prints how many samples were measured per second.

    Args:
        parts: see `locked_parts`.

    Returns:
        The features, in the main process.
    """
    counts: list[int] = []

    def extract(indices: range) -> Features:
        counts.append(len(indices))
        images = samples.batch(indices)
        features = extractor(images)
        if classifier and args.stacked_mnist:
            digits = classifier(images.flatten(0, 1)[:, None])["logits"].argmax(1)
            return {**features, "digits": digits.view(-1, 3)}
        if classifier:
            logits = features["logits"] if classifier is extractor else classifier(images)["logits"]
            return {**features, "classes": logits.argmax(1)}
        return features

    description = "sampling and measuring" if args.pipeline else "measuring"
    started = time.perf_counter()
    features = extract_features(
        samples.count,
        samples.batch_size,
        extract,
        accelerator,
        parts,
        description,
        offset=samples.offset,
        threads=threads,
    )
    rate = sum(gather_object(counts)) / (time.perf_counter() - started)
    if rate and accelerator.is_main_process:
        print(f"{description}: {rate:.3g} images per second")
    return features


def parts_folder(
    samples: PipelineSamples | StoredSamples,
    extractor: FeatureExtractor,
    classifier: ClassifierFeatures | None,
    args: EvaluateArguments,
) -> Path:
    """Return the folder of intermediate results from which an interrupted command with these settings resumes."""
    settings = {
        **samples.facts.as_dict(),
        **extractor.facts.as_dict(),
        "batch_size": samples.batch_size,
        "digits": args.stacked_mnist,
        "judge": classifier and classifier.digest,
        "kept": args.save_images and str(Path(args.save_images).resolve()),
    }
    return Path(args.cache_dir) / f"samples-{fingerprint(settings)}.parts"


@contextmanager
def saving_images(args: EvaluateArguments, parts: Path, accelerator: Accelerator) -> Iterator[None]:
    """Lock the folder of `--save_images`, if there is one.

    Args:
        parts: the folder of intermediate results; if it has some, an interrupted command is continued.

    Raises:
        InputError: if another command is writing to it, or it contains files of anything but the continued command.
    """
    folder = args.save_images and Path(args.save_images)
    with locked(folder, accelerator, "--save_images") if folder else nullcontext():
        # of the main process, which alone writes the parts
        has_files = bool(folder) and contains_files(folder)
        has_other_files = [has_files and not any(parts.glob("part-*"))]
        if broadcast_object_list(has_other_files)[0]:
            raise InputError(f"--save_images {folder} is not empty: name a new folder, so that no file is replaced.")
        accelerator.wait_for_everyone()
        if folder and accelerator.is_main_process:
            remove_temporary_files(folder)
            if not has_files:  # the images of these parts have been removed
                shutil.rmtree(parts, ignore_errors=True)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# References


def load_references(
    samples: PipelineSamples | StoredSamples,
    extractor: FeatureExtractor,
    args: EvaluateArguments,
    accelerator: Accelerator,
    threads: int,
) -> tuple[Reference | None, Reference | None]:
    """Return the reference and the held-out images.

    Called before samples are generated, so that references that cannot be used are reported at once.

    Raises:
        InputError: if they are too few, statistics instead of features, or the same images.
    """
    if not args.reference:
        if isinstance(samples, StoredSamples):
            check_dataset_options([(args.images or "", samples.source)], {"image_column": args.image_column})
        return None, None
    source = open_reference(args.reference, args.reference_split, "train", args, accelerator)
    held_out_source = args.held_out and open_reference(args.held_out, args.held_out_split, "test", args, accelerator)
    check_reference_options(args, samples, source, held_out_source or None)
    reference = load_reference(
        args.reference, source, args.num_reference, samples, extractor, args, accelerator, threads
    )
    require_images(MIN_IMAGES, args.reference, reference)
    if args.save_statistics and reference.facts.statistics and not reference.facts.contents:
        raise InputError(
            f"--save_statistics {args.save_statistics} would state a protocol, but how the statistics in "
            f"{args.reference} were measured is unknown. Copy that file instead."
        )
    if args.save_statistics and accelerator.is_main_process:
        save_statistics(Path(args.save_statistics), reference, extractor, accelerator)
    if not args.held_out:
        return reference, None
    require_features("training", "--reference", args.reference, reference)
    held_out = load_reference(
        args.held_out, held_out_source or None, None, samples, extractor, args, accelerator, threads
    )
    require_features("held-out", "--held_out", args.held_out, held_out)
    require_images(MIN_HELD_OUT, args.held_out, held_out)
    if held_out.facts.contents and held_out.facts.contents == reference.facts.contents:
        raise InputError(
            f"--held_out {args.held_out} contains the images of --reference {args.reference}: pass images that "
            "were not used in training."
        )
    return reference, held_out


def open_reference(
    location: str | InMemory, split: str | None, default_split: str, args: EvaluateArguments, accelerator: Accelerator
) -> ImageSource | None:
    """Open the images of a reference; None for a file of features or statistics.

    Raises:
        InputError: if there are no such images.
    """
    with one_process_first(accelerator):
        path = Path("" if isinstance(location, InMemory) else local_copy(location))
        if path.is_file() and (path.suffix == ".safetensors" or (path.suffix == ".npz" and holds_statistics(path))):
            return None
        return open_source(
            location,
            split,
            default_split=default_split,
            config=args.reference_config,
            image_column=args.image_column,
        )


def check_reference_options(
    args: EvaluateArguments,
    samples: PipelineSamples | StoredSamples,
    source: ImageSource | None,
    held_out: ImageSource | None,
) -> None:
    """Check that the settings of the images have an effect on some of them.

    Raises:
        InputError: if one has none; the message names its flag.
    """
    if source is None:
        for name in ("reference_split", "num_reference"):
            if value := getattr(args, name):
                raise InputError(
                    f"--{name} {value} selects images, but {args.reference} holds only their features: omit it."
                )
    if held_out is None and args.held_out_split:
        raise InputError(
            f"--held_out_split {args.held_out_split} selects images, but {args.held_out} holds only their features."
        )
    opened = [(args.reference, source), (args.held_out, held_out)]
    references = [(location, images) for location, images in opened if location and images]
    check_dataset_options(references or [(args.reference or "", None)], {"reference_config": args.reference_config})
    if isinstance(samples, StoredSamples):
        references.append((args.images or "", samples.source))
    if args.value_range and not references:
        raise InputError(f"--value_range applies to image files, but {args.reference} has only features: omit it.")
    check_dataset_options(references or [(args.reference or "", None)], {"image_column": args.image_column})


def load_reference(
    location: str | InMemory,
    source: ImageSource | None,
    count: int | None,
    samples: PipelineSamples | StoredSamples,
    extractor: FeatureExtractor,
    args: EvaluateArguments,
    accelerator: Accelerator,
    threads: int,
) -> Reference:
    """Load saved features or statistics, or extract and cache the features of images at the size of the samples.

    Args:
        source: see `open_reference`.
        count: size of a random subset; None means all.

    Raises:
        InputError: if the features or statistics are of another extractor or of images of another size, or `count` is
            larger than the number of images.
        RunError: if an image cannot be read.
    """
    height, width = samples.preprocessing.height, samples.preprocessing.width
    if source is None:
        path = Path(local_copy(str(location)))
        if path.suffix == ".safetensors":
            return read_features(path, extractor, (height, width), accelerator)
        return read_statistics(path, location_name(location), extractor, (height, width))
    if count and count > len(source):
        raise InputError(f"--num_reference is {count}, but {location} has {len(source)} images.")
    return measure_reference(
        ReferenceImages(source, value_range=check_value_range(args.value_range)),
        location_name(location),
        source.split,
        (height, width),
        extractor,
        args.batch_size,
        accelerator,
        Path(args.cache_dir),
        count,
        threads=threads,
    )


def require_features(kind: str, flag: str, location: str | InMemory, reference: Reference) -> None:
    """Raise an error for saved statistics: detecting memorization needs the features of single images."""
    if reference.facts.statistics is not None:
        raise InputError(
            f"Detecting memorization needs the features of the {kind} images, but {location} has only their mean and "
            f"covariance. Pass the images themselves with {flag}."
        )


def require_images(minimum: int, location: str | InMemory, reference: Reference) -> None:
    """Raise an error for a reference with too few images; the number behind saved statistics is unknown."""
    count = reference.facts.images
    if count is not None and count < minimum:
        raise InputError(f"{location} has {count} images; there must be at least {minimum} to measure against.")


# ---------------------------------------------------------------------------------------------------------------------
# Results


def write_results(results: Results, args: EvaluateArguments, seconds: float) -> None:
    """Write the results file, the plot of the confusion matrix next to it, and the model card of a pipeline folder."""
    output = Path(args.output)
    content = {**results.to_json(), "seconds": seconds, "arguments": asdict(args)}
    replace_file(
        output, lambda path: path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    )
    if results.classes:
        figure = confusion_matrix_plot(results.classes.confusion, results.classes.names)
        replace_file(confusion_path(args), lambda path: figure.savefig(path, dpi=110))
    if args.update_card:
        update_card(args.card, results)


def print_results(results: Results, args: EvaluateArguments) -> None:
    """Print the results with their protocol, and the files that contain them."""
    print(f"\n{format_table(results.metrics, results.floors, results.protocol.extractor.name)}\n")
    for part, text in results.protocol.descriptions().items():
        print(f"{part.replace('_', ' ')}: {text}")
    if results.floors:
        halves = results.floors["fid"].protocol["halves"]
        print(
            f"floor (real-vs-real baseline): {halves[0]:,} images of one half of the reference against {halves[1]:,} "
            "of the other"
        )
    if results.classes:
        for name, accuracy in results.classes.accuracies.items():
            print(f"accuracy of {name}: {'no sample' if accuracy is None else f'{accuracy:.2%}'}")
    for warning in results.warnings:
        print(f"\nwarning: {warning}")
    print(f"\nall metrics with their protocol: {args.output}")
    if args.save_statistics:
        print(f"statistics of the reference: {args.save_statistics}")
    if results.classes:
        print(f"confusion matrix: {confusion_path(args)}")
    if args.update_card:
        print(f"model card with these metrics: {args.card}")


def confusion_path(args: EvaluateArguments) -> Path:
    output = Path(args.output)
    return output.with_name(f"{output.stem}-confusion.png")
