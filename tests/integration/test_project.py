"""The whole project as its users see it: a miniature of the pipeline through the real `dvc`, in a clean clone."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from dit.commands.demo.nearest import NearestTrainingImages
from dit.config import DEFAULTS
from dit.tracking.mlflow import Tracker, tracking_uri
from dit.training.checkpoint import Checkpoints
from helpers.clones import Clone, Project


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
    assert clone.json("metrics/encode.json")["reconstruction_psnr"] >= 34
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_speedrun_leaves_project_unchanged(clone):
    done = clone.run(sys.executable, "-m", "dit.cli", "benchmark", "speedrun", "--output", str(clone.root.parent / "s.json"))
    assert "speedrun: 0.95 was not reached" in done.stdout  # after a dozen steps
    points = json.loads((clone.root.parent / "s.json").read_text())["points"]
    assert points[-1]["step"] == clone.json("metrics/train.json")["steps"] == 12
    assert [point["step"] for point in points] == sorted({point["step"] for point in points})
    assert all(point["prompts"] == 8 and 0 <= point["accuracy"] <= 1 for point in points)
    assert clone.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_race_prints_a_row_for_each_and_leaves_project_unchanged(clone):
    output = str(clone.root.parent / "race.json")
    command = (sys.executable, "-m", "dit.cli", "benchmark", "race", "this-model", "sit", "--prompts", "3", "--output", output)
    printed = clone.run(*command).stdout
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows == ["network", "---", "this-model", "sit"] and printed.count("not reached") == 8  # after twenty steps
    points = json.loads((clone.root.parent / "race.json").read_text())["sit"]["points"]
    assert [point["step"] for point in points] == list(range(1, 21))
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        ("shapes.encode.image_size=60", "params.yaml: shapes.encode.image_size: 60 is not a multiple of 16"),
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


def files_outside(root: Path) -> list[Path]:
    """Files beside the folder `root`; MLflow makes an empty folder there, whose name is an encoded `%`."""
    return [path for path in root.parent.rglob("*") if path.is_file() and root not in path.parents]


@pytest.mark.parametrize("name", ["a%20b", "a?b=c", "a#b", "100% d'été 图"])
def test_tracking_stays_in_a_folder_of_any_name(tmp_path, monkeypatch, model, name):
    """MLflow's addresses are made of the folder's name; nothing of a run may lie outside."""
    root = tmp_path / name
    shutil.copytree(model, root / "models" / "dit")
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = Tracker(tracking_uri(), "run", {})
    run.log_image(Image.new("RGB", (8, 8)), "image")
    run.log_model(root / "models" / "dit", "dit-shapes", 1)
    run.finish()
    assert {path.name for path in root.iterdir()} == {".state", "mlartifacts", "mlflow.db", "models"}
    assert not (root / ".state" / "unsent").exists() and not files_outside(root)
    client = MlflowClient(tracking_uri())
    assert [item.path for item in client.list_artifacts(run.run_id)] == ["image.png"]
    assert client.search_model_versions("name = 'dit-shapes'")[0].run_id == run.run_id
    assert len(list((root / "mlartifacts").rglob("transformer/*.safetensors"))) == 1


@pytest.mark.slow
def test_rank_of_a_cluster_is_no_worker(clone):
    """Clusters set it for every program; a stage that took it for its own would wait for others, or end in a stack trace."""
    ranks = ("RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=2", "PMI_SIZE=2", "OMPI_COMM_WORLD_SIZE=2")
    clone.run("env", *ranks, sys.executable, "-m", "stages.encode")
    assert "up to date" in clone.dvc("status", "encode").stdout
    refused = clone.run("env", *ranks, sys.executable, "-m", "stages.train", "--resume", "nowhere", check=False)
    assert refused.stderr.splitlines()[-1].startswith("train: --resume nowhere: no such file")


def damaged_cache_files(root: Path) -> list[Path]:
    """Files of DVC's cache whose content is not what their name says."""
    files = [path for path in (root / ".dvc" / "cache" / "files" / "md5").rglob("*") if path.is_file()]
    assert files
    named = {path: path.parent.name + path.name.removesuffix(".dir") for path in files}
    return [path for path in files if hashlib.md5(path.read_bytes()).hexdigest() != named[path]]


@pytest.mark.slow
@pytest.mark.parametrize(("links", "name"), [("hardlink", "a%20b #1"), ("symlink", "100% d'été 图")])
def test_repro_with_links_in_a_folder_of_any_name(tmp_path, links, name):
    """Outs that are links into DVC's cache are read, replaced and deleted, and never written through; a worktree shares them."""
    clone = Clone(tmp_path / name / "project")
    clone.dvc("config", "--local", "cache.type", links)
    clone.dvc("repro")
    log = clone.root / "models" / "train.log"
    assert log.is_symlink() if links == "symlink" else log.stat().st_nlink > 1
    assert "Running stage" not in clone.dvc("repro").stdout
    clone.run("git", "add", "-A")
    clone.run("git", "commit", "-qm", "run")
    clone.dvc("exp", "run", "-S", "train.batch_size=8")
    clone.run(sys.executable, "-m", "stages.train")
    assert not damaged_cache_files(clone.root)
    clone.run("git", "checkout", "-q", ".")
    clone.dvc("checkout", "--force")
    assert "Running stage" not in clone.dvc("repro").stdout and len(clone.parents()) == 3
    clone.run("git", "worktree", "add", "-q", "../tree")
    tree = Project(tmp_path / name / "tree")
    tree.dvc("config", "--local", "cache.dir", "../project/.dvc/cache")  # DVC writes the absolute one in the locale alone
    tree.dvc("config", "--local", "cache.type", links)
    tree.dvc("checkout")
    assert "Running stage" not in tree.dvc("repro").stdout
    tree.dvc("exp", "run", "-S", "sample.num_inference_steps=2")
    assert not damaged_cache_files(clone.root) and not files_outside(tmp_path / name)


def test_nearest_training_images_of_one_of_them(clone):
    nearest = NearestTrainingImages(clone.root)
    entry = next(entry for entry in clone.json("data/raw/metadata.json") if entry["split"] == "train")
    found = nearest.find(Image.open(clone.root / "data" / "raw" / entry["image"]).convert("RGB"))
    assert len(found) == 5 and found[0][1] == f"{entry['text']} (1.000)"
    assert NearestTrainingImages(clone.root / "docs").find(found[0][0]) is None  # there are none
