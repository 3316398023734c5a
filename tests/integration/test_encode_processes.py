"""Several processes that share the work of the encode stage."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

import pytest
import torch

from dit.encode import encode as encode_module
from dit.encode.encode import Part
from helpers import REPO
from helpers.encoding import COUNT, SHARD_BYTES, contents, encode, write_raw
from stages.encode import parse_part
from stages.processes import ProcessFailed, run_processes

SHARE = """
import sys
from pathlib import Path
from dit.encode import encode as encode_module
from helpers.encoding import SHARD_BYTES, encode
encode_module.SHARD_BYTES = SHARD_BYTES
result = encode(Path(sys.argv[1]), Path(sys.argv[2]))
Path(sys.argv[2]).with_name(f"result-{result is None}").touch()
"""


@pytest.fixture
def shared(tmp_path, monkeypatch):
    """The folder in which one process and then two have encoded the same data set, into `one` and `two`."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(encode_module, "SHARD_BYTES", SHARD_BYTES)
    raw = write_raw(tmp_path / "raw")
    encode(raw, tmp_path / "one")
    (tmp_path / "share.py").write_text(SHARE)
    monkeypatch.setenv("PYTHONPATH", f"{REPO}{os.pathsep}{REPO / 'tests'}")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    run_processes([sys.executable, *map(str, (tmp_path / "share.py", raw, tmp_path / "two"))], 2)
    return tmp_path


def test_two_processes_write_the_same_bytes_as_one(shared):
    assert contents(shared / "one") == contents(shared / "two")
    assert sorted(path.name for path in shared.glob("result-*")) == ["result-False", "result-True"]  # one reports


def test_machines_that_do_not_know_of_each_other_share_the_shards(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(encode_module, "SHARD_BYTES", SHARD_BYTES)
    raw = write_raw(tmp_path / "raw")
    machines = [tmp_path / name for name in ("whole", "first", "second")]
    for machine, part in zip(machines, (Part(1, 1), Part(1, 2), Part(2, 2)), strict=True):
        monkeypatch.setenv("DVC_ROOT", str(machine))
        metrics = encode(raw, machine / "latents", part=part)
        assert (metrics is None) == (part.of > 1) == (not (machine / "latents").exists())
    assert "part 2 of 2, 3 of 6 shards, is in" in capfd.readouterr().out
    written = [{path.name for path in machine.rglob("shard-*")} for machine in machines[1:]]
    assert all(written) and not written[0] & written[1]
    # What came of the second is brought to the first, which has nothing left to encode.
    shutil.copytree(machines[2] / ".state", machines[1] / ".state", dirs_exist_ok=True)
    monkeypatch.setenv("DVC_ROOT", str(machines[1]))
    assert encode(raw, machines[1] / "latents")["images"] == COUNT
    assert f"resuming, {COUNT} of {COUNT} images are done" in capfd.readouterr().out
    assert contents(machines[0] / "latents") == contents(machines[1] / "latents")


@pytest.mark.parametrize(
    ("text", "problem"), [("3", "not like 2/4"), ("a/2", "not like 2/4"), ("3/2", "2 parts are 1/2 to 2/2"), ("0/2", "1/2 to")]
)
def test_part_that_there_is_not(text, problem):
    with pytest.raises(argparse.ArgumentTypeError, match=problem):
        parse_part(text)


def test_failure_of_one_process_is_printed_and_ends_the_others(tmp_path, capfd):
    (tmp_path / "fail.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('the disk of 1 is full')\ntime.sleep(600)\n"
    )
    before = dict(os.environ)
    with pytest.raises(ProcessFailed, match="process 1 of 2 failed"):
        run_processes([sys.executable, str(tmp_path / "fail.py")], 2)
    assert dict(os.environ) == before  # else another launcher's processes would end, since they take this one for theirs
    assert "the disk of 1 is full" in capfd.readouterr().out
