"""Image sources: what each kind of location gives, which split, which labels, and what is refused."""

import io
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path, PurePath
from zipfile import ZipFile, ZipInfo

import datasets
import numpy as np
import pytest
from PIL import Image
from PIL import features as pillow_features
from pyarrow import parquet
from tiny import ROOT, make_dataset, write_idx, write_images, write_shard

from ddgan.core.errors import InputError
from ddgan.core.locations import InMemory
from ddgan.data.images import IMAGE_SUFFIXES, BrokenImageError, open_image
from ddgan.data.preprocessing import Preprocessing, read_image
from ddgan.data.sources import (
    EMBEDDED_DATASET,
    DatasetImages,
    FolderImages,
    ImageSource,
    ImageSubset,
    Labels,
    MissingSplitError,
    ZipImages,
    natural_order,
    open_source,
    open_stream,
)
from ddgan.training.arguments import DataArguments
from ddgan.training.loading import TrainingData

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
@pytest.mark.parametrize(
    "kind", [".parquet", ".arrow", ".tar", ".npz", ".zip", "shards", "arrays", "saved", "saved splits"]
)
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
    elif kind == "arrays":
        location = tmp_path / "arrays"
        location.mkdir()
        for name, part, save in (("2", range(4), np.savez), ("10", range(4, 9), np.savez_compressed)):
            images = np.repeat(np.array(part, dtype=np.uint8), 64).reshape(-1, 8, 8)
            save(location / f"{name}.npz", arr_0=images, arr_1=np.array(part) % 2)
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
        shutil.copy(location / "train" / "data-00000-of-00001.arrow", location / "train" / "cache-0.arrow")
    else:
        table(range(9)).save_to_disk(tmp_path / "saved")
        # as `Dataset.map` leaves in the folder
        shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "saved" / "cache-0.arrow")
        location = tmp_path / "saved" / "data-00000-of-00001.arrow" if kind == ".arrow" else tmp_path / "saved"
    stream = open_stream(str(location))
    rows = stream.select([stream.image_column, stream.label_column(None)])
    pixels = [int(np.asarray(open_image(row[stream.image_column])).flat[0]) for row in rows]
    assert pixels == list(range(9))


def test_arrays_and_archives_cannot_be_streamed(tmp_path):
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "0.npz").touch()
    for name in ("images.npz", "images.zip", "arrays"):
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


def test_an_npz_file_with_a_changed_pixel_is_named(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.full((9, 8, 8), 7, np.uint8))
    content = (tmp_path / "images.npz").read_bytes()
    (tmp_path / "images.npz").write_bytes(content.replace(b"\7\7\7", b"\7\6\7", 1))
    with pytest.raises(InputError, match=r"images\.npz cannot be read as a \.npz file; .*Bad CRC-32"):
        open_source(str(tmp_path / "images.npz"))


def test_a_damaged_compressed_npz_file_is_named(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    np.savez_compressed(tmp_path / "images.npz", arr_0=pixels)
    content = bytearray((tmp_path / "images.npz").read_bytes())
    start = content.index(b"arr_0.npy") + 60
    content[start : start + 20] = b"\xff" * 20
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"images\.npz cannot be read as a \.npz file"):
        open_source(str(tmp_path / "images.npz"))
    np.savez(tmp_path / "labels.npz", arr_0=pixels, arr_1=np.array(["a", None] * 4 + ["b"], dtype=object))
    with pytest.raises(InputError, match=r"labels\.npz cannot be read as a \.npz file"):
        open_source(str(tmp_path / "labels.npz")).labels(None)


def test_pixels_have_the_same_fingerprint_in_one_file_and_in_several(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    (tmp_path / "parts").mkdir()
    np.savez(tmp_path / "parts" / "0.npz", arr_0=images[:4])
    np.savez_compressed(tmp_path / "parts" / "1.npz", arr_0=images[4:])
    whole, parts = open_source(str(tmp_path / "images.npz")), open_source(str(tmp_path / "parts"))
    assert parts.fingerprint([2, 3, 5]) == whole.fingerprint([2, 3, 5]) != whole.fingerprint([2, 3, 6])
    assert parts.name(5) == f"image 1 of {tmp_path / 'parts' / '1.npz'}"


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


def test_the_colors_of_palette_images_are_part_of_their_fingerprint():
    images = [Image.new("P", (2, 2)) for _ in range(2)]
    for image, color in zip(images, ((255, 0, 0), (0, 0, 255)), strict=True):
        image.putpalette(color)
    fingerprints = [open_source(InMemory([image] * 2)).fingerprint([0]) for image in images]
    assert fingerprints[0] != fingerprints[1]


def test_fingerprints_do_not_change_between_versions(tmp_path):
    (tmp_path / "0.png").write_bytes(b"any bytes")
    (tmp_path / "1.png").write_bytes(b"")
    assert open_source(str(tmp_path)).fingerprint([0, 1]) == "5635b81cbb869d7de375380f"
    images = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4)
    np.savez(tmp_path / "images.npz", arr_0=images)
    assert open_source(str(tmp_path / "images.npz")).fingerprint([1]) == "aed39e980c4a9d273656267c"


def test_an_npz_file_without_images_or_with_other_labels_is_refused(tmp_path):
    for arrays in (
        {"images": np.zeros((2, 8, 8), np.uint8)},
        {"arr_0": np.zeros((2, 8, 8), np.float32)},
        {"arr_0": np.zeros((0, 8, 8), np.uint8)},
        {"arr_0": np.array("text")},
    ):
        np.savez(tmp_path / "images.npz", **arrays)
        with pytest.raises(InputError, match=r"images\.npz must contain images \(N, H, W, C\) as 8-bit integers"):
            open_source(str(tmp_path / "images.npz"))
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"images of the shape \(3, 8, 8\); it must be \(H, W, C\)"):
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


def test_members_of_a_zip_file_outside_of_it_are_reported_and_unusual_names_are_read(tmp_path, caplog):
    folder = write_class_folders(tmp_path / "images", range(4))
    with ZipFile(tmp_path / "images.zip", "w") as archive:
        for file, name in zip(
            sorted(folder.rglob("*.png")), ("../a.png", "/b.png", "./c.png", "d//e.png"), strict=True
        ):
            archive.writestr(ZipInfo(name), file.read_bytes())
    source = open_source(str(tmp_path / "images.zip"))
    assert [source.name(i).split()[0] for i in range(len(source))] == ["c.png", "d/e.png"]
    assert "ignored 2 images with paths outside of it, such as ../a.png" in caplog.text
    assert all(read_image(source[i], Preprocessing(1, 8, 8)).unique().numel() == 1 for i in range(2))


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
    assert open_source(location(vehicles), "train").split == "train"  # unless it is named


def test_the_folder_of_a_split_may_have_another_name_for_it(tmp_path):
    for name, values in (("Training", range(6)), ("Testing", range(10, 13)), ("valid", range(20, 22))):
        write_class_folders(tmp_path / name, values)
    splits = {split: open_source(str(tmp_path), split) for split in (None, "train", "test", "Testing", "val")}
    assert [source.split for source in splits.values()] == ["Training", "Training", "Testing", "Testing", "valid"]
    assert splits[None].labels(None).classes == ["even", "odd"]
    write_class_folders(tmp_path / "val", range(2))
    with pytest.raises(
        MissingSplitError, match="has no split validation: its splits are Testing, Training, val, vali"
    ):
        open_source(str(tmp_path), "validation")


@pytest.mark.parametrize("kind", ["folder", ".zip", ".npz", ".parquet", ".arrow", "saved"])
def test_a_split_of_images_without_splits_is_refused_instead_of_ignored(tmp_path, kind):
    location = tmp_path / f"images{kind}"
    if kind in ("folder", ".zip"):
        location = write_class_folders(tmp_path / "images", range(4))
        location = zip_folder(location, tmp_path / "images.zip") if kind == ".zip" else location
    elif kind == ".npz":
        np.savez(location, arr_0=np.zeros((4, 8, 8), np.uint8))
    elif kind == ".parquet":
        table(range(4)).to_parquet(location)
    else:
        table(range(4)).save_to_disk(tmp_path / "saved")
        location = tmp_path / "saved" / ("data-00000-of-00001.arrow" if kind == ".arrow" else "")
    for split in (None, "train", "all"):
        source = open_source(str(location), split, default_split="test")
        assert (len(source), source.split) == (4, "all")
    with pytest.raises(MissingSplitError, match="has no split test"):
        open_source(str(location), "test")
    if kind in (".parquet", ".arrow", "saved"):
        assert first_pixels(open_source(str(location), "train[1:3]")) == [1, 2]
        with pytest.raises(MissingSplitError, match="has no split test"):
            open_stream(str(location), "test")


def test_a_split_of_a_saved_dataset_is_streamed(tmp_path):
    datasets.DatasetDict(train=table(range(9)), held_out=table(range(20, 24))).save_to_disk(tmp_path / "saved")
    stream = open_stream(str(tmp_path / "saved"), "held_out")
    assert len(list(stream.select([stream.image_column]))) == 4
    with pytest.raises(MissingSplitError, match="has no split test: its splits are train, held_out"):
        open_stream(str(tmp_path / "saved"), "test")


def test_the_format_of_a_dataset_does_not_change_its_images(tmp_path):
    rows = table(range(9))

    def transform(batch):
        return {"image": [image.rotate(90) for image in batch["image"]]}

    for formatted in (rows.with_format("numpy"), rows.with_format("torch"), rows.with_transform(transform)):
        source = open_source(InMemory(formatted))
        assert first_pixels(source) == list(range(9))
        assert list(source.labels(None).numbers) == [i % 2 for i in range(9)]


def test_paths_in_a_dataset_in_memory_are_relative_to_the_working_folder(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 2)
    monkeypatch.chdir(tmp_path)
    rows = datasets.Dataset.from_dict({"image": ["images/000.png", "images/001.png"]})
    source = open_source(InMemory(rows.cast_column("image", datasets.Image())))
    assert [open_image(source[i]).size for i in range(2)] == [(8, 8)] * 2


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
    plain = write_images(tmp_path / "plain", 2)
    assert isinstance(open_source(str(plain)), FolderImages)
    assert isinstance(open_dataset(plain), FolderImages)
    (plain / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: 001.png\n---\n")
    assert len(open_dataset(plain)) == 1
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


def png(value: int) -> bytes:
    encoded = io.BytesIO()
    Image.new("L", (8, 8), value).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("bytes", [png(i) for i in range(4)]),
        ("gray lists", [np.full((8, 8), i).tolist() for i in range(4)]),
        ("one channel", [np.full((8, 8, 1), i).tolist() for i in range(4)]),
        ("color lists", [np.full((8, 8, 3), i).tolist() for i in range(4)]),
        ("paths", [f"images/{i}.png" for i in range(4)]),
    ],
)
def test_columns_without_a_type_of_images_are_read(tmp_path, monkeypatch, kind, cells, streaming):
    datasets.Dataset.from_dict({"image": cells}).to_parquet(tmp_path / "train.parquet")
    if kind == "paths":
        (tmp_path / "images").mkdir()
        for i in range(4):
            (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    monkeypatch.chdir("/")
    for location in (tmp_path, tmp_path / "train.parquet"):
        args = DataArguments(dataset_name=str(location), streaming=streaming)
        data = TrainingData(args, Preprocessing(1, 8, 8), 0, batch_size=4, accumulation=1, processes=1, seed=0)
        batch = next(data.batches(0, 1, None))
        assert sorted(((batch.images[:, 0, 0, 0] + 1) * 127.5).round().tolist()) == [0, 1, 2, 3]
        if not streaming:
            assert data.source.fingerprint([0]) != data.source.fingerprint([1])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([png(0), None], "row 1 of the column 'image' .*it is empty"),
        ([png(0), b"no image"], "row 1 of the column 'image' .*cannot identify image file"),
        (
            ["https://example.org/0.png"],
            "row 0 of the column 'image' .*it holds 'https://example.org/0.png', not an i",
        ),
        (["missing.png"], r"row 0 of the column 'image' \(missing.png\).*No such file"),
        ([[[0, 256]]], r"it holds int64 of shape \(1, 2\), values 0 to 256. Pixels must be integers from 0 to 255"),
        ([[[0.5]]], r"it holds float64 of shape \(1, 1\), values 0.5 to 0.5"),
        ([[[1, 2], [3]]], r"it holds object of shape \(0,\)"),
        ([[1, 2, 3]], r"it holds int64 of shape \(3,\)"),
    ],
)
def test_cells_that_are_no_images_are_reported_with_row_column_and_content(tmp_path, cells, message):
    datasets.Dataset.from_dict({"image": cells}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        args = DataArguments(dataset_name=str(tmp_path))
        TrainingData(args, Preprocessing(1, 8, 8), 0, batch_size=4, accumulation=1, processes=1, seed=0)


def test_paths_in_a_dataset_of_the_hub_are_not_opened(tmp_path):
    write_images(tmp_path, 1)
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "000.png")]})
    with pytest.raises(BrokenImageError, match="not an image"):
        DatasetImages(rows, None)[0]


def test_a_dataset_without_images_names_its_columns(tmp_path):
    (tmp_path / "words.csv").write_text("word,length\nno,2\n")
    with pytest.raises(InputError, match=r"no image column\. Its columns are: word, length"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("open_kind", [open_dataset, open_folder, open_stream])
def test_a_file_of_another_kind_is_refused(tmp_path, open_kind):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"rows\.csv is not a file of images that can be read \(\.npz, \.zip, \.parq"):
        open_kind(str(tmp_path / "rows.csv"))


def test_a_missing_source_is_reported_with_the_places_that_were_tried(tmp_path):
    with pytest.raises(
        InputError,
        match=r"nobody/nothing: there is no such file or folder \(looked for at /.*\), and the .* Hub is not",
    ):
        open_dataset("nobody/nothing")
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "missing")
    with pytest.raises(InputError, match="There are no images in"):
        open_folder(tmp_path)


def test_an_image_folder_needs_no_datasets_library(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(open_folder(images)) == 13
    with pytest.raises(
        InputError, match=r"datasets \(of the extra \[train\]\) is not installed\. Run pip install 'datasets>="
    ):
        open_dataset("some/thing")


def test_broken_links_are_ignored_and_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    write_images(tmp_path / "some", 2)
    for folder in ("some", "none"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "linked.png").symlink_to(tmp_path / "nowhere.png")
    assert len(open_folder(tmp_path / "some")) == 2
    assert "2 images. Ignored: 1 broken links" in caplog.text
    with pytest.raises(InputError, match=r"There are no images in .*none.* Ignored: 1 broken links"):
        open_folder(tmp_path / "none")


def test_suffixes_of_archives_may_be_in_capitals(tmp_path):
    write_images(tmp_path / "images", 2)
    assert len(open_source(str(zip_folder(tmp_path / "images", tmp_path / "IMAGES.ZIP")))) == 2


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
    (folder / "run" / "metrics.csv").write_text("step\n")
    for source in (open_folder(folder), open_source(str(folder))):  # a run does not make the folder a dataset
        assert len(source) == 5
    grids = open_folder(folder / "run")  # unless it is named itself
    assert len(grids) == 2


def test_thumbnails_and_recycle_bins_are_ignored_and_counted(tmp_path, caplog):
    caplog.set_level("INFO", "ddgan")
    folder = write_images(tmp_path / "nas", 4)
    for name in ("@eaDir/000.png", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX"):
        write_images(folder / name, 1)
    (folder / "photo.heic").write_bytes(b"")
    for open_as in (open_folder, open_dataset, open_source):
        assert len(open_as(str(folder))) == 4
    assert "nas: 4 images. Ignored: 1 in " in caplog.text
    assert "1 in @eaDir" in caplog.text and "1 .heic" in caplog.text
    assert len(open_source(str(zip_folder(folder, tmp_path / "nas.zip")))) == 4
    with pytest.raises(InputError, match=r"@eaDir.* folders of a network drive .*--train_data_dir"):
        open_stream(str(folder))


@pytest.mark.parametrize("suffix", [".JFIF", ".tga", ".jp2", ".ppm", ".avif"])
def test_files_that_pillow_reads_are_images(tmp_path, suffix):
    if not Image.registered_extensions().get(suffix.lower()) or (
        suffix == ".avif" and not pillow_features.check("avif")
    ):
        pytest.skip(f"this build of Pillow does not read {suffix}")
    write_images(tmp_path, 1)
    Image.new("RGB", (8, 8), "teal").save(tmp_path / f"b{suffix}", Image.registered_extensions()[suffix.lower()])
    source = open_folder(tmp_path)
    assert len(source) == 2
    assert read_image(source[1], Preprocessing(3, 8, 8)).shape == (3, 8, 8)


def test_all_image_suffixes_are_known_to_pillow():
    assert set(Image.registered_extensions()) >= IMAGE_SUFFIXES


def test_images_are_in_the_natural_order_of_their_names(tmp_path):
    for i in range(12):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    assert first_pixels(open_folder(tmp_path)) == list(range(12))
    assert first_pixels(open_source(str(zip_folder(tmp_path, tmp_path.parent / "images.zip")))) == list(range(12))
    names = ["1.png", "01.png", "a1b10.png", "a1b9.png", "a", "9" * 5000 + ".png"]
    expected = ["01.png", "1.png", "9" * 5000 + ".png", "a", "a1b9.png", "a1b10.png"]
    assert sorted(names, key=lambda name: natural_order(PurePath(name))) == expected


def test_odd_file_names_are_read(tmp_path):
    names = [
        "a b.png",
        "100%.PNG",
        "日本.png",
        "new\nline.png",
        "#1.png",
        "[x].png",
        "-n.png",
        "~.png",
        "two..dots.png",
    ]
    write_images(tmp_path / "plain", len(names))
    for i, name in enumerate(names):
        (tmp_path / "plain" / f"{i:03d}.png").rename(tmp_path / "plain" / name)
    for location in (tmp_path / "plain", zip_folder(tmp_path / "plain", tmp_path / "images.zip")):
        source = open_source(str(location))
        assert len(source) == len(names)
        assert all(read_image(source[i], Preprocessing(3, 8, 8)).shape == (3, 8, 8) for i in range(len(names)))


def test_a_torchvision_folder_is_read_as_torchvision_lays_it_out(tmp_path):
    pixels = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4)
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", pixels)
    for folder in (tmp_path, tmp_path / "MNIST"):
        source = open_folder(folder)
        assert np.array_equal(np.stack([source[i] for i in range(len(source))]), pixels)
    with pytest.raises(InputError, match=r"has no split validation: its splits are train\."):
        open_folder(tmp_path, split="validation")
    (tmp_path / "KMNIST").symlink_to("MNIST")
    with pytest.raises(InputError, match=r"several sets of images\. Choose one of them: .*/KMNIST, .*/MNIST\."):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "content", [b"\x1f\x8b\x08\0" + bytes(60), b"\0\0\x0d\x03" + bytes(60), b"\0\0\x08\x01" + bytes(60)]
)
def test_other_contents_than_idx_images_are_refused(tmp_path, content):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(InputError, match="does not contain bytes in 3 dimensions in MNIST's idx format"):
        open_folder(tmp_path)


def test_compressed_idx_files_are_reported(tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz is compressed: unpack the files in .*/raw"):
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


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_ids_are_not_classes(tmp_path, kind):
    features = datasets.Features({"label": datasets.Value(kind), "image": datasets.Image()})
    labels = [i if kind == "int64" else f"{i}.png" for i in range(102)]
    rows = {"label": labels, "image": [Image.new("L", (1, 1))] * 102}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match="102 different labels for 102 images: these are not classes"):
        open_dataset(tmp_path).labels(None)


def test_integer_labels_are_the_classes_that_occur(tmp_path):
    expected = Labels(["1", "2", "10"], [2, 0, 1])
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 8, 8), np.uint8), arr_1=np.array([10, 1, 2]))
    assert open_source(str(tmp_path / "images.npz")).labels(None) == expected
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((3, 2, 2)))
    write_idx(raw / "train-labels-idx1-ubyte", np.array([10, 1, 2]))
    assert open_folder(tmp_path / "MNIST").labels(None) == expected
    for kind, values in (("int64", [10, 1, 2]), ("string", ["10", "1", "2"])):
        features = datasets.Features({"label": datasets.Value(kind), "image": datasets.Image()})
        rows = {"label": values, "image": [Image.new("L", (8, 8))] * 3}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{kind}.parquet")
        assert open_source(str(tmp_path / f"{kind}.parquet")).labels(None) == expected


def test_class_folders_are_in_natural_order(tmp_path):
    for name in ("1", "2", "10", "11", "12"):
        write_images(tmp_path / "images" / name, 1)
    archive = zip_folder(tmp_path / "images", tmp_path / "images.zip")
    for location in (tmp_path / "images", archive):
        assert open_source(str(location)).labels(None) == Labels(["1", "2", "10", "11", "12"], list(range(5)))


def test_labels_in_metadata_are_not_ignored(tmp_path):
    folder = write_class_folders(tmp_path / "images", range(4))
    with pytest.raises(InputError, match=r"--label_column style: .*/images has no columns"):
        open_folder(folder).labels("style")
    table = "file_name,style\n" + "".join(
        f"{path.relative_to(folder)},{i}\n" for i, path in enumerate(sorted(folder.rglob("*.png")))
    )
    (folder / "metadata.csv").write_text(table)
    with pytest.raises(InputError, match=r"metadata\.csv may contain the labels.*--dataset_name .*--label_column"):
        open_folder(folder).labels(None)
    assert list(open_dataset(folder).labels("style").numbers) == [0, 1, 2, 3]


def test_a_class_folder_whose_name_is_not_utf8_is_refused_at_once(tmp_path):
    write_images(tmp_path / os.fsdecode("caf\xe9".encode("latin-1")), 1)
    with pytest.raises(InputError, match="is not UTF-8: rename it") as raised:
        open_folder(tmp_path).labels(None)
    assert str(raised.value).encode()


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


@pytest.mark.parametrize("open_kind", [open_folder, open_dataset, open_stream])
def test_the_home_folder_and_those_above_it_are_refused(tmp_path, monkeypatch, open_kind):
    write_images(tmp_path / "home" / "photos", 2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in (tmp_path / "home", tmp_path, Path("/")):
        with pytest.raises(InputError, match=f"{folder} contains your home folder"):
            open_kind(str(folder))
    assert len(open_folder(tmp_path / "home" / "photos")) == 2


@pytest.mark.parametrize("open_kind", [open_folder, open_dataset])
def test_the_search_for_images_ends_after_many_other_files(tmp_path, monkeypatch, open_kind):
    monkeypatch.setattr("ddgan.data.sources._MAX_OTHER_FILES", 20)
    for i in range(21):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(InputError, match=f"no image among the first 20 files and folders in {tmp_path}"):
        open_kind(tmp_path)
    write_images(tmp_path, 30)
    assert len(open_kind(tmp_path)) == 30
