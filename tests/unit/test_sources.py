"""The source of rendered shapes, and the split that all sources share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.config import ShapesData
from dit.dataset.filters import forbids_flip
from dit.dataset.reader import read_metadata
from dit.errors import UserError
from dit.shapes.captions import parse
from dit.shapes.scene import UNSEEN_PAIRS
from dit.sources import fetch
from dit.sources.writer import FetchResult, split_by_image
from helpers.sources import RUNTIME

DATA = ShapesData(
    source="shapes", num_samples=40, val_fraction=0.25, image_size=64, layout="free", level=3, storage="files", seed=3
)


def test_shapes_are_deterministic(tmp_path):
    result = fetch(DATA, tmp_path / "a", RUNTIME)
    fetch(DATA, tmp_path / "b", RUNTIME)
    assert (result.images, result.train_images, result.val_images) == (40, 30, 10)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_shapes_show_no_unseen_pair(tmp_path):
    fetch(DATA, tmp_path, RUNTIME)
    for entry in read_metadata(tmp_path):
        assert not {named.pair for named in parse(entry.text).objects} & UNSEEN_PAIRS


def test_metrics_keys():
    result = FetchResult(images=1)
    result.reject("a.jpg", "empty file")
    assert result.metrics() == {
        "images": 1,
        "captions": 0,
        "train_images": 0,
        "val_images": 0,
        "double_images": 0,
        "bad": [{"image": "a.jpg", "reason": "empty file"}],
        "unpaired": [],
        "other_files": {},
        "bad_images": 1,
    }


def test_split_by_image():
    digests = {f"images/{k}.jpg": bytes([k]) for k in range(10)}
    splits = split_by_image(digests, 0.3, seed=0)
    assert list(splits) == list(digests) and list(splits.values()).count("val") == 3
    assert splits == split_by_image(dict(reversed(digests.items())), 0.3, seed=0)


def test_split_by_image_has_both_sides():
    assert sorted(split_by_image({"a": b"a", "b": b"b"}, 0.01, seed=0).values()) == ["train", "val"]
    with pytest.raises(UserError, match="at least 2"):
        split_by_image({"a": b"a"}, 0.5, seed=0)
    with pytest.raises(UserError, match="2 usable images, all of the same bytes"):
        split_by_image({"a": b"a", "b": b"a"}, 0.5, seed=0)


@given(
    contents=st.lists(st.binary(max_size=1), min_size=2, max_size=30).filter(lambda each: len(set(each)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_by_image_keeps_doubles_together(contents, fraction, seed):
    digests = {f"{k}.jpg": content for k, content in enumerate(contents)}
    splits = split_by_image(digests, fraction, seed)
    sides = {digest: {splits[name] for name in digests if digests[name] == digest} for digest in digests.values()}
    assert all(len(side) == 1 for side in sides.values()) and set(splits.values()) == {"train", "val"}
    smallest = min(contents.count(content) for content in contents)
    assert list(splits.values()).count("val") <= max(1, round(fraction * len(contents)), smallest)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A dog to the LEFT of a cat", True),
        ("turn right", True),
        ("a bright copyright sign", False),
        ("a red circle above a star", False),
    ],
)
def test_forbids_flip(caption, expected):
    assert forbids_flip(caption) == expected
