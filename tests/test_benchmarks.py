"""The benchmarks run and print the tables of docs/performance.md; what they measure is judged by people, not here."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import REPO


@pytest.mark.parametrize(
    ("arguments", "header"),
    [
        (["read", "--entries", "200"], "| entries | written in |"),
        (["download", "--images", "1"], "| download over loopback |"),
    ],
)
def test_a_benchmark_prints_a_table_that_the_documentation_has(tmp_path, arguments, header):
    command = [sys.executable, "-m", "benchmarks.data", *arguments, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith(header) and lines[0] in (REPO / "docs" / "performance.md").read_text()
    cells = [len(line.split("|")) for line in lines]
    assert len(lines) == 3 and len(set(cells)) == 1
    assert not list(tmp_path.iterdir())  # nothing is left behind
