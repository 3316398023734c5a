"""A folder of one's own images and captions: what is used, and what is rejected and why."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.errors import UserError
from dit.sources import fetch
from dit.sources.folder import find_images
from dit.sources.writer import FetchResult
from dit.utils.files import write_json
from helpers import SHARED
from helpers.images import BAD
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


def test_fetch_folder_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    add_pair(tmp_path / "mine", "cat.jpg", "a cat", noise_file(1))
    add_pair(tmp_path / "mine", "dog.jpg", "a dog", noise_file(2))
    (tmp_path / "mine" / "alone.jpg").write_bytes(noise_file(3))
    result = fetch(folder_data("~/mine"), tmp_path / "out", RUNTIME)
    assert result.images == 2 and result.unpaired == [str(Path("~/mine/alone.jpg"))]
    assert json.loads((tmp_path / "out" / "source.json").read_text())["paths"] == ["~/mine"]  # without the user's name
    with pytest.raises(UserError, match="folder.data.paths: ~nobody-of-that-name/x is not a folder"):
        fetch(folder_data("~nobody-of-that-name/x"), tmp_path / "none", RUNTIME)


def test_fetch_two_folders_with_same_names(tmp_path):
    for k in range(2):
        add_pair(tmp_path / str(k), "x.jpg", f"number {k}", noise_file(k))
    fetch(folder_data(tmp_path / "0", tmp_path / "1"), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {"images/0/x.jpg": ["number 0"], "images/1/x.jpg": ["number 1"]}


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
    with pytest.raises(UserError, match="10 of 14 images are unusable, more than 50.0%; mend or remove them, or raise") as error:
        fetch(folder_data(mine, limit=0.5), tmp_path / "again", RUNTIME)
    assert f"{mine / 'dot.png'}: only 1 x 1 pixels" in str(error.value) and "an animation of 3 images" in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that exists and cannot be read")
def test_fetch_files_that_cannot_be_read(tmp_path):
    for k in range(3):
        add_pair(tmp_path / "mine", f"{k}.jpg", "a caption", noise_file(k))
    for name in ("bad.jpg", "2.txt"):
        (tmp_path / "mine" / name).unlink(missing_ok=True)
        (tmp_path / "mine" / name).symlink_to("/proc/self/mem")
    (tmp_path / "mine" / "bad.txt").write_text("a caption")
    result, _ = fetched(tmp_path)
    reasons = {Path(row["image"]).name: row["reason"] for row in result.rejected}
    assert reasons == {"bad.jpg": "not readable: Input/output error", "2.jpg": "2.txt is not readable: Input/output error"}
    (tmp_path / "mine" / "metadata.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match="metadata.jsonl is not readable: Input/output error"):
        fetched(tmp_path)


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
    reasons = [row["reason"].split(": ")[1] for row in result.rejected]
    assert reasons == ["no such image", "a name that does not stay in its folder"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.jsonl", b'{"file_name": "a.jpg", "text": "a"}\n{"file_name": ', "is not readable as JSONL"),
        ("metadata.jsonl", b'{"file_name": "a.jpg"}', "line 1: expected file_name and text"),
        ("metadata.jsonl", b'["a.jpg", "a"]', "line 1: expected file_name and text"),
        ("metadata.csv", b"name,what\na.jpg,a\n", "line 1: no column file_name or image; it has 'name', 'what'"),
        ("metadata.csv", b"file_name,what\na.jpg,a\n", "line 1: no column text or caption"),
        ("metadata.csv", b"file_name;text\na.jpg;a\n", "line 1: no column file_name or image; separate the columns by commas"),
        ("metadata.csv", b"", "line 1: no column file_name or image; it has nothing"),
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


def fetched(tmp_path: Path, limit: float = 0.9) -> tuple[FetchResult, dict[str, list[str]]]:
    """Fetch `tmp_path`/mine; return the result and the captions by image."""
    result = fetch(folder_data(tmp_path / "mine", limit=limit), tmp_path / "out", RUNTIME)
    return result, captions_of(tmp_path / "out")


def test_fetch_names_that_encode_reads_again(tmp_path):
    names = ["Screenshot 2024-01-05 at 3.45.12\u202fPM.jpg", "a:b.jpg", "caf\u00e9 \u732b.jpg", "new\nline.jpg", "d/\u200bx.jpg"]
    for k, name in enumerate(names):
        add_pair(tmp_path / "mine", name, "a caption", noise_file(k))
    assert set(fetched(tmp_path)[1]) == {f"images/{name}" for name in names}


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).filter(
    lambda name: not name.startswith(".")
)


@settings(max_examples=100, deadline=None)
@given(stem=NAMES, data=st.data())
def test_fetch_any_name(stem, data):
    with TemporaryDirectory() as folder:
        mine = Path(folder, "mine")
        for k, name in enumerate(["one.jpg", "two.jpg", f"{stem}.jpg"]):
            add_pair(mine, name, "a caption", noise_file(k))
        found, result = find_images(folder_data(mine))
        assert len(found) == 3 and not result.unpaired
        result, captions = fetched(Path(folder))  # which reads them as the encode stage does
        assert result.images + len(result.rejected) == 3 and len(captions) == result.images
        assert not result.rejected or ".." in stem.replace("\\", "/").split("/") or "\\" in stem


@pytest.mark.parametrize("captioned", [True, False])
def test_fetch_name_that_is_not_utf8(tmp_path, captioned):
    for k in range(3):
        add_pair(tmp_path / "mine", f"{k}.jpg", "a caption", noise_file(k))
    name = os.fsdecode(b"caf\xe9.jpg")
    if captioned:
        add_pair(tmp_path / "mine", name, "a cafe", noise_file(3))
    else:
        (tmp_path / "mine" / name).write_bytes(noise_file(3))
    result, _ = fetched(tmp_path)
    write_json(tmp_path / "metrics.json", result.metrics())
    assert all(line.isprintable() for line in result.summary()) and result.images == 3
    if captioned:
        assert result.rejected[0]["reason"] == "a name that is not UTF-8; rename it"
    assert (result.rejected[0]["image"] if captioned else result.unpaired[0]).endswith("caf\\udce9.jpg")


def test_fetch_row_of_csv_with_more_fields_than_columns(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.jpg").write_bytes(noise_file(0))
    (tmp_path / "mine" / "metadata.csv").write_text('file_name,text\n0.jpg,"a\ndog"\n0.jpg,a cat, sitting on a mat\n')
    with pytest.raises(UserError, match=r"metadata.csv, line 4: more fields than the 2 columns; put a caption .* into quotes"):
        fetched(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", 'file_name,text\n0.jpg,"a cat\n1.jpg,a dog\n', "line 3 is not readable as CSV: unexpected end of data"),
        ("metadata.csv", 'file_name,text\n0.jpg,a cat\n1.jpg,"a" dog\n', "line 3 is not readable as CSV: "),
        ("metadata.csv", "file_name,text,\n0.jpg,a cat, on a mat\n", "line 2: more fields than the 2 columns"),
        ("metadata.csv", "file_name,text,text\n0.jpg,a,b\n", "line 1: two columns 'text'"),
        ("METADATA.CSV", "name,what\n0.jpg,a\n", "METADATA.CSV, line 1: no column file_name or image"),
        ("metadata.jsonl", '{"file_name": "0.jpg", "text": "a"}\n\n{"file_name" "1.jpg"}\n', "line 3 is not readable as JSONL: "),
    ],
)
def test_fetch_list_names_its_line(tmp_path, name, content, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        fetched(tmp_path)


def test_fetch_rows_without_a_caption(tmp_path):
    (tmp_path / "mine").mkdir()
    for k in range(5):
        (tmp_path / "mine" / f"{k}.jpg").write_bytes(noise_file(k))
    rows = [{"file_name": "0.jpg", "text": None}, {"file_name": "1.jpg", "text": None, "caption": "a cat"}]
    rows += [{"file_name": f"{k}.jpg", "text": ["a dog", "a dog", None]} for k in (2, 3)]
    write_list(tmp_path / "mine", "jsonl", rows)
    result, captions = fetched(tmp_path)
    assert captions == {"images/1.jpg": ["a cat"], "images/2.jpg": ["a dog"], "images/3.jpg": ["a dog"]}
    assert [row["reason"] for row in result.rejected] == ["no caption"] and len(result.unpaired) == 1


def test_fetch_the_text_of_exactly_its_name_wins(tmp_path):
    add_pair(tmp_path / "mine", "CAT.jpg", "exactly", noise_file(0))
    (tmp_path / "mine" / "cat.txt").write_text("nearly")
    add_pair(tmp_path / "mine", "b.jpg", "a dog", noise_file(1))
    (tmp_path / "mine" / "c\u202fd.jpg").write_bytes(noise_file(2))
    (tmp_path / "mine" / "C D.TXT").write_text("with a blank")
    (tmp_path / "mine" / "wide.jpg").write_bytes(noise_file(3))
    (tmp_path / "mine" / "wide.txt").write_bytes("a cat".encode("utf-16-le"))
    result, captions = fetched(tmp_path)
    assert captions["images/CAT.jpg"] == ["exactly"] and captions["images/c\u202fd.jpg"] == ["with a blank"]
    assert [Path(name).name for name in result.unpaired] == ["cat.txt"]
    assert [row["reason"] for row in result.rejected] == ["wide.txt is not UTF-8"]


def test_fetch_without_any_caption_says_what_is_there(tmp_path):
    (tmp_path / "mine").mkdir()
    for k in range(3):
        (tmp_path / "mine" / f"{k}.jpg").write_bytes(noise_file(k))
        (tmp_path / "mine" / f"{k}.caption").write_text("a cat")
    with pytest.raises(UserError, match=r"no image with a .txt beside it .*; 3 images without a caption.*; .*\.caption 3"):
        fetched(tmp_path)
    (tmp_path / "mine" / "0.txt").write_text("a cat")
    with pytest.raises(UserError, match=r"1 usable image; at least 2 are needed.*; 2 images without a caption"):
        fetched(tmp_path)


def test_fetch_a_folder_named_twice_is_read_once(tmp_path):
    for k in range(3):
        add_pair(tmp_path / "mine" / "sub", f"{k}.jpg", "a caption", noise_file(k))
    paths = [tmp_path / "mine" / "sub", tmp_path / "mine", tmp_path / "mine" / "sub"]
    assert fetch(folder_data(*paths), tmp_path / "out", RUNTIME).images == 3


def test_fetch_leaves_out_what_is_the_systems(tmp_path):
    for k in range(3):
        add_pair(tmp_path / "mine", f"{k}.jpg", "a caption", noise_file(k))
        for name in (f"._{k}.jpg", f"__MACOSX/{k}.jpg", f".thumbnails/{k}.jpg", f"@eaDir/{k}.jpg"):
            add_pair(tmp_path / "mine", name, "no caption", b"Mac OS X")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "0.jpg:Zone.Identifier"):
        (tmp_path / "mine" / name).write_bytes(b"?")
    result, captions = fetched(tmp_path, limit=0)
    assert sorted(captions) == [f"images/{k}.jpg" for k in range(3)]
    assert not result.unpaired and not result.other_files


def test_fetch_follows_links_once(tmp_path):
    for k in range(3):
        add_pair(tmp_path / "elsewhere" / str(k), f"{k}.jpg", "a caption", noise_file(k))
    add_pair(tmp_path / "mine" / "real", "3.jpg", "a caption", noise_file(3))
    for name in ("first", "second"):  # both lead to the same folder
        (tmp_path / "mine" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "mine" / "again").symlink_to(tmp_path / "mine" / "real")
    (tmp_path / "mine" / "part").symlink_to(tmp_path / "elsewhere" / "1")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "mine")
    (tmp_path / "mine" / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "mine" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "mine" / "pipe.jpg")
    result, captions = fetched(tmp_path)
    assert [about["count"] for about in result.other_files.values()] == [3]
    assert sorted(captions) == ["images/first/0/0.jpg", "images/first/1/1.jpg", "images/first/2/2.jpg", "images/real/3.jpg"]
    assert not result.unpaired


def test_fetch_says_what_it_leaves_out(tmp_path):
    for k in range(10):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / f"{k}.jpg").write_bytes(noise_file(k))
        (tmp_path / "mine" / f"{k}.{'txt' if k < 2 else 'caption'}").write_text("one\ntwo\nthree" if k else "one")
    for k in range(12):
        (tmp_path / "mine" / f"IMG_{k}.HEIC").write_bytes(b"heic")
    (tmp_path / "mine" / "alone.txt").write_text("alone")
    result, _ = fetched(tmp_path)
    mine = tmp_path / "mine"
    assert list(result.summary()) == [
        "2 images, 4 captions (2.0 an image)",
        f"8 images without a caption, such as {mine / '2.jpg'}",
        f"1 captions without an image, such as {mine / 'alone.txt'}",
        f"files of kinds that are not read: .heic 12 ({mine / 'IMG_0.HEIC'}), .caption 8 ({mine / '2.caption'})",
        "WARNING: more is left out (20 files) than used (2 images); captions are read from .txt files of the image's name, and "
        "from metadata.jsonl, .csv or .json",
    ]
    assert result.metrics()["other_files"][".caption"] == {"count": 8, "example": str(mine / "2.caption")}


def test_fetch_names_in_lists_as_people_mean_them(tmp_path):
    mine = tmp_path / "mine"
    files = ["sub/0.jpg", "sub/1.JPG", "sub/deep/Caf\u00e9.jpg", "3.jpg", "a.jpg", "A.jpg"]
    for k, name in enumerate(files):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_bytes(noise_file(k))
    given = ["sub\\0.jpg", "./sub/1.jpg", "SUB\\deep\\Cafe\u0301.jpg", " 3.jpg ", "A.jpg", "a.JPG", "sub/0.txt", ".\\..\\3.jpg"]
    (mine / "sub" / "0.txt").write_text("a text file")
    (mine / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in given))
    result, captions = fetched(tmp_path)
    assert captions == {
        "images/sub/0.jpg": ["sub\\0.jpg", "a text file"],
        "images/sub/1.JPG": ["./sub/1.jpg"],
        "images/sub/deep/Caf\u00e9.jpg": ["SUB\\deep\\Cafe\u0301.jpg"],
        "images/3.jpg": ["3.jpg"],
        "images/A.jpg": ["A.jpg"],
    }
    assert [row["reason"].split(": ")[1].split(";")[0] for row in result.rejected] == [
        "2 images have this name, but for upper and lower case",
        "not one of .jpg, .jpeg, .png, .webp",
        "a name that does not stay in its folder",
    ]


def test_fetch_captions_without_control_characters(tmp_path):
    add_pair(
        tmp_path / "mine",
        "0.jpg",
        "a\x1b[31m red\x1b[0m\x0bcat\u200b\u202e\r\n\u2028two\x85lines\ttabbed \u0646\u200c\u0645",
        noise_file(0),
    )
    add_pair(tmp_path / "mine", "1.jpg", "a dog", noise_file(1))
    assert fetched(tmp_path)[1]["images/0.jpg"] == ["a red cat", "two lines tabbed \u0646\u200c\u0645"]


def test_fetch_doubles_are_counted(tmp_path):
    for k, seed in enumerate([1, 2, 1, 3, 1, 2]):
        add_pair(tmp_path / "mine", f"{k}.jpg", "a caption", noise_file(seed))
    result, _ = fetched(tmp_path)
    assert result.double_images == 5 and any("5 images have the same bytes as another one" in line for line in result.summary())


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
