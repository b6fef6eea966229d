"""Images in, tensors out: every kind of source and of image, and the plan that deals them out."""

import json
import struct
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pyarrow import parquet
from tiny import ROOT, make_dataset, write_images

from ddgan.core.errors import InputError, RunError
from ddgan.data.preprocessing import Preprocessing, read_image
from ddgan.data.sources import open_images
from ddgan.training.arguments import DataArguments, LabelArguments
from ddgan.training.loading import TrainingData
from ddgan.training.plan import BatchPlan

SHARED = ROOT.parent / "shared" / "data"
PLAN = {"batch_size": 4, "accumulation": 1, "processes": 1, "seed": 0}


def load(image, channels=3, size=(8, 8), **options) -> torch.Tensor:
    preprocessing = Preprocessing(channels, *size, **options)
    return preprocessing.finish(preprocessing.load(image), sample_key=0)


def numbers(batch) -> list[int]:
    return ((batch.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


# ---- images


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_what_the_model_takes(mode, channels, tmp_path):
    grey = np.linspace(0, 65535 if mode.startswith("I") else 255, 64).reshape(8, 8)
    if mode.startswith("I"):
        image = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(grey.astype(np.float32) if mode == "F" else grey.astype(np.uint8)).convert(mode)
    pixels = load(image, channels)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == torch.float32
    assert pixels[0, 0, 0] == pytest.approx(-1, abs=0.05)
    assert pixels[0, -1, -1] == pytest.approx(1, abs=0.05)


def test_sixteen_bits_keep_their_range():
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    expected = torch.from_numpy(np.round(ramp * (255 / 65535)) / 127.5 - 1).float()
    assert torch.allclose(load(Image.fromarray(ramp), channels=1)[0], expected, atol=1e-6)


def test_dark_sixteen_bit_images_stay_dark():
    dark = Image.fromarray(np.full((8, 8), 200, dtype=np.uint16))
    assert load(dark, channels=1).max() == pytest.approx(1 / 127.5 - 1)


def test_transparent_becomes_white_where_the_model_has_no_alpha():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(load(clear), torch.ones(3, 8, 8))
    assert load(clear, channels=4)[3].max() == -1
    palette = Image.new("P", (8, 8), 3)
    palette.info["transparency"] = 3
    assert torch.equal(load(palette, channels=1), torch.ones(1, 8, 8))


def test_a_photo_is_turned_the_way_its_camera_was_held(tmp_path):
    photo = Image.new("RGB", (16, 8), "black")
    photo.paste("white", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    pixels = load(Image.open(tmp_path / "photo.png"), size=(16, 8))
    assert pixels[:, 0].min() == 1
    assert pixels[:, -1].max() == -1


def test_a_photo_with_odd_metadata_is_read(tmp_path):
    def saved(suffix: str, *rows: bytes, head: bytes = b"Exif\0\0II*\0\x08\0\0\0") -> Path:
        table = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
        photo.save(tmp_path / f"photo{suffix}", exif=head + table, quality=100)
        return tmp_path / f"photo{suffix}"

    photo = Image.new("RGB", (16, 8), "black")
    photo.paste("white", (0, 0, 8, 8))
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    maker = struct.pack("<HHII", 0x010F, 5, 1, 8)  # a fraction, where a name is due
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")  # a name, where a number is due
    preprocessing = Preprocessing(1, 16, 8)
    for odd in (maker, width):
        for suffix in (".jpg", ".png", ".webp"):
            pixels = read_image(saved(suffix, odd, turned), preprocessing)
            assert pixels[0, :4].min() > 250
            assert pixels[0, -4:].max() < 5
    upright = read_image(saved(".png", turned, head=b"Exif\0\0none of EXIF"), Preprocessing(1, 8, 16))
    assert upright[0, :, :8].min() > upright[0, :, 8:].max()


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "photo.png")))
    assert np.array_equal(read_image(tmp_path / "photo.png", Preprocessing(1, 8, 8))[0], expected)


def test_images_that_are_not_square_are_cropped_not_squeezed():
    wide = Image.new("L", (32, 8), 0)
    wide.paste(255, (12, 0, 20, 8))
    assert load(wide, channels=1, center_crop=True).min() == 1  # the white square in the middle
    crops = set()
    preprocessing = Preprocessing(1, 8, 8)
    for key in range(50):
        crops.add(preprocessing.finish(preprocessing.load(wide), key).mean().item())
    assert len(crops) > 5
    assert load(Image.new("L", (20, 30)), channels=1, size=(8, 16)).shape == (1, 8, 16)


def test_flips_are_half_of_the_samples_and_depend_on_the_key_alone():
    ramp = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (8, 1)))
    preprocessing = Preprocessing(1, 8, 8, random_flip=True)
    flipped = [preprocessing.finish(preprocessing.load(ramp), key)[0, 0, 0] > -1 for key in range(400)]
    assert 150 < sum(flipped) < 250
    again = [preprocessing.finish(preprocessing.load(ramp), key)[0, 0, 0] > -1 for key in range(400)]
    assert flipped == again


# ---- sources


def test_a_local_dataset_folder_finds_its_image_column(tmp_path):
    folder = make_dataset(tmp_path / "digits", 10)
    data = TrainingData(DataArguments(dataset_name=str(folder)), Preprocessing(1, 8, 8), 0, **PLAN)
    seen = [n for batch in data.batches(0, 3, None) for n in numbers(batch)]
    assert sorted(seen) == list(range(10))
    assert data.name == "digits"
    with pytest.raises(InputError, match=r"no column 'photo'.*number, picture.*--image_column"):
        open_images(DataArguments(dataset_name=str(folder), image_column="photo"))
    with pytest.raises(InputError, match=r"split test.*could not be loaded"):
        open_images(DataArguments(dataset_name=str(folder), split="test"))


def test_a_dataset_without_images_names_its_columns(tmp_path):
    (tmp_path / "words.csv").write_text("word,length\nno,2\n")
    with pytest.raises(InputError, match=r"no image column\. Its columns are: word, length"):
        open_images(DataArguments(dataset_name=str(tmp_path)))


def test_what_is_not_there_is_said_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(InputError, match=r"nobody/nothing .*local folder .*not there; then nobody/nothing on"):
        open_images(DataArguments(dataset_name="nobody/nothing"))
    with pytest.raises(InputError, match="no such folder"):
        open_images(DataArguments(train_data_dir=str(tmp_path / "missing")))
    with pytest.raises(InputError, match="There is no image in"):
        open_images(DataArguments(train_data_dir=str(tmp_path)))


def test_an_image_folder_needs_no_datasets_library(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(open_images(DataArguments(train_data_dir=str(images)))) == 13
    with pytest.raises(InputError, match=r"needs the package `datasets`.*\[train\]"):
        open_images(DataArguments(dataset_name="some/thing"))


def test_folders_that_are_links_are_searched_once(tmp_path):
    write_images(tmp_path / "elsewhere" / "cat", 3)
    write_images(tmp_path / "images" / "ant", 2)
    (tmp_path / "images" / "cat").symlink_to("../elsewhere/cat")
    (tmp_path / "elsewhere" / "cat" / "back").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "ant" / "up").symlink_to("../..")
    (tmp_path / "linked").symlink_to("images")
    for folder in (tmp_path / "images", tmp_path / "linked"):
        source = open_images(DataArguments(train_data_dir=str(folder)))
        names = [*(f"ant/00{i}.png" for i in range(2)), *(f"cat/00{i}.png" for i in range(3))]
        assert [source.name(i) for i in range(len(source))] == [str(folder / name) for name in names]
        assert source.labels(None).classes == ["ant", "cat"]


def test_hidden_files_and_run_folders_are_no_images(tmp_path):
    folder = write_images(tmp_path / "images", 4)
    write_images(folder / ".thumbs", 4)
    (folder / "._000.png").write_bytes(b"as macOS leaves it")
    for run in ("run", "deep/run"):
        write_images(folder / run / "samples", 2)
        (folder / run / "config.yaml").write_text("seed: 0\n")
    write_images(folder / "saved", 1)
    (folder / "saved" / "config.yaml").write_text("seed: 0\n")
    (folder / "saved" / "model_index.json").write_text("{}")
    write_images(folder / "samples", 1)  # a name like any other where no run made it
    source = open_images(DataArguments(train_data_dir=str(folder)))
    assert len(source) == 5
    grids = open_images(DataArguments(train_data_dir=str(folder / "run")))  # asked for by its name
    assert len(grids) == 2


def test_a_torchvision_folder_is_read_as_it_lies(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(5 * 16, dtype=np.uint8).reshape(5, 4, 4)
    header = b"\0\0\x08\x03" + b"".join(int(n).to_bytes(4, "big") for n in pixels.shape)
    (raw / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    for folder in (tmp_path, tmp_path / "MNIST"):
        source = open_images(DataArguments(train_data_dir=str(folder)))
        assert np.array_equal(np.stack([source[i] for i in range(len(source))]), pixels)
    with pytest.raises(InputError, match="has no split validation: its splits are train and test"):
        open_images(DataArguments(train_data_dir=str(tmp_path), split="validation"))
    (tmp_path / "KMNIST").symlink_to("MNIST")
    with pytest.raises(InputError, match=r"several sets of images\. Name one of them: .*/KMNIST, .*/MNIST\."):
        open_images(DataArguments(train_data_dir=str(tmp_path)))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not beside this clone")
def test_the_real_mnist_is_read():
    source = open_images(DataArguments(train_data_dir=str(SHARED / "MNIST")))
    assert len(source) == 60000
    assert load(source[0], channels=1, size=(32, 32)).shape == (1, 32, 32)


def test_the_embedded_dataset_is_the_default():
    source = open_images(DataArguments())
    assert 500 <= len(source) <= 1000
    assert read_image(source[0], Preprocessing(3, 32, 32)).shape == (3, 32, 32)


# ---- broken images


def test_a_broken_image_is_named_before_training_or_left_out_and_counted(tmp_path):
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


def test_cells_that_are_no_images_are_broken_images(tmp_path):
    import datasets

    (tmp_path / "data").mkdir(parents=True)
    features = datasets.Features({"picture": datasets.Image()})
    rows = [Image.new("L", (8, 8), 7), None, Image.new("L", (8, 8), 9)]
    datasets.Dataset.from_dict({"picture": rows}, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(InputError, match="row 1"):
        TrainingData(DataArguments(dataset_name=str(tmp_path)), Preprocessing(1, 8, 8), 0, **PLAN)
    args = DataArguments(dataset_name=str(tmp_path), skip_broken_images=True)
    (batch,) = TrainingData(args, Preprocessing(1, 8, 8), 0, **PLAN).batches(0, 1, None)
    assert sorted(numbers(batch)) == [7, 9, 9]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_but_broken_images_ends_the_run(tmp_path, streaming, workers):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    where = {"dataset_name": str(tmp_path)} if streaming else {"train_data_dir": str(tmp_path)}
    args = DataArguments(**where, streaming=streaming, skip_broken_images=True, dataloader_num_workers=workers)
    batches = TrainingData(args, Preprocessing(3, 8, 8), 0, **PLAN).batches(0, 1, None)
    with pytest.raises(RunError, match=r"(An image cannot|had no image that can) be read") as ended:
        next(batches)
    assert "Traceback" not in str(ended.value)
    time.sleep(0.1)  # in which torch would say that the reader was killed


# ---- the plan


@pytest.mark.parametrize("images", [1, 7, 24, 25, 100])
@pytest.mark.parametrize(("batch", "accumulation", "processes"), [(4, 1, 1), (3, 2, 1), (2, 3, 2), (1, 1, 5)])
def test_every_epoch_has_every_image_once_and_no_process_is_without_work(images, batch, accumulation, processes):
    plan = BatchPlan(images, batch, accumulation, processes, seed=3)
    orders = []
    for epoch in range(2):
        order = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            positions = []
            for micro_batch in range(plan.micro_batches(step)):
                shares = [plan.shard(step, micro_batch, rank) for rank in range(processes)]
                assert max(map(len, shares)) <= batch
                positions += [position for share in shares for position in share]
            assert positions == list(range(plan.global_batch(step)[2]))
            order += [plan.image_index(step, position) for position in positions]
        assert sorted(order) == list(range(images))
        assert plan.images_seen((epoch + 1) * plan.steps_per_epoch) == (epoch + 1) * images
        orders.append(order)
    assert images < 7 or orders[0] != orders[1]


# ---- streams


def stream(folder: Path, rank: int = 0, workers: int = 0, **plan) -> TrainingData:
    args = DataArguments(dataset_name=str(folder), streaming=True, dataloader_num_workers=workers)
    return TrainingData(args, Preprocessing(1, 8, 8), rank, **{**PLAN, **plan})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_taken_up_exactly_where_it_was_left(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("ddgan.training.loading._SHUFFLE_BLOCK", 7)
    folder = make_dataset(tmp_path / "streamed", 30, shards=3)

    def read(start: int, stop: int, position=None) -> list:
        return list(islice(stream(folder, workers=workers).batches(start, 20, position), stop - start))

    whole = [(numbers(batch), batch.keys) for batch in read(0, 20)]
    first_pass = Counter(n for seen, _ in whole for n in seen)
    assert sum(first_pass.values()) == 80
    assert set(first_pass) == set(range(30))
    assert max(first_pass.values()) <= 3  # 80 samples are two passes of 30 and a part of a third
    for taken in (1, 3, 7, 8, 15):  # within a block, at its end, in the second pass
        first = read(0, taken)
        rest = read(taken, 20, json.loads(json.dumps(first[-1].position)))
        assert [(numbers(b), b.keys) for b in [*first, *rest]] == whole, taken


@pytest.mark.parametrize("shards", [1, 4])
def test_processes_share_out_a_stream(tmp_path, shards):
    folder = make_dataset(tmp_path / "streamed", 32, shards=shards)
    parts = [
        [n for b in islice(stream(folder, rank, processes=2).batches(0, 4, None), 4) for n in numbers(b)]
        for rank in (0, 1)
    ]
    assert len(parts[0]) == len(parts[1]) == 16
    assert sorted(parts[0] + parts[1]) == list(range(32))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_fails_is_said_in_a_paragraph(tmp_path, workers):
    folder = make_dataset(tmp_path / "streamed", 32, shards=4)
    batches = stream(folder, workers=workers).batches(0, 8, None)
    for file in folder.rglob("*.parquet"):
        file.write_bytes(b"cut off")
    with pytest.raises(RunError, match=r"cannot be read: \w+: .*--resume_from_checkpoint latest") as ended:
        next(batches)
    assert "Traceback" not in str(ended.value)


def test_a_stream_reads_one_shard_after_the_other(tmp_path, monkeypatch):
    """Several at once it would read row by row, and sleep for seconds at the end of each pass."""
    monkeypatch.setattr("ddgan.training.loading._SHUFFLE_BLOCK", 4)
    folder = make_dataset(tmp_path / "streamed", 8, shards=2)
    first, second = ([n % 2 for n in numbers(b)] for b in islice(stream(folder).batches(0, 2, None), 2))
    assert sorted([first, second]) == [[0] * 4, [1] * 4]


def test_a_stream_shuffles_its_rows(tmp_path):
    folder = make_dataset(tmp_path / "streamed", 32)
    seen = [n for b in islice(stream(folder).batches(0, 8, None), 8) for n in numbers(b)]
    assert sorted(seen) == list(range(32))
    assert seen != list(range(32))


# ---- labels


def labelled(args: DataArguments, label_column: str | None = None) -> tuple[list[str], dict[int, str]]:
    """The classes, and the name of the class that each image came with, by the value of its first pixel."""
    data = TrainingData(args, Preprocessing(1, 8, 8), 0, LabelArguments(label_column), **PLAN)
    steps = data.plan.steps_per_epoch or 3
    found = {}
    for batch in islice(data.batches(0, steps, None), steps):
        found |= dict(zip(numbers(batch), [data.classes[label] for label in batch.labels], strict=True))
    return data.classes, found


def test_sub_folders_are_classes(tmp_path):
    for i in range(9):
        folder = tmp_path / "images" / ("cat", "ant")[i % 2] / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    args = DataArguments(train_data_dir=str(tmp_path / "images"))
    assert labelled(args) == (["ant", "cat"], {i: ("cat", "ant")[i % 2] for i in range(9)})
    Image.new("L", (8, 8), 9).save(tmp_path / "images" / "9.png")
    with pytest.raises(InputError, match=r"no class labels: .*9\.png is in no sub-folder"):
        labelled(args)


def test_a_broken_image_that_is_left_out_takes_its_label_along(tmp_path):
    for i in range(6):
        (tmp_path / str(i)).mkdir()
        Image.new("L", (8, 8), i).save(tmp_path / str(i) / "image.png")
    (tmp_path / "3" / "image.png").write_bytes(b"not an image")
    classes, found = labelled(DataArguments(train_data_dir=str(tmp_path), skip_broken_images=True, cache_images=True))
    assert classes == [str(i) for i in range(6)]
    assert found == {i: str(i) for i in (0, 1, 2, 4, 5)}


@pytest.mark.parametrize(("name", "classes"), [("MNIST", "0 1 2"), ("FashionMNIST", "T-shirt/top Trouser Pullover")])
def test_torchvision_folders_bring_labels_and_names(tmp_path, name, classes):
    raw = tmp_path / name / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(5, dtype=np.uint8), 64)
    header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (5, 8, 8))
    args = DataArguments(train_data_dir=str(tmp_path))
    for broken in (b"", header[:9], header + pixels.tobytes()[:-1], header[:4] + bytes(4) + header[8:]):
        (raw / "train-images-idx3-ubyte").write_bytes(broken)
        with pytest.raises(InputError, match="train-images-idx3-ubyte is cut off or empty"):
            labelled(args)
    (raw / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    with pytest.raises(InputError, match="no train-labels-idx1-ubyte beside them"):
        labelled(args)
    for broken in (b"", b"\0\0\x08\x01", b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes(4)):
        (raw / "train-labels-idx1-ubyte").write_bytes(broken)
        with pytest.raises(InputError, match="train-labels-idx1-ubyte is cut off or empty"):
            labelled(args)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (4).to_bytes(4, "big") + bytes([2, 0, 1, 1]))
    with pytest.raises(InputError, match="5 images, but train-labels-idx1-ubyte beside it 4 labels"):
        labelled(args)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (5).to_bytes(4, "big") + bytes([2, 0, 1, 1, 2]))
    names, found = labelled(args)
    assert names[:3] == classes.split()
    assert [found[i] for i in range(5)] == [names[label] for label in (2, 0, 1, 1, 2)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_class_labels_is_found(tmp_path, streaming):
    features = datasets.Features(
        {"kind": datasets.ClassLabel(names=["odd", "even", "none"]), "image": datasets.Image()}
    )
    rows = {"kind": [(i + 1) % 2 for i in range(9)], "image": [Image.new("L", (8, 8), i) for i in range(9)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    args = DataArguments(dataset_name=str(tmp_path), streaming=streaming)
    classes, found = labelled(args)
    assert classes == ["odd", "even", "none"]
    assert found.items() <= {i: ("even", "odd")[i % 2] for i in range(9)}.items()
    assert len(found) == 9
    with pytest.raises(InputError, match=r"no column 'label'.*kind, image.*--label_column"):
        labelled(args, "label")


def test_a_row_of_a_stream_without_a_class_is_said_or_left_out(tmp_path):
    """-1 is how datasets of the Hub mark a row that has no label."""
    features = datasets.Features({"kind": datasets.ClassLabel(names=["odd", "even"]), "image": datasets.Image()})
    rows = {"kind": [0, -1, 0], "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(RunError, match="its class is -1, not one of 0 to 1"):
        labelled(DataArguments(dataset_name=str(tmp_path), streaming=True))
    kept = labelled(DataArguments(dataset_name=str(tmp_path), streaming=True, skip_broken_images=True))
    assert kept == (["odd", "even"], {0: "odd", 2: "odd"})


def test_columns_of_names_and_of_integers_are_labels_too(tmp_path):
    features = datasets.Features(
        {"label": datasets.Value("int64"), "name": datasets.Value("string"), "image": datasets.Image()}
    )
    names = ["b", "a", "c"]
    rows = {"label": [2, 0, 5], "name": names, "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    args = DataArguments(dataset_name=str(tmp_path))
    assert labelled(args) == (["0", "1", "2", "3", "4", "5"], {0: "2", 1: "0", 2: "5"})
    assert labelled(args, "name") == (["a", "b", "c"], dict(enumerate(names)))
    with pytest.raises(InputError, match=r"ClassLabel. Without --streaming"):
        labelled(DataArguments(dataset_name=str(tmp_path), streaming=True), "name")


@pytest.mark.parametrize(
    ("kind", "labels", "said"),
    [
        ("int64", [1998, 2001, 2020], "3 different labels, up to 2020. Labels must count from 0, here to 2: number"),
        ("int64", [0, -1, 2], "It holds -1."),
        ("int64", [0, -1, None], "It holds None."),
        ("string", ["a", None, "b"], "It holds None."),
        ("float64", [0.0, 1.0, 2.0], "It holds 0.0."),
    ],
)
def test_columns_that_cannot_be_classes_are_refused(tmp_path, kind, labels, said):
    features = datasets.Features({"label": datasets.Value(kind), "image": datasets.Image()})
    rows = {"label": labels, "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(InputError, match=said):
        labelled(DataArguments(dataset_name=str(tmp_path)))


def test_yes_and_no_are_classes(tmp_path):
    features = datasets.Features({"label": datasets.Value("bool"), "image": datasets.Image()})
    rows = {"label": [True, False, True], "image": [Image.new("L", (8, 8), i) for i in range(3)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = TrainingData(DataArguments(dataset_name=str(tmp_path)), Preprocessing(1, 8, 8), 0, LabelArguments(), **PLAN)
    (batch,) = data.batches(0, 1, None)
    assert data.classes == ["0", "1"]
    assert batch.labels.dtype == torch.int64
    assert dict(zip(numbers(batch), batch.labels.tolist(), strict=True)) == {0: 1, 1: 0, 2: 1}


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
        labelled(DataArguments(dataset_name=str(tmp_path)))


def test_data_without_labels_says_so(tmp_path):
    folder = make_dataset(tmp_path / "digits", 10)
    with pytest.raises(InputError, match=r"no column of class labels.*number, picture"):
        labelled(DataArguments(dataset_name=str(folder)))
