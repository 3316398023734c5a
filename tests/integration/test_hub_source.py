"""Source `hub`: image–caption data sets in the formats of the Hub, streamed, and nothing read that is not used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest

from dit.config import HubData
from dit.dataset.reader import read_metadata
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.sources import fetch
from dit.sources.hub import open_stream
from helpers import REPO
from helpers.hub_server import serve_hub
from helpers.sources import RUNTIME, captions_of, hub_data, noise_file

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "more": datasets.List(datasets.Value("string")),
        "number": datasets.Value("int64"),
    }
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_parquet(folder: Path, files: int = 3, rows: int = 4, bad: dict[int, dict] | None = None) -> list[bytes]:
    """Parquet files of `rows` rows each; returns the image files. `bad` replaces columns of some rows."""
    images = [noise_file(k, kind="PNG" if k == 1 else "JPEG") for k in range(files * rows)]
    for number in range(files):
        table = {name: [] for name in FEATURES}
        for k in range(number * rows, (number + 1) * rows):
            row = {
                "image": {"bytes": images[k], "path": None},
                "text": f" caption {k}\n",
                "more": [f"a {k}", "", f"b {k}"],
                "number": k,
            }
            for name, value in (row | (bad or {}).get(k, {})).items():
                table[name].append(value)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(
            folder / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        )
    return images


def test_fetch_first_rows(tmp_path):
    images = write_parquet(tmp_path / "set")
    result = fetch(hub_data(tmp_path / "set", caption_columns=("text", "more")), tmp_path / "out", RUNTIME)
    assert (result.images, result.captions, result.rejected) == (6, 18, [])
    names = [f"images/{k:08d}.{'png' if k == 1 else 'jpg'}" for k in range(6)]
    assert captions_of(tmp_path / "out") == {name: [f"caption {k}", f"a {k}", f"b {k}"] for k, name in enumerate(names)}
    for name, content in zip(names, images, strict=False):
        assert (tmp_path / "out" / name).read_bytes() == content


def test_fetch_from_the_home_folder(tmp_path, monkeypatch):
    write_parquet(tmp_path / "set")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows
    assert fetch(hub_data("~/set"), tmp_path / "out", RUNTIME).images == 6
    assert json.loads((tmp_path / "out" / "source.json").read_text())["dataset"] == "~/set"  # without the user's name


def test_fetch_reads_only_what_is_used(tmp_path):
    write_parquet(tmp_path / "set", files=3, rows=6)
    for number in (1, 2):  # whoever touches them fails
        path = tmp_path / "set" / "data" / f"train-{number:05d}-of-00003.parquet"
        path.write_bytes(path.read_bytes()[:50])
    assert fetch(hub_data(tmp_path / "set"), tmp_path / "out", RUNTIME).images == 6
    with pytest.raises(UserError, match=r"breaks off after 6 rows .*lower hub.data.num_samples"):
        fetch(hub_data(tmp_path / "set", num_samples=7), tmp_path / "more", RUNTIME)


def test_fetch_imagefolder_into_shards(tmp_path):
    root = tmp_path / "set" / "train"
    root.mkdir(parents=True)
    lines = []
    for k in range(6):
        (root / f"{k}.jpg").write_bytes(noise_file(k))
        lines.append(json.dumps({"file_name": f"{k}.jpg", "text": f"caption {k}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    for name in "ab":
        fetch(hub_data(tmp_path / "set", storage="shards"), tmp_path / name, RUNTIME)
    assert [entry.text for entry in read_metadata(tmp_path / "a")] == [f"caption {k}" for k in range(6)]
    for k, entry in enumerate(read_metadata(tmp_path / "a")):
        assert StoredImages(tmp_path / "a").read(entry.stored) == noise_file(k)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_fetch_rejects_unusable_rows_up_to_a_limit(tmp_path):
    bad = {
        1: {"image": {"bytes": b"", "path": None}},
        2: {"image": {"bytes": b"<html>", "path": None}},
        3: {"text": None},
        4: {"text": "word " * 2000},
        5: {"image": None},
    }
    write_parquet(tmp_path / "set", bad=bad)
    result = fetch(hub_data(tmp_path / "set", num_samples=12, max_bad_fraction=0.5), tmp_path / "out", RUNTIME)
    assert {row["image"]: row["reason"] for row in result.rejected} == {
        "row 1": "empty file",
        "row 2": "a web page, not an image",
        "row 3": "no caption",
        "row 4": "a caption of 2000 words; 1000 are the most",
        "row 5": "empty file",
    }
    assert result.images == 7
    with pytest.raises(UserError, match="hub.data.max_bad_fraction: 5 of 12 images are unusable"):
        fetch(hub_data(tmp_path / "set", num_samples=12, max_bad_fraction=0.4), tmp_path / "again", RUNTIME)


@pytest.mark.parametrize(
    ("changes", "beginning"),
    [
        ({"dataset": "nobody/nothing"}, "hub.data.dataset: 'nobody/nothing'"),
        ({"split": "test"}, "hub.data.split: 'test': ValueError: Bad split: test. Available splits: ['train']"),
        ({"config": "tiny"}, "hub.data.config: 'tiny': ValueError: BuilderConfig 'tiny' not found. Available: ['default']"),
        ({"image_column": "picture"}, "hub.data.image_column: 'picture': no such column; "),
        ({"caption_columns": ("text", "words")}, "hub.data.caption_columns: 'words': no such column; "),
        ({"num_samples": 13}, "hub.data.num_samples: 13 images wanted, split 'train' has 12"),
    ],
)
def test_fetch_what_cannot_be_had(tmp_path, changes, beginning):
    write_parquet(tmp_path / "set")
    with pytest.raises(UserError) as error:
        fetch(hub_data(tmp_path / "set", **changes), tmp_path / "out", RUNTIME)
    message = str(error.value)
    assert message.startswith(beginning) and "\n" not in message
    if "no such column" in beginning:
        assert message.endswith("has image, text, more, number")


def test_fetch_image_column_of_numbers(tmp_path):
    write_parquet(tmp_path / "set")
    with pytest.raises(UserError, match="hub.data.image_column: 'number' holds int64, and images are needed"):
        fetch(hub_data(tmp_path / "set", image_column="number"), tmp_path / "out", RUNTIME)


def test_fetch_caption_column_of_numbers(tmp_path):
    write_parquet(tmp_path / "set")
    with pytest.raises(UserError, match="column 'number' holds no text"):
        fetch(hub_data(tmp_path / "set", caption_columns=("number",)), tmp_path / "out", RUNTIME)


def test_open_stream_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[hub\]'"):
        open_stream(hub_data("any"))


def test_fetch_images_in_files_of_their_own(tmp_path):
    table = {"image": [str(tmp_path / f"{k}.jpg") for k in range(6)], "text": [f"caption {k}" for k in range(6)]}
    for k in range(6):
        (tmp_path / f"{k}.jpg").write_bytes(noise_file(k))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    fetch(hub_data(tmp_path / "set"), tmp_path / "out", RUNTIME)
    assert [(tmp_path / "out" / f"images/{k:08d}.jpg").read_bytes() for k in range(6)] == [noise_file(k) for k in range(6)]
    (tmp_path / "4.jpg").unlink()
    with pytest.raises(UserError, match=r"breaks off after 4 rows \(FileNotFoundError: .*4.jpg.*\); run again"):
        fetch(hub_data(tmp_path / "set"), tmp_path / "again", RUNTIME)


STREAM = """
import json, sys
from pathlib import Path
from dit.config import HubData
from dit.errors import UserError
from dit.sources import fetch
results = []
for number, data in enumerate(json.loads(sys.argv[2])):
    try:
        results.append(fetch(HubData(**data), Path(sys.argv[1]) / str(number), None).images)
    except UserError as error:
        results.append(str(error))
print("RESULTS" + json.dumps(results))
"""


def stream(home: Path, wanted: list[HubData], **environment: str) -> list:
    """What a fresh process fetches, into home/0, home/1 …; or the error's line. The Hub's library reads HF_… at import."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", STREAM, str(home), json.dumps([asdict(data) for data in wanted])]
    done = subprocess.run(command, capture_output=True, text=True, env=others | settings | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[1])


def test_fetch_over_the_network(tmp_path):
    images = write_parquet(tmp_path / "hub" / "some" / "set")
    with serve_hub(tmp_path / "hub") as (address, hub):
        wanted = [hub_data("some/set", num_samples=4), hub_data("some/set", num_samples=2, revision="v1")]
        assert stream(tmp_path, wanted, HF_ENDPOINT=address) == [4, 2]
        assert {name for name, _ in hub.asked} == {"some/set/data/train-00000-of-00003.parquet"}
    assert [(tmp_path / "0" / entry.image).read_bytes() for entry in read_metadata(tmp_path / "0")] == images[:4]


def test_fetch_refused_by_the_hub(tmp_path):
    write_parquet(tmp_path / "hub" / "some" / "set")
    write_parquet(tmp_path / "hub" / "some" / "gated")
    with serve_hub(tmp_path / "hub") as (address, hub):
        hub.gated.add("some/gated")
        wanted = [hub_data("some/set", revision="v9"), hub_data("some/nothing"), hub_data("some/gated")]
        revision, missing, gated = stream(tmp_path, wanted, HF_ENDPOINT=address)
    assert revision.startswith("hub.data.dataset: 'some/set' ") and "v9" in revision
    for line, name in ((missing, "nothing"), (gated, "gated")):
        assert line.startswith(f"hub.data.dataset: 'some/{name}' ") and "log in with `hf auth login`" in line and "\n" not in line


@pytest.mark.parametrize(
    ("status", "advice"),
    [(403, "log in with `hf auth login`, or set HF_TOKEN"), pytest.param(429, "try again later", marks=pytest.mark.slow)],
)
def test_fetch_refused_with_a_status(tmp_path, status, advice):
    """A Hub that is busy is no wrong id; its library tries again for half a minute first."""
    with serve_hub(tmp_path / "hub") as (address, hub):
        hub.down = status
        (line,) = stream(tmp_path, [hub_data("some/set")], HF_ENDPOINT=address)
    assert line.startswith(f"hub.data.dataset: 'some/set' is not to be had: the Hub answers {status}; ") and line.endswith(advice)


@pytest.mark.parametrize(
    ("environment", "part"),
    [({"HF_ENDPOINT": "http://127.0.0.1:9"}, "check your network"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE")],
)
def test_fetch_without_a_network(tmp_path, environment, part):
    (line,) = stream(tmp_path, [hub_data("some/set")], **environment)
    assert line.startswith("hub.data.dataset: 'some/set' ") and part in line and "\n" not in line
