"""Images on remote storage: in memory through fsspec, and on a local HTTP server."""

import functools
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from fsspec.registry import known_implementations
from PIL import Image
from tiny import finetune_flags, largest_difference, weights, write_images, write_shard

from ddgan import finetune_model
from ddgan.core.errors import InputError
from ddgan.core.files import location_name
from ddgan.data import remote
from ddgan.data.images import open_image
from ddgan.data.remote import local_copy
from ddgan.data.sources import open_source, open_stream
from ddgan.training.arguments import DataArguments
from ddgan.training.model_card import settings_for_card


def write_table(path: Path, values: range) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    rows = {"image": [Image.new("L", (8, 8), i) for i in values], "label": [i % 2 for i in values]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Two parquet files and two WebDataset shards of 9 images, an .npz and a .zip file, and a file that is damaged."""
    folder = tmp_path_factory.mktemp("files")
    for i, values in enumerate((range(4), range(4, 9))):
        write_table(folder / f"train-0{i}.parquet", values)
        write_shard(folder / f"train-0{i}.tar", values)
    np.savez(folder / "images.npz", arr_0=np.repeat(np.arange(9, dtype=np.uint8), 64).reshape(9, 8, 8))
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(9):
            Image.new("L", (8, 8), i).save(tmp_path_factory.getbasetemp() / "image.png")
            archive.write(tmp_path_factory.getbasetemp() / "image.png", f"{i}.png")
    (folder / "damaged.parquet").write_bytes((folder / "train-00.parquet").read_bytes()[:-100])
    return folder


@pytest.fixture(params=["memory", "http"])
def storage(request, files, tmp_path, monkeypatch) -> Iterator[str]:
    """URL of a folder with these files."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    if request.param == "memory":
        system, name = fsspec.filesystem("memory"), tmp_path.name
        for path in files.iterdir():
            system.pipe(f"/{name}/{path.name}", path.read_bytes())
        yield f"memory://{name}"
        system.rm(f"/{name}", recursive=True)
        return
    pytest.importorskip("aiohttp")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def pixel(cell) -> int:
    return int(np.asarray(open_image(cell)).flat[0])


@pytest.mark.parametrize("name", ["train-{00..01}.parquet", "train-*.parquet", "train-{00..01}.tar"])
def test_files_are_read_and_streamed_from_urls(storage, name):
    source = open_source(f"{storage}/{name}")
    assert sorted(pixel(source[i]) for i in range(len(source))) == list(range(9))
    labels = source.labels(None)
    assert labels.numbers is not None
    assert list(labels.numbers) == [pixel(source[i]) % 2 for i in range(9)]
    stream = open_stream(f"{storage}/{name}")
    assert sorted(pixel(row[stream.image_column]) for row in stream.select([stream.image_column])) == list(range(9))


def test_single_files_are_read_from_urls(storage):
    for name, count in (("train-00.parquet", 4), ("train-01.tar", 5), ("images.npz", 9), ("images.zip", 9)):
        source = open_source(f"{storage}/{name}")
        assert len({pixel(source[i]) for i in range(len(source))}) == len(source) == count


def test_a_stream_from_urls_trains_as_from_files(storage, files, tiny_model, tmp_path):
    for name, place in (("local", files), ("remote", storage)):
        data = ("--dataset_name", f"{place}/train-00.parquet", "--streaming", "--max_train_steps", 2)
        finetune_model.main(finetune_flags(tiny_model, files, tmp_path / name, *data, "--batch_size", 2))
    assert largest_difference(weights(tmp_path / "local"), weights(tmp_path / "remote")) == 0
    card = (tmp_path / "remote" / "README.md").read_text()
    assert "train-00.parquet" in card and storage not in card


@pytest.mark.parametrize("open_kind", [open_source, open_stream])
def test_files_that_cannot_be_read_are_named(storage, open_kind):
    for name in ("nothing.parquet", "nothing-*.parquet", "damaged.parquet"):
        with pytest.raises(InputError, match=r"://.*\.parquet cannot be read as a \.parquet file"):
            open_kind(f"{storage}/{name}")
    with pytest.raises(
        InputError, match=r"://.*/folder is not the URL of files of images \(\.parquet, \.arrow, \.tar"
    ):
        open_kind(f"{storage}/folder")


def test_an_empty_range_is_refused():
    with pytest.raises(InputError, match=r"The range \{063\.\.000\} in memory://a-\{063\.\.000\}\.tar is empty"):
        open_source("memory://a-{063..000}.tar")


@pytest.mark.parametrize(
    ("location", "revision", "path"),
    [
        ("hf://datasets/ann/digits/a/b.npz", None, "a/b.npz"),
        ("hf://datasets/ann/digits@v1/b.npz", "v1", "b.npz"),
        ("hf://datasets/ann/digits@refs/pr/1/b.npz", "refs/pr/1", "b.npz"),
        ("hf://datasets/ann/digits@refs%2Fpr%2F1/b.npz", "refs/pr/1", "b.npz"),
    ],
)
def test_a_file_on_the_hub_is_downloaded_from_its_revision(monkeypatch, location, revision, path):
    requested = {}
    monkeypatch.setattr(remote, "hf_hub_download", lambda *names, **more: requested.update(more, names=names) or "/x")
    local_copy(location)
    assert requested == {"names": ("ann/digits", path), "repo_type": "dataset", "revision": revision}


def test_an_array_that_does_not_exist_is_named(storage):
    with pytest.raises(InputError, match=r"nothing\.npz cannot be downloaded \(FileNotFoundError"):
        open_source(f"{storage}/nothing.npz")


def test_urls_without_a_driver_are_refused_in_one_paragraph(tiny_model, tmp_path, monkeypatch):
    def flags(*data) -> list[str]:
        return finetune_flags(tiny_model, tmp_path, tmp_path / "run", "--dataset_name", *data)

    monkeypatch.setitem(known_implementations, "s3", {"class": "nowhere.S3", "err": "Install s3fs"})
    with pytest.raises(
        InputError, match=r"--dataset_name s3://a/b.parquet: reading s3:// needs .*Install s3fs\. Inst"
    ):
        finetune_model.main(flags("s3://a/b.parquet"))
    with pytest.raises(InputError, match=r"--dataset_name tape://a/b.tar: there is no storage tape://"):
        finetune_model.main(flags("tape://a/b.tar"))
    with pytest.raises(InputError, match=r"--train_data_dir memory://a/b is a URL: pass it with --dataset_name"):
        finetune_model.main(finetune_flags(tiny_model, "memory://a/b", tmp_path / "run"))
    with pytest.raises(InputError, match=r"--start_model memory://a/b: there is no such file or folder"):
        finetune_model.main(finetune_flags("memory://a/b", write_images(tmp_path / "i", 1), tmp_path / "run"))


def test_the_query_of_a_url_is_not_on_the_card():
    args = DataArguments(dataset_name="https://example.org/folder/train.parquet?signature=secret")
    assert settings_for_card(args)["dataset_name"] == "train.parquet"


def test_the_query_of_a_url_is_not_part_of_its_name():
    assert location_name("https://host/images/train.parquet?X-Signature=secret") == "train.parquet"
    assert location_name("s3://bucket/train-{00..63}.tar") == "train-{00..63}.tar"
