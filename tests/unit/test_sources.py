"""The source of rendered shapes, and the split that all sources share."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ShapesData
from dit.dataset.filters import forbids_flip
from dit.dataset.reader import read_metadata
from dit.errors import UserError
from dit.shapes.captions import parse
from dit.shapes.scene import UNSEEN_PAIRS
from dit.sources import fetch
from dit.sources.table import ImageTable
from dit.sources.writer import FetchResult
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


def split(digests: dict[str, bytes], val_fraction: float, seed: int) -> dict[str, str]:
    """The side of each image that was added to a table in this order."""
    with tempfile.TemporaryDirectory() as folder:
        table = ImageTable(Path(folder, "images.sqlite"))
        try:
            for name, digest in digests.items():
                table.add(name, digest, name, ["a caption"], "")
            val, doubles = table.split(val_fraction, seed)
            assert doubles == sum(count for count in Counter(digests.values()).values() if count > 1)
            return {row.name: row.split for row in table.rows(val)}
        finally:
            table.close()
            assert not list(Path(folder).iterdir())


def split_in_memory(digests: dict[str, bytes], val_fraction: float, seed: int) -> dict[str, str]:
    """The same, as versions before the table had it: data sets that exist keep their split."""
    groups: dict[bytes, list[str]] = {}
    for name in sorted(digests):
        groups.setdefault(digests[name], []).append(name)
    count = min(max(1, round(val_fraction * len(digests))), len(digests) - 1)
    by_first = {names[0]: names for names in groups.values()}
    val: list[str] = []
    for first in np.random.default_rng(seed).permutation(list(by_first)).tolist():
        if len(val) + len(by_first[first]) <= count:
            val += by_first[first]
    val = val or min(groups.values(), key=len)
    return dict.fromkeys(digests, "train") | dict.fromkeys(val, "val")


def test_split():
    digests = {f"images/{k}.jpg": bytes([k]) for k in range(10)}
    splits = split(digests, 0.3, seed=0)
    assert list(splits) == list(digests) and list(splits.values()).count("val") == 3
    assert splits == split(dict(reversed(digests.items())), 0.3, seed=0)


def test_split_has_both_sides():
    assert sorted(split({"a": b"a", "b": b"b"}, 0.01, seed=0).values()) == ["train", "val"]
    with pytest.raises(UserError, match="at least 2"):
        split({"a": b"a"}, 0.5, seed=0)
    with pytest.raises(UserError, match="2 usable images, all of the same bytes"):
        split({"a": b"a", "b": b"a"}, 0.5, seed=0)


@settings(deadline=None)
@given(
    contents=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=3),
        st.binary(max_size=1),
        min_size=2,
        max_size=30,
    ).filter(lambda each: len(set(each.values())) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_split_keeps_doubles_together(contents, fraction, seed):
    splits = split(contents, fraction, seed)
    assert splits == split_in_memory(contents, fraction, seed)
    sides = {digest: {splits[name] for name in contents if contents[name] == digest} for digest in contents.values()}
    assert all(len(side) == 1 for side in sides.values()) and set(splits.values()) == {"train", "val"}
    smallest = min(Counter(contents.values()).values())
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
