"""Clean clones of this project with small settings, as users have them who run the real `dvc`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from mlflow import MlflowClient

from helpers import REPO

SMALL = {
    "data": {"num_samples": 60, "val_fraction": 0.2},
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
    "optim": {"num_epochs": 4, "compile_model": False},
}
RUNTIME = {"num_workers": 2, "num_processes": 1, "checkpoint_every": 500, "sample_every": 500, "log_every": 25}


def environment(root: Path) -> dict[str, str]:
    """The environment of a user who has activated the one that runs this test."""
    others = ("DVC_", "MLFLOW_", "GIT_", "AWS_", "SSH_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(others)}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GIT_AUTHOR_NAME": "A",
        "GIT_AUTHOR_EMAIL": "a@example.com",
        "GIT_COMMITTER_NAME": "A",
        "GIT_COMMITTER_EMAIL": "a@example.com",
        "HOME": str(root.parent),
        "DVC_SITE_CACHE_DIR": str(root.parent / "site-cache"),  # what DVC remembers for all users of a machine
    }


class Project:
    """A folder in which a user works with git and dvc; the folder above it is the user's home."""

    def __init__(self, root: Path):
        self.root = root

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.root, env=environment(self.root), capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done

    def dvc(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check)

    def json(self, name: str):
        return json.loads((self.root / name).read_text())

    def store(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.root / 'mlflow.db'}".replace("%", "%25"))

    def parents(self) -> list:
        experiment = self.store().get_experiment_by_name("dit")
        runs = self.store().search_runs([experiment.experiment_id], order_by=["attribute.start_time"])
        return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]


class Clone(Project):
    """A clone of the working tree, committed, with small settings."""

    def __init__(self, root: Path):
        super().__init__(root)
        root.mkdir(parents=True, exist_ok=True)
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=REPO,
            capture_output=True,
            check=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (REPO / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, root / name)
        (root / "dvc.lock").unlink(missing_ok=True)
        shutil.rmtree(root / "metrics", ignore_errors=True)
        values = yaml.safe_load((root / "params.yaml").read_text())
        for block, changes in SMALL.items():
            values["shapes"][block].update(changes)
        values["recipe"] = "shapes"
        values["runtime"].update(RUNTIME)
        values["train"].update(batch_size=16, warmup_steps=2)
        values["sample"].update(num_samples=16, num_inference_steps=4)
        (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "start"]):
            self.run(*command)
