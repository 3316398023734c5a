"""What Windows and macOS lack: the stages run without it, and their worker processes start by spawn."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.clones import Clone, environment

SITECUSTOMIZE = """
import ctypes, multiprocessing, os
for name in ("fork", "forkpty", "preadv", "pread", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
if multiprocessing.current_process().name == "MainProcess":
    multiprocessing.set_start_method("spawn")
opened = ctypes.CDLL.__init__
def open_library(self, name, *arguments, **settings):
    if name is None:
        raise TypeError("this platform has no library without a name")
    return opened(self, name, *arguments, **settings)
ctypes.CDLL.__init__ = open_library
"""


@pytest.mark.slow
def test_stages_run_without_what_is_posix_alone(tmp_path):
    clone = Clone(tmp_path / "home" / "project")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = environment(clone.root) | {"PYTHONPATH": str(tmp_path / "site")}
    for stage in ("download", "encode", "train", "sample", "evaluate", "report"):
        command = [sys.executable, "-m", f"stages.{stage}"]
        done = subprocess.run(command, cwd=clone.root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert clone.json("metrics/evaluate.json")["prompt_accuracy_prompts"] == 8
