"""The source of rendered shapes, and the split that all sources share."""

from __future__ import annotations

import pytest

from dit.config import ShapesData
from dit.dataset.filters import forbids_flip
from dit.dataset.reader import read_metadata
from dit.errors import UserError
from dit.shapes.captions import parse
from dit.shapes.scene import UNSEEN_PAIRS
from dit.sources import fetch
from dit.sources.writer import FetchResult, split_by_image
from helpers.sources import RUNTIME

DATA = ShapesData(source="shapes", num_samples=40, val_fraction=0.25, image_size=64, layout="files", seed=3)


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
        "bad": [{"image": "a.jpg", "reason": "empty file"}],
        "unpaired": [],
        "bad_images": 1,
    }


def test_split_by_image():
    names = [f"images/{k}.jpg" for k in range(10)]
    splits = split_by_image(names, 0.3, seed=0)
    assert sorted(splits) == names and list(splits.values()).count("val") == 3
    assert splits == split_by_image(names[::-1], 0.3, seed=0)


def test_split_by_image_has_both_sides():
    assert sorted(split_by_image(["a", "b"], 0.01, seed=0).values()) == ["train", "val"]
    with pytest.raises(UserError, match="at least 2"):
        split_by_image(["a"], 0.5, seed=0)


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
