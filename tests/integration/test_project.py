"""The whole project as its users see it: a miniature of the pipeline through the real `dvc`, in a clean clone."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import yaml

from dit.config import DEFAULTS
from dit.training.checkpoint import Checkpoints


def test_repro_writes_all_outputs(clone):
    for name in (
        "data/raw/metadata.json",
        "data/latents/index.json",
        "data/reconstructions.png",
        "models/dit/model_index.json",
        "models/dit/README.md",
        "models/train.log",
        "samples/images/00015.png",
        "samples/grids/val.png",
        "samples/grids/unseen.png",
        "samples/worst.png",
        "samples/nearest.png",
        "metrics/accuracy_by_attribute.csv",
        "metrics/accuracy_by_number.csv",
        "metrics/loss_by_timestep.csv",
        "samples/grids/own.png",
        "samples/grids/diversity.png",
        "samples/grids/settings.png",
        "samples/grids/denoising.png",
        "metrics/report.md",
        "metrics/report/nearest.webp",
    ):
        assert (clone.root / name).is_file(), name
    assert list((clone.root / "samples" / "progress").glob("*.png"))
    results = clone.json("metrics/evaluate.json")
    for name in ("prompt_accuracy", "prompt_accuracy_unseen"):
        assert 0 <= results[f"{name}_low"] <= results[name] <= results[f"{name}_high"] <= 1
        assert results[f"{name}_prompts"] == 8
    assert results["val_loss"] > 0 and "clip_score" in results
    assert clone.json("metrics/encode.json")["reconstruction_psnr"] >= 36
    assert clone.json("metrics/sample.json")["sampling_images_per_second"] > 0
    assert clone.run("git", "status", "--porcelain").stdout == ""


def test_repro_logs_one_run_with_one_child(clone):
    (parent,) = clone.parents()
    store = clone.store()
    assert parent.info.run_id == clone.json("metrics/mlflow.json")["run_id"]
    assert parent.data.params["model.hidden_size"] == "32" and parent.data.params["train.batch_size"] == "16"
    assert parent.data.metrics["prompt_accuracy"] == clone.json("metrics/evaluate.json")["prompt_accuracy"]
    assert store.get_metric_history(parent.info.run_id, "val_loss")
    children = store.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [child.data.params["sample.scheduler"] for child in children] == [DEFAULTS.scheduler]


def test_repro_registers_model_and_data_set(clone):
    (parent,) = clone.parents()
    (registered,) = clone.store().search_model_versions("name = 'dit-shapes'")
    assert registered.run_id == parent.info.run_id
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())
    (latents,) = [out["md5"] for out in lock["stages"]["encode"]["outs"] if out["path"] == "data/latents"]
    assert parent.inputs.dataset_inputs[0].dataset.digest == latents
    assert not (clone.root / "mlruns").exists()


def test_repro_again_runs_nothing(clone):
    assert "Running stage" not in clone.dvc("repro").stdout
    assert "up to date" in clone.dvc("status").stdout


def test_exp_run_runs_what_it_changes_and_gets_its_rows(clone):
    before = len(clone.parents())
    output = clone.dvc("exp", "run", "-S", "train.batch_size=8").stdout
    assert [stage for stage in ("download", "encode", "train", "sample", "evaluate") if f"Running stage '{stage}'" in output] == [
        "train",
        "sample",
        "evaluate",
    ]
    rows = clone.dvc("exp", "show", "--csv").stdout
    assert rows.count("\n") >= 4 and ",8," in rows
    narrow = clone.run(sys.executable, "tools/experiments.py").stdout.splitlines()
    assert [line.split()[-1] for line in narrow[-2:]] == ["16", "8"] and max(map(len, narrow)) <= 120
    parents = clone.parents()
    assert len(parents) == before + 1 and parents[-1].data.params["train.batch_size"] == "8"
    assert "prompt_accuracy" in parents[-1].data.metrics
    assert parents[-1].data.tags["dvc.exp_name"] == parents[-1].info.run_name
    clone.run("git", "checkout", "-q", ".")
    clone.dvc("checkout")


def test_pull_request_report_names_changes(clone):
    """The step of the workflow as it stands there, on a branch with another sampler."""
    clone.run("git", "update-ref", "refs/remotes/origin/main", "HEAD")
    clone.dvc("exp", "run", "-S", "sample.num_inference_steps=2")
    workflow = yaml.safe_load((clone.root / ".github" / "workflows" / "report.yml").read_text())
    (step,) = [step for step in workflow["jobs"]["report"]["steps"] if step.get("name") == "report"]
    clone.run("env", "BASE=main", "bash", "-euc", step["run"])
    report = (clone.root / "report.md").read_text()
    assert "| params.yaml | sample.num_inference_steps | 4" in report and "metrics/evaluate.json | clip_score" in report
    assert "metrics/train.json" not in report
    page = (clone.root / "dvc_plots" / "index.html").read_text()
    assert page.count("val.png") >= 2 and "train_loss" in page
    assert clone.run("bash", "tools/report.sh", "nowhere", check=False).stderr == "report: git knows no revision nowhere\n"
    clone.run("git", "checkout", "-q", ".")
    clone.dvc("checkout")


def test_speedrun_leaves_project_unchanged(clone):
    done = clone.run(sys.executable, "-m", "dit.cli", "benchmark", "speedrun", "--output", str(clone.root.parent / "s.json"))
    assert "speedrun: 0.95 was not reached" in done.stdout  # after a dozen steps
    points = json.loads((clone.root.parent / "s.json").read_text())["points"]
    assert points[-1]["step"] == clone.json("metrics/train.json")["steps"] == 12
    assert [point["step"] for point in points] == sorted({point["step"] for point in points})
    assert all(point["prompts"] == 8 and 0 <= point["accuracy"] <= 1 for point in points)
    assert clone.run("git", "status", "--porcelain").stdout == ""


def test_speedrun_ends_at_the_goal(clone):
    code = """
from pathlib import Path
from dit.benchmark import speedrun
from dit.config import load_config
speedrun.GOAL = 0.0
points = speedrun.speedrun(load_config(), Path("data/latents"), Path("data/raw"), first_share=0.5)
print(speedrun.speedrun_line(points), len(points))
"""
    assert "(6 steps) until prompt_accuracy was 0.000 of 8 prompts 1" in clone.run(sys.executable, "-c", code).stdout


def test_resume_from_unusable_checkpoint_is_one_line(clone):
    log = (clone.root / "models" / "train.log").read_text()
    runs = len(clone.parents())
    absent = clone.run(sys.executable, "-m", "stages.train", "--resume", "nowhere.safetensors", check=False)
    assert absent.returncode == 1 and absent.stderr.splitlines()[-1].startswith(
        "train: --resume nowhere.safetensors: no such file"
    )
    Checkpoints(clone.root.parent / "other", 1)._write(3, {"weights.a": torch.zeros(2)}, {})
    other = str(clone.root.parent / "other" / "step-00000003.safetensors")
    refused = clone.run(sys.executable, "-m", "stages.train", "--resume", other, check=False)
    assert refused.returncode == 1 and "of another transformer than the settings ask for" in refused.stderr
    assert "Traceback" not in absent.stderr + refused.stderr
    assert not list((clone.root / ".state" / "train").glob("*"))
    assert (clone.root / "models" / "train.log").read_text() == log and len(clone.parents()) == runs
    assert "up to date" in clone.dvc("status").stdout


KEEP_CHECKPOINTS = """
import sys
import stages.train as stage
from stages import run_stage
stage.shutil.rmtree = lambda path: None
run_stage("train", stage.main, metrics=[stage.METRICS, stage.CURVES, stage.RUN])
"""


def test_resume_from_other_settings_is_kept_apart(clone):
    states = clone.root / ".state" / "train"
    original = (clone.root / "params.yaml").read_text()
    often = original.replace("checkpoint_every: 500", "checkpoint_every: 5")
    (clone.root / "params.yaml").write_text(often.replace("num_epochs: 4", "num_epochs: 3"))
    clone.run(sys.executable, "-c", KEEP_CHECKPOINTS)
    (other,) = states.glob("*/step-00000005.safetensors")
    (clone.root / "params.yaml").write_text(often)
    resumed = clone.run(sys.executable, "-c", KEEP_CHECKPOINTS, "--resume", str(other))
    assert "of other settings or a copy" in resumed.stdout and "resuming after step 5 of 12" in resumed.stdout + resumed.stderr
    assert len(list(states.glob("*/step-00000010.safetensors"))) == 1
    alone = clone.run(sys.executable, "-m", "stages.train")
    assert "resuming" not in alone.stdout + alone.stderr
    (clone.root / "params.yaml").write_text(original)
    shutil.rmtree(states)
    clone.run("git", "checkout", "-q", ".")
    clone.dvc("checkout", "--force")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("shapes.model.num_heads=3", "params.yaml: shapes.model.hidden_size: 32 is not a multiple of num_heads (3)"),
        ("shapes.encode.image_size=60", "params.yaml: shapes.encode.image_size: 60 is not a multiple of 32"),
    ],
)
def test_failed_stage_is_one_line_and_loses_nothing(clone, setting, says):
    kept = {
        path: path.read_bytes() for name in ("metrics", "models", "samples", "data") for path in (clone.root / name).rglob("*.*")
    }
    done = clone.dvc("exp", "run", "-S", setting, check=False)
    assert done.returncode != 0
    assert says in done.stderr and "dvc checkout --force" in done.stderr and "Traceback" not in done.stderr + done.stdout
    clone.run("git", "checkout", "-q", "params.yaml")
    clone.dvc("checkout")
    assert all(path.is_file() and path.read_bytes() == content for path, content in kept.items())
    assert "Running stage" not in clone.dvc("repro").stdout
