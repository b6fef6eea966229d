"""Claims about scripts/evaluate.py, through its command line."""

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT, few_step_scheduler, run_ranks, tiny_unet, write_images

from ddgan import ClassConditionalPipeline, ClassConditionedUnet, GuidedPipeline
from ddgan.commands import evaluate as command
from ddgan.core.errors import InputError, RunError
from ddgan.evaluation import coverage, features, metrics
from ddgan.evaluation.classifier import ImageClassifier
from ddgan.evaluation.extractors import ClassifierFeatures, weights_digest
from ddgan.evaluation.reporting import full_title, metric_type
from ddgan.sampling import groups, image_files
from ddgan.sampling.loading import load_pipeline, pipeline_hash
from ddgan.scripts import evaluate, generate

SCRIPT = ROOT / "scripts" / "evaluate.py"
SHARED = ROOT.parent / "shared" / "data"
SHORT = ("--scheduler", "ddim", "--num_inference_steps", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """A classifier of color images and one of gray images, samples and a reference of 40 images each."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, channels, classes in (("color", 3, 3), ("gray", 1, 10)):
        torch.manual_seed(channels)
        network = ImageClassifier(sample_size=8, in_channels=channels, num_classes=classes, widths=(8, 16))
        network.head.weight.data *= 100  # so that it predicts all classes
        network.save_pretrained(root / name)
    write_images(root / "reference", 40)
    samples = write_images(root / "samples", 60)
    for path in sorted(samples.iterdir())[:20]:
        path.unlink()  # the reference has the same first images
    for path in samples.iterdir():
        Image.open(path).point(lambda value: value // 2 + 64).save(path)
    return {**{path.name: path for path in root.iterdir()}, "model": tiny_model}


@pytest.fixture
def run(folders, tmp_path):
    """Run evaluate.py in this process with the color classifier and return the content of its results file."""

    def run(*flags, reference: str | Path | None = "reference", output: str = "evaluation.json") -> dict:
        against = ["--reference", folders.get(reference, reference)] if reference else []
        defaults = [*against, "--feature_extractor", folders["color"], "--cache_dir", tmp_path / "cache"]
        all_flags = [*defaults, "--output", tmp_path / output, *flags]
        evaluate.main([str(flag) for flag in all_flags])
        return json.loads((tmp_path / output).read_text())

    return run


def values(results: dict) -> dict[str, float]:
    return {name: entry["value"] for name, entry in results["metrics"].items()}


ALL = {"fid", "kid", "precision", "recall", "density", "coverage", "near_copies", "classifier_score"}


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers in every way of measuring


def test_a_pipeline_and_its_generated_images_give_the_same_numbers(run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "SHARD_IMAGES", 5)
    sampled = run("--pipeline", folders["model"], *SHORT, "--num_images", 12)
    assert {name.partition("@")[0] for name in sampled["metrics"]} == ALL
    generated = ("--pipeline", folders["model"], *SHORT, "--num_images", 12, "--output_dir", tmp_path / "generated")
    for more in ((), ("--format", "npz"), ("--format", "webdataset")):
        generate.main([str(flag) for flag in (*generated, *more, "--overwrite")])
        assert values(run("--images", tmp_path / "generated" / "images")) == values(sampled)


def test_a_few_step_pipeline_is_sampled_in_the_steps_it_was_trained_for(run, tmp_path):
    DDPMPipeline(tiny_unet(), few_step_scheduler(3)).save_pretrained(tmp_path / "model")
    results = run("--pipeline", tmp_path / "model", "--num_images", 12)
    assert "DDPMScheduler, num inference steps 3," in results["metrics"]["fid@12"]["protocol"]["samples"]


@pytest.mark.slow
def test_two_processes_give_the_same_numbers_as_one(run, folders, tmp_path):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 22, "--seed", 20]  # groups of 12 and 10 samples
    one = run(*flags)
    defaults = ["--reference", folders["reference"], "--feature_extractor", folders["color"]]
    more = ["--cache_dir", tmp_path / "cache2", "--output", tmp_path / "two.json"]
    output = run_ranks(SCRIPT, *defaults, *more, *flags, output=tmp_path / "output.txt", machines=2)
    assert values(json.loads((tmp_path / "two.json").read_text())) == values(one)
    assert output.count("all metrics") == 1


def test_the_number_of_threads_does_not_change_the_numbers(run, folders, tmp_path, two_threads, capsys):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 22, "--seed", 20, "--batch_size", 8]
    two = run(*flags)
    assert "images per second" in capsys.readouterr().out
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert values(run(*flags, "--cache_dir", tmp_path / "cache2")) == values(two)


@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_batch_size_does_not_change_the_numbers(run, folders, tmp_path, batch_size):
    whole = values(run("--images", folders["samples"]))
    parts = values(run("--images", folders["samples"], "--batch_size", batch_size, "--cache_dir", tmp_path / "other"))
    assert parts == pytest.approx(whole, rel=1e-4)


def test_the_order_of_the_images_does_not_change_the_numbers(run, folders, tmp_path):
    (tmp_path / "reversed").mkdir()
    for i, path in enumerate(sorted(folders["samples"].iterdir(), reverse=True)):
        os.link(path, tmp_path / "reversed" / f"{i:03d}.png")
    reversed_values = values(run("--images", tmp_path / "reversed"))
    assert reversed_values == pytest.approx(values(run("--images", folders["samples"])), rel=1e-6)


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """The seeds of generated samples; a group of 8x8 images has 32."""
    seeds_seen, sample = [], command.sample

    def recorded(pipe, seeds, *rest, **options):
        seeds_seen.extend(seeds)
        return sample(pipe, seeds, *rest, **options)

    for module in (command, groups):
        monkeypatch.setattr(module, "sample", recorded)
    return seeds_seen


def test_an_interrupted_evaluation_resumes(run, folders, tmp_path, monkeypatch, sampled):
    monkeypatch.setattr(features, "PART_IMAGES", 4)
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 70, "--seed", 20]
    whole = values(run(*flags))

    def stops(pipe, seeds, *rest, **options):
        if seeds[0] == 64:
            raise KeyboardInterrupt
        return sample(pipe, seeds, *rest, **options)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        sample = groups.sample
        patches.setattr(groups, "sample", stops)
        run(*flags)
    sampled.clear()
    assert values(run(*flags)) == whole
    assert sampled == [20, *range(64, 96)]  # the first sample determines the size
    assert not list((tmp_path / "cache").glob("*.parts"))


def test_two_commands_with_the_same_settings_do_not_interfere(run, folders, tmp_path, monkeypatch):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 34]
    saved, sample, second = tmp_path / "saved", groups.sample, []

    def starts_another(pipe, seeds, *rest, **options):
        if seeds[0] == 32:  # the first command has saved intermediate results
            with monkeypatch.context() as patches:
                patches.setattr(groups, "sample", sample)
                if saved.exists():
                    with pytest.raises(
                        InputError, match=r"saved is in use: .*choose another folder with --save_images"
                    ):
                        run(*flags, "--save_images", saved)
                else:
                    second.append(values(run(*flags)))
        return sample(pipe, seeds, *rest, **options)

    monkeypatch.setattr(features, "PART_IMAGES", 16)
    monkeypatch.setattr(groups, "sample", starts_another)
    assert [values(run(*flags))] == second
    assert [values(run(*flags, "--save_images", saved))] == second
    assert not list((tmp_path / "cache").glob("*.parts"))
    assert sorted(path.name for path in saved.iterdir()) == [f"{i:06d}.png" for i in range(34)]


def test_results_that_cannot_be_written_are_not_lost(run, folders, tmp_path, monkeypatch, sampled):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20]
    output = tmp_path / "new" / "evaluation.json"
    compute = metrics.compute_metrics

    def compute_while_the_folder_is_taken(*arguments):
        output.parent.touch()
        return compute(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(metrics, "compute_metrics", compute_while_the_folder_is_taken)
        with pytest.raises(RunError, match=r"results cannot be written to .*evaluation.json: .*with another --output"):
            run(*flags, "--output", output)
    sampled.clear()
    run(*flags)
    assert sampled == [0]  # the first sample determines the size


def stopped(*_args, **_more):
    raise KeyboardInterrupt


def test_samples_are_not_lost_when_their_metrics_were_not_computed(run, folders, tmp_path, monkeypatch, sampled):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20]
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(metrics, "kernel_distance", stopped)
        run(*flags)
    sampled.clear()
    run(*flags)
    assert sampled == [0]  # the first sample determines the size


def test_all_samples_are_saved_although_an_interrupted_evaluation_did_not_save_them(
    run, folders, tmp_path, monkeypatch, sampled
):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20]
    save = ["--save_images", tmp_path / "saved"]
    with monkeypatch.context() as patches:
        patches.setattr(metrics, "kernel_distance", stopped)
        for more in ((), save):
            with pytest.raises(KeyboardInterrupt):
                run(*flags, *more)
    sampled.clear()
    run(*flags, *save)
    assert [path.name for path in sorted((tmp_path / "saved").iterdir())] == [f"{i:06d}.png" for i in range(20)]
    assert sampled == [0]  # saved samples are not generated again


def test_samples_whose_files_were_removed_after_an_interruption_are_generated_again(
    run, folders, tmp_path, monkeypatch
):
    flags = ["--pipeline", folders["model"], *SHORT, "--num_images", 20, "--save_images", tmp_path / "saved"]
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(metrics, "kernel_distance", stopped)
        run(*flags)
    shutil.rmtree(tmp_path / "saved")
    run(*flags)
    assert len(list((tmp_path / "saved").iterdir())) == 20


@pytest.mark.parametrize("package", ["torch-fidelity", "matplotlib"])
def test_a_missing_package_is_reported_before_sampling(run, folders, monkeypatch, sampled, package):
    found = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: found(name) if name != package.replace("-", "_") else None)
    with pytest.raises(InputError, match=rf"{package} \(of the extra \[eval\]\) is not installed"):
        run("--pipeline", folders["model"], *SHORT, "--num_images", 20)
    assert not sampled


@pytest.mark.parametrize(
    ("name", "message"), [("few", "few has 11 images; .* at least 12"), ("other", "16 dimensions")]
)
def test_unusable_references_are_rejected_before_sampling(run, folders, tmp_path, sampled, name, message):
    write_images(tmp_path / "few", 11)
    np.savez(tmp_path / "other.npz", mu=np.zeros(8), sigma=np.eye(8))
    reference = tmp_path / (name if name == "few" else "other.npz")
    with pytest.raises(InputError, match=message):
        run("--pipeline", folders["model"], *SHORT, "--num_images", 20, reference=reference)
    assert sampled == [0]


def test_too_few_held_out_images_are_rejected_before_sampling(run, folders, sampled):
    with pytest.raises(InputError, match="samples has 40 images; there must be at least 100"):
        run("--pipeline", folders["model"], *SHORT, "--num_images", 20, "--held_out", folders["samples"])
    assert sampled == [0]


def test_identical_images_have_no_distance(run, folders):
    same = values(run("--images", folders["reference"]))
    assert abs(same["fid@40"]) < 1e-6
    assert same["precision@40"] == same["recall@40"] == same["coverage@40"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# References


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """The number of images in each call of the extractor."""
    calls, extract = [], ClassifierFeatures.extract

    def counted(self, images):
        calls.append(len(images))
        return extract(self, images)

    monkeypatch.setattr(ClassifierFeatures, "extract", counted)
    return calls


def test_features_are_cached_by_data_extractor_and_count(run, folders, tmp_path, measured):
    def images_measured(*flags) -> int:
        measured.clear()
        run("--images", folders["samples"], *flags, reference=reference)
        return sum(measured)

    reference = write_images(tmp_path / "changing", 30)
    assert images_measured() == 70
    assert images_measured() == 40
    assert images_measured("--num_reference", 20) == 60
    assert images_measured("--num_reference", 20) == 40
    assert images_measured("--feature_extractor", folders["gray"]) == 70
    Image.new("RGB", (8, 8)).save(reference / "000.png")
    assert images_measured() == 70


def test_contents_are_identified_by_the_images_not_their_place(run, folders, tmp_path):
    def contents(reference: Path) -> str:
        results = run("--images", folders["samples"], reference=reference)
        (described,) = {entry["protocol"]["reference"] for entry in results["metrics"].values()}
        assert f"contents {results['reference']['contents']}" in described
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
    (cached,) = (tmp_path / "cache").glob("*.safetensors")

    images = [Image.open(path) for path in sorted(folders["reference"].iterdir())]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    np.savez(tmp_path / "images.npz", arr_0=stack(folders["reference"]))
    for reference in (cached, tmp_path / "data", tmp_path / "data" / "train.parquet", tmp_path / "images.npz"):
        assert values(run("--images", folders["samples"], reference=reference)) == pytest.approx(whole, rel=1e-6)


def test_every_form_of_samples_gives_the_same_numbers(run, folders, tmp_path):
    whole = values(run("--images", folders["samples"]))
    np.savez(tmp_path / "images.npz", arr_0=stack(folders["samples"]))
    assert values(run("--images", tmp_path / "images.npz")) == pytest.approx(whole, rel=1e-6)


def test_a_stated_range_of_values_makes_formats_equal(run, folders, tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for name, images in (("bytes", gray), ("floats", gray / np.float32(127.5) - 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i:02d}.tif")
    flags = ("--images", tmp_path / "floats")
    with pytest.raises(RunError, match="--value_range"):
        run(*flags, reference=tmp_path / "bytes")
    results = run(*flags, "--value_range", -1, 1, reference=tmp_path / "floats")
    assert values(results) == values(run("--images", tmp_path / "bytes", reference=tmp_path / "bytes"))
    assert results["reference"]["value_range"] == "-1 to 1"


def test_images_that_come_out_nearly_black_have_a_warning(run, tmp_path, caplog):
    for i in range(12):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 300 * i, np.uint16)).save(tmp_path / "images" / f"{i:02d}.tif")
    run("--images", tmp_path / "images", reference=tmp_path / "images")
    assert caplog.text.count("state these with --value_range") == 2  # for the samples and for the reference


def test_saved_statistics_give_only_the_fid(run, folders, tmp_path):
    whole = values(run("--images", folders["samples"]))
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    gaussian = metrics.Gaussian.of(load_file(cached)["features"])
    np.savez(tmp_path / "statistics.npz", mu=gaussian.mean, sigma=gaussian.covariance)
    results = run("--images", folders["samples"], reference=tmp_path / "statistics.npz")
    assert values(results) == {name: whole[name] for name in ("fid@40", "classifier_score@40")}
    assert any("saved statistics" in warning for warning in results["warnings"])


def test_published_statistics_are_reused_with_their_protocol(run, folders, tmp_path, local_hub):
    file = tmp_path / "reference-8x8.npz"
    whole = run("--images", folders["samples"], "--save_statistics", file)
    with np.load(file) as arrays:  # as other implementations read them
        cached = next((tmp_path / "cache").glob("*.safetensors"))
        gaussian = metrics.Gaussian.of(load_file(cached)["features"])
        assert (arrays["mu"] == gaussian.mean).all() and (arrays["sigma"] == gaussian.covariance).all()
    local_hub.add("ann/statistics", kind="dataset", **{"reference-8x8.npz": file.read_bytes()})
    for reference in (file, "hf://datasets/ann/statistics/reference-8x8.npz"):
        results = run("--images", folders["samples"], reference=reference)
        assert values(results) == {name: values(whole)[name] for name in ("fid@40", "classifier_score@40")}
        facts = {name: results["reference"][name] for name in ("name", "contents", "images", "measured_at")}
        assert facts == {name: whole["reference"][name] for name in facts} and facts["images"] == 40
        assert results["reference"]["extractor_digest"] == whole["extractor"]["extractor_digest"]
        assert "saved statistics" not in warnings(results)
    again = tmp_path / "again.npz"
    run("--images", folders["samples"], "--save_statistics", again, reference=file)
    with np.load(file) as first, np.load(again) as second:
        assert (first["sigma"] == second["sigma"]).all()


def test_statistics_of_another_protocol_are_refused(run, folders, tmp_path):
    file = tmp_path / "statistics.npz"
    run("--images", folders["samples"], "--save_statistics", file)
    with pytest.raises(InputError, match=r"are those of color with the weights \w+, not of gray with the weights \w+"):
        run("--images", folders["samples"], "--feature_extractor", folders["gray"], reference=file)
    small = write_images(tmp_path / "small", 12, size=(6, 6))
    with pytest.raises(InputError, match=r"statistics\.npz are those of images at 8x8, but the samples are 6x6"):
        run("--images", small, reference=file)
    with np.load(file) as arrays:
        np.savez(file, mu=arrays["mu"] + 1, sigma=arrays["sigma"], protocol=arrays["protocol"])
    with pytest.raises(InputError, match=r"statistics\.npz is damaged or was changed: mu and sigma are not those"):
        run("--images", folders["samples"], reference=file)
    with np.load(file) as arrays:
        np.savez(file, mu=arrays["mu"], sigma=arrays["sigma"], protocol=np.array("[1]"))
    with pytest.raises(InputError, match=r"statistics\.npz cannot be read as a \.npz file"):
        run("--images", folders["samples"], reference=file)


def test_statistics_of_an_unknown_protocol_do_not_get_one(run, folders, tmp_path):
    features = np.random.default_rng(0).normal(size=(100, 16))
    np.savez(tmp_path / "foreign.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    with pytest.raises(InputError, match=r"how the statistics in .*foreign\.npz were measured is unknown\. Copy"):
        run(
            *("--images", folders["samples"], "--save_statistics", tmp_path / "ours.npz"),
            reference=tmp_path / "foreign.npz",
        )
    assert not (tmp_path / "ours.npz").exists()
    with pytest.raises(InputError, match=r"needs the features of the held-out images, but .*foreign\.npz has only"):
        run("--images", folders["samples"], "--held_out", tmp_path / "foreign.npz")


def test_statistics_replace_only_statistics(run, folders, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=stack(folders["reference"]))
    before = (tmp_path / "images.npz").read_bytes()
    for name, message in (
        ("images.npz", "images.npz exists and holds no statistics"),
        ("a.pt", "name of an .npz file"),
    ):
        with pytest.raises(InputError, match=message):
            run("--images", folders["samples"], "--save_statistics", tmp_path / name)
    assert (tmp_path / "images.npz").read_bytes() == before
    for _ in range(2):
        run("--images", folders["samples"], "--save_statistics", tmp_path / "statistics.npz")


@pytest.mark.parametrize("sigma", [-np.eye(16), np.triu(np.ones((16, 16))), np.full((16, 16), np.nan)])
def test_saved_statistics_that_are_no_covariance_are_refused(run, folders, tmp_path, sigma):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(16), sigma=sigma)
    with pytest.raises(InputError, match="sigma is not a covariance matrix"):
        run("--images", folders["samples"], reference=tmp_path / "statistics.npz")


def test_features_of_another_network_are_rejected(run, folders, tmp_path):
    run("--images", folders["samples"])
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    with pytest.raises(
        InputError,
        match=r"are those of color with the weights \w+, not of gray with the weights \w+\. Pass the network",
    ):
        run("--images", folders["samples"], "--feature_extractor", folders["gray"], reference=cached)
    content = cached.read_bytes()
    cached.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(InputError, match=r"safetensors cannot be read .*contents do not match their digest"):
        run("--images", folders["samples"], reference=cached)


@pytest.mark.parametrize(
    ("reference", "flags", "message"),
    [
        (
            "reference",
            ["--image_column", "x"],
            "image_column x is a setting of a dataset, not of .*reference and .*samples",
        ),
        (
            "statistics.npz",
            ["--num_reference", 20],
            "num_reference 20 selects images, but .*statistics.npz holds only",
        ),
        ("statistics.npz", ["--reference_split", "test"], "reference_split test selects images"),
        ("statistics.npz", ["--reference_config", "a"], "reference_config a is a setting of a dataset"),
        ("reference", ["--guidance_scale", 2], "--guidance_scale 2.0 is for sampling a --pipeline"),
        ("rows.parquet", ["--reference_config", "a"], "rows.parquet has no configuration a"),
        ("reference", ["--held_out_split", "test"], "--held_out_split test needs --held_out"),
        (None, ["--num_reference", 20], "--num_reference 20 needs --reference"),
        (None, ["--image_column", "x"], "image_column x is a setting of a dataset, not of .*samples: omit"),
        ("reference", ["--scheduler", "ddim"], "--scheduler ddim is for sampling a --pipeline"),
        ("reference", ["--classifier", "color"], "--classifier .*gray predicts classes and digits"),
        ("reference", ["--extractor_weights", "x"], "--extractor_weights x are for inception-v3-compat, DINOv2"),
    ],
)
def test_settings_without_effect_are_refused(run, folders, tmp_path, reference, flags, message):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(16), sigma=np.eye(16))
    (tmp_path / "rows.parquet").touch()
    flags = [folders["gray"] if flag == "color" else flag for flag in flags]
    reference = reference if reference in (None, "reference") else tmp_path / reference
    with pytest.raises(InputError, match=message):
        run("--images", folders["samples"], *flags, reference=reference)


def test_a_value_range_without_image_files_is_refused(run, folders, tmp_path):
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(192), sigma=np.eye(192))
    flags = ("--pipeline", folders["model"], *SHORT, "--num_images", 12, "--value_range", 0, 99)
    with pytest.raises(InputError, match=r"--value_range applies to image files, but .*statistics\.npz has only feat"):
        run(*flags, reference=tmp_path / "statistics.npz")


def test_a_split_of_a_folder(run, folders, tmp_path):
    for split, count in (("train", 30), ("test", 20)):
        write_images(tmp_path / "both" / split, count)
    results = run("--images", folders["samples"], "--reference_split", "test", reference=tmp_path / "both")
    assert results["reference"]["images"] == 20


def test_repeated_training_images_are_detected_with_held_out_ones(run, folders, tmp_path):
    training, held_out = write_images(tmp_path / "training", 100), tmp_path / "held_out"
    for i, path in enumerate(sorted(write_images(tmp_path / "more", 200).iterdir())[100:]):
        held_out.mkdir(exist_ok=True)
        os.link(path, held_out / f"{i}.png")
    repeated = values(run("--images", training, "--held_out", held_out, reference=training))
    assert repeated["memorized@100"] == 1 and repeated["nearest_training_ratio@100"] < 1e-3
    fresh = values(run("--images", held_out, "--held_out", held_out, reference=training))
    assert fresh["memorized@100"] <= 0.02 and fresh["nearest_training_ratio@100"] == pytest.approx(1)


@pytest.mark.skipif(not (SHARED / "MNIST").exists(), reason="MNIST is not next to this clone")
def test_the_floor_of_mnist_in_the_features_of_a_digit_classifier(run, folders, tmp_path):
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
    assert floors["classifier_score"]["value"] > 8  # ten digits, certain, but unevenly distributed in splits of 40


# ---------------------------------------------------------------------------------------------------------------------
# Classes and modes


def test_class_accuracy_compares_requested_and_predicted_classes(run, folders):
    results = run("--images", folders["samples"], "--class_labels", 2, 0, reference=None)
    network = ImageClassifier.from_pretrained(folders["color"])
    images = torch.from_numpy(stack(folders["samples"])).permute(0, 3, 1, 2) / 127.5 - 1
    predicted = network(images).argmax(1).tolist()
    requested = [2, 0] * 20
    correct = [a == b for a, b in zip(requested, predicted, strict=True)]
    assert results["metrics"]["class_accuracy@40"]["value"] == pytest.approx(sum(correct) / 40)
    assert results["class_accuracies"] == {"0": sum(correct[1::2]) / 20, "1": None, "2": sum(correct[::2]) / 20}
    assert results["confusion"][2] == [predicted[::2].count(label) for label in range(3)]
    assert 0 < sum(correct) < 40


def test_the_confusion_matrix_is_plotted(run, folders, tmp_path, capsys):
    run("--images", folders["samples"], "--class_labels", 0, 1, 2)
    assert Image.open(tmp_path / "evaluation-confusion.png").size[0] > 3 * 40
    printed = capsys.readouterr().out
    assert "accuracy of 1: " in printed and "evaluation-confusion.png" in printed


def test_a_conditional_pipeline_samples_the_classes_in_turn(run, tmp_path):
    unet = tiny_unet(num_class_embeds=3)
    unet.class_embedding.weight.data *= 20
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    flags = ["--pipeline", tmp_path / "model", *SHORT, "--num_images", 12, "--save_images", tmp_path / "saved"]
    results = run(*flags, "--class_labels", 1, 2, reference=None)
    generated = ("--pipeline", tmp_path / "model", *SHORT, "--num_images", 12, "--output_dir", tmp_path / "generated")
    generate.main([str(flag) for flag in (*generated, "--class_labels", 1, 2)])
    assert (stack(tmp_path / "saved") == stack(tmp_path / "generated" / "images")).all()
    assert [sum(row) for row in results["confusion"]] == [0, 6, 6]


def named_pipeline(folder: Path, names: list[str]) -> Path:
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = ClassConditionedUnet(
        8,
        in_channels=3,
        out_channels=3,
        num_classes=3,
        id2label=names,
        **levels,
        layers_per_block=1,
        norm_num_groups=4,
    )
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def test_classes_of_a_pipeline_and_a_classifier_are_matched_by_name(run, tmp_path, caplog):
    torch.manual_seed(3)
    network = ImageClassifier(8, 3, 3, widths=(8, 16), id2label={0: "bee", 1: "cat", 2: "ant"})
    network.save_pretrained(tmp_path / "classifier")
    flags = [*SHORT, "--num_images", 12, "--feature_extractor", tmp_path / "classifier"]
    named = named_pipeline(tmp_path / "named", ["ant", "bee", "cat"])
    results = run("--pipeline", named, *flags, "--class_labels", "ant", 1, reference=None)
    assert [sum(row) for row in results["confusion"]] == [6, 0, 6]
    assert not caplog.records
    other = named_pipeline(tmp_path / "other", ["a", "b", "c"])
    results = run("--pipeline", other, *flags, "--class_labels", "b", reference=None)
    assert [sum(row) for row in results["confusion"]] == [0, 12, 0]
    assert "they are matched by number" in caplog.text
    partly = named_pipeline(tmp_path / "partly", ["ant", "bee", "wasp"])
    with pytest.raises(
        InputError, match="--class_labels wasp: the classifier classifier has the classes 0 to 2, named"
    ):
        run("--pipeline", partly, *flags, "--class_labels", 0, "wasp", reference=None)
    with pytest.raises(InputError, match="--class_labels wasp"):  # not the class with the same number
        run("--pipeline", partly, *flags, "--class_labels", "wasp", reference=None)


def test_a_conditional_pipeline_is_measured_without_a_classifier(run, folders, tmp_path):
    named = named_pipeline(tmp_path / "named", ["ant", "bee", "cat"])
    flags = [*SHORT, "--num_images", 12, "--feature_extractor", "pixels-8x8", "--class_labels", "ant", "cat"]
    results = run("--pipeline", named, *flags)
    assert results["metrics"]["fid@12"]["value"] > 0 and "class_accuracy@12" not in results["metrics"]
    assert results["samples"]["class_labels"] == ["ant", "cat"]
    with pytest.raises(InputError, match="--class_labels needs the predictions of a classifier"):
        run("--images", folders["samples"], *flags[-5:])


def test_existing_images_are_paired_with_their_classes_in_natural_order(run, tmp_path):
    torch.manual_seed(0)
    classifier = ImageClassifier(8, 1, 2, widths=(8, 8), id2label={0: "dark", 1: "bright"})
    classifier.head.weight.data *= 100
    images = torch.cat([torch.full((1, 1, 8, 8), value / 127.5 - 1) for value in range(0, 240, 20)])
    predicted = classifier(images).argmax(1).tolist()
    classifier.save_pretrained(tmp_path / "classifier")
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / "images" / f"{i}.png")
    flags = ("--images", tmp_path / "images", "--feature_extractor", tmp_path / "classifier")
    names = [("dark", "bright")[label] for label in predicted]
    results = run(*flags, "--class_labels", *names, reference=None)
    assert values(results)["class_accuracy@12"] == 1
    assert "natural order" in results["samples"]["order"]


def test_guidance_and_eta_are_the_same_as_in_generate(run, tmp_path):
    torch.manual_seed(0)
    levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = ClassConditionedUnet(8, 3, 3, 3, 2, 0.1, layers_per_block=1, norm_num_groups=4, **levels)
    unet.class_embedding.weight.data *= 20
    ClassConditionalPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    shared = ["--pipeline", tmp_path / "model", *SHORT, "--class_labels", 1, 2, "--num_images", 12]
    guided = [*shared, "--guidance_scale", 3, "--eta", 0.5]
    results = run(*guided, "--save_images", tmp_path / "saved", reference=None)
    run(*shared, "--save_images", tmp_path / "unguided", reference=None)
    generate.main([str(flag) for flag in (*guided, "--output_dir", tmp_path / "generated")])
    assert (stack(tmp_path / "saved") == stack(tmp_path / "generated" / "images")).all()
    assert (stack(tmp_path / "saved") != stack(tmp_path / "unguided")).any()
    protocol = results["metrics"]["class_accuracy@12"]["protocol"]["samples"]
    assert "guidance scale 3.0" in protocol and "eta 0.5" in protocol


def test_autoguidance_is_the_same_as_in_generate_and_part_of_the_protocol(run, folders, tmp_path):
    worse = DDPMPipeline(tiny_unet(), DDPMScheduler())
    for parameter in worse.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    worse.save_pretrained(tmp_path / "worse")
    shared = ["--pipeline", folders["model"], *SHORT, "--num_images", 12]
    auto = ["--autoguidance", tmp_path / "worse", "--guidance_scale", 1.5, "--guidance_interval", 0, 50]
    results = run(*shared, *auto, "--save_images", tmp_path / "saved")
    run(*shared, "--save_images", tmp_path / "unguided")
    generate.main([str(flag) for flag in (*shared, *auto, "--output_dir", tmp_path / "generated")])
    assert (stack(tmp_path / "saved") == stack(tmp_path / "generated" / "images")).all()
    assert (stack(tmp_path / "saved") != stack(tmp_path / "unguided")).any()
    protocol = results["metrics"]["fid@12"]["protocol"]["samples"]
    contents = pipeline_hash(load_pipeline(str(tmp_path / "worse")))
    assert f"guidance scale 1.5, guidance interval 0.0 50.0, autoguidance worse, autoguidance contents {contents}" in (
        protocol
    )


def test_stacked_digits_are_classified_channel_by_channel(run, folders):
    flags = ["--stacked_mnist", "--classifier", folders["gray"], "--batch_size", 16]
    results = run("--images", folders["samples"], *flags, reference=None)
    network = ImageClassifier.from_pretrained(folders["gray"])
    images = torch.from_numpy(stack(folders["samples"])) / 127.5 - 1
    digits = torch.stack([network(images[..., channel][:, None]).argmax(1) for channel in range(3)], 1)
    expected = coverage.stacked_mnist_coverage(digits)
    assert values(results) == {"modes@40": expected.modes, "mode_kl@40": pytest.approx(expected.kl)}
    assert 1 < expected.modes < 40
    (warning,) = results["warnings"]
    assert "counted in 40 samples" in warning and "25,600" in warning
    for entry in results["metrics"].values():
        assert f"gray, digest {weights_digest(network)}, resize to 8x8, bicubic" in entry["protocol"]["classifier"]


def test_modes_of_stacked_digits_are_counted_in_as_many_samples_as_in_the_paper(run, folders, monkeypatch, capsys):
    monkeypatch.setattr(groups, "sample", stopped)
    for flags, count in ((["--stacked_mnist", "--classifier", folders["gray"]], 25_600), ([], 10_000)):
        with pytest.raises(KeyboardInterrupt):
            run("--pipeline", folders["model"], *SHORT, *flags)
        assert f"/{count} [" in capsys.readouterr().err  # the total of the progress bar


# ---------------------------------------------------------------------------------------------------------------------
# Protocol, tables, cards and warnings


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


def test_the_table_has_each_number_with_its_floor(run, folders, capsys):
    results = run("--images", folders["samples"])
    printed = capsys.readouterr().out
    for name, key in (("FD", "fid"), ("KD", "kid"), ("coverage", "coverage")):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}@40 "))
        entry = results["metrics"][f"{key}@40"]
        assert f"{entry['value']:.4g}" in line and f"{entry['floor']['value']:.4g}" in line
    assert "floor (real-vs-real baseline): 20 images of one half of the reference against 20 of the other" in printed


def test_features_of_clip_give_cmmd(run, folders, clip, capsys):
    flags = ["--images", folders["samples"], "--feature_extractor", "clip-vit-l-14-336px"]
    results = run(*flags, "--extractor_weights", clip)
    assert {name.partition("@")[0] for name in results["metrics"]} == ALL - {"classifier_score"} | {"cmmd"}
    entry = results["metrics"]["cmmd@40"]
    assert entry["name"] == "CMMD@40 (clip (clip))" and results["metrics"]["fid@40"]["name"] == "FD@40 (clip (clip))"
    assert entry["value"] > entry["floor"]["value"] and entry["floor"]["halves"] == [20, 20]
    protocol = entry["protocol"]
    assert (protocol["images"], protocol["reference_images"], protocol["estimator"]) == (40, 40, "unbiased")
    assert "to 16x16, bicubic" in protocol["extractor"] and "images 40" in protocol["samples"]
    assert any(line.startswith("CMMD@40 ") for line in capsys.readouterr().out.splitlines())
    assert "FD is unreliable" not in warnings(results) and "favor" not in warnings(results)
    few = run(*flags, "--extractor_weights", clip, "--num_images", 12)
    assert "FD is unreliable. Features with fewer dimensions, or CMMD, need fewer images." in warnings(few)


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        ({"clip_prompt": ["a rose"], "clip_model": ["ViT-B-32", "laion2b"]}, "ViT-B-32 laion2b"),
        ({"towards": ["color:red", "2*clip_image:rose.png"]}, "openai/clip-vit-base-patch32"),
        ({"towards": ["reference:clip:a.png"], "clip_model": ["openai/clip-vit-base-patch32"]}, None),
    ],
)
def test_samples_that_clip_guided_have_a_warning_with_features_of_clip(run, folders, clip, tmp_path, settings, model):
    images = shutil.copytree(folders["samples"], tmp_path / "guided" / "images")
    (tmp_path / "guided" / "generate.json").write_text(json.dumps(settings))
    flags = ["--feature_extractor", "clip-vit-b-32", "--extractor_weights", clip]
    guided = run("--images", images, *flags)
    message = f"generated with guidance by CLIP ({model}), and these are features of CLIP"
    assert (message in warnings(guided)) == bool(model)
    assert guided["samples"].get("clip_guidance") == model
    assert "guidance by CLIP" not in warnings(run("--images", images))
    assert "guidance by CLIP" not in warnings(run("--images", folders["samples"], *flags))


def test_numbers_in_the_model_card_replace_those_of_the_same_protocol(run, folders, tmp_path):
    unet, model = tiny_unet(), tmp_path / "model"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(model)
    (model / "README.md").write_text("---\nlicense: mit\ntags:\n- ddpm\n---\n\n# Mine\n\nWords.\n")
    flags = ["--pipeline", model, *SHORT, "--num_images", 12, "--update_card"]
    run(*flags)
    unet.conv_out.bias.data += 0.1
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(model)  # trained further
    text = (model / "README.md").read_text()
    assert "type: fd-color" in text and "name: FD@12 (color)" in text and "type: kd-color" in text
    for name, earlier in (("fd", "fid"), ("kd", "kid")):  # their names in cards of earlier versions
        text = text.replace(f"type: {name}-color", f"type: {earlier}-color")
        text = text.replace(f"name: {name.upper()}@12 (color)", f"name: {earlier.upper()}@12 (color)")
    (model / "README.md").write_text(text)
    results = run(*flags, "--seed", 7)
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "mit" and card.text.strip().startswith("# Mine\n\nWords.")
    written = {result.metric_name: result for result in card.data.eval_results}
    assert len(written) == len(card.data.eval_results) == len(results["metrics"])
    fid = written["FD@12 (color)"]
    assert fid.metric_value == pytest.approx(results["metrics"]["fid@12"]["value"], rel=1e-5)
    assert (fid.dataset_name, fid.dataset_split, fid.metric_type) == ("reference", "all", "fd-color")
    assert "seeds 7 to 18" in fid.metric_args["samples"]
    assert str(tmp_path) not in card.content
    assert card.text.count("## Evaluation on reference, all") == 1
    assert f"| FD@12 (color) | {results['metrics']['fid@12']['value']:.4g} | " in card.text
    assert "**Warning:** Too few samples: 12." in card.text and "seeds 7 to 18" in card.text

    ImageClassifier(8, 3, 3, widths=(8, 16)).save_pretrained(tmp_path / "other")
    for more in (["--feature_extractor", tmp_path / "other"], ["--scheduler", "ddpm"], ["--num_images", 13]):
        before = len(ModelCard.load(model / "README.md").data.eval_results)
        results = run(*flags, *more)
        card = ModelCard.load(model / "README.md")
        assert len(card.data.eval_results) == before + len(results["metrics"])
    assert card.text.count("## Evaluation on reference, all") == 4
    assert {"fd-color", "fd-other"} <= {result.metric_type for result in card.data.eval_results}


def test_a_model_card_is_only_updated_on_request(run, folders, tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    flags = ["--pipeline", tmp_path / "model", *SHORT, "--num_images", 12]
    with pytest.raises(InputError, match="--update_card needs the --pipeline of a local folder with a model card"):
        run(*flags, "--update_card")
    (tmp_path / "model" / "README.md").write_text("# Mine\n")
    run(*flags)
    assert (tmp_path / "model" / "README.md").read_text() == "# Mine\n"
    damaged = "---\ntitle: a: b\n---\n# Mine\n"
    (tmp_path / "model" / "README.md").write_text(damaged)
    with pytest.raises(InputError, match=r"README\.md cannot be read .*mapping values are not allowed here"):
        run(*flags, "--update_card")
    assert (tmp_path / "model" / "README.md").read_text() == damaged


@pytest.mark.parametrize(
    ("key", "extractor", "title", "card_type"),
    [
        ("fid@10", "inception-v3-compat", "FID@10", "fid"),
        ("kid@10", "inception-v3-compat", "KID@10", "kid"),
        ("precision@10", "inception-v3-compat", "precision@10", "precision"),
        ("class_accuracy@10", "inception-v3-compat", "class accuracy@10 (digits)", "class_accuracy-digits"),
        ("fid@10", "dinov2-vit-l-14", "FD-DINOv2@10", "fd-dinov2"),
        ("kid@10", "dinov2-vit-l-14", "KD@10 (dinov2-vit-l-14)", "kd-dinov2-vit-l-14"),
        ("fid@10", "dinov2-vit-s-14", "FD@10 (dinov2-vit-s-14)", "fd-dinov2-vit-s-14"),
        ("cmmd@10", "clip-vit-l-14-336px", "CMMD@10", "cmmd"),
        ("cmmd@10", "clip-vit-b-32", "CMMD@10 (clip-vit-b-32)", "cmmd-clip-vit-b-32"),
        ("fid@10", "pixels-8x8", "FD@10 (pixels-8x8)", "fd-pixels-8x8"),
    ],
)
def test_only_metrics_of_the_networks_of_papers_have_their_names(key, extractor, title, card_type):
    assert full_title(key, extractor, "digits") == title
    assert metric_type(key, extractor, "digits") == card_type


def warnings(results: dict) -> str:
    return "\n".join(results["warnings"])


def test_too_few_samples_have_a_warning_with_the_bias(run, folders):
    results = run("--images", folders["samples"])
    bias = results["metrics"]["fid@40"]["protocol"]["estimated_bias"]
    assert bias > 0
    assert "Too few samples: 40" in warnings(results) and f"about {bias:.3g}" in warnings(results)
    assert "covariance is singular" not in warnings(results)
    assert "There are 12 samples, not more than the 16" in warnings(
        run("--images", folders["samples"], "--num_images", 12)
    )


def test_jpeg_against_png_has_a_warning(run, folders, tmp_path):
    (tmp_path / "jpeg").mkdir()
    for path in folders["reference"].iterdir():
        Image.open(path).save(tmp_path / "jpeg" / f"{path.stem}.jpg")
    message = "The samples are PNG, the reference images JPEG"
    assert message in warnings(run("--images", folders["samples"], reference=tmp_path / "jpeg"))
    assert "JPEG" not in warnings(run("--images", folders["samples"]))


def test_gray_against_color_has_a_warning(run, folders, tmp_path):
    (tmp_path / "gray").mkdir()
    for path in folders["reference"].iterdir():
        Image.open(path).convert("L").save(tmp_path / "gray" / path.name)
    assert "samples are color, the reference is gray" in warnings(
        run("--images", folders["samples"], reference=tmp_path / "gray")
    )
    results = run("--images", folders["samples"], "--feature_extractor", folders["gray"])
    assert "The samples are in color, but this classifier" in warnings(results)


def test_the_size_of_images_is_that_after_their_orientation(run, folders, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for name, turned in (("tall", range(30)), ("mixed", range(15))):
        (tmp_path / name).mkdir()
        for i, path in enumerate(sorted(write_images(tmp_path / f"{name}-images", 30, size=(12, 8)).iterdir())):
            options = {"exif": exif} if i in turned else {}
            Image.open(path).save(tmp_path / name / path.with_suffix(".jpg").name, **options)
    assert run("--images", tmp_path / "tall", reference=tmp_path / "tall")["samples"]["size"] == "8x12"
    with pytest.raises(RunError, match=r"differ in size: .* is (8x12|12x8), .* is (12x8|8x12)"):
        run("--images", tmp_path / "mixed")


def test_resized_references_have_a_warning(run, folders, tmp_path):
    large = write_images(tmp_path / "large", 30, size=(16, 12))
    results = run("--images", folders["samples"], reference=large)
    assert "16x12, were cropped at the center, to 8x8, bicubic" in warnings(results)
    (cached,) = (tmp_path / "cache").glob("large-*.safetensors")
    samples = write_images(tmp_path / "small", 30, size=(6, 6))
    with pytest.raises(InputError, match=r"features in .* are those of images at 8x8, but the samples are 6x6\. Meas"):
        run("--images", samples, reference=cached)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline", "MODEL", "--images", "SAMPLES"], "either --pipeline"),
        ([], "either --pipeline"),
        (["--images", "SAMPLES", "--num_images", 41], "has 40 images"),
        (["--images", "SAMPLES", "--num_images", 11], "at least 12"),
        (["--images", "FEW"], "11 images; there must be at least 12 to measure"),
        (["--images", "SAMPLES", "--num_reference", 61], "--num_reference is 61, but .* has 40 images"),
        (["--images", "SAMPLES", "--output", "."], r"--output \. is a folder"),
        (["--images", "SAMPLES", "--reference", "nowhere.npz"], "no such file"),
        (
            ["--images", "SAMPLES", "--feature_extractor", "nowhere"],
            "--feature_extractor nowhere does not exist .* one of the extractors inception",
        ),
        (["--images", "SAMPLES", "--class_labels", 3], "color has the classes 0 to 2"),
        (["--images", "SAMPLES", "--class_labels", "wasp"], "--class_labels wasp: the classifier color has the class"),
        (["--images", "SAMPLES", "--stacked_mnist"], "color is not"),
        (["--images", "SAMPLES", "--save_images", "x"], "already exist"),
        (["--images", "SAMPLES", "--held_out", "SAMPLES"], "at least 100"),
    ],
)
def test_unusable_flags_are_rejected(run, folders, tmp_path, flags, message, caplog):
    few = write_images(tmp_path / "few", 11)
    names = {"MODEL": folders["model"], "SAMPLES": folders["samples"], "FEW": few}
    with pytest.raises(InputError, match=message):
        run(*(names.get(flag, flag) for flag in flags))
    assert "different names" not in caplog.text


def test_files_that_are_no_evaluations_and_folders_with_images_are_not_overwritten(run, folders, tmp_path):
    image = next(folders["samples"].iterdir())
    (tmp_path / "thesis.json").write_text('{"title": "Emoji"}')
    for file in (image, tmp_path / "thesis.json"):
        before = file.read_bytes()
        with pytest.raises(InputError, match=f"--output {file} exists and is not the result of an evaluation"):
            run("--images", folders["samples"], "--output", file)
        assert file.read_bytes() == before
    files = sorted(folders["samples"].iterdir())
    with pytest.raises(InputError, match=r"--save_images .* is not empty: name a new folder"):
        run("--pipeline", folders["model"], *SHORT, "--num_images", 12, "--save_images", folders["samples"])
    assert sorted(folders["samples"].iterdir()) == files


@pytest.mark.parametrize("suffix", [".npz", ".parquet", ".safetensors"])
def test_a_damaged_file_is_named(run, folders, tmp_path, suffix):
    (tmp_path / f"damaged{suffix}").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=rf"damaged{suffix} cannot be read as a {suffix} file"):
        run("--images", folders["samples"], reference=tmp_path / f"damaged{suffix}")


def test_a_reference_and_held_out_images_are_splits_of_a_dataset_with_configurations(run, folders, tmp_path):
    numbers = {"train": range(100), "rest": range(100, 200)}
    images = [Image.open(path) for path in sorted(write_images(tmp_path / "images", 200).iterdir())]
    other = [Image.new("RGB", (8, 8))] * 100
    features = datasets.Features({"photo": datasets.Image(), "mask": datasets.Image()})
    (tmp_path / "data" / "b").mkdir(parents=True)
    for split, part in numbers.items():
        folder = tmp_path / split
        folder.mkdir()
        for i in part:
            images[i].save(folder / f"{i}.png")
        rows = {"photo": [images[i] for i in part], "mask": other}
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "data" / "b" / f"{split}-00000-of-00001.parquet")
    (tmp_path / "data" / "a.parquet").write_bytes(next((tmp_path / "data" / "b").iterdir()).read_bytes())
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a.parquet\n- config_name: b\n  data_files:\n"
        "  - split: train\n    path: b/train*\n  - split: rest\n    path: b/rest*\n---\n"
    )
    sampled = ("--images", folders["samples"], "--held_out")
    names = ("--held_out_split", "rest", "--reference_config", "b", "--image_column", "photo")
    of_dataset = values(run(*sampled, tmp_path / "data", *names, reference=tmp_path / "data"))
    assert of_dataset == values(run(*sampled, tmp_path / "rest", reference=tmp_path / "train"))


def test_held_out_images_must_not_be_the_reference(run, folders, tmp_path, sampled):
    training = write_images(tmp_path / "training", 100)
    with pytest.raises(InputError, match="contains the images of --reference"):
        run("--pipeline", folders["model"], *SHORT, "--held_out", training, reference=training)
    assert len(sampled) <= 1  # the one that determines the size


def test_fewer_images_are_a_random_subset(run, folders, tmp_path):
    both = tmp_path / "both"
    for kind, source in (("a", "reference"), ("b", "samples")):
        (both / kind).mkdir(parents=True)
        for path in folders[source].iterdir():
            os.link(path, both / kind / path.name)
    subset = values(run("--images", both, "--num_images", 40))
    assert subset["precision@40"] < 1  # the first 40 are those of the reference
    assert values(run("--images", both, "--num_images", 40)) == subset


def test_a_guided_pipeline_without_its_loss_is_rejected(run, folders, tmp_path):
    GuidedPipeline.from_pipe(DDPMPipeline.from_pretrained(folders["model"])).save_pretrained(tmp_path / "guided")
    with pytest.raises(InputError, match="A GuidedPipeline cannot be called without loss"):
        run("--pipeline", tmp_path / "guided", *SHORT)


def test_a_reference_or_a_classifier_is_required(folders):
    with pytest.raises(InputError, match="--reference, or a --classifier"):
        evaluate.main(["--images", str(folders["samples"])])


def test_broken_images_and_images_of_another_size_are_named(run, folders, tmp_path):
    samples = write_images(tmp_path / "mixed", 120)
    Image.new("RGB", (9, 8)).save(samples / "050.png")
    with pytest.raises(RunError, match=r"000\.png is 8x8, .*050\.png is 9x8"):
        run("--images", samples)
    (samples / "050.png").write_bytes(b"not an image")
    with pytest.raises(RunError, match=r"cannot be read: .*050\.png"):
        run("--images", samples)
    with pytest.raises(RunError, match=r"cannot be read: .*050\.png"):
        run("--images", folders["samples"], reference=samples)
