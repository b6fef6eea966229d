"""Measure a pipeline, or pictures that are there, against reference images; every number comes with its protocol.

    python scripts/evaluate.py --pipeline my-run --reference path/to/MNIST --feature_extractor mnist-classifier
    accelerate launch scripts/evaluate.py --pipeline google/ddpm-cifar10-32 --scheduler ddim \
        --reference uoft-cs/cifar10 --num_images 50000 --output cifar10.json
    python scripts/evaluate.py --images generated/images --reference path/to/MNIST --held_out path/to/MNIST

Pictures of a pipeline are measured as they are drawn, picture i from the seed `--seed` + i alone, and are not kept.
The same numbers come out of any number of processes, the same command goes on where an interrupted one stopped, and
the features of a reference are kept for the next time.
"""

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from zipfile import ZipFile

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError

from ddgan.core.cli import option, parse_arguments, require_at_least
from ddgan.core.errors import InputError, RunError, naming_file, run_command
from ddgan.core.files import fingerprint, replace_file
from ddgan.data.images import color_channels
from ddgan.data.preprocessing import Preprocessing
from ddgan.data.sources import open_source, read_arrays
from ddgan.evaluation import report
from ddgan.evaluation.coverage import STACKED_MNIST_SAMPLES
from ddgan.evaluation.extractors import INCEPTION, ClassifierFeatures, FeatureExtractor, load_extractor
from ddgan.evaluation.features import Features, extract_features, read_features, read_protocol
from ddgan.evaluation.metrics import MIN_HELD_OUT, MIN_IMAGES, Gaussian
from ddgan.evaluation.references import (
    CACHE_DIR,
    Reference,
    ReferenceImages,
    look,
    measure_reference,
    some_of,
    spread,
)
from ddgan.evaluation.results import Results, evaluate
from ddgan.hub.cards import CARD_NAME
from ddgan.sampling.pipelines import (
    SCHEDULERS,
    load_pipeline,
    pipeline_hash,
    sample,
    sample_in_full_batches,
    with_scheduler,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DRAWN = 10_000  # pictures of a pipeline, if nothing else is said; below that the bias of FID is large


@dataclass
class EvaluateArguments:
    """What is measured, against what, with which features."""

    pipeline: str | None = option(None, "pipeline folder or Hub repository to draw pictures from")
    images: str | None = option(None, "or pictures that are there: a folder, a .parquet file, or an .npz with arr_0")
    num_images: int | None = option(
        None,
        f"pictures to measure (default: {DRAWN:,} of a pipeline, {STACKED_MNIST_SAMPLES:,} with --stacked_mnist; all "
        "of --images, of which fewer are drawn at random, or with --class_labels are the first)",
    )
    reference: str | None = option(
        None,
        "images to measure against: folder, MNIST-style folder, dataset folder or Hub dataset, .npz, .parquet, or "
        "statistics: an .npz with mu and sigma, a .safetensors of kept features",
    )
    reference_split: str = option("train", "split of the reference")
    reference_config: str | None = option(None, "configuration of a reference dataset, where it has several")
    num_reference: int | None = option(None, "images of the reference, drawn at random (default: all)")
    held_out: str | None = option(
        None, "images that the training has not seen, to tell memorisation; the reference are then the training images"
    )
    held_out_split: str = option("test", "split of the held-out images")
    image_column: str | None = option(None, "column with the images (default: the first image column)")
    feature_extractor: str | None = option(
        None, "inception-v3-compat (default), dinov2, or a classifier folder from scripts/train_classifier.py"
    )
    extractor_weights: str | None = option(None, "file (inception-v3-compat) or folder (dinov2) with its weights")
    classifier: str | None = option(
        None, "classifier folder that judges classes and digits (default: the feature extractor, if it is one)"
    )
    stacked_mnist: bool = option(False, "count modes of StackedMNIST: a digit in each channel")
    batch_size: int = option(64, "images that go through a network at once; on a CPU pictures are drawn one by one")
    seed: int = option(0, "seed of the first picture; the next ones follow it")
    scheduler: Literal["as-saved", *SCHEDULERS] = option("as-saved", "scheduler to sample with")
    num_inference_steps: int | None = option(
        None, "network evaluations for a picture (default: all of a DDPM's, 50 of others', or the pipeline's own)"
    )
    dtype: Literal[tuple(DTYPES)] = option("fp32", "number format of the pipeline's network")
    class_labels: list[int] | None = option(None, "class of each picture, used in turn: --class_labels 0 1 2")
    guidance_scale: float | None = option(
        None, "classifier-free guidance of a class-conditional pipeline (default: 1)"
    )
    trust_remote_code: bool = option(False, "run Python code that the pipeline brings along")
    output: str = option("evaluation.json", "file for all numbers and their protocol")
    save_images: str | None = option(None, "keep the pictures that are drawn, in this folder")
    cache_dir: str = option(str(CACHE_DIR), "folder for features of references")
    update_card: bool = option(True, "write the numbers into the model card of a pipeline folder")

    def __post_init__(self):
        if bool(self.pipeline) == bool(self.images):
            raise InputError("Name what to measure: either --pipeline to draw from, or --images that are there.")
        if self.images and self.save_images:
            raise InputError("--save_images keeps what a --pipeline draws; those of --images are there already.")
        if self.held_out and not self.reference:
            raise InputError("--held_out images are compared with training images: name these with --reference.")
        if self.feature_extractor is None:
            self.feature_extractor = INCEPTION if self.reference else self.classifier
        if self.feature_extractor is None:
            raise InputError("Name images to measure against with --reference, or a --classifier to judge with.")
        require_at_least(1, self, "batch_size", "num_inference_steps")
        require_at_least(MIN_IMAGES, self, "num_images", "num_reference")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments(EvaluateArguments, argv=argv)
    started = time.perf_counter()
    accelerator = Accelerator()
    threads = torch.get_num_threads()
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # as in scripts/generate.py: sums in another order are other pictures

    with in_plain_words(InputError):
        extractor = load_extractor(args.feature_extractor, args.extractor_weights, accelerator.device)
        judge = load_judge(args, extractor, accelerator.device)
    samples = PipelineSamples(args, accelerator) if args.pipeline else StoredSamples(args)
    if args.stacked_mnist and samples.facts["channels"] != 3:
        raise InputError("--stacked_mnist counts digits in three channels, but the pictures are grey.")
    reference = held_out = None
    with in_plain_words(RunError):
        if args.reference:
            reference = load_reference(
                args.reference, args.reference_split, args.num_reference, samples, extractor, args, accelerator
            )
            require_images(MIN_IMAGES, args.reference, reference)
        if args.held_out and "statistics" in reference.facts:
            raise InputError(
                f"Memorisation is told from the features of the training images, but {args.reference} has only their "
                "mean and covariance. Name the images with --reference."
            )
        if args.held_out:
            held_out = load_reference(args.held_out, args.held_out_split, None, samples, extractor, args, accelerator)
            require_images(MIN_HELD_OUT, args.held_out, held_out)
            contents = held_out.facts.get("contents")
            if contents and contents == reference.facts.get("contents"):
                raise InputError(
                    f"--held_out {args.held_out} holds the images of --reference {args.reference}: name some that the "
                    "training has not seen."
                )
        measured, parts = measure_samples(samples, extractor, judge, args, accelerator)
    if accelerator.is_main_process:
        torch.set_num_threads(threads)
        with in_plain_words(InputError):
            results = evaluate(samples.facts, measured, extractor, reference, held_out, judge, args.class_labels)
        results.facts["seconds"] = round(time.perf_counter() - started, 1)
        present(results, args)
        shutil.rmtree(parts)
    accelerator.end_training()


@contextmanager
def in_plain_words(kind: type[Exception]):
    """What a part that knows no command line refuses ends the command with its message and no traceback."""
    try:
        yield
    except (InputError, RunError):
        raise
    except (ValueError, ImportError) as error:
        raise kind(str(error)) from error


def load_judge(
    args: EvaluateArguments, extractor: FeatureExtractor, device: torch.device
) -> ClassifierFeatures | None:
    """The classifier that tells classes or digits, where any are to be told.

    Raises:
        InputError: if there is none, or it does not know the classes.
    """
    if args.class_labels is None and not args.stacked_mnist:
        return None
    judge = extractor if isinstance(extractor, ClassifierFeatures) else None
    if args.classifier and args.classifier != args.feature_extractor:
        judge = load_extractor(args.classifier, device=device)
    if not isinstance(judge, ClassifierFeatures):
        asked = "--stacked_mnist" if args.stacked_mnist else "--class_labels"
        raise InputError(f"{asked} asks what a classifier sees: name the folder of one with --classifier.")
    classes = judge.network.config.num_classes
    if args.stacked_mnist:
        if (classes, judge.channels) != (10, 1):
            raise InputError(f"--stacked_mnist needs a classifier of ten grey digits, which {judge.name} is not.")
    elif min(args.class_labels) < 0 or max(args.class_labels) >= classes:
        raise InputError(
            f"--class_labels are {sorted(set(args.class_labels))}, but the classifier {judge.name} knows 0 to "
            f"{classes - 1}."
        )
    return judge


# ---------------------------------------------------------------------------------------------------------------------
# Samples: `count`, `facts` and `batch(range)` -> images (N, C, H, W), uint8


class PipelineSamples:
    """Pictures that are drawn from a pipeline when they are asked for."""

    def __init__(self, args: EvaluateArguments, accelerator: Accelerator):
        self.args = args
        self.count = args.num_images or (STACKED_MNIST_SAMPLES if args.stacked_mnist else DRAWN)
        # the arithmetic of an accelerator depends on the size of the batch, that of a CPU on more
        self.at_once = 1 if accelerator.device.type == "cpu" else args.batch_size
        pipe = load_pipeline(args.pipeline, DTYPES[args.dtype], args.trust_remote_code, accelerator.device)
        contents = pipeline_hash(pipe)
        self.pipe = with_scheduler(pipe, args.scheduler)
        (first,) = sample_in_full_batches(self._draw, [0], self.at_once)
        self.preprocessing = Preprocessing(color_channels(first), first.height, first.width)
        self.facts = {
            "pipeline": name_of(args.pipeline),
            "contents": contents,
            "images": self.count,
            "seeds": f"{args.seed} to {args.seed + self.count - 1}",
            "scheduler": type(self.pipe.scheduler).__name__,
            "num_inference_steps": len(self.pipe.scheduler.timesteps),
            "class_labels": args.class_labels,
            "guidance_scale": args.guidance_scale,
            "dtype": args.dtype,
            "device": accelerator.device.type,
            "drawn_at_once": self.at_once,
            **look([first]),
        }

    def batch(self, indices: range) -> torch.Tensor:
        pictures = sample_in_full_batches(self._draw, indices, self.at_once)
        if self.args.save_images:
            for i, picture in zip(indices, pictures, strict=True):
                replace_file(Path(self.args.save_images) / f"{i:06d}.png", picture.save)
        return torch.stack([self.preprocessing.load(picture) for picture in pictures])

    def _draw(self, indices: Sequence[int]) -> list[Image.Image]:
        classes = self.args.class_labels
        labels = [classes[i % len(classes)] for i in indices] if classes else None
        scale = self.args.guidance_scale
        guidance = {} if scale is None else {"guidance_scale": scale}
        seeds = [self.args.seed + i for i in indices]
        return sample(self.pipe, seeds, self.args.num_inference_steps, labels, **guidance)


class StoredSamples:
    """Pictures that are there, all of one size."""

    def __init__(self, args: EvaluateArguments):
        self.source = open_source(args.images, image_column=args.image_column)
        self.images = ReferenceImages(self.source)
        self.count = args.num_images or len(self.source)
        if self.count > len(self.source):
            raise InputError(f"--num_images is {self.count}, but {args.images} has {len(self.source)} images.")
        self.chosen = range(self.count) if args.class_labels is not None else some_of(len(self.source), self.count)
        self.facts = {
            "source": name_of(args.images),
            "contents": self.source.fingerprint(self.chosen),
            "images": self.count,
            "class_labels": args.class_labels,
            **look([self.images.image(self.chosen[i]) for i in spread(self.count)]),
        }
        first = self.images.image(self.chosen[0])
        self.preprocessing = Preprocessing(self.facts["channels"], first.height, first.width)

    def batch(self, indices: range) -> torch.Tensor:
        channels, height, width = self.preprocessing.channels, self.preprocessing.height, self.preprocessing.width
        numbers = [self.chosen[i] for i in indices]
        for number in numbers:
            size = self.images.image(number).size
            if size != (width, height):
                raise RunError(
                    f"The pictures are not of one size: {self.source.name(self.chosen[0])} is {width}x{height}, "
                    f"{self.source.name(number)} is {size[0]}x{size[1]}. Measure those of one size at a time."
                )
        return torch.stack([self.images.pixels(number, channels, height, width) for number in numbers])


def measure_samples(
    samples: PipelineSamples | StoredSamples,
    extractor: FeatureExtractor,
    judge: ClassifierFeatures | None,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> tuple[Features | None, Path]:
    """Features of all pictures, and the classes or digits that the classifier sees, in the main process.

    Returns:
        also the folder where they are kept, so that an interrupted command can go on.
    """

    def measure(indices: range) -> Features:
        images = samples.batch(indices)
        found = extractor(images)
        if args.stacked_mnist:
            digits = judge(images.flatten(0, 1)[:, None])["logits"].argmax(1)
            return {**found, "digits": digits.view(-1, 3)}
        if judge:
            logits = found["logits"] if judge is extractor else judge(images)["logits"]
            return {**found, "classes": logits.argmax(1)}
        return found

    settings = {**samples.facts, **extractor.protocol, "batch_size": args.batch_size, "digits": args.stacked_mnist}
    settings |= {"judge": judge and judge.digest, "kept": args.save_images and str(Path(args.save_images).resolve())}
    parts = Path(args.cache_dir) / f"samples-{fingerprint(settings)}.parts"
    verb = "drawing and measuring" if args.pipeline else "measuring"
    return extract_features(samples.count, args.batch_size, measure, accelerator, parts, verb), parts


# ---------------------------------------------------------------------------------------------------------------------
# Reference images and statistics


def load_reference(
    given: str,
    split: str,
    count: int | None,
    samples: PipelineSamples | StoredSamples,
    extractor: FeatureExtractor,
    args: EvaluateArguments,
    accelerator: Accelerator,
) -> Reference:
    """Features of the images that are named, brought to the size of the samples; kept in the cache.

    Raises:
        InputError: if there are no such images, or the statistics are another extractor's.
        RunError: at an image that cannot be read.
    """
    height, width = samples.preprocessing.height, samples.preprocessing.width
    if given.endswith(".safetensors") and Path(given).is_file():
        with naming_file(given, SafetensorError):
            facts = read_protocol(Path(given))
        if facts.get("extractor_digest") != extractor.digest:
            raise InputError(
                f"The features in {given} are those of {facts.get('extractor', 'an unknown network')}, not of "
                f"{extractor.name} with the weights {extractor.digest}. Measure the reference images themselves."
            )
        return Reference(facts, read_features(Path(given)) if accelerator.is_main_process else None)
    if given.endswith(".npz") and Path(given).is_file():
        with naming_file(given), ZipFile(given) as file:
            names = {Path(name).stem for name in file.namelist()}
        if "arr_0" not in names and {"mu", "sigma"} <= names:
            arrays = read_arrays(Path(given))
            mean, covariance = (arrays[name].astype(float) for name in ("mu", "sigma"))
            blank = torch.zeros(1, samples.preprocessing.channels, height, width, dtype=torch.uint8)
            dimensions = extractor(blank)["features"].shape[1]
            if mean.shape != (dimensions,) or covariance.shape != (dimensions, dimensions):
                raise InputError(
                    f"{given} has mu of the shape {mean.shape} and sigma of {covariance.shape}, but the features of "
                    f"{extractor.name} have {dimensions} dimensions. Name the extractor that they were made with."
                )
            facts = {"name": name_of(given), "statistics": "mu and sigma, of unknown protocol"}
            return Reference(facts, None, Gaussian(mean, covariance))
    with accelerator.main_process_first():
        source = open_source(given, split, config=args.reference_config, image_column=args.image_column)
    images = ReferenceImages(source)
    kept = Path(args.cache_dir)
    return measure_reference(
        *(images, name_of(given), source.split, (height, width), extractor, args.batch_size, accelerator, kept, count)
    )


def require_images(least: int, given: str, reference: Reference) -> None:
    """Refuse images that are too few before any picture is drawn; how many are behind saved statistics is unknown."""
    count = reference.facts.get("images", least)
    if count < least:
        raise InputError(f"{given} has {count} images; there must be at least {least} to measure against.")


def name_of(given: str) -> str:
    """A file or folder by its own name, else the name as it is."""
    return Path(given).resolve().name if Path(given).exists() else given


# ---------------------------------------------------------------------------------------------------------------------
# Results


def present(results: Results, args: EvaluateArguments) -> None:
    """Write the results to their file and the model card, and print them."""
    output = Path(args.output)
    words = report.protocol(results.facts)
    numbers = {}
    for key, measure in results.measures.items():
        numbers[key] = {"value": measure.value}
        if measure.spread is not None:
            numbers[key]["spread"] = measure.spread
        floor = results.floors.get(key.partition("@")[0])
        if floor:
            numbers[key]["floor"] = {"value": floor.value, "spread": floor.spread, **floor.protocol}
        numbers[key]["protocol"] = {**measure.protocol, **words}
    everything = {"metrics": numbers, **results.facts, "arguments": asdict(args)}
    replace_file(output, lambda path: path.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8"))

    print(f"\n{report.table(results.measures, results.floors)}\n")
    for part, text in words.items():
        print(f"{part.replace('_', ' ')}: {text}")
    if results.floors:
        halves = results.floors["fid"].protocol["halves"]
        print(f"floor: {halves[0]:,} images of one half of the reference against {halves[1]:,} of the other")
    for name, accuracy in results.facts.get("class_accuracies", {}).items():
        print(f"accuracy of {name}: {'no sample' if accuracy is None else f'{accuracy:.2%}'}")
    for warning in results.facts["warnings"]:
        print(f"\nwarning: {warning}")
    print(f"\nall numbers with their protocol: {output}")
    if results.picture:
        picture = output.with_name(f"{output.stem}-confusion.png")
        replace_file(picture, results.picture.save)
        print(f"classes asked for (rows) and seen (columns): {picture}")
    card = Path(args.pipeline or "") / CARD_NAME
    if args.pipeline and args.update_card and card.is_file():
        reference, judge = results.facts["reference"], results.facts["classifier"]
        dataset = reference["name"] if reference else judge["name"]
        split = reference and reference.get("split")
        report.write_to_card(card, report.eval_results(results.measures, dataset, split, words))
        print(f"model card with these numbers: {card}")


if __name__ == "__main__":
    run_command(main)
