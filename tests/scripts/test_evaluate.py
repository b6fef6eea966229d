"""Claims about scripts/evaluate.py, through its command line."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from tiny import ROOT, run_ranks, tiny_unet, write_images

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, GuidedPipeline
from ddgan.core.errors import InputError, RunError
from ddgan.evaluation import coverage, features, metrics
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.extractors import ClassifierFeatures, weights_digest
from ddgan.scripts import evaluate, generate

SCRIPT = ROOT / "scripts" / "evaluate.py"
SHARED = ROOT.parent / "shared" / "data"
SHORT = ("--scheduler", "ddim", "--num_inference_steps", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """A classifier of colour pictures and one of grey ones, samples and a reference of 40 pictures each."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, channels, classes in (("colour", 3, 3), ("grey", 1, 10)):
        torch.manual_seed(channels)
        network = ImageClassifier(sample_size=8, in_channels=channels, num_classes=classes, widths=(8, 16))
        network.head.weight.data *= 100  # so that it sees all classes
        network.save_pretrained(root / name)
    write_images(root / "reference", 40)
    samples = write_images(root / "samples", 60)
    for path in sorted(samples.iterdir())[:20]:
        path.unlink()  # the reference has these first pictures too
    for path in samples.iterdir():
        Image.open(path).point(lambda value: value // 2 + 64).save(path)
    return {**{path.name: path for path in root.iterdir()}, "model": tiny_model}


@pytest.fixture
def run(folders, tmp_path):
    """Run evaluate.py in this process with the colour classifier; returns what is in its file."""

    def run(*flags, reference: str | Path | None = "reference", output: str = "evaluation.json") -> dict:
        against = ["--reference", folders.get(reference, reference)] if reference else []
        start = [*against, "--feature_extractor", folders["colour"], "--cache_dir", tmp_path / "cache"]
        given = [*start, "--output", tmp_path / output, *flags]
        evaluate.main([str(flag) for flag in given])
        return json.loads((tmp_path / output).read_text())

    return run


def values(results: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in results["metrics"].items()}


ALL = {"fid", "kid", "precision", "recall", "density", "coverage", "classifier_score"}


# ---------------------------------------------------------------------------------------------------------------------
# The same number however it is measured


def test_a_pipeline_gives_what_its_generated_images_give(run, folders, tmp_path):
    drawn = run("--pipeline", folders["model"], *SHORT, "--num_images", 12)
    assert {name.partition("@")[0] for name in drawn["metrics"]} == ALL
    generated = ("--pipeline", folders["model"], *SHORT, "--num_images", 12, "--output_dir", tmp_path / "generated")
    generate.main([str(flag) for flag in generated])
    assert values(run("--images", tmp_path / "generated" / "images")) == values(drawn)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(run, folders, tmp_path):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 22, "--batch_size", 4]
    one = run(*flags)
    start = ["--reference", folders["reference"], "--feature_extractor", folders["colour"]]
    more = ["--cache_dir", tmp_path / "cache2", "--output", tmp_path / "two.json"]
    said = run_ranks(SCRIPT, *start, *more, *flags, output=tmp_path / "output.txt")
    assert values(json.loads((tmp_path / "two.json").read_text())) == values(one)
    assert said.count("all numbers") == 1


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_batch_size_does_not_matter(run, folders, tmp_path, batch_size):
    whole = values(run("--images", folders["samples"]))
    parts = values(run("--images", folders["samples"], "--batch_size", batch_size, "--cache_dir", tmp_path / "other"))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_order_of_the_images_does_not_matter(run, folders, tmp_path):
    (tmp_path / "turned").mkdir()
    for i, path in enumerate(sorted(folders["samples"].iterdir(), reverse=True)):
        os.link(path, tmp_path / "turned" / f"{i:03d}.png")
    turned = values(run("--images", tmp_path / "turned"))
    assert turned == pytest.approx(values(run("--images", folders["samples"])), rel=1e-6)


def test_an_interrupted_evaluation_goes_on(run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART_IMAGES", 4)
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20, "--batch_size", 2]
    whole, drawn, draw = values(run(*flags)), [], evaluate.sample

    def stops(pipe, seeds, *rest):
        if len(drawn) > 12:
            raise KeyboardInterrupt
        drawn.extend(seeds)
        return draw(pipe, seeds, *rest)

    monkeypatch.setattr(evaluate, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    drawn.clear()
    assert values(run(*flags)) == whole
    assert drawn == [0, *range(12, 20)]  # the first one tells the size
    assert not list((tmp_path / "cache").glob("*.parts"))


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The seeds of pictures that are drawn."""
    seen, draw = [], evaluate.sample
    monkeypatch.setattr(evaluate, "sample", lambda pipe, seeds, *rest: seen.extend(seeds) or draw(pipe, seeds, *rest))
    return seen


def stopped(*_args, **_more):
    raise KeyboardInterrupt


def test_what_was_drawn_is_not_lost_when_it_is_not_measured(run, folders, tmp_path, monkeypatch, drawn):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20]
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(metrics, "kernel_distance", stopped)
        run(*flags)
    drawn.clear()
    run(*flags)
    assert drawn == [0]  # the first one tells the size


def test_pictures_are_kept_whole_though_an_interrupted_evaluation_did_not_keep_them(
    run, folders, tmp_path, monkeypatch, drawn
):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20]
    keep = ["--save_images", tmp_path / "kept"]
    with monkeypatch.context() as patches:
        patches.setattr(metrics, "kernel_distance", stopped)
        for more in ((), keep):
            with pytest.raises(KeyboardInterrupt):
                run(*flags, *more)
    drawn.clear()
    run(*flags, *keep)
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == [f"{i:06d}.png" for i in range(20)]
    assert drawn == [0]  # those that were kept are not drawn again


@pytest.mark.parametrize(("named", "said"), [("few", "few has 11 images; .* at least 12"), ("other", "16 dimensions")])
def test_references_that_cannot_be_measured_against_are_refused_before_pictures_are_drawn(
    run, folders, tmp_path, drawn, named, said
):
    write_images(tmp_path / "few", 11)
    np.savez(tmp_path / "other.npz", mu=np.zeros(8), sigma=np.eye(8))
    reference = tmp_path / (named if named == "few" else "other.npz")
    with pytest.raises(InputError, match=said):
        run("--pipeline", folders["model"], *SHORT, "--num_images", 20, reference=reference)
    assert drawn == [0]


def test_too_few_held_out_images_are_refused_before_pictures_are_drawn(run, folders, drawn):
    with pytest.raises(InputError, match="samples has 40 images; there must be at least 100"):
        run("--pipeline", folders["model"], *SHORT, "--num_images", 20, "--held_out", folders["samples"])
    assert drawn == [0]


def test_identical_images_are_at_no_distance(run, folders):
    found = values(run("--images", folders["reference"]))
    assert abs(found["fid@40"]) < 1e-6
    assert found["precision@40"] == found["recall@40"] == found["coverage@40"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# References


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """How many images each call of the extractor was given."""
    calls, measure = [], ClassifierFeatures.measure

    def counted(self, images):
        calls.append(len(images))
        return measure(self, images)

    monkeypatch.setattr(ClassifierFeatures, "measure", counted)
    return calls


def test_a_reference_is_measured_once_for_its_data_extractor_and_count(run, folders, tmp_path, measured):
    def images_measured(*flags) -> int:
        measured.clear()
        run("--images", folders["samples"], *flags, reference=reference)
        return sum(measured)

    reference = write_images(tmp_path / "changing", 30)
    assert images_measured() == 70
    assert images_measured() == 40
    assert images_measured("--num_reference", 20) == 60
    assert images_measured("--num_reference", 20) == 40
    assert images_measured("--feature_extractor", folders["grey"]) == 70
    Image.new("RGB", (8, 8)).save(reference / "000.png")
    assert images_measured() == 70


def test_contents_are_told_by_the_images_wherever_they_are(run, folders, tmp_path):
    def contents(reference: Path) -> str:
        results = run("--images", folders["samples"], reference=reference)
        (said,) = {entry["protocol"]["reference"] for entry in results["metrics"].values()}
        assert f"contents {results['reference']['contents']}" in said
        return results["reference"]["contents"]

    one = write_images(tmp_path / "one", 13)
    first = contents(one)
    assert contents(write_images(tmp_path / "elsewhere" / "other", 13)) == first
    for path in one.iterdir():
        os.utime(path, (0, 0))
    assert contents(one) == first
    tables = []
    for name in ("table", "copy"):
        (tmp_path / name).mkdir()
        cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(one.iterdir())]
        kinds = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": cells}, features=kinds).to_parquet(tmp_path / name / "train.parquet")
        tables.append(contents(tmp_path / name))
    assert tables == [first, first]
    changed = Image.open(one / "005.png")
    changed.putpixel((0, 0), (1, 2, 3))
    changed.save(one / "005.png")
    assert contents(one) != first


def stack(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def test_every_form_of_reference_gives_the_same_numbers(run, folders, tmp_path):
    whole = values(run("--images", folders["samples"]))
    (kept,) = (tmp_path / "cache").glob("*.safetensors")

    pictures = [Image.open(path) for path in sorted(folders["reference"].iterdir())]
    table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    np.savez(tmp_path / "images.npz", arr_0=stack(folders["reference"]))
    for reference in (kept, tmp_path / "data", tmp_path / "data" / "train.parquet", tmp_path / "images.npz"):
        assert values(run("--images", folders["samples"], reference=reference)) == pytest.approx(whole, rel=1e-6)


def test_every_form_of_samples_gives_the_same_numbers(run, folders, tmp_path):
    whole = values(run("--images", folders["samples"]))
    np.savez(tmp_path / "images.npz", arr_0=stack(folders["samples"]))
    assert values(run("--images", tmp_path / "images.npz")) == pytest.approx(whole, rel=1e-6)


def test_saved_statistics_give_fid_alone(run, folders, tmp_path):
    whole = values(run("--images", folders["samples"]))
    (kept,) = (tmp_path / "cache").glob("*.safetensors")
    found = metrics.Gaussian.of(features.read_features(kept)["features"])
    np.savez(tmp_path / "statistics.npz", mu=found.mean, sigma=found.covariance)
    results = run("--images", folders["samples"], reference=tmp_path / "statistics.npz")
    assert values(results) == {name: whole[name] for name in ("fid@40", "classifier_score@40")}
    assert any("saved statistics" in warning for warning in results["warnings"])


def test_features_of_another_network_are_refused(run, folders, tmp_path):
    run("--images", folders["samples"])
    (kept,) = (tmp_path / "cache").glob("*.safetensors")
    with pytest.raises(InputError, match="are those of colour, not of grey"):
        run("--images", folders["samples"], "--feature_extractor", folders["grey"], reference=kept)


def test_a_split_of_a_folder(run, folders, tmp_path):
    for split, count in (("train", 30), ("test", 20)):
        write_images(tmp_path / "both" / split, count)
    results = run("--images", folders["samples"], "--reference_split", "test", reference=tmp_path / "both")
    assert results["reference"]["images"] == 20


def test_repeated_training_images_are_told_from_held_out_ones(run, folders, tmp_path):
    training, held_out = write_images(tmp_path / "training", 100), tmp_path / "held_out"
    for i, path in enumerate(sorted(write_images(tmp_path / "more", 200).iterdir())[100:]):
        held_out.mkdir(exist_ok=True)
        os.link(path, held_out / f"{i}.png")
    repeated = values(run("--images", training, "--held_out", held_out, reference=training))
    assert repeated["memorised@100"] == 1 and repeated["nearest_training_ratio@100"] < 1e-3
    fresh = values(run("--images", held_out, "--held_out", held_out, reference=training))
    assert fresh["memorised@100"] <= 0.02 and fresh["nearest_training_ratio@100"] == pytest.approx(1)


@pytest.mark.skipif(not (SHARED / "MNIST").exists(), reason="MNIST is not beside this clone")
def test_the_floor_of_mnist_is_half_against_half_in_a_digit_classifiers_features(run, folders, tmp_path):
    digits = ROOT / "examples" / "classifiers" / "mnist"
    noise = np.random.default_rng(0).integers(0, 256, (400, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", arr_0=noise)
    flags = ["--feature_extractor", digits, "--num_reference", 2000]
    results = run("--images", tmp_path / "noise.npz", *flags, reference=SHARED / "MNIST")["metrics"]
    floors = {name.partition("@")[0]: entry["floor"] for name, entry in results.items()}
    assert floors["fid"]["halves"] == [400, 1000]
    assert 0 < 10 * floors["fid"]["value"] < results["fid@400"]["value"]
    assert abs(floors["kid"]["value"]) < 3 * floors["kid"]["spread"] < results["kid@400"]["value"]
    assert floors["coverage"]["value"] > 0.8 and results["coverage@400"]["value"] < 0.1
    assert floors["classifier_score"]["halves"] == [400, 1000]
    assert floors["classifier_score"]["value"] > 8  # ten digits, told with certainty, but not evenly in splits of 40


# ---------------------------------------------------------------------------------------------------------------------
# Classes and modes


def test_classes_are_compared_with_what_the_classifier_sees(run, folders):
    results = run("--images", folders["samples"], "--class_labels", 2, 0, reference=None)
    network = ImageClassifier.from_pretrained(folders["colour"])
    pictures = torch.from_numpy(stack(folders["samples"])).permute(0, 3, 1, 2) / 127.5 - 1
    seen = network(pictures).argmax(1).tolist()
    asked = [2, 0] * 20
    right = [a == s for a, s in zip(asked, seen, strict=True)]
    assert results["metrics"]["class_accuracy@40"]["value"] == pytest.approx(sum(right) / 40)
    assert results["class_accuracies"] == {"0": sum(right[1::2]) / 20, "1": None, "2": sum(right[::2]) / 20}
    assert results["confusion"][2] == [seen[::2].count(label) for label in range(3)]
    assert 0 < sum(right) < 40


def test_the_confusion_is_drawn(run, folders, tmp_path, capsys):
    run("--images", folders["samples"], "--class_labels", 0, 1, 2)
    assert Image.open(tmp_path / "evaluation-confusion.png").size[0] > 3 * 40
    printed = capsys.readouterr().out
    assert "accuracy of 1: " in printed and "evaluation-confusion.png" in printed


def test_a_conditional_pipeline_draws_the_classes_in_turn(run, tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    unet.class_embedding.weight.data *= 20
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    flags = ["--pipeline", tmp_path / "model", *SHORT, "--num_images", 12, "--save_images", tmp_path / "kept"]
    results = run(*flags, "--class_labels", 1, 2, reference=None)
    generated = ("--pipeline", tmp_path / "model", *SHORT, "--num_images", 12, "--output_dir", tmp_path / "generated")
    generate.main([str(flag) for flag in (*generated, "--class_labels", 1, 2)])
    assert (stack(tmp_path / "kept") == stack(tmp_path / "generated" / "images")).all()
    assert [sum(row) for row in results["confusion"]] == [0, 6, 6]


def test_a_guided_pipeline_is_measured_as_it_is_generated(run, tmp_path):
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = ClassConditionedUnet(8, 3, 3, 3, 2, 0.1, layers_per_block=1, norm_num_groups=4, **levels)
    unet.class_embedding.weight.data *= 20
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    shared = ["--pipeline", tmp_path / "model", *SHORT, "--class_labels", 1, 2, "--num_images", 12]
    guided = [*shared, "--guidance_scale", 3]
    results = run(*guided, "--save_images", tmp_path / "kept", reference=None)
    run(*shared, "--save_images", tmp_path / "unguided", reference=None)
    generate.main([str(flag) for flag in (*guided, "--output_dir", tmp_path / "generated")])
    assert (stack(tmp_path / "kept") == stack(tmp_path / "generated" / "images")).all()
    assert (stack(tmp_path / "kept") != stack(tmp_path / "unguided")).any()
    assert "guidance scale 3.0" in results["metrics"]["class_accuracy@12"]["protocol"]["samples"]


def test_stacked_digits_are_seen_channel_by_channel(run, folders):
    flags = ["--stacked_mnist", "--classifier", folders["grey"], "--batch_size", 16]
    results = run("--images", folders["samples"], *flags, reference=None)
    network = ImageClassifier.from_pretrained(folders["grey"])
    pictures = torch.from_numpy(stack(folders["samples"])) / 127.5 - 1
    digits = torch.stack([network(pictures[..., channel][:, None]).argmax(1) for channel in range(3)], 1)
    expected = coverage.stacked_mnist_coverage(digits)
    assert values(results) == {"modes@40": expected.modes, "mode_kl@40": pytest.approx(expected.kl)}
    assert 1 < expected.modes < 40
    (warning,) = results["warnings"]
    assert "counted in 40 samples" in warning and "25,600" in warning
    for entry in results["metrics"].values():
        assert f"grey, digest {weights_digest(network)}, resize to 8x8, bicubic" in entry["protocol"]["classifier"]


def test_modes_of_stacked_digits_are_counted_in_as_many_pictures_as_the_paper_has(run, folders, monkeypatch, capsys):
    draw = evaluate.sample

    def stops(pipe, seeds, *rest):
        if seeds != [0]:
            stopped()
        return draw(pipe, seeds, *rest)

    monkeypatch.setattr(evaluate, "sample", stops)
    for flags, count in ((["--stacked_mnist", "--classifier", folders["grey"]], 25_600), ([], 10_000)):
        with pytest.raises(KeyboardInterrupt):
            run("--pipeline", folders["model"], *SHORT, *flags)
        assert f"/{count} [" in capsys.readouterr().err  # of the progress bar


# ---------------------------------------------------------------------------------------------------------------------
# What is told beside the numbers


def test_every_number_has_its_protocol(run, folders):
    results = run("--pipeline", folders["model"], *SHORT, "--num_images", 12, "--seed", 5)
    for entry in results["metrics"].values():
        protocol = entry["protocol"]
        assert "seeds 5 to 16" in protocol["samples"] and "DDIMScheduler" in protocol["samples"]
        assert "num inference steps 2" in protocol["samples"] and "8-bit pixels" in protocol["samples"]
        assert "reference, split all" in protocol["reference"] and "images 40" in protocol["reference"]
        assert "to 8x8, bicubic" in protocol["extractor"] and "extractor digest" in protocol["extractor"]
        assert "torch-fidelity" in protocol["versions"] and "diffusers-ddgan" in protocol["versions"]
    assert results["metrics"]["kid@12"]["protocol"]["subset_size"] == 6
    assert results["metrics"]["kid@12"]["spread"] > 0
    for name in ("fid", "classifier_score"):
        assert results["metrics"][f"{name}@12"]["floor"]["halves"] == [12, 20]


def test_the_table_shows_each_number_beside_its_floor(run, folders, capsys):
    results = run("--images", folders["samples"])
    printed = capsys.readouterr().out
    for name, key in (("FID", "fid"), ("KID", "kid"), ("coverage", "coverage")):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}@40 "))
        entry = results["metrics"][f"{key}@40"]
        assert f"{entry['value']:.4g}" in line and f"{entry['floor']['value']:.4g}" in line
    assert "floor: 20 images of one half of the reference against 20 of the other" in printed


def test_the_model_card_gets_the_numbers_in_place_of_earlier_ones(run, folders, tmp_path):
    unet, model = tiny_unet(), tmp_path / "model"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(model)
    (model / "README.md").write_text("---\nlicense: mit\ntags:\n- ddpm\n---\n\n# Mine\n\nWords.\n")
    flags = ["--pipeline", model, *SHORT, "--num_images", 12]
    run(*flags)
    results = run(*flags, "--seed", 7)
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "mit" and card.text.strip() == "# Mine\n\nWords."
    written = {result.metric_name: result for result in card.data.eval_results}
    assert len(written) == len(card.data.eval_results) == len(results["metrics"])
    fid = written["FID@12"]
    assert fid.metric_value == pytest.approx(results["metrics"]["fid@12"]["value"], rel=1e-5)
    assert (fid.dataset_name, fid.dataset_split, fid.metric_type) == ("reference", "all", "fid")
    assert "seeds 7 to 18" in fid.metric_args["samples"]
    assert str(tmp_path) not in card.content

    before = (model / "README.md").read_text()
    run(*flags, "--seed", 8, "--no_update_card")
    assert (model / "README.md").read_text() == before


def warnings(results: dict) -> str:
    return "\n".join(results["warnings"])


def test_too_few_samples_are_warned_about_with_the_bias(run, folders):
    results = run("--images", folders["samples"])
    bias = results["metrics"]["fid@40"]["protocol"]["estimated_bias"]
    assert bias > 0
    assert "Too few samples: 40" in warnings(results) and f"about {bias:.3g}" in warnings(results)
    assert "covariance is singular" not in warnings(results)
    assert "There are 12 samples, not more than the 16" in warnings(
        run("--images", folders["samples"], "--num_images", 12)
    )


def test_jpeg_against_png_is_warned_about(run, folders, tmp_path):
    (tmp_path / "jpeg").mkdir()
    for path in folders["reference"].iterdir():
        Image.open(path).save(tmp_path / "jpeg" / f"{path.stem}.jpg")
    said = "The samples are PNG, the reference images JPEG"
    assert said in warnings(run("--images", folders["samples"], reference=tmp_path / "jpeg"))
    assert "JPEG" not in warnings(run("--images", folders["samples"]))


def test_grey_against_colour_is_warned_about(run, folders, tmp_path):
    (tmp_path / "grey").mkdir()
    for path in folders["reference"].iterdir():
        Image.open(path).convert("L").save(tmp_path / "grey" / path.name)
    assert "samples are colour, the reference is grey" in warnings(
        run("--images", folders["samples"], reference=tmp_path / "grey")
    )
    seen = run("--images", folders["samples"], "--feature_extractor", folders["grey"])
    assert "The samples have colours, which this classifier" in warnings(seen)


def test_resized_references_are_warned_about(run, folders, tmp_path):
    large = write_images(tmp_path / "large", 30, size=(16, 12))
    results = run("--images", folders["samples"], reference=large)
    assert "16x12, were cropped at the centre, to 8x8, bicubic" in warnings(results)
    (kept,) = (tmp_path / "cache").glob("large-*.safetensors")
    samples = write_images(tmp_path / "small", 30, size=(6, 6))
    said = "reference was measured at 8x8, the samples are 6x6"
    assert said in warnings(run("--images", samples, reference=kept))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--pipeline", "MODEL", "--images", "SAMPLES"], "either --pipeline"),
        ([], "either --pipeline"),
        (["--images", "SAMPLES", "--num_images", 41], "has 40 images"),
        (["--images", "SAMPLES", "--num_images", 11], "at least 12"),
        (["--images", "SAMPLES", "--reference", "nowhere.npz"], "no such file"),
        (["--images", "SAMPLES", "--feature_extractor", "nowhere"], "neither inception-v3-compat nor dinov2"),
        (["--images", "SAMPLES", "--class_labels", 3], "colour knows 0 to 2"),
        (["--images", "SAMPLES", "--stacked_mnist"], "colour is not"),
        (["--images", "SAMPLES", "--save_images", "x"], "are there already"),
        (["--images", "SAMPLES", "--held_out", "SAMPLES"], "at least 100"),
    ],
)
def test_what_cannot_be_used_is_said(run, folders, wrong, said):
    names = {"MODEL": folders["model"], "SAMPLES": folders["samples"]}
    with pytest.raises(InputError, match=said):
        run(*(names.get(flag, flag) for flag in wrong))


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
def test_a_damaged_file_is_named(run, folders, tmp_path, suffix):
    (tmp_path / f"damaged{suffix}").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=rf"damaged{suffix} cannot be read as a {suffix} file"):
        run("--images", folders["samples"], reference=tmp_path / f"damaged{suffix}")


def test_the_reference_is_not_held_out(run, folders, tmp_path, drawn):
    training = write_images(tmp_path / "training", 100)
    with pytest.raises(InputError, match="holds the images of --reference"):
        run("--pipeline", folders["model"], *SHORT, "--held_out", training, reference=training)
    assert len(drawn) <= 1  # the one that tells the size


def test_some_of_the_images_are_drawn_at_random(run, folders, tmp_path):
    both = tmp_path / "both"
    for kind, source in (("a", "reference"), ("b", "samples")):
        (both / kind).mkdir(parents=True)
        for path in folders[source].iterdir():
            os.link(path, both / kind / path.name)
    some = values(run("--images", both, "--num_images", 40))
    assert some["precision@40"] < 1  # the first 40 are those of the reference
    assert values(run("--images", both, "--num_images", 40, "--seed", 5)) == some


def test_a_guided_pipeline_cannot_be_measured_without_its_loss(run, folders, tmp_path):
    GuidedPipeline.from_pipe(DDPMPipeline.from_pretrained(folders["model"])).save_pretrained(tmp_path / "guided")
    with pytest.raises(InputError, match="A GuidedPipeline cannot be called without loss"):
        run("--pipeline", tmp_path / "guided", *SHORT)


def test_without_a_reference_or_a_classifier_there_is_nothing_to_measure(folders):
    with pytest.raises(InputError, match="--reference, or a --classifier"):
        evaluate.main(["--images", str(folders["samples"])])


def test_broken_and_unequal_images_are_named(run, folders, tmp_path):
    samples = write_images(tmp_path / "mixed", 120)
    Image.new("RGB", (9, 8)).save(samples / "050.png")
    with pytest.raises(RunError, match=r"000\.png is 8x8, .*050\.png is 9x8"):
        run("--images", samples)
    (samples / "050.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"cannot be read: .*050\.png"):
        run("--images", samples)
    with pytest.raises(RunError, match=r"cannot be read: .*050\.png"):
        run("--images", folders["samples"], reference=samples)
