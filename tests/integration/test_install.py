"""The installer: `make repro` in a bare clone, from a folder of wheels alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.clones import Clone, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """A folder of all that constraints.txt pins, as docs/install.md makes it."""
    folder = tmp_path_factory.mktemp("wheels")
    clone = Clone(tmp_path_factory.mktemp("source") / "project")
    for what in (["setuptools==84.2.1"], ["."]):
        command = [sys.executable, "-m", "pip", "wheel", "-q", "-c", "constraints.txt", "-w", str(folder), *what]
        done = subprocess.run(command, cwd=clone.root, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"there is no package index: {done.stderr.splitlines()[-1]}")
    return folder


def test_make_repro_installs_from_wheels_and_runs(tmp_path, wheels):
    clone = Clone(tmp_path / "home" / "project")
    python = Path(sys.base_prefix) / "bin"
    env = environment(clone.root) | {"PATH": f"{python}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(["make", "repro"], cwd=clone.root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "installing the pinned packages into .venv" in done.stderr
    assert clone.json("metrics/evaluate.json")["prompt_accuracy_prompts"] == 8
    again = subprocess.run(["make", "repro"], cwd=clone.root, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "installing" not in again.stderr and "Running stage" not in again.stdout
