"""Raw images as loose files or in WebDataset shards."""

from __future__ import annotations

import json
import pickle
import tarfile

import pytest

from dit.dataset import storage
from dit.dataset.reader import read_metadata
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.sources import fetch
from helpers.servers import picture
from helpers.sources import RUNTIME, add_pair, folder_data


def test_both_layouts_hold_the_same_images_under_the_same_names(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    for k in range(7):
        add_pair(mine, f"deep/{k}.a.JPG", f"number {k}\nagain {k}", picture(k))
    monkeypatch.setattr(storage, "SHARD_BYTES", 6 * len(picture(0)))
    for layout in ("files", "shards"):
        fetch(folder_data(mine, layout=layout), tmp_path / layout, RUNTIME)
    rows = {layout: read_metadata(tmp_path / layout) for layout in ("files", "shards")}
    named = {layout: [(row.image, row.text, row.split) for row in rows[layout]] for layout in rows}
    assert named["files"] == named["shards"]
    shards = sorted((tmp_path / "shards").rglob("*.tar"))
    assert len(shards) > 1 and all(shard.stat().st_size < 6 * len(picture(0)) + 4 * tarfile.RECORDSIZE for shard in shards)
    for row in rows["shards"]:
        content = (mine / row.image.removeprefix("images/")).read_bytes()
        assert StoredImages(tmp_path / "shards").read(row.stored) == content
        assert StoredImages(tmp_path / "files").read(row.image) == content
    images = StoredImages(tmp_path / "shards")
    first = images.read(rows["shards"][0].stored)
    assert pickle.loads(pickle.dumps(images)).read(rows["shards"][0].stored) == first  # as where workers are not forked
    assert not list((tmp_path / "shards").rglob("*.part")) and not list((tmp_path / "shards").rglob("*.JPG"))


def test_a_shard_is_what_webdataset_reads_and_the_same_every_time(tmp_path):
    for k in range(3):
        add_pair(tmp_path / "mine", f"{k}.jpg", f"number {k}", picture(k))
    for name in "ab":
        fetch(folder_data(tmp_path / "mine", layout="shards"), tmp_path / name, RUNTIME)
    shard = tmp_path / "a" / "shards" / "00000.tar"
    assert shard.read_bytes() == (tmp_path / "b" / "shards" / "00000.tar").read_bytes()
    with tarfile.open(shard) as archive:
        names = archive.getnames()
        about = json.load(archive.extractfile("00000001.json"))
    assert names == [f"{k:08d}.{kind}" for k in range(3) for kind in ("jpg", "json")]
    assert about == {"file_name": "images/1.jpg", "captions": ["number 1"]}


def test_from_20000_images_on_they_are_shards():
    assert storage.choose_layout("auto", 19_999) == "files" and storage.choose_layout("auto", 20_000) == "shards"
    assert storage.choose_layout("files", 10**6) == "files" and storage.choose_layout("shards", 1) == "shards"


def test_an_image_that_has_gone_is_one_clear_line(tmp_path):
    add_pair(tmp_path / "mine", "a.jpg", "a", picture(1))
    add_pair(tmp_path / "mine", "b.jpg", "b", picture(2))
    fetch(folder_data(tmp_path / "mine", layout="shards"), tmp_path / "out", RUNTIME)
    for stored in ("shards/00000.tar/00000009.jpg", "shards/00001.tar/00000000.jpg", "images/gone.jpg"):
        with pytest.raises(UserError, match=f"{stored}: missing or not readable"):
            StoredImages(tmp_path / "out").read(stored)
