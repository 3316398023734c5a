"""Source `hub`: image–caption data sets in the formats of the Hub, streamed, and nothing read that is not used."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from PIL import Image

from dit.config import HubData, load_config
from dit.dataset.reader import read_metadata
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.sources import fetch
from helpers import REPO
from helpers.hub_server import serve_hub
from helpers.servers import picture

PARAMS = load_config(REPO / "params.yaml")
RUNTIME = PARAMS.runtime
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


def hub_data(folder: Path | str, **changes) -> HubData:
    plain = {"dataset": str(folder), "num_samples": 6, "val_fraction": 0.3, "max_bad_fraction": 0.0, "layout": "files"}
    return replace(PARAMS.hub.data, **plain | changes)


def write_parquet(folder: Path, files: int = 3, rows: int = 4, bad: dict[int, dict] | None = None) -> list[bytes]:
    """Parquet files of `rows` rows each; returns the pictures' bytes. `bad` replaces columns of some rows."""
    pictures = [picture(k, kind="PNG" if k == 1 else "JPEG") for k in range(files * rows)]
    for number in range(files):
        table = {name: [] for name in FEATURES}
        for k in range(number * rows, (number + 1) * rows):
            row = {
                "image": {"bytes": pictures[k], "path": None},
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
    return pictures


def captions_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in read_metadata(folder):
        found.setdefault(entry.image, []).append(entry.text)
    return found


def test_the_first_rows_arrive_byte_for_byte_with_the_captions_of_all_columns(tmp_path):
    pictures = write_parquet(tmp_path / "set")
    report = fetch(hub_data(tmp_path / "set", caption_columns=("text", "more")), tmp_path / "out", RUNTIME)
    assert (report.images, report.captions, report.bad) == (6, 18, [])
    names = [f"images/{k:08d}.{'png' if k == 1 else 'jpg'}" for k in range(6)]
    assert captions_of(tmp_path / "out") == {name: [f"caption {k}", f"a {k}", f"b {k}"] for k, name in enumerate(names)}
    for name, content in zip(names, pictures, strict=False):
        assert (tmp_path / "out" / name).read_bytes() == content


def test_what_is_not_used_is_not_read(tmp_path):
    write_parquet(tmp_path / "set", files=3, rows=6)
    for number in (1, 2):  # whoever touches them fails
        path = tmp_path / "set" / "data" / f"train-{number:05d}-of-00003.parquet"
        path.write_bytes(path.read_bytes()[:50])
    assert fetch(hub_data(tmp_path / "set"), tmp_path / "out", RUNTIME).images == 6
    with pytest.raises(UserError, match=r"breaks off after row 5 .*lower hub.data.num_samples"):
        fetch(hub_data(tmp_path / "set", num_samples=7), tmp_path / "more", RUNTIME)


def test_an_imagefolder_is_read_too_and_the_layout_may_be_shards(tmp_path):
    root = tmp_path / "set" / "train"
    root.mkdir(parents=True)
    lines = []
    for k in range(6):
        (root / f"{k}.jpg").write_bytes(picture(k))
        lines.append(json.dumps({"file_name": f"{k}.jpg", "text": f"caption {k}"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    for name in "ab":
        fetch(hub_data(tmp_path / "set", layout="shards"), tmp_path / name, RUNTIME)
    assert [entry.text for entry in read_metadata(tmp_path / "a")] == [f"caption {k}" for k in range(6)]
    for k, entry in enumerate(read_metadata(tmp_path / "a")):
        assert StoredImages(tmp_path / "a").read(entry.stored) == picture(k)
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_unusable_rows_are_set_aside_with_a_reason_up_to_a_limit(tmp_path):
    bad = {
        1: {"image": {"bytes": b"", "path": None}},
        2: {"image": {"bytes": b"<html>", "path": None}},
        3: {"text": None},
        4: {"text": "word " * 2000},
        5: {"image": None},
    }
    write_parquet(tmp_path / "set", bad=bad)
    report = fetch(hub_data(tmp_path / "set", num_samples=12, max_bad_fraction=0.5), tmp_path / "out", RUNTIME)
    assert {row["image"]: row["reason"] for row in report.bad} == {
        "row 1": "empty file",
        "row 2": "a web page, not a picture",
        "row 3": "no caption",
        "row 4": "a caption of 2000 words; 1000 are the most",
        "row 5": "empty file",
    }
    assert report.images == 7
    with pytest.raises(UserError, match="hub.data.max_bad_fraction: 5 of 12 images are unusable"):
        fetch(hub_data(tmp_path / "set", num_samples=12, max_bad_fraction=0.4), tmp_path / "again", RUNTIME)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": "nobody/nothing"}, "hub.data.dataset: 'nobody/nothing'"),
        ({"split": "test"}, "hub.data.split: 'test': ValueError: Bad split: test. Available splits: ['train']"),
        ({"config": "tiny"}, "hub.data.config: 'tiny': ValueError: BuilderConfig 'tiny' not found. Available: ['default']"),
        ({"image_column": "picture"}, "hub.data.image_column: 'picture': no such column; "),
        ({"caption_columns": ("text", "words")}, "hub.data.caption_columns: 'words': no such column; "),
        ({"num_samples": 13}, "hub.data.num_samples: 13 images wanted, split 'train' has 12"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(tmp_path, changes, says):
    write_parquet(tmp_path / "set")
    with pytest.raises(UserError) as error:
        fetch(hub_data(tmp_path / "set", **changes), tmp_path / "out", RUNTIME)
    message = str(error.value)
    assert message.startswith(says) and "\n" not in message
    if "no such column" in says:
        assert message.endswith("has image, text, more, number")


def test_columns_that_hold_something_else_are_named(tmp_path):
    write_parquet(tmp_path / "set")
    with pytest.raises(UserError, match="hub.data.image_column: 'number' holds int64, and images are needed"):
        fetch(hub_data(tmp_path / "set", image_column="number"), tmp_path / "out", RUNTIME)
    with pytest.raises(UserError, match="column 'number' holds no text"):
        fetch(hub_data(tmp_path / "set", caption_columns=("number",)), tmp_path / "out", RUNTIME)


def test_without_the_library_the_line_says_what_to_install(tmp_path):
    script = (
        "import sys; sys.modules['datasets'] = None\n"
        "from dit.config import load_config\nfrom dit.sources.hub import open_stream\nfrom dit.errors import UserError\n"
        "try:\n    open_stream(load_config(sys.argv[1]).hub.data)\nexcept UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(REPO / "params.yaml")], cwd=REPO, capture_output=True, text=True)
    assert "pip install -c constraints.txt -e '.[hub]'" in done.stdout, done.stderr


def test_a_picture_in_a_file_of_its_own_keeps_its_bytes(tmp_path):
    with Image.open(io.BytesIO(picture(1))) as image:
        assert image.format == "JPEG"
    table = {"image": [str(tmp_path / f"{k}.jpg") for k in range(6)], "text": [f"caption {k}" for k in range(6)]}
    for k in range(6):
        (tmp_path / f"{k}.jpg").write_bytes(picture(k))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "set" / "train.parquet")
    fetch(hub_data(tmp_path / "set"), tmp_path / "out", RUNTIME)
    assert [(tmp_path / "out" / f"images/{k:08d}.jpg").read_bytes() for k in range(6)] == [picture(k) for k in range(6)]


STREAM = """
import json, sys
from dataclasses import replace
from pathlib import Path
from dit.config import load_config
from dit.errors import UserError
from dit.sources import fetch
params = load_config(sys.argv[1])
results = []
for number, changes in enumerate(json.loads(sys.argv[3])):
    try:
        data = replace(params.hub.data, layout="files", max_bad_fraction=0.0, **changes)
        results.append(fetch(data, Path(sys.argv[2]) / str(number), params.runtime).images)
    except UserError as error:
        results.append(str(error))
print("RESULTS" + json.dumps(results))
"""


def stream(home: Path, wanted: list[dict], **environment: str) -> list:
    """What a fresh process fetches, into home/0, home/1 …; or the error's line. The Hub's library reads HF_… at import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_HOME": str(home / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", STREAM, str(REPO / "params.yaml"), str(home), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | settings | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[1])


def test_over_the_network_only_the_files_that_are_used_are_asked_for(tmp_path):
    pictures = write_parquet(tmp_path / "hub" / "some" / "set")
    write_parquet(tmp_path / "hub" / "some" / "gated")
    with serve_hub(tmp_path / "hub") as (address, hub):
        hub.gated.add("some/gated")
        wanted = [
            {"dataset": "some/set", "num_samples": 4},
            {"dataset": "some/set", "num_samples": 2, "revision": "v1"},
            {"dataset": "some/set", "num_samples": 2, "revision": "v9"},
            {"dataset": "some/nothing", "num_samples": 2},
            {"dataset": "some/gated", "num_samples": 2},
        ]
        results = stream(tmp_path, wanted, HF_ENDPOINT=address)
        assert {name for name, _ in hub.asked} == {"some/set/data/train-00000-of-00003.parquet"}
    (gone,) = stream(tmp_path / "b", wanted[:1], HF_ENDPOINT=address)
    (offline,) = stream(tmp_path / "c", wanted[:1], HF_HUB_OFFLINE="1")
    assert results[:2] == [4, 2]
    assert [(tmp_path / "0" / entry.image).read_bytes() for entry in read_metadata(tmp_path / "0")] == pictures[:4]
    for line, name in zip([*results[2:], gone, offline], ["set", "nothing", "gated", "set", "set"], strict=True):
        assert line.startswith(f"hub.data.dataset: 'some/{name}' ") and "\n" not in line, line
    assert "log in with `hf auth login`" in results[3] and "log in with `hf auth login`" in results[4]
    assert "v9" in results[2]
    assert "check your network" in gone and "HF_HUB_OFFLINE" in offline
