"""A folder of one's own images and captions: what is used, and what is rejected and why."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from dit.dataset.filters import check_image
from dit.errors import UserError
from dit.sources import fetch
from helpers import SHARED
from helpers.sources import RUNTIME, add_pair, captions_of, folder_data, noise_file


def test_fetch_folder_of_pairs(tmp_path):
    mine = tmp_path / "mine"
    add_pair(mine, "cat.jpg", "a cat\n\n  a   small cat \n", noise_file(1))
    add_pair(mine, "deep/er/DOG.PNG", "a dog", noise_file(2, kind="PNG"))
    add_pair(mine, "deep/bird.webp", "a bird", noise_file(3, kind="WEBP"))
    (mine / "alone.jpg").write_bytes(noise_file(4))
    (mine / "alone_too.txt").write_text("nothing to see")
    result = fetch(folder_data(mine), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {
        "images/cat.jpg": ["a cat", "a small cat"],
        "images/deep/er/DOG.PNG": ["a dog"],
        "images/deep/bird.webp": ["a bird"],
    }
    for name in ("cat.jpg", "deep/er/DOG.PNG", "deep/bird.webp"):
        assert (tmp_path / "out" / "images" / name).read_bytes() == (mine / name).read_bytes()
    assert [Path(name).name for name in result.unpaired] == ["alone.jpg", "alone_too.txt"]


def test_fetch_two_folders_with_same_names(tmp_path):
    for k in range(2):
        add_pair(tmp_path / str(k), "x.jpg", f"number {k}", noise_file(k))
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
    "frames.png": (frames("PNG"), "an animation of 3 images"),
    "frames.webp": (frames("WEBP"), "an animation of 3 images"),
    "glass.png": (saved(Image.new("RGBA", (32, 32), (255, 0, 0, 128)), "PNG"), "transparent in places"),
    "hole.png": (saved(Image.new("P", (32, 32)), "PNG", transparency=0), "transparent in places"),
    "zero.jpg": (b"", "empty file"),
    "page.jpg": (b"<html><body>404</body></html>", "a web page"),
    "half.jpg": (noise_file(5)[:700], "damaged"),
    "text.jpg": (b"this is no image at all", "not an image"),
    "dot.png": (noise_file(6, (1, 1), "PNG"), "only 1 x 1 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_check_image_unusable(name):
    assert BAD[name][1] in check_image(BAD[name][0])


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.new("RGBA", (32, 32), (255, 0, 0, 255)), "PNG"),
        saved(Image.new("CMYK", (32, 32)), "JPEG"),
        saved(Image.new("L", (32, 32)), "JPEG"),
        saved(Image.new("I;16", (32, 32)), "PNG"),
        frames("MPO"),  # a telephone's JPEG with a second image behind the first
    ],
)
def test_check_image_unusual(content):
    assert check_image(content) is None


def test_check_image_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "decompression bomb" in check_image(noise_file(7))
    monkeypatch.undo()
    assert check_image(noise_file(7)) is None


def test_fetch_rejects_unusable_pairs_up_to_a_limit(tmp_path):
    mine = tmp_path / "mine"
    for k in range(4):
        add_pair(mine, f"good{k}.jpg", "fine", noise_file(k))
    for name, (content, _) in BAD.items():
        add_pair(mine, name, "a caption", content)
    add_pair(mine, "latin.jpg", "caf\xe9".encode("latin-1"), noise_file(8))
    add_pair(mine, "silent.jpg", " \n", noise_file(9))
    add_pair(mine, "novel.jpg", "word " * 10_000, noise_file(10))
    result = fetch(folder_data(mine, limit=0.8), tmp_path / "out", RUNTIME)
    reasons = {Path(row["image"]).name: row["reason"] for row in result.rejected}
    assert set(reasons) == {*BAD, "latin.jpg", "silent.jpg", "novel.jpg"}
    assert reasons["novel.jpg"] == "a caption of 10000 words; 1000 are the most"
    assert reasons["latin.jpg"] == "latin.txt is not UTF-8" and reasons["silent.jpg"] == "no caption in silent.txt"
    assert result.images == 4
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
def test_fetch_captions_of_lists_and_txt_files(tmp_path, kind, name, text):
    mine = tmp_path / "mine"
    add_pair(mine, "deep/a.jpg", "from the file", noise_file(1))
    for k, file in enumerate(["deep/b.jpg", "c.jpg"]):
        (mine / file).write_bytes(noise_file(k + 2))
    rows = [
        ("a.jpg", "from the list"),
        ("b.jpg", 'one, "two"\nand three'),
        ("b.jpg", "again"),
        ("gone.jpg", "x"),
        ("../c.jpg", "y"),
    ]
    write_list(mine / "deep", kind, [{name: file, text: caption, "other": 1} for file, caption in rows])
    result = fetch(folder_data(mine, limit=0.7), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {
        "images/deep/a.jpg": ["from the list", "from the file"],
        "images/deep/b.jpg": ['one, "two" and three', "again"],
    }
    assert [Path(name).name for name in result.unpaired] == ["c.jpg"]
    assert [row["reason"].split(": ")[1] for row in result.rejected] == ["no such image", "does not stay in its folder"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
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
def test_fetch_unreadable_list(tmp_path, file, content, message):
    (tmp_path / "a.jpg").write_bytes(noise_file(1))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        fetch(folder_data(tmp_path), tmp_path / "out", RUNTIME)
    assert message in str(error.value) and file in str(error.value) and "\n" not in str(error.value)


def test_fetch_folder_without_pairs(tmp_path):
    with pytest.raises(UserError, match=r"folder.data.paths: no image with a .txt beside it"):
        fetch(folder_data(tmp_path), tmp_path / "out", RUNTIME)


def test_fetch_missing_folder(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        fetch(folder_data(tmp_path / "nowhere"), tmp_path / "out", RUNTIME)


@pytest.mark.skipif(
    not (SHARED / "captioned-folder").is_dir(), reason="the folder of real captioned images is not beside this repository"
)
def test_fetch_real_folder(tmp_path):
    shutil.copytree(SHARED / "captioned-folder", tmp_path / "mine")
    result = fetch(folder_data(tmp_path / "mine"), tmp_path / "out", RUNTIME)
    assert result.images == 100 and not result.rejected
