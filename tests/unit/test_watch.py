"""Which version of the data the settings stand for: told apart by names, sizes and times, and kept where nobody can look."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.config import load_config
from dit.errors import UserError
from dit.sources.watch import describe_folder, identify, pin
from helpers import REPO
from helpers.sources import folder_data, hub_data

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = st.text("ab1 é", min_size=1, max_size=4).map(str.strip).filter(bool)
FILES = st.dictionaries(NAMES, st.tuples(st.binary(max_size=3), st.integers(0, 2**31)), max_size=4)  # content, time


def described(files: dict[str, tuple[bytes, int]]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        for name, (content, time) in files.items():
            (Path(folder) / name).write_bytes(content)
            os.utime(Path(folder) / name, (time, time))
        return describe_folder(Path(folder))


@given(FILES, FILES)
def test_describe_folder_tells_folders_apart(one, other):
    about = [{name: (len(content), time) for name, (content, time) in files.items()} for files in (one, other)]
    assert (described(one) == described(other)) == (about[0] == about[1])
    assert described(dict(reversed(one.items()))) == described(one)
    assert described(one)["files"] == len(one) and described(one)["bytes"] == sum(len(content) for content, _ in one.values())


def test_identify_names_of_any_bytes(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    version, (line,) = identify(folder_data(tmp_path), {})
    assert version["folders"][str(tmp_path)]["files"] == 1 and line.endswith(": 1 files, 0.0 MB")


@pytest.mark.parametrize("data", [folder_data, hub_data])
def test_identify_folder_that_is_gone(tmp_path, data):
    (tmp_path / "set").mkdir()
    known, _ = identify(data(tmp_path / "set"), {})
    (tmp_path / "set").rmdir()
    version, (line,) = identify(data(tmp_path / "set"), known)
    assert version == known and line.endswith("set is not here; taken for unchanged")
    with pytest.raises(UserError, match=r"(is not a folder; .*`dvc pull`|is not to be had)"):
        identify(data(tmp_path / "other"), known)


def test_identify_relative_folder_in_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.jpg").write_bytes(b"abc")
    version, _ = identify(folder_data(Path("own")), {})
    assert version == {"folders": {"own": describe_folder(tmp_path / "own")}}


def test_identify_commit_asks_nobody():
    version, lines = identify(hub_data("some/set", revision=COMMIT), {})
    assert version == {"dataset": "some/set", "asked": COMMIT, "revision": COMMIT} and lines == []


def test_identify_id_that_is_none():
    known = {"dataset": "no/such/id", "asked": None, "revision": COMMIT}
    for other in ({}, known | {"asked": "v1"}, known | {"dataset": "other/id"}):
        with pytest.raises(UserError, match=r"hub.data.dataset: 'no/such/id' is not to be had \(.*; check the id") as error:
            identify(hub_data("no/such/id"), other)
        assert "\n" not in str(error.value)
    assert identify(hub_data("no/such/id"), known)[0] == known


def test_pin_is_for_the_same_data_set_only():
    version = {"dataset": "some/set", "asked": None, "revision": COMMIT}
    assert pin(hub_data("some/set"), version) == {"revision": COMMIT}
    for data in (hub_data("some/set", revision="v1"), hub_data("other/set"), load_config(REPO / "params.yaml").shapes.data):
        assert pin(data, version) == {}
    assert pin(hub_data("some/set"), {}) == {}
