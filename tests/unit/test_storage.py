"""Images as loose files or in WebDataset shards, and their loading in worker processes."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import tarfile

import pytest
import torch

from dit.dataset import storage
from dit.dataset.image_io import load_crops
from dit.dataset.reader import read_metadata
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.sources import fetch
from helpers.sources import RUNTIME, add_pair, folder_data, noise_file

LAYOUTS = ("files", "shards")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The same seven images in both layouts, in several small shards."""
    for k in range(7):
        add_pair(tmp_path / "mine", f"deep/{k}.a.JPG", f"number {k}\nagain {k}", noise_file(k))
    monkeypatch.setattr(storage, "SHARD_BYTES", 6 * len(noise_file(0)))
    for layout in LAYOUTS:
        fetch(folder_data(tmp_path / "mine", storage=layout), tmp_path / layout, RUNTIME)
    return tmp_path


def test_layouts_have_the_same_metadata(stored):
    files, shards = ([(row.image, row.text, row.split) for row in read_metadata(stored / layout)] for layout in LAYOUTS)
    assert files == shards


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_images_read_bytes(stored, layout):
    images = StoredImages(stored / layout)
    for row in read_metadata(stored / layout):
        assert images.read(row.stored) == (stored / "mine" / row.image.removeprefix("images/")).read_bytes()


def test_shards_are_limited_in_size_and_complete(stored):
    shards = [path for path in (stored / "shards").rglob("*") if path.is_file() and path.suffix not in (".json", ".jsonl")]
    assert len(shards) > 1 and {path.suffix for path in shards} == {".tar"}
    assert all(path.stat().st_size < 6 * len(noise_file(0)) + 4 * tarfile.RECORDSIZE for path in shards)


def test_stored_images_are_pickled(stored):
    images = StoredImages(stored / "shards")
    where = next(read_metadata(stored / "shards")).stored
    first = images.read(where)
    assert pickle.loads(pickle.dumps(images)).read(where) == first


def test_load_crops_spawn(stored):
    """Spawned workers, as on Windows and macOS, get all that they need by pickling."""
    names = list(dict.fromkeys((row.image, row.stored) for row in read_metadata(stored / "shards")))
    batches = [names[:3], names[3:]]
    here = list(load_crops(stored / "shards", batches, [(16, 16)], crops=1))
    usual = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = list(load_crops(stored / "shards", [*batches, batches[0]], [(16, 16)], crops=1, workers=2))
    finally:
        multiprocessing.set_start_method(usual, force=True)
    for (pixels, digests, sides), (others, other_digests, other_sides) in zip(here, spawned, strict=False):
        assert torch.equal(pixels, others) and digests == other_digests and sides == other_sides


def test_shards_are_deterministic_webdataset(tmp_path):
    for k in range(3):
        add_pair(tmp_path / "mine", f"{k}.jpg", f"number {k}", noise_file(k))
    for name in "ab":
        fetch(folder_data(tmp_path / "mine", storage="shards"), tmp_path / name, RUNTIME)
    shard = tmp_path / "a" / "shards" / "00000.tar"
    assert shard.read_bytes() == (tmp_path / "b" / "shards" / "00000.tar").read_bytes()
    with tarfile.open(shard) as archive:
        names = archive.getnames()
        about = json.load(archive.extractfile("00000001.json"))
    assert names == [f"{k:08d}.{kind}" for k in range(3) for kind in ("jpg", "json")]
    assert about == {"file_name": "images/1.jpg", "captions": ["number 1"]}


@pytest.mark.parametrize(
    ("layout", "count", "expected"),
    [("auto", 19_999, "files"), ("auto", 20_000, "shards"), ("files", 10**6, "files"), ("shards", 1, "shards")],
)
def test_choose_storage(layout, count, expected):
    assert storage.choose_storage(layout, count) == expected


@pytest.mark.parametrize("where", ["shards/00000.tar/00000009.jpg", "shards/99999.tar/00000000.jpg", "images/gone.jpg"])
def test_stored_images_missing(stored, where):
    with pytest.raises(UserError, match=f"{where}: missing or not readable"):
        StoredImages(stored / "shards").read(where)


def test_stored_images_truncated_shard(stored):
    shard = stored / "shards" / "shards" / "00000.tar"
    images = StoredImages(stored / "shards")
    images.read("shards/00000.tar/00000000.jpg")
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match="missing or not readable"):
        images.read("shards/00000.tar/00000000.jpg")
