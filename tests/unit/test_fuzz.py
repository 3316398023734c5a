"""Whatever stands in the files that others write: either it is used, or one clear line says what is wrong with it."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit.config import Params, load_config
from dit.dataset.filters import check_captions, check_name, clean_caption
from dit.dataset.reader import Entry, read_metadata
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.sources import coco
from dit.sources.folder import read_list
from dit.yaml_file import read_yaml
from helpers import REPO
from helpers.cache import write_cache

EXAMPLES = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WEIRD = st.sampled_from(["../x", "/x", "", "\x00", "\ud800", "a" * 300, "C:\\x", "shard-00000.safetensors", "train", "val", "."])
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | WEIRD
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@st.composite
def nearly(draw, good):
    """`good` with a few values, keys or list items changed, left out or doubled."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        spots = [([], value)]
        for path, item in spots:
            keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else []
            spots += [([*path, key], item[key]) for key in keys]
        path, _ = draw(st.sampled_from(spots))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["change", "change", "drop", "double"]))
        if action == "change":
            parent[path[-1]] = draw(JSON)
        elif action == "drop":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
    return value


def content_of(good) -> st.SearchStrategy[bytes]:
    """Bytes of a file that should hold `good` as JSON: nearly that, other JSON, cut, or no JSON at all."""
    valid = json.dumps(good).encode()
    return (
        nearly(good).map(lambda value: json.dumps(value).encode())
        | JSON.map(lambda value: json.dumps(value).encode())
        | st.integers(0, len(valid)).map(lambda end: valid[:end])
        | st.binary(max_size=40)
        | st.just(b"[" * 100_000)
    )


def only_user_errors(read):
    """What `read` returns; None if it says in one line what is wrong."""
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


PARAMS = read_yaml((REPO / "params.yaml").read_text(encoding="utf-8"), "params.yaml")
YAML_PARTS = [*"abn01:-,[]{}&*!|>'\"%@#?~=. \n\t", "<<", "!!", "---", "no", "1e5", "2024-01-05"]


@settings(EXAMPLES, max_examples=100)
@given(data=st.data())
def test_load_config_any_input(tmp_path, data):
    any_yaml = st.lists(st.sampled_from(YAML_PARTS), max_size=30).map(lambda parts: "".join(parts).encode())
    content = data.draw(content_of(PARAMS) | any_yaml)
    (tmp_path / "params.yaml").write_bytes(content)
    params = only_user_errors(lambda: load_config(tmp_path / "params.yaml"))
    assert params is None or isinstance(params, Params)


ROWS = [{"image": f"images/{k}.jpg", "text": f"caption {k}", "split": "val" if k else "train"} for k in range(3)]
ROWS.append(ROWS[0] | {"stored": "shards/00000.tar/00000000.jpg"})


@EXAMPLES
@given(content=content_of(ROWS))
def test_read_metadata_any_input(tmp_path, content):
    (tmp_path / "metadata.json").write_bytes(content)
    for entry in only_user_errors(lambda: list(read_metadata(tmp_path))) or []:
        assert isinstance(entry, Entry) and entry.split in ("train", "val")
        assert check_name(entry.image) is None and check_name(entry.stored) is None


ANNOTATIONS = {
    "licenses": [{"id": 1, "url": "https://example.org"}],
    "images": [{"id": k, "file_name": f"{k}.jpg", "license": 1} for k in range(3)],
    "annotations": [{"id": 10 + k, "image_id": k % 3, "caption": f"caption {k}\n"} for k in range(4)],
}


@EXAMPLES
@given(content=content_of(ANNOTATIONS))
def test_coco_annotations_any_input(tmp_path, content):
    archive = tmp_path / "annotations.zip"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("annotations/captions_val2017.json", content)
    photos = only_user_errors(lambda: coco.read_captions(archive, ("val2017",))) or []
    fine = [photo for photo in photos if photo.problem is None]
    assert len({photo.name for photo in fine}) == len(fine)
    for photo in fine:
        assert not check_name(photo.name) and "/" not in photo.name and photo.captions


@EXAMPLES
@given(content=st.binary(max_size=200))
def test_coco_archive_any_bytes(tmp_path, content):
    (tmp_path / "annotations.zip").write_bytes(content)
    assert only_user_errors(lambda: coco.read_captions(tmp_path / "annotations.zip", ("val2017",))) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_cache(folder)
    return folder


@settings(EXAMPLES, max_examples=400)
@given(data=st.data())
def test_read_index_any_input(whole, data):
    index = whole / "index.json"
    good = whole / "index.good"
    if not good.exists():
        good.write_bytes(index.read_bytes())
    index.write_bytes(data.draw(content_of(json.loads(good.read_text()))))
    cache = only_user_errors(lambda: LatentCache(whole))
    if cache is not None:
        numbers = np.arange(len(cache))
        assert len(cache.read(numbers, np.zeros(len(cache)), np.zeros(len(cache), dtype=bool)).moments) == len(cache)
        only_user_errors(cache.verify)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
@EXAMPLES
@given(data=st.data())
def test_read_list_any_input(tmp_path, kind, data):
    good = [{"file_name": "a.jpg", "text": "a"}, {"file_name": "b.jpg", "text": ["b", "c"]}]
    content = data.draw(content_of(good) | nearly(good).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()))
    path = tmp_path / f"metadata.{kind}"
    path.write_bytes(content)
    for _, name, text in only_user_errors(lambda: list(read_list(path))) or []:
        assert isinstance(name, str) and isinstance(text, str)


@EXAMPLES
@given(text=st.text() | WEIRD, name=st.text() | WEIRD)
def test_filters_passed_text_can_be_written(tmp_path, text, name):
    caption = clean_caption(text)
    if check_captions([caption]) is None:
        json.dumps(caption, ensure_ascii=False).encode()
    if check_name(name) is None:
        target = (tmp_path / name).resolve()
        assert target.is_relative_to(tmp_path.resolve()) and target != tmp_path.resolve()
