"""Drawn shapes, and the split that all sources share."""

from __future__ import annotations

import pytest

from dit.config import ShapesData
from dit.dataset.reader import read_metadata
from dit.errors import UserError
from dit.shapes.captions import parse
from dit.shapes.scene import UNSEEN_PAIRS
from dit.sources import fetch
from dit.sources.writer import split_by_image
from helpers.sources import RUNTIME


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
