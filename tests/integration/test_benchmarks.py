"""The benchmarks print the tables of docs/performance.md and write them as JSON; people assess what they measure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dit.benchmark.busy import WAYS, busy_process
from dit.benchmark.editing import foreground_iou
from helpers import REPO

DOCUMENTED = (REPO / "docs" / "performance.md").read_text(encoding="utf-8")


def benchmark(*arguments: object, output: Path) -> tuple[str, dict]:
    """Run `dit benchmark`; returns what it prints and the JSON that it writes."""
    command = [sys.executable, "-m", "dit.cli", "benchmark", *map(str, arguments), "--output", str(output)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("part", "size"), [("read", ["--entries", 200]), ("download", ["--images", 1])])
@pytest.mark.slow
def test_data_prints_a_documented_table(tmp_path, part, size):
    (tmp_path / "temporary").mkdir()
    printed, results = benchmark("data", part, *size, "--folder", tmp_path / "temporary", output=tmp_path / "data.json")
    header, _, row, _, path = printed.strip().splitlines()
    assert header in DOCUMENTED and header.count("|") == row.count("|") and path == str(tmp_path / "data.json")
    assert list(results) == ["device", part]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_sampling_prints_a_documented_table(tmp_path, model):
    printed, results = benchmark("sampling", "editing", "--checkpoint", model, output=tmp_path / "sampling.json")
    assert printed.strip().splitlines()[0] in DOCUMENTED
    assert [row["strength"] for row in results["editing"]] == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.slow
def test_busy_prints_a_documented_table(clone):
    printed = clone.run(sys.executable, "-m", "dit.cli", "benchmark", "busy", "--steps", "12", "--output", "../busy.json").stdout
    header, _, *rows, _, path = printed.strip().splitlines()
    assert header in DOCUMENTED and path == "../busy.json"
    results = clone.json("../busy.json")["rows"]
    assert [row["threads"] for row in results] == list(WAYS) == [row.split("|")[1].strip() for row in rows]
    assert all(row["quiet"] > 0 and row["busy"] > 0 for row in results)


@pytest.mark.slow
def test_gpu_in_a_rehearsal_prints_documented_tables(tmp_path):
    printed, results = benchmark("gpu", "--rehearse", "--steps", 1, output=tmp_path / "gpu.json")
    assert "| what | measured |" in printed and "| killed and resumed: the same bits | yes |" in printed
    assert results["same_bits_after_kill"] is True
    assert set(results["loading"]) == {"cache on the device", "workers"} and min(results["loading"].values()) > 0
    assert {row["name"] for row in results["training"]["rows"]} >= {"this model", "PixArtTransformer2DModel"}
    assert results["sampling_seconds_per_step"] > 0 and results["decoding_seconds_per_image"] > 0
    assert ("skipped" in results["tests"]) != torch.cuda.is_available()


def test_gpu_says_that_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    shutil.copy(REPO / "params.yaml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "dit.cli", "benchmark", "gpu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "dit benchmark gpu --rehearse" in done.stderr


def test_gpu_needs_neither_dvc_nor_mlflow():
    loaded = "import sys, dit.benchmark.gpu; print(*sorted({'dvc', 'mlflow', 'pandas', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=REPO, capture_output=True, text=True).stdout.strip() == ""


def test_busy_process_is_busy_until_the_end():
    with busy_process() as process:
        before = psutil.Process(process.pid).cpu_times().user
        time.sleep(2)
        assert psutil.Process(process.pid).cpu_times().user - before > 0.2
    assert process.returncode is not None


def test_busy_needs_latents(tmp_path):
    shutil.copy(REPO / "params.yaml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "dit.cli", "benchmark", "busy"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "data/latents" in done.stderr


def test_foreground_iou_compares_places():
    def square(left: int) -> Image.Image:
        pixels = np.full((32, 32, 3), 255, dtype=np.uint8)
        pixels[8:16, left : left + 8] = (255, 0, 0)
        return Image.fromarray(pixels)

    assert foreground_iou(square(8), square(8)) == 1
    assert foreground_iou(square(8), square(12)) == pytest.approx(1 / 3, rel=0.1)  # corners may be rounded


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> tuple[str, dict]:
    size = {"hidden-size": 32, "num-layers": 1, "num-heads": 2, "patch-size": 8, "batch-size": 1, "steps": 1}
    flags = [f"--{name}={value}" for name, value in size.items()]
    return benchmark("training", *flags, output=tmp_path_factory.mktemp("benchmark") / "training.json")


def test_training_prints_a_documented_table(training):
    assert "| a training step of | images/s |" in DOCUMENTED and "| a training step of | images/s |" in training[0]


def test_training_measures_this_model_its_peers_and_encoding_first(training):
    results = training[1]
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
    assert results["attention"]


def test_training_measures_a_checkpoint(training):
    results = training[1]
    assert results["checkpoint"]["gigabytes"] * 1e9 == pytest.approx(4 * 4 * results["parameters"], rel=0.02)
