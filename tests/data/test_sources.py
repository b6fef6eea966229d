"""Image sources: what each kind of location gives, which split, which labels, and what is refused."""

import json
import multiprocessing
import sys
from pathlib import Path
from zipfile import ZipFile

import datasets
import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from tiny import ROOT, make_dataset, write_images, write_shard

from ddgan.core.errors import InputError
from ddgan.data.images import BrokenImageError, open_image
from ddgan.data.preprocessing import Preprocessing, read_image
from ddgan.data.sources import (
    EMBEDDED_DATASET,
    FolderImages,
    ImageSource,
    ImageSubset,
    MissingSplitError,
    ZipImages,
    open_source,
    open_stream,
)

SHARED = ROOT.parent / "shared" / "data"


def open_dataset(location: str | Path, **options) -> ImageSource:
    """Open a source as `--dataset_name` does."""
    return open_source(str(location), folder_as="dataset", **options)


def open_folder(location: str | Path, **options) -> ImageSource:
    """Open a source as `--train_data_dir` does."""
    return open_source(str(location), folder_as="images", **options)


def first_pixels(source: ImageSource) -> list[int]:
    return [int(np.asarray(open_image(source[i])).flat[0]) for i in range(len(source))]


def write_class_folders(folder: Path, values: range) -> Path:
    """One gray image per value, in the subfolders `even` and `odd`."""
    for value in values:
        path = folder / ("even", "odd")[value % 2] / f"{value:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), value).save(path)
    return folder


def zip_folder(folder: Path, archive: Path) -> Path:
    with ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    return archive


def table(values: range) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["even", "odd"])})
    rows = {"image": [Image.new("L", (8, 8), i) for i in values], "kind": [i % 2 for i in values]}
    return datasets.Dataset.from_dict(rows, features=features)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of sources


@pytest.mark.parametrize("open_as", [open_folder, open_dataset, open_source])
@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".tar", ".npz", ".zip", "shards", "saved", "saved splits"])
def test_every_kind_of_source_gives_its_images_and_labels(tmp_path, kind, open_as):
    location, classes, split = tmp_path / f"images{kind}", ["0", "1"], "all"
    if kind == ".parquet":
        table(range(9)).to_parquet(location)
        classes = ["even", "odd"]
    elif kind in (".arrow", "saved"):
        table(range(9)).save_to_disk(tmp_path / "saved")
        location = tmp_path / "saved" / "data-00000-of-00001.arrow" if kind == ".arrow" else tmp_path / "saved"
        classes = ["even", "odd"]
    elif kind == "saved splits":
        location, classes, split = tmp_path / "saved", ["even", "odd"], "train"
        datasets.DatasetDict(train=table(range(9)), test=table(range(20, 24))).save_to_disk(location)
    elif kind == ".tar":
        write_shard(location, range(9))
    elif kind == "shards":
        location, split = tmp_path / "shards", "train"
        write_shard(location / "00000.tar", range(4))
        write_shard(location / "00001.tar", range(4, 9))
    elif kind == ".npz":
        images = np.repeat(np.arange(9, dtype=np.uint8), 64).reshape(9, 8, 8, 1)
        np.savez(location, arr_0=images, arr_1=np.arange(9) % 2)
    elif kind == ".zip":
        zip_folder(write_class_folders(tmp_path / "images", range(9)), location)
        classes = ["even", "odd"]
    source = open_as(str(location))
    assert sorted(first_pixels(source)) == list(range(9))
    assert source.split == split
    labels = source.labels(None)
    assert labels.classes == classes
    assert list(labels.numbers) == [value % 2 for value in first_pixels(source)]


@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".tar", "saved", "saved splits"])
def test_datasets_on_disk_are_streamed(tmp_path, kind):
    location = tmp_path / f"images{kind}"
    if kind == ".parquet":
        table(range(9)).to_parquet(location)
    elif kind == ".tar":
        write_shard(location, range(9))
    elif kind == "saved splits":
        datasets.DatasetDict(train=table(range(9)), test=table(range(20, 24))).save_to_disk(location)
    else:
        table(range(9)).save_to_disk(tmp_path / "saved")
        location = tmp_path / "saved" / "data-00000-of-00001.arrow" if kind == ".arrow" else tmp_path / "saved"
    stream = open_stream(str(location))
    rows = stream.select([stream.image_column, stream.label_column(None)])
    pixels = [int(np.asarray(open_image(row[stream.image_column])).flat[0]) for row in rows]
    assert pixels == list(range(9))


def test_arrays_and_archives_cannot_be_streamed(tmp_path):
    for name in ("images.npz", "images.zip"):
        with pytest.raises(InputError, match=rf"{name} cannot be streamed"):
            open_stream(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".npz", ".zip", ".parquet", ".arrow", ".tar"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    whole, damaged = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    with pytest.raises(InputError, match=r"damaged\.\w+: there is no such file \(looked for at /"):
        open_source(str(damaged))
    if suffix == ".npz":
        np.savez(whole, arr_0=np.zeros((9, 8, 8), np.uint8))
    elif suffix == ".zip":
        zip_folder(write_class_folders(tmp_path / "images", range(9)), whole)
    elif suffix == ".tar":
        write_shard(whole, range(9))
    elif suffix == ".parquet":
        table(range(9)).to_parquet(whole)
    else:
        table(range(9)).save_to_disk(tmp_path / "saved")
        whole = tmp_path / "saved" / "data-00000-of-00001.arrow"
    content = whole.read_bytes()
    for part in (content[: len(content) * 5 // 8 + 10], b"something else" * 100):
        damaged.write_bytes(part)
        with pytest.raises(InputError, match=rf"damaged{suffix} cannot be read as a {suffix} file; is it complete\?"):
            open_source(str(damaged))


def test_a_damaged_saved_dataset_is_named(tmp_path):
    table(range(9)).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(InputError, match=r"/saved cannot be read; is it complete\?"):
        open_source(str(tmp_path / "saved"))


def test_contents_in_another_container_have_the_same_fingerprint(tmp_path):
    folder = write_class_folders(tmp_path / "images", range(9))
    expected = open_source(str(folder)).fingerprint(range(4))
    assert open_source(str(zip_folder(folder, tmp_path / "images.zip"))).fingerprint(range(4)) == expected
    assert open_source(str(folder)).fingerprint(range(5)) != expected


def test_fingerprints_do_not_change_between_versions(tmp_path):
    (tmp_path / "0.png").write_bytes(b"any bytes")
    (tmp_path / "1.png").write_bytes(b"")
    assert open_source(str(tmp_path)).fingerprint([0, 1]) == "5635b81cbb869d7de375380f"
    images = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "images.npz", arr_0=images)
    assert open_source(str(tmp_path / "images.npz")).fingerprint([1]) == "aed39e980c4a9d273656267c"


def test_an_npz_file_without_images_or_with_other_labels_is_refused(tmp_path):
    for arrays in ({"images": np.zeros((2, 8, 8), np.uint8)}, {"arr_0": np.zeros((2, 8, 8), np.float32)}):
        np.savez(tmp_path / "images.npz", **arrays)
        with pytest.raises(InputError, match=r"images\.npz must contain images \(N, H, W, C\) as 8-bit integers"):
            open_source(str(tmp_path / "images.npz"))
    for labels, message in (
        (None, "no class labels"),
        ([0.0, 1.0], "no class labels"),
        ([0, 1, 1], "3 labels in arr_1"),
    ):
        more = {} if labels is None else {"arr_1": np.array(labels)}
        np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8), np.uint8), **more)
        with pytest.raises(InputError, match=message):
            open_source(str(tmp_path / "images.npz")).labels(None)


def test_a_zip_file_is_read_below_the_folder_that_holds_all_images(tmp_path):
    folder = write_class_folders(tmp_path / "deep" / "images", range(4))
    for name in (".hidden/4.png", "__MACOSX/._5.png", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    source = open_source(str(zip_folder(tmp_path / "deep", tmp_path / "images.zip")))
    assert [source.name(i) for i in (0, 3)] == [
        f"deep/images/{name}.png in {tmp_path / 'images.zip'}" for name in ("even/000", "odd/003")
    ]
    assert source.labels(None).classes == ["even", "odd"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"There are no images in .*empty\.zip"):
        open_source(str(zip_folder(tmp_path / "empty", tmp_path / "empty.zip")))


def test_a_subset_is_a_source_of_some_of_the_images(tmp_path):
    source = open_folder(write_class_folders(tmp_path / "numbers", range(6)))  # 0, 2 and 4, then 1, 3 and 5
    subset = ImageSubset(source, [5, 0, 1])
    assert first_pixels(subset) == [5, 0, 2]
    assert subset.name(0) == source.name(5) and subset.split == source.split
    assert subset.labels(None).classes == ["even", "odd"] and subset.labels(None).numbers == [1, 0, 0]
    assert subset.fingerprint([1, 2]) == source.fingerprint([0, 1])


def test_a_damaged_member_of_a_zip_file_is_a_broken_image(tmp_path):
    archive = zip_folder(write_class_folders(tmp_path / "images", range(4)), tmp_path / "images.zip")
    content = bytearray(archive.read_bytes())
    content[content.index(b"IDAT") + 4] ^= 255
    archive.write_bytes(content)
    source = open_source(str(archive))
    with pytest.raises(BrokenImageError):
        source[0]
    assert read_image(source[1], Preprocessing(1, 8, 8)).unique() == 2
    assert len(source.fingerprint(range(4))) == 24


def test_a_zip_file_is_read_by_several_forked_processes_at_once(tmp_path):
    source = ZipImages(zip_folder(write_class_folders(tmp_path / "images", range(40)), tmp_path / "images.zip"))
    expected = [source[i] for i in range(40)]  # opened in this process first, as before workers are forked
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.__getitem__, [*range(40)] * 8, chunksize=1) == expected * 8


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("archived", [False, True])
def test_a_folder_for_each_split(tmp_path, archived):
    def location(folder: Path) -> str:
        return str(zip_folder(folder, folder.with_suffix(".zip")) if archived else folder)

    both = tmp_path / "both"
    write_class_folders(both / "train", range(6))
    write_class_folders(both / "test", range(10, 13))
    train, test = (open_source(location(both), split) for split in ("train", "test"))
    assert (train.split, sorted(first_pixels(train))) == ("train", list(range(6)))
    assert (test.split, sorted(first_pixels(test))) == ("test", [10, 11, 12])
    assert train.labels(None).classes == test.labels(None).classes == ["even", "odd"]
    with pytest.raises(MissingSplitError, match="has no split validation: its splits are test, train"):
        open_source(location(both), "validation")

    vehicles = tmp_path / "vehicles"  # where `train` is a class
    for name in ("train", "car"):
        write_class_folders(vehicles / name, range(2))
    source = open_source(location(vehicles))
    assert (source.split, source.labels(None).classes) == ("all", ["car", "train"])


def test_a_split_of_a_saved_dataset_or_a_part_of_it(tmp_path):
    splits = datasets.DatasetDict(train=table(range(9)), held_out=table(range(20, 24)))
    splits.save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), "held_out")
    assert (source.split, first_pixels(source)) == ("held_out", [20, 21, 22, 23])
    assert first_pixels(open_source(str(tmp_path / "saved"), "train[:2]+held_out[3:]")) == [0, 1, 23]
    with pytest.raises(MissingSplitError, match="has no split test: its splits are train, held_out"):
        open_source(str(tmp_path / "saved"), "test")


def test_a_missing_split_of_a_dataset_is_told_from_other_errors(tmp_path):
    folder = make_dataset(tmp_path / "digits", 3)
    with pytest.raises(MissingSplitError):
        open_dataset(folder, split="test")
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(b"no table")
    with pytest.raises(InputError) as raised:
        open_dataset(folder)
    assert not isinstance(raised.value, MissingSplitError)


def test_a_folder_of_images_with_a_table_is_read_as_requested(tmp_path):
    folder = write_class_folders(tmp_path / "images", range(4))
    (folder / "notes.csv").write_text("name,value\na,1\n")
    assert isinstance(open_folder(folder), FolderImages)
    (folder / "even" / "000.png").rename(tmp_path / "000.png")
    assert len(open_folder(folder)) == 3
    (tmp_path / "000.png").rename(folder / "even" / "000.png")
    table(range(20, 24)).to_parquet(folder / "train.parquet")
    assert isinstance(open_folder(folder), FolderImages)
    assert isinstance(open_source(str(write_images(tmp_path / "plain", 2))), FolderImages)
    assert not isinstance(open_dataset(tmp_path / "plain"), FolderImages)
    data = tmp_path / "table"
    data.mkdir()
    table(range(20, 24)).to_parquet(data / "train.parquet")
    for open_as in (open_folder, open_dataset, open_source):
        assert first_pixels(open_as(str(data))) == [20, 21, 22, 23]


# ---------------------------------------------------------------------------------------------------------------------
# Folders, MNIST-style folders, datasets


def test_a_local_dataset_folder_finds_its_image_column(tmp_path):
    folder = make_dataset(tmp_path / "digits", 10)
    assert first_pixels(open_dataset(folder)) == list(range(10))
    with pytest.raises(InputError, match=r"no column 'photo'.*number, picture.*--image_column"):
        open_dataset(folder, image_column="photo")
    with pytest.raises(InputError, match=r"split test.*could not be loaded"):
        open_dataset(folder, split="test")


def test_a_dataset_without_images_names_its_columns(tmp_path):
    (tmp_path / "words.csv").write_text("word,length\nno,2\n")
    with pytest.raises(InputError, match=r"no image column\. Its columns are: word, length"):
        open_dataset(tmp_path)


def test_a_missing_source_is_reported_with_the_places_that_were_tried(tmp_path):
    with pytest.raises(
        InputError,
        match=r"nobody/nothing .*could not be loaded from the Hugging Face Hub, since there is no local folder /",
    ):
        open_dataset("nobody/nothing")
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "missing")
    with pytest.raises(InputError, match="There are no images in"):
        open_folder(tmp_path)


def test_an_image_folder_needs_no_datasets_library(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(open_folder(images)) == 13
    with pytest.raises(InputError, match=r"datasets is not installed\. Run pip install 'datasets>="):
        open_dataset("some/thing")


def test_linked_folders_are_searched_once(tmp_path):
    write_images(tmp_path / "elsewhere" / "cat", 3)
    write_images(tmp_path / "images" / "ant", 2)
    (tmp_path / "images" / "cat").symlink_to("../elsewhere/cat")
    (tmp_path / "elsewhere" / "cat" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "ant" / "up").symlink_to("../..")
    (tmp_path / "linked").symlink_to("images")
    for folder in (tmp_path / "images", tmp_path / "linked"):
        source = open_folder(folder)
        names = [*(f"ant/00{i}.png" for i in range(2)), *(f"cat/00{i}.png" for i in range(3))]
        assert [source.name(i) for i in range(len(source))] == [str(folder / name) for name in names]
        assert source.labels(None).classes == ["ant", "cat"]


def test_hidden_files_and_run_folders_are_ignored(tmp_path):
    folder = write_images(tmp_path / "images", 4)
    write_images(folder / ".thumbs", 4)
    (folder / "._000.png").write_bytes(b"as macOS leaves it")
    for run in ("run", "deep/run"):
        write_images(folder / run / "samples", 2)
        (folder / run / "config.yaml").write_text("seed: 0\n")
    write_images(folder / "saved", 1)
    (folder / "saved" / "config.yaml").write_text("seed: 0\n")
    (folder / "saved" / "model_index.json").write_text("{}")
    write_images(folder / "samples", 1)  # an ordinary name outside of run folders
    source = open_folder(folder)
    assert len(source) == 5
    grids = open_folder(folder / "run")  # unless it is named itself
    assert len(grids) == 2


def test_a_torchvision_folder_is_read_as_torchvision_lays_it_out(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4)
    header = b"\0\0\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in pixels.shape)
    (raw / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    for folder in (tmp_path, tmp_path / "MNIST"):
        source = open_folder(folder)
        assert np.array_equal(np.stack([source[i] for i in range(len(source))]), pixels)
    with pytest.raises(InputError, match=r"has no split validation: its splits are train\."):
        open_folder(tmp_path, split="validation")
    (tmp_path / "KMNIST").symlink_to("MNIST")
    with pytest.raises(InputError, match=r"several sets of images\. Choose one of them: .*/KMNIST, .*/MNIST\."):
        open_folder(tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not beside this repository")
def test_the_real_mnist_is_read():
    source = open_folder(SHARED / "MNIST")
    assert len(source) == 60000
    assert read_image(source[0], Preprocessing(1, 32, 32)).shape == (1, 32, 32)


def test_the_embedded_dataset_is_read():
    source = open_dataset(EMBEDDED_DATASET)
    assert 500 <= len(source) <= 1000
    assert read_image(source[0], Preprocessing(3, 32, 32)).shape == (3, 32, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("int64", [1998, 2001, 2020], "3 different labels, up to 2020. Labels must count from 0, here to 2: renumber"),
        ("int64", [0, -1, 2], "It contains -1."),
        ("int64", [0, -1, None], "It contains None."),
        ("string", ["a", None, "b"], "It contains None."),
        ("float64", [0.0, 1.0, 2.0], "It contains 0.0."),
    ],
)
def test_columns_that_cannot_be_classes_are_refused(tmp_path, kind, labels, message):
    features = datasets.Features({"label": datasets.Value(kind), "image": datasets.Image()})
    rows = {"label": labels, "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path).labels(None)


def test_labels_beyond_the_classes_are_refused(tmp_path):
    """As in a file whose metadata name fewer classes than it holds."""
    features = datasets.Features({"kind": datasets.Value("int64"), "image": datasets.Image()})
    rows = {"kind": [0, 1, 5], "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    table = parquet.read_table(tmp_path / "train.parquet")
    metadata = json.loads(table.schema.metadata[b"huggingface"])
    metadata["info"]["features"]["kind"] = {"names": ["a", "b"], "_type": "ClassLabel"}
    table = table.replace_schema_metadata({b"huggingface": json.dumps(metadata)})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match=r"the label 5, but names 2 classes, whose labels are 0 to 1"):
        open_dataset(tmp_path).labels(None)
