"""The rows of a data set in tar shards: lines beside the shards, read one by one, with little memory for many of them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit.dataset import storage
from dit.dataset.reader import StoredRows, by_image, read_images, read_metadata
from dit.errors import UserError
from dit.sources.writer import DatasetWriter, FetchResult
from helpers import REPO
from helpers.sources import folder_data

IMAGES = 23


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """Images with one to three captions each, in several shards; some with a licence."""
    monkeypatch.setattr(storage, "SHARD_BYTES", 12_000)
    return write(tmp_path / "raw", "shards")


def write(folder: Path, layout: str) -> Path:
    writer = DatasetWriter(folder, replace(folder_data(folder, storage=layout), val_fraction=0.3), IMAGES)
    for k in range(IMAGES):
        captions = [f"é {c} of {k}\u2028" for c in range(1 + k % 3)]
        writer.add(f"images/{k}.jpg", bytes([k]) * 600, captions, f"https://example.org/{k}" if k % 2 else "")
    writer.close(FetchResult())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_lie_beside_their_shards(raw):
    names = sorted(content(raw))
    shards = [name for name in names if name.endswith(".tar")]
    assert len(shards) > 3
    lines = [name.replace(".tar", ".jsonl") for name in shards]
    assert names == sorted(["metadata.json", "source.json", *shards, *lines])
    assert json.loads((raw / "metadata.json").read_text()) == {"files": lines, "images": IMAGES, "captions": 45}
    for shard, name in zip(shards, lines, strict=True):
        rows = [json.loads(line) for line in (raw / name).read_bytes().splitlines()]
        assert rows and all(row["stored"].startswith(f"{shard}/") for row in rows)
        assert {row["licence"] for row in rows if "licence" in row} <= {f"https://example.org/{k}" for k in range(1, IMAGES, 2)}


def test_rows_are_those_of_loose_files(raw, tmp_path):
    files = [replace(entry, stored="") for entry in read_metadata(write(tmp_path / "files", "files"))]
    assert files == [replace(entry, stored="") for entry in read_metadata(raw)] and len(files) == 45
    assert sum(entry.split == "val" for entry in files) >= 1


def test_rows_of_a_killed_run_are_no_data_set(tmp_path):
    writer = DatasetWriter(tmp_path / "raw", folder_data(tmp_path, storage="shards"), IMAGES)
    writer.add("images/0.jpg", b"0" * 600, ["killed after this one"])
    with pytest.raises(UserError, match="metadata.json: no such file; run `dvc repro download`"):
        read_images(tmp_path / "raw")
    write(tmp_path / "raw", "shards")  # the same folder again
    write(tmp_path / "other", "shards")
    assert content(tmp_path / "raw") == {
        name: part.replace(b"/other", b"/raw") for name, part in content(tmp_path / "other").items()
    }


def test_read_images_are_lists_of_captions(raw):
    images, expected = read_images(raw), by_image(read_metadata(raw))
    assert isinstance(images, StoredRows) and len(images) == IMAGES
    assert list(images) == expected
    assert [images[k] for k in np.random.default_rng(0).permutation(IMAGES)] == [
        expected[k] for k in np.random.default_rng(0).permutation(IMAGES)
    ]
    for start, end in ((0, 0), (3, 4), (5, 19), (20, 99)):
        assert list(images[start:end]) == expected[start:end] and len(images[start:end]) == len(expected[start:end])
    assert list(images[4:20][2:9]) == expected[6:13]
    assert list(pickle.loads(pickle.dumps(images[3:9]))) == expected[3:9]
    with pytest.raises(IndexError):
        images[IMAGES]


def test_read_images_of_a_folder_of_before(raw):
    """Shards whose rows are all in metadata.json, as versions before wrote them."""
    expected = list(read_images(raw))
    rows = [json.loads(line) for path in sorted(raw.glob("shards/*.jsonl")) for line in path.read_bytes().splitlines()]
    for path in raw.glob("shards/*.jsonl"):
        path.unlink()
    (raw / "metadata.json").write_text(json.dumps(rows))
    assert read_images(raw) == expected
    assert list(read_metadata(raw)) == [entry for entries in expected for entry in entries]


def change(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda raw: (raw / "shards" / "00001.jsonl").unlink(), "00001.jsonl: not readable (No such file or directory)"),
        (lambda raw: change(raw / "shards" / "00001.jsonl", b'"}\n', b""), "00001.jsonl: line 1 is not readable as JSON"),
        (lambda raw: change(raw / "shards" / "00001.jsonl", b'"image"', b'"picture"'), "line 1: expected image, text and split"),
        (lambda raw: change(raw / "shards" / "00001.jsonl", b"images/", b"/etc/"), "line 1: a name that does not stay"),
        (lambda raw: change(raw / "shards" / "00001.jsonl", b'"train"', b'"test"'), "split must be train or val"),
        (lambda raw: (raw / "shards" / "00001.jsonl").write_bytes(b""), "23 images with 45 captions expected, "),
        (lambda raw: change(raw / "metadata.json", b"shards/00001", b"../00001"), "metadata.json: expected a list of captions"),
        (lambda raw: change(raw / "metadata.json", b"23", b'"23"'), "metadata.json: expected a list of captions"),
        (lambda raw: change(raw / "metadata.json", b"files", b"rows"), "metadata.json: expected a list of captions"),
    ],
)
def test_read_images_damaged(raw, harm, says):
    harm(raw)
    with pytest.raises(UserError) as error:
        read_images(raw)
    assert says in str(error.value) and str(error.value).endswith("; run `dvc repro download`") and "\n" not in str(error.value)


def test_read_images_that_change_while_they_are_read(raw):
    images = read_images(raw)
    (raw / "shards" / "00000.jsonl").write_bytes(b"\n" * 99)
    with pytest.raises(UserError, match=r"00000.jsonl: changed while it was read"):
        images[0]


MEASURE = """
import json, sys, tracemalloc
from pathlib import Path
from dit.dataset.reader import Entry, read_images, read_metadata

def measure(read):
    tracemalloc.start()
    kept = read()
    found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept
    return found

folder = Path(sys.argv[1])
objects = measure(lambda: list(read_metadata(folder)))[0]  # first, so that the names that Python keeps once each count
streamed = measure(lambda: sum(isinstance(entry, Entry) for entry in read_metadata(folder)))[1]
indexed = measure(lambda: read_images(folder))[0]
print(json.dumps([streamed, indexed, objects]))
"""


def test_rows_take_little_memory(tmp_path):
    """16 bytes an image, where as objects they take 437 (Python 3.11); and none at all where they are read one by one."""
    count = 20_000
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with (tmp_path / "shards" / f"{number:05d}.jsonl").open("w") as file:
            for k in range(number * count // 2, (number + 1) * count // 2):
                row = {"image": f"images/{k:08d}.jpg", "text": f"caption {k} " + "word " * 12, "split": "train"}
                file.write(json.dumps(row | {"stored": f"shards/{number:05d}.tar/{k:08d}.jpg"}) + "\n")
    files = ["shards/00000.jsonl", "shards/00001.jsonl"]
    (tmp_path / "metadata.json").write_text(json.dumps({"files": files, "images": count, "captions": count}))

    # In a process of its own: what others have interned before decides when Python's table of texts grows.
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, cwd=REPO, check=True)
    streamed, indexed, objects = json.loads(ran.stdout)
    table = 2**22  # of texts that Python keeps once each; it does not grow with what is dropped again
    assert 0 < streamed < table and 16 * count <= indexed < 20 * count + table
    assert objects > 25 * 16 * count
