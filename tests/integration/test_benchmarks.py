"""The benchmarks run and print the tables of docs/performance.md; what they measure is judged by people, not here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers import REPO


@pytest.mark.parametrize(
    ("arguments", "header"),
    [
        (["read", "--entries", "200"], "| entries | written in |"),
        (["download", "--images", "1"], "| download over loopback |"),
    ],
)
def test_a_benchmark_prints_a_table_that_the_documentation_has(tmp_path, arguments, header):
    command = [sys.executable, "-m", "dit.benchmark.data", *arguments, "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith(header) and lines[0] in (REPO / "docs" / "performance.md").read_text()
    cells = [len(line.split("|")) for line in lines]
    assert len(lines) == 3 and len(set(cells)) == 1
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_dit_benchmark_measures_this_model_its_peers_and_encoding_at_every_step(tmp_path):
    size = ["--hidden-size", "32", "--num-layers", "1", "--num-heads", "2", "--patch-size", "8", "--batch-size", "1"]
    command = [sys.executable, "-m", "dit.cli", "benchmark", *size, "--steps", "1", "--output", str(tmp_path / "b.json")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    documented = (REPO / "docs" / "performance.md").read_text()
    assert "| a training step of | images/s |" in documented and "| a training step of | images/s |" in done.stdout
    results = json.loads((tmp_path / "b.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        "this model",
        "this model, the training loop",
        "PixArtTransformer2DModel",
        "DiTTransformer2DModel, classes alone",
        "this model, encoding at every step",
    ]
    own, tutorial = rows["this model"], rows["this model, encoding at every step"]
    assert own["share"] == pytest.approx(own["images_per_second"] * results["flops_per_image_and_step"] / results["matmul_peak"])
    assert tutorial["ratio"] == pytest.approx(tutorial["seconds_per_step"] / own["seconds_per_step"])
    assert tutorial["ratio"] > 2  # a VAE of full size against a transformer of one block
    assert results["checkpoint"]["gigabytes"] * 1e9 == pytest.approx(4 * 4 * results["parameters"], rel=0.02)
    assert results["attention"]
