"""Sources: the bytes arrive as they are, what is unusable is named, and nothing leaves its folder."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import REPO, SHARED
from PIL import Image
from servers import bad_line, make_mirror, once, picture, serve

from dit.config import CocoData, FolderData, ShapesData, load_config
from dit.errors import UserError
from dit.sources import coco, fetch, storage
from dit.sources.captions import parse
from dit.sources.dataset import read_metadata, split_by_image
from dit.sources.http import CHUNK, Downloader
from dit.sources.scene import UNSEEN_PAIRS
from dit.sources.storage import StoredImages
from dit.sources.usable import check_image

RUNTIME = replace(load_config(REPO / "params.yaml").runtime, download_connections=4)


def captions_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in read_metadata(folder):
        found.setdefault(entry.image, []).append(entry.text)
    return found


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_are_the_same_on_every_machine_and_show_no_unseen_pair(tmp_path):
    data = ShapesData(source="shapes", num_samples=40, val_fraction=0.25, image_size=64, layout="files", seed=3)
    report = fetch(data, tmp_path / "a", RUNTIME)
    fetch(data, tmp_path / "b", RUNTIME)
    assert (report.images, report.train_images, report.val_images) == (40, 30, 10)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    for entry in read_metadata(tmp_path / "a"):
        assert not {thing.pair for thing in parse(entry.text).things} & UNSEEN_PAIRS


def test_the_split_is_by_image_and_has_both_sides():
    names = [f"images/{k}.jpg" for k in range(10)]
    splits = split_by_image(names, 0.3, seed=0)
    assert sorted(splits) == names and list(splits.values()).count("val") == 3
    assert splits == split_by_image(names[::-1], 0.3, seed=0)
    assert sorted(split_by_image(names[:2], 0.01, seed=0).values()) == ["train", "val"]
    with pytest.raises(UserError, match="at least 2"):
        split_by_image(names[:1], 0.5, seed=0)


# --- folder ---------------------------------------------------------------------------------------------------------


def folder_data(*paths: Path, limit: float = 0.0, layout: str = "files") -> FolderData:
    return FolderData(
        source="folder", paths=tuple(map(str, paths)), val_fraction=0.3, layout=layout, max_bad_fraction=limit, seed=0
    )


def add_pair(folder: Path, name: str, text: str | bytes, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_folder_of_pairs_arrives_byte_for_byte_with_a_caption_per_line(tmp_path):
    mine = tmp_path / "mine"
    add_pair(mine, "cat.jpg", "a cat\n\n  a   small cat \n", picture(1))
    add_pair(mine, "deep/er/DOG.PNG", "a dog", picture(2, kind="PNG"))
    add_pair(mine, "deep/bird.webp", "a bird", picture(3, kind="WEBP"))
    (mine / "alone.jpg").write_bytes(picture(4))
    (mine / "alone_too.txt").write_text("nothing to see")
    report = fetch(folder_data(mine), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {
        "images/cat.jpg": ["a cat", "a small cat"],
        "images/deep/er/DOG.PNG": ["a dog"],
        "images/deep/bird.webp": ["a bird"],
    }
    for name in ("cat.jpg", "deep/er/DOG.PNG", "deep/bird.webp"):
        assert (tmp_path / "out" / "images" / name).read_bytes() == (mine / name).read_bytes()
    assert [Path(name).name for name in report.unpaired] == ["alone.jpg", "alone_too.txt"]


def test_two_folders_may_hold_files_of_the_same_name(tmp_path):
    for k in range(2):
        add_pair(tmp_path / str(k), "x.jpg", f"number {k}", picture(k))
    fetch(folder_data(tmp_path / "0", tmp_path / "1"), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {"images/0/x.jpg": ["number 0"], "images/1/x.jpg": ["number 1"]}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def frames(kind: str) -> bytes:
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    return saved(images[0], kind, save_all=True, append_images=images[1:])


BAD = {
    "frames.png": (frames("PNG"), "an animation of 3 pictures"),
    "frames.webp": (frames("WEBP"), "an animation of 3 pictures"),
    "glass.png": (saved(Image.new("RGBA", (32, 32), (255, 0, 0, 128)), "PNG"), "transparent in places"),
    "hole.png": (saved(Image.new("P", (32, 32)), "PNG", transparency=0), "transparent in places"),
    "zero.jpg": (b"", "empty file"),
    "page.jpg": (b"<html><body>404</body></html>", "a web page"),
    "half.jpg": (picture(5)[:700], "damaged"),
    "text.jpg": (b"this is no picture at all", "not a picture"),
    "dot.png": (picture(6, (1, 1), "PNG"), "only 1 x 1 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_picture_is_recognised(name):
    assert BAD[name][1] in check_image(BAD[name][0])


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.new("RGBA", (32, 32), (255, 0, 0, 255)), "PNG"),
        saved(Image.new("CMYK", (32, 32)), "JPEG"),
        saved(Image.new("L", (32, 32)), "JPEG"),
        saved(Image.new("I;16", (32, 32)), "PNG"),
        frames("MPO"),  # a telephone's JPEG with a second picture behind the first
    ],
)
def test_an_unusual_picture_is_usable(content):
    assert check_image(content) is None


def test_a_decompression_bomb_is_recognised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "decompression bomb" in check_image(picture(7))
    monkeypatch.undo()
    assert check_image(picture(7)) is None


def test_unusable_pairs_are_set_aside_with_a_reason_up_to_a_limit(tmp_path):
    mine = tmp_path / "mine"
    for k in range(4):
        add_pair(mine, f"good{k}.jpg", "fine", picture(k))
    for name, (content, _) in BAD.items():
        add_pair(mine, name, "a caption", content)
    add_pair(mine, "latin.jpg", "caf\xe9".encode("latin-1"), picture(8))
    add_pair(mine, "silent.jpg", " \n", picture(9))
    add_pair(mine, "novel.jpg", "word " * 10_000, picture(10))
    report = fetch(folder_data(mine, limit=0.8), tmp_path / "out", RUNTIME)
    reasons = {Path(row["image"]).name: row["reason"] for row in report.bad}
    assert set(reasons) == {*BAD, "latin.jpg", "silent.jpg", "novel.jpg"}
    assert reasons["novel.jpg"] == "a caption of 10000 words; 1000 are the most"
    assert reasons["latin.jpg"] == "latin.txt is not UTF-8" and reasons["silent.jpg"] == "no caption in silent.txt"
    assert report.images == 4
    with pytest.raises(UserError, match="12 of 16 images are unusable"):
        fetch(folder_data(mine, limit=0.5), tmp_path / "again", RUNTIME)


def write_list(folder: Path, kind: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    else:
        (folder / "metadata.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("kind", "name", "text"), [("jsonl", "file_name", "text"), ("csv", "file_name", "caption"), ("json", "image", "text")]
)
def test_captions_may_be_in_a_list_and_in_txt_files_too(tmp_path, kind, name, text):
    mine = tmp_path / "mine"
    add_pair(mine, "deep/a.jpg", "from the file", picture(1))
    for k, file in enumerate(["deep/b.jpg", "c.jpg"]):
        (mine / file).write_bytes(picture(k + 2))
    rows = [
        ("a.jpg", "from the list"),
        ("b.jpg", 'one, "two"\nand three'),
        ("b.jpg", "again"),
        ("gone.jpg", "x"),
        ("../c.jpg", "y"),
    ]
    write_list(mine / "deep", kind, [{name: file, text: caption, "other": 1} for file, caption in rows])
    report = fetch(folder_data(mine, limit=0.7), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {
        "images/deep/a.jpg": ["from the list", "from the file"],
        "images/deep/b.jpg": ['one, "two" and three', "again"],
    }
    assert [Path(name).name for name in report.unpaired] == ["c.jpg"]
    assert [row["reason"].split(": ")[1] for row in report.bad] == ["no such picture", "does not stay in its folder"]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("metadata.jsonl", b'{"file_name": "a.jpg", "text": "a"}\n{"file_name": ', "is not readable as JSONL"),
        ("metadata.jsonl", b'{"file_name": "a.jpg"}', "line 1: expected file_name and text"),
        ("metadata.jsonl", b'["a.jpg", "a"]', "line 1: expected file_name and text"),
        ("metadata.csv", b"name,what\na.jpg,a\n", "line 2: expected file_name and text"),
        ("metadata.csv", b"file_name,text\na.jpg,caf\xe9\n", "is not UTF-8"),
        ("metadata.json", b"[" * 100_000, "is not readable as JSON"),
        ("metadata.json", b"3", "row 0: expected file_name and text"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_clear_line(tmp_path, file, content, says):
    (tmp_path / "a.jpg").write_bytes(picture(1))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        fetch(folder_data(tmp_path), tmp_path / "out", RUNTIME)
    assert says in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_pairs_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"folder.data.paths: no picture with a .txt beside it"):
        fetch(folder_data(tmp_path), tmp_path / "out", RUNTIME)
    with pytest.raises(UserError, match="is not a folder"):
        fetch(folder_data(tmp_path / "nowhere"), tmp_path / "out", RUNTIME)


# --- coco -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept_downloads(monkeypatch, tmp_path):
    """What is kept between runs, in a place of its own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))


def coco_data(url: str, count: int, **changes) -> CocoData:
    return CocoData(
        **{
            "source": "coco",
            "split": "val2017",
            "num_samples": count,
            "val_fraction": 0.3,
            "base_url": url,
            "captions_per_image": 2,
            "layout": "files",
            "max_bad_fraction": 0.0,
            "seed": 0,
        }
        | changes
    )


NAMES = [f"{k:012d}.jpg" for k in range(8)]


@pytest.mark.usefixtures("kept_downloads")
def test_coco_images_arrive_byte_for_byte_and_a_body_that_ends_early_is_gone_on_with(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror", once("truncate", NAMES[:3])) as (url, log):
        report = fetch(coco_data(url, 8), tmp_path / "out", RUNTIME)
    assert report.images == 8 and report.captions == 16 and not report.bad
    for name in NAMES:
        content = (tmp_path / "mirror" / "val2017" / name).read_bytes()
        assert (tmp_path / "out" / "images" / name).read_bytes() == content
        starts = [start for asked, start in log.asked if asked == name]
        assert starts[0] is None and len(starts) == (2 if name in NAMES[:3] else 1)
        assert len(starts) == 1 or len(content) // 2 - CHUNK < starts[1] <= len(content) // 2
    assert captions_of(tmp_path / "out")[f"images/{NAMES[2]}"] == ["caption 0 of 2", "caption 1 of 2"]
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.version"))


@pytest.mark.usefixtures("kept_downloads")
def test_more_images_fetch_only_those_that_are_missing(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror") as (url, log):
        for folder, seed, count in (("a", 0, 4), ("b", 0, 4), ("c", 1, 4), ("d", 0, 6)):
            before = len(log.asked)
            fetch(coco_data(url, count, seed=seed), tmp_path / folder, RUNTIME)
            if folder == "b":
                assert len(log.asked) == before
        assert sorted(log.names()) == sorted(set(log.names()))
    a, b, c, d = (set(captions_of(tmp_path / folder)) for folder in "abcd")
    assert a == b != c and a < d


@pytest.mark.usefixtures("kept_downloads")
def test_a_download_goes_on_after_a_kill_unless_the_file_has_changed(tmp_path):
    (tmp_path / "mirror").mkdir()
    for name, content in (("same", b"0123456789" * 1000), ("changed", b"abcdefghij" * 1000)):
        (tmp_path / "mirror" / name).write_bytes(content)
        (tmp_path / f"{name}.part").write_bytes(content[:4000])
        (tmp_path / f"{name}.version").write_text(f'"{hashlib.md5(content).hexdigest()}"')
    (tmp_path / "mirror" / "changed").write_bytes(b"something else")
    with serve(tmp_path / "mirror") as (url, log):
        for name in ("same", "changed"):
            assert Downloader("key").save(f"{url}/{name}", tmp_path / name) is None
            assert (tmp_path / name).read_bytes() == (tmp_path / "mirror" / name).read_bytes()
    assert log.asked == [("same", 4000), ("changed", 4000)]


@pytest.mark.usefixtures("kept_downloads")
def test_a_beginning_longer_than_the_whole_is_thrown_away(tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "file").write_bytes(b"short")
    (tmp_path / "file.part").write_bytes(b"longer than that")
    (tmp_path / "file.version").write_text(f'"{hashlib.md5(b"short").hexdigest()}"')
    with serve(tmp_path / "mirror") as (url, _):
        assert Downloader("key").save(f"{url}/file", tmp_path / "file") is None
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.usefixtures("kept_downloads")
def test_both_splits_and_licences(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES[:4])
    make_mirror(tmp_path / "mirror", [f"9{name[1:]}" for name in NAMES[:3]], split="train2017")
    with serve(tmp_path / "mirror") as (url, log):
        report = fetch(coco_data(url, 7, split="both"), tmp_path / "out", RUNTIME)
    assert report.images == 7 and sum(name.startswith("9") for name in log.names()) == 3
    rows = json.loads((tmp_path / "out" / "metadata.json").read_text())
    licences = {row["image"]: row.get("licence") for row in rows}
    assert licences["images/000000000000.jpg"] == "https://example.org/0" and licences["images/000000000003.jpg"] is None


@pytest.mark.usefixtures("kept_downloads")
def test_a_missing_coco_image_is_set_aside(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    (tmp_path / "mirror" / "val2017" / NAMES[5]).unlink()
    with serve(tmp_path / "mirror") as (url, _):
        report = fetch(coco_data(url, 8, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
    assert report.bad == [{"image": NAMES[5], "reason": "the server answers 404 Not Found"}]
    assert report.images == 7


@pytest.mark.usefixtures("kept_downloads")
def test_a_damaged_coco_image_is_asked_for_again_the_next_time(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    good = (tmp_path / "mirror" / "val2017" / NAMES[5]).read_bytes()
    (tmp_path / "mirror" / "val2017" / NAMES[5]).write_bytes(good[:500])
    with serve(tmp_path / "mirror") as (url, _):
        report = fetch(coco_data(url, 8, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
        assert [row["image"] for row in report.bad] == [NAMES[5]] and "damaged" in report.bad[0]["reason"]
        (tmp_path / "mirror" / "val2017" / NAMES[5]).write_bytes(good)
        assert fetch(coco_data(url, 8), tmp_path / "again", RUNTIME).images == 8


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "sub/evil.jpg", "C:evil.jpg", "ev\x00il.jpg", ""])
@pytest.mark.usefixtures("kept_downloads")
def test_a_name_that_leaves_the_folder_is_set_aside_and_not_asked_for(tmp_path, name):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg", name])
    with serve(tmp_path / "mirror") as (url, log):
        report = fetch(coco_data(url, 3, max_bad_fraction=0.4), tmp_path / "out", RUNTIME)
        assert report.bad == [{"image": name, "reason": "its name does not stay in its folder"}]
        assert report.images == 2 and len(log.asked) == 3
        with pytest.raises(UserError, match="coco.data.max_bad_fraction: 1 of 3 images are unusable"):
            fetch(coco_data(url, 3), tmp_path / "out", RUNTIME)


@pytest.mark.usefixtures("kept_downloads")
def test_an_image_that_comes_twice_is_used_once(tmp_path):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg", "1.jpg"])
    with serve(tmp_path / "mirror") as (url, log):
        report = fetch(coco_data(url, 3, max_bad_fraction=0.4), tmp_path / "out", RUNTIME)
    assert report.bad == [{"image": "1.jpg", "reason": "its name comes twice in the annotations"}]
    assert report.images == 2 and log.names().count("1.jpg") == 1


def write_annotations(path: Path, content: object, member: str = "annotations/captions_val2017.json") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content if isinstance(content, bytes) else json.dumps(content))
    return path


def test_an_id_that_comes_twice_is_used_once(tmp_path):
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}, {"id": 6, "file_name": "c.jpg"}]
    rows = [{"id": k, "image_id": image, "caption": "x"} for k, image in enumerate((5, 5, 6))]
    photos = coco.read_captions(write_annotations(tmp_path / "a.zip", {"images": images, "annotations": rows}), ("val2017",))
    assert [(photo.name, photo.problem) for photo in photos] == [
        ("a.jpg", None),
        ("b.jpg", "image id 5 comes twice in the annotations"),
        ("c.jpg", None),
    ]


def test_of_a_zip_with_absolute_paths_nothing_is_unpacked(tmp_path):
    outside = tmp_path / "outside.json"
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    archive = write_annotations(tmp_path / "a.zip", content)
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr(str(outside), "{}")
        more.writestr("../outside.json", "{}")
    before = sorted(tmp_path.rglob("*"))
    assert [photo.captions for photo in coco.read_captions(archive, ("val2017",))] == [["a cat"]]
    assert sorted(tmp_path.rglob("*")) == before
    absolute = write_annotations(tmp_path / "b.zip", content, "/annotations/captions_val2017.json")
    with pytest.raises(UserError, match="no readable annotations/captions_val2017.json"):
        coco.read_captions(absolute, ("val2017",))


@pytest.mark.usefixtures("kept_downloads")
def test_too_many_coco_images_wanted_is_one_clear_line(tmp_path):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg"])
    with serve(tmp_path / "mirror") as (url, _), pytest.raises(UserError, match="3 images wanted, val2017 has 2"):
        fetch(coco_data(url, 3), tmp_path / "out", RUNTIME)


def test_an_unreachable_host_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for attempt in (
        lambda: coco.check_host("http://127.0.0.1:9"),
        lambda: fetch(coco_data("http://127.0.0.1:9", 2), tmp_path, RUNTIME),
    ):
        with pytest.raises(UserError, match=r"coco.data.base_url: cannot reach http://127.0.0.1:9 \(refused\)"):
            attempt()


# --- shards ---------------------------------------------------------------------------------------------------------


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


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "coco-mirror").is_dir(), reason="the folder of real COCO images is not beside this repository")
@pytest.mark.usefixtures("kept_downloads")
def test_all_real_coco_files_arrive_over_a_bad_line_and_are_asked_for_once(tmp_path):
    mirror = SHARED / "coco-mirror"
    files = {path.name: path for split in ("val2017", "train2017") for path in (mirror / split).glob("*.jpg")}
    with serve(mirror, bad_line(0.2)) as (url, log):
        data = coco_data(url, len(files), split="both", captions_per_image=5)
        report = fetch(data, tmp_path / "out", RUNTIME)
        assert min(log.tricks.values()) >= 5, log.tricks
        asked = len(log.asked)
        fetch(data, tmp_path / "again", RUNTIME)
        assert len(log.asked) == asked
    assert report.images == len(files) == 250 and not report.bad
    for folder in ("out", "again"):
        arrived = {path.name: path.read_bytes() for path in (tmp_path / folder / "images").iterdir()}
        assert arrived == {name: path.read_bytes() for name, path in files.items()}
    assert all(texts and all(text == text.strip() for text in texts) for texts in captions_of(tmp_path / "out").values())


@pytest.mark.skipif(
    not (SHARED / "captioned-folder").is_dir(), reason="the folder of real captioned images is not beside this repository"
)
def test_a_real_captioned_folder(tmp_path):
    shutil.copytree(SHARED / "captioned-folder", tmp_path / "mine")
    report = fetch(folder_data(tmp_path / "mine"), tmp_path / "out", RUNTIME)
    assert report.images == 100 and not report.bad
