"""Batches of training images, from sources and from streams."""

import json
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_dataset, write_images, write_shard

from ddgan.core.cli import parse_arguments
from ddgan.core.errors import InputError, RunError
from ddgan.data.arguments import check_value_range
from ddgan.data.preprocessing import Preprocessing
from ddgan.training.arguments import DataArguments, LabelArguments
from ddgan.training.loading import Batch, TrainingData

PLAN = {"batch_size": 4, "accumulation": 1, "processes": 1, "seed": 0}


def first_pixels(batch: Batch) -> list[int]:
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# ---- sources


def test_the_arguments_name_the_images(tmp_path):
    folder = make_dataset(tmp_path / "digits", 10)
    data = TrainingData(DataArguments(dataset_name=str(folder)), Preprocessing(1, 8, 8), 0, **PLAN)
    values = [value for batch in data.batches(0, 3, None) for value in first_pixels(batch)]
    assert sorted(values) == list(range(10))
    assert data.name == "digits"


def test_the_configuration_and_the_image_column_of_a_dataset(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("day", "night"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    features = datasets.Features({"scene": datasets.Image(), "edges": datasets.Image()})
    for name, value in (("day", 10), ("night", 20)):
        rows = {"scene": [Image.new("L", (8, 8), value)] * 4, "edges": [Image.new("L", (8, 8), value + 1)] * 4}
        (tmp_path / "data" / name).mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / name / "train.parquet")
    for streaming in (False, True):
        args = DataArguments(
            dataset_name=str(tmp_path / "data"), dataset_config="night", image_column="edges", streaming=streaming
        )
        batch = next(TrainingData(args, Preprocessing(1, 8, 8), 0, **PLAN).batches(0, 1, None))
        assert first_pixels(batch) == [21] * 4


def test_the_embedded_dataset_is_the_default():
    data = TrainingData(DataArguments(), Preprocessing(3, 32, 32), 0, **PLAN)
    assert 500 <= len(data.source) <= 1000
    assert data.name == "twemoji-32"


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
def test_an_npz_file_is_trained_on(tmp_path, flag):
    images = np.repeat(np.arange(6, dtype=np.uint8), 64).reshape(6, 8, 8)
    np.savez(tmp_path / "images.npz", arr_0=images, arr_1=np.arange(6) % 3)
    args = DataArguments(**{flag: str(tmp_path / "images.npz")}, dataloader_num_workers=1)
    assert labelled(args) == (["0", "1", "2"], {i: str(i % 3) for i in range(6)})


def test_a_stream_of_webdataset_shards_is_trained_on(tmp_path):
    for shard in range(2):
        write_shard(tmp_path / "shards" / f"{shard}.tar", range(shard, 8, 2))
    args = DataArguments(dataset_name=str(tmp_path / "shards"), streaming=True)
    batches = TrainingData(args, Preprocessing(1, 8, 8), 0, **PLAN).batches(0, 2, None)
    assert sorted(value for batch in islice(batches, 2) for value in first_pixels(batch)) == list(range(8))


def test_the_stated_range_of_values_is_used_and_a_missing_one_is_noticed(tmp_path, caplog):
    for i in range(4):
        Image.fromarray(np.linspace(0, 4095, 64).reshape(8, 8).astype(np.uint16)).save(tmp_path / f"{i}.png")
    for value_range, warnings in ((None, 1), ([0, 4095], 0)):
        caplog.clear()
        args = DataArguments(train_data_dir=str(tmp_path), value_range=value_range)
        data = TrainingData(args, Preprocessing(1, 8, 8, value_range=check_value_range(args.value_range)), 0, **PLAN)
        list(data.batches(0, 2, None))
        assert len(caplog.records) == warnings


@pytest.mark.parametrize("flag", ["image_column", "dataset_config"])
def test_settings_of_a_dataset_are_refused_for_image_files(tmp_path, flag):
    folder = write_images(tmp_path / "images", 4)
    with pytest.raises(InputError, match=f"--{flag} name is a setting of a dataset"):
        TrainingData(DataArguments(train_data_dir=str(folder), **{flag: "name"}), Preprocessing(3, 8, 8), 0, **PLAN)


# ---- broken images


def test_a_broken_image_is_reported_before_training_or_skipped_and_counted(tmp_path):
    folder = write_images(tmp_path / "images", 9)
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"004\.png.*--skip_broken_images"):
        TrainingData(DataArguments(train_data_dir=str(folder)), Preprocessing(3, 8, 8), 0, **PLAN)
    for workers in (0, 1):
        args = DataArguments(train_data_dir=str(folder), skip_broken_images=True, dataloader_num_workers=workers)
        data = TrainingData(args, Preprocessing(3, 8, 8), 0, **PLAN)
        batches = list(data.batches(0, 3, None))
        assert sum(len(batch.images) for batch in batches) == 9
        broken = [name for batch in batches for name in batch.broken]
        assert len(broken) == 1
        assert "004.png" in broken[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_ends_the_run_with_its_name(tmp_path, workers):
    folder = write_images(tmp_path / "images", 9)
    args = DataArguments(train_data_dir=str(folder), dataloader_num_workers=workers)
    data = TrainingData(args, Preprocessing(3, 8, 8), 0, **PLAN)
    (folder / "004.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"004\.png"):
        list(data.batches(0, 3, None))


def test_cells_without_an_image_are_broken_images(tmp_path):
    (tmp_path / "data").mkdir(parents=True)
    features = datasets.Features({"picture": datasets.Image()})
    rows = [Image.new("L", (8, 8), 7), None, Image.new("L", (8, 8), 9)]
    datasets.Dataset.from_dict({"picture": rows}, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(InputError, match="row 1"):
        TrainingData(DataArguments(dataset_name=str(tmp_path)), Preprocessing(1, 8, 8), 0, **PLAN)
    args = DataArguments(dataset_name=str(tmp_path), skip_broken_images=True)
    (batch,) = TrainingData(args, Preprocessing(1, 8, 8), 0, **PLAN).batches(0, 1, None)
    assert sorted(first_pixels(batch)) == [7, 9, 9]


def test_a_stream_cannot_be_cached(tmp_path):
    with pytest.raises(InputError, match="--cache_images has no effect with --streaming"):
        DataArguments(dataset_name=str(tmp_path), streaming=True, cache_images=True)
    (tmp_path / "recipe.yaml").write_text("cache_images: true\n")
    flags = ["--dataset_name", str(tmp_path), "--streaming", "--config", str(tmp_path / "recipe.yaml")]
    assert not parse_arguments(DataArguments, argv=flags)[0].cache_images


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_but_broken_images_ends_the_run(tmp_path, streaming, workers):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    location = {"dataset_name": str(tmp_path)} if streaming else {"train_data_dir": str(tmp_path)}
    args = DataArguments(**location, streaming=streaming, skip_broken_images=True, dataloader_num_workers=workers)
    batches = TrainingData(args, Preprocessing(3, 8, 8), 0, **PLAN).batches(0, 1, None)
    with pytest.raises(RunError, match=r"(An image cannot|No image could) be read") as raised:
        next(batches)
    assert "Traceback" not in str(raised.value)
    time.sleep(0.1)  # torch would report within it that the worker was killed


# ---- streams


def stream(folder: Path, rank: int = 0, workers: int = 0, **plan) -> TrainingData:
    args = DataArguments(dataset_name=str(folder), streaming=True, dataloader_num_workers=workers)
    return TrainingData(args, Preprocessing(1, 8, 8), rank, **{**PLAN, **plan})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_resumes_exactly_where_it_stopped(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("ddgan.training.loading._SHUFFLE_BLOCK", 7)
    folder = make_dataset(tmp_path / "streamed", 30, shards=3)

    def read(start: int, stop: int, position=None) -> list:
        return list(islice(stream(folder, workers=workers).batches(start, 20, position), stop - start))

    whole = [(first_pixels(batch), batch.keys) for batch in read(0, 20)]
    first_pass = Counter(n for values, _ in whole for n in values)
    assert sum(first_pass.values()) == 80
    assert set(first_pass) == set(range(30))
    assert max(first_pass.values()) <= 3  # 80 samples are two passes of 30 and a part of a third
    for batches in (1, 3, 7, 8, 15):  # within a block, at its end, in the second pass
        first = read(0, batches)
        rest = read(batches, 20, json.loads(json.dumps(first[-1].position)))
        assert [(first_pixels(b), b.keys) for b in [*first, *rest]] == whole, batches


@pytest.mark.parametrize("shards", [1, 4])
def test_processes_share_a_stream(tmp_path, shards):
    folder = make_dataset(tmp_path / "streamed", 32, shards=shards)
    parts = [
        [n for b in islice(stream(folder, rank, processes=2).batches(0, 4, None), 4) for n in first_pixels(b)]
        for rank in (0, 1)
    ]
    assert len(parts[0]) == len(parts[1]) == 16
    assert sorted(parts[0] + parts[1]) == list(range(32))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_stream_ends_the_run_with_one_paragraph(tmp_path, workers):
    folder = make_dataset(tmp_path / "streamed", 32, shards=4)
    batches = stream(folder, workers=workers).batches(0, 8, None)
    for file in folder.rglob("*.parquet"):
        file.write_bytes(b"truncated")
    with pytest.raises(RunError, match=r"cannot be read: \w+: .*--resume_from_checkpoint latest") as raised:
        next(batches)
    assert "Traceback" not in str(raised.value)


def test_a_stream_reads_one_shard_after_the_other(tmp_path, monkeypatch):
    """Otherwise `datasets` would interleave their rows, and sleep for seconds at the end of each pass."""
    monkeypatch.setattr("ddgan.training.loading._SHUFFLE_BLOCK", 4)
    folder = make_dataset(tmp_path / "streamed", 8, shards=2)
    first, second = ([n % 2 for n in first_pixels(b)] for b in islice(stream(folder).batches(0, 2, None), 2))
    assert sorted([first, second]) == [[0] * 4, [1] * 4]


def test_a_stream_shuffles_its_rows(tmp_path):
    folder = make_dataset(tmp_path / "streamed", 32)
    values = [n for b in islice(stream(folder).batches(0, 8, None), 8) for n in first_pixels(b)]
    assert sorted(values) == list(range(32))
    assert values != list(range(32))


# ---- labels


def labelled(
    args: DataArguments, label_column: str | None = None, model_classes: list[str] | None = None
) -> tuple[list[str], dict[int, str]]:
    """Return the classes, and the class of each image by the value of its first pixel."""
    data = TrainingData(args, Preprocessing(1, 8, 8), 0, LabelArguments(label_column), classes=model_classes, **PLAN)
    steps = data.plan.steps_per_epoch or 3
    names = {}
    for batch in islice(data.batches(0, steps, None), steps):
        names |= dict(zip(first_pixels(batch), [data.classes[label] for label in batch.labels], strict=True))
    return data.classes, names


def test_sub_folders_are_classes(tmp_path):
    for i in range(9):
        folder = tmp_path / "images" / ("cat", "ant")[i % 2] / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    args = DataArguments(train_data_dir=str(tmp_path / "images"))
    assert labelled(args) == (["ant", "cat"], {i: ("cat", "ant")[i % 2] for i in range(9)})
    Image.new("L", (8, 8), 9).save(tmp_path / "images" / "9.png")
    with pytest.raises(InputError, match=r"no class labels: .*9\.png is not in a subfolder"):
        labelled(args)


def test_a_broken_image_is_skipped_with_its_label(tmp_path):
    for i in range(6):
        (tmp_path / str(i)).mkdir()
        Image.new("L", (8, 8), i).save(tmp_path / str(i) / "image.png")
    (tmp_path / "3" / "image.png").write_bytes(b"not an image")
    classes, names = labelled(DataArguments(train_data_dir=str(tmp_path), skip_broken_images=True, cache_images=True))
    assert classes == [str(i) for i in range(6)]
    assert names == {i: str(i) for i in (0, 1, 2, 4, 5)}


@pytest.mark.parametrize(("name", "classes"), [("MNIST", "0 1 2"), ("FashionMNIST", "T-shirt/top Trouser Pullover")])
def test_torchvision_folders_have_labels_and_class_names(tmp_path, name, classes):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(5, dtype=np.uint8), 64)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (5, 8, 8))
    args = DataArguments(train_data_dir=str(tmp_path))
    for broken in (b"", header[:9], header + pixels.tobytes()[:-1], header[:4] + bytes(4) + header[8:]):
        (raw / "train-images-idx3-ubyte").write_bytes(broken)
        with pytest.raises(InputError, match="train-images-idx3-ubyte is truncated or empty"):
            labelled(args)
    (raw / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    with pytest.raises(InputError, match="no train-labels-idx1-ubyte next to them"):
        labelled(args)
    for broken in (b"", b"\0\0\x08\x01", b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes(4)):
        (raw / "train-labels-idx1-ubyte").write_bytes(broken)
        with pytest.raises(InputError, match="train-labels-idx1-ubyte is truncated or empty"):
            labelled(args)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (4).to_bytes(4, "big") + bytes([2, 0, 1, 1]))
    with pytest.raises(InputError, match="5 images, but there are 4 labels in train-labels-idx1-ubyte"):
        labelled(args)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes([2, 0, 1, 1, 2]))
    class_names, labels = labelled(args)
    assert class_names[:3] == classes.split()
    assert [labels[i] for i in range(5)] == [class_names[label] for label in (2, 0, 1, 1, 2)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_class_labels_is_found(tmp_path, streaming):
    features = datasets.Features(
        {"kind": datasets.ClassLabel(names=["odd", "even", "none"]), "image": datasets.Image()}
    )
    rows = {"kind": [(i + 1) % 2 for i in range(9)], "image": [Image.new("L", (8, 8), i) for i in range(9)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    args = DataArguments(dataset_name=str(tmp_path), streaming=streaming)
    classes, names = labelled(args)
    assert classes == ["odd", "even", "none"]
    assert names.items() <= {i: ("even", "odd")[i % 2] for i in range(9)}.items()
    assert len(names) == 9
    with pytest.raises(InputError, match=r"no column 'label'.*kind, image.*--label_column"):
        labelled(args, "label")


def write_classes(folder: Path, names: list[str]) -> None:
    """Write a dataset of one image per class, whose pixels have the value of the label."""
    features = datasets.Features({"label": datasets.ClassLabel(names=names), "image": datasets.Image()})
    rows = {"label": range(len(names)), "image": [Image.new("L", (8, 8), i) for i in range(len(names))]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "model", "expected"),
    [
        (["cat", "ant", "bee"], ["ant", "bee", "cat"], ["cat", "ant", "bee"]),  # the names decide, not their order
        (["2", "0", "1"], ["ant", "bee", "cat"], ["cat", "ant", "bee"]),  # images without class names
        (["cat", "ant", "bee"], ["0", "1", "2"], ["cat", "ant", "bee"]),  # a model without class names
        (["1", "0", "2"], ["0", "1", "2"], ["1", "0", "2"]),
    ],
)
def test_labels_become_those_of_a_pretrained_model(tmp_path, streaming, names, model, expected):
    write_classes(tmp_path, names)
    classes, labels = labelled(DataArguments(dataset_name=str(tmp_path), streaming=streaming), model_classes=model)
    assert classes == (names if model[0] == "0" and names[0] == "cat" else model)
    assert labels == dict(enumerate(expected))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("names", "model", "message"),
    [
        (["ant", "cow"], ["ant", "bee", "cat"], "has no 'bee', 'cat', and the model has no 'cow'"),
        (["ant", "bee"], ["ant", "bee", "cat"], "has no 'cat'[.]"),
        (["ant", "bee", "cat"], ["ant", "bee"], "the model has no 'cat'[.]"),
        (["0", "1", "2"], ["ant", "bee"], "the model has no '0', '1', '2'[.]"),
        (["ant"], [str(i) for i in range(12)], "'9' and 2 more, and the model has no 'ant'"),
    ],
)
def test_classes_that_a_pretrained_model_lacks_are_named(tmp_path, streaming, names, model, message):
    write_classes(tmp_path, names)
    args = DataArguments(dataset_name=str(tmp_path), streaming=streaming)
    with pytest.raises(InputError, match=rf"not the {len(model)} classes of the start model: .*{message}.*label_col"):
        labelled(args, model_classes=model)


def test_a_row_of_a_stream_without_a_class_is_reported_or_skipped(tmp_path):
    """Datasets on the Hub mark rows without a label with -1."""
    features = datasets.Features({"kind": datasets.ClassLabel(names=["odd", "even"]), "image": datasets.Image()})
    rows = {"kind": [0, -1, 0], "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RunError, match="its class is -1, not one of 0 to 1"):
        labelled(DataArguments(dataset_name=str(tmp_path), streaming=True))
    labels = labelled(DataArguments(dataset_name=str(tmp_path), streaming=True, skip_broken_images=True))
    assert labels == (["odd", "even"], {0: "odd", 2: "odd"})


def test_columns_of_names_and_of_integers_are_labels(tmp_path):
    features = datasets.Features(
        {"label": datasets.Value("int64"), "name": datasets.Value("string"), "image": datasets.Image()}
    )
    names = ["b", "a", "c"]
    rows = {"label": [2, 0, 5], "name": names, "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    args = DataArguments(dataset_name=str(tmp_path))
    assert labelled(args) == (["0", "2", "5"], {0: "2", 1: "0", 2: "5"})
    assert labelled(args, "name") == (["a", "b", "c"], dict(enumerate(names)))
    with pytest.raises(InputError, match=r"ClassLabel. Without --streaming"):
        labelled(DataArguments(dataset_name=str(tmp_path), streaming=True), "name")


def test_booleans_are_classes(tmp_path):
    features = datasets.Features({"label": datasets.Value("bool"), "image": datasets.Image()})
    rows = {"label": [True, False, True], "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = TrainingData(DataArguments(dataset_name=str(tmp_path)), Preprocessing(1, 8, 8), 0, LabelArguments(), **PLAN)
    (batch,) = data.batches(0, 1, None)
    assert data.classes == ["0", "1"]
    assert batch.labels.dtype == torch.int64
    assert dict(zip(first_pixels(batch), batch.labels.tolist(), strict=True)) == {0: 1, 1: 0, 2: 1}


def test_a_dataset_without_labels_is_refused(tmp_path):
    folder = make_dataset(tmp_path / "digits", 10)
    with pytest.raises(InputError, match=r"no column of class labels.*number, picture"):
        labelled(DataArguments(dataset_name=str(folder)))
