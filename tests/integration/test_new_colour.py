"""examples/new_colour.py at small size, after the pipeline has trained a small model."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from dit.config import load_config
from dit.latents.cache import LatentCache
from dit.model.objectives import make_objective
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.training.validation import validation_losses
from helpers import REPO
from helpers.clones import Clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_new_colour_trains_adapters_that_know_more_of_it(tmp_path):
    """A model this small draws nothing that the detector confirms; but the adapters lower the loss of held-out scenes."""
    clone = Clone(tmp_path / "project")
    clone.dvc("repro", "train")
    sizes = ("--images", "200", "--steps", "600", "--prompts", "10")
    done = clone.run(sys.executable, "examples/new_colour.py", *sizes)
    assert "lavender: " in done.stdout and "old colours: " in done.stdout
    folder, report = clone.root / "new_colour", clone.json("new_colour/report.json")
    assert 0.5 < report.pop("new_ceiling") <= 1 and report.pop("seconds") > 0
    assert set(report) == {"new_before", "new_after", "old_before", "old_after"} and all(0 <= v <= 1 for v in report.values())
    assert all(".lora_" in name for name in load_file(folder / "lora" / "pytorch_lora_weights.safetensors"))
    assert (folder / "before.png").is_file() and (folder / "after.png").is_file()
    assert clone.run("git", "status", "--porcelain", "-uno").stdout.split() == []

    cache, train = LatentCache(folder / "latents"), load_config(REPO / "params.yaml").train
    objective = make_objective(train.objective, train.prediction_type)
    pipeline = DiTTextToImagePipeline.from_pretrained(clone.root / "models" / "dit")
    before = validation_losses(pipeline.transformer, cache, objective, 16, passes=4)
    pipeline.load_lora_weights(folder / "lora")
    assert np.mean(validation_losses(pipeline.transformer, cache, objective, 16, passes=4)) < 0.98 * np.mean(before)


def test_new_colour_without_a_model_is_one_line(tmp_path):
    clone = Clone(tmp_path / "project")
    failed = clone.run(sys.executable, "examples/new_colour.py", check=False)
    assert (
        failed.returncode == 1
        and failed.stderr == "new_colour: models/dit is no trained model; `dvc repro` trains one in models/dit\n"
    )


@pytest.mark.parametrize("wrong", ["--images 9", "--steps 0", "--prompts -1"])
def test_new_colour_refuses_a_number_that_is_too_small_and_keeps_what_is_there(tmp_path, wrong):
    kept = tmp_path / "new_colour" / "report.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    command = [sys.executable, str(REPO / "examples" / "new_colour.py"), *wrong.split()]
    failed = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert failed.returncode == 2 and f"error: {wrong}: at least" in failed.stderr and "Traceback" not in failed.stderr
    assert kept.read_text() == "{}"
