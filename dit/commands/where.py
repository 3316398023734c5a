"""`dit where`: what a run has left and where, and how to look at it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dit.commands.check import read_json
from dit.errors import UserError, without_password

RESULTS = ("dvc.lock", "metrics", "params.yaml")  # what git keeps of a run; experiments are compared with the last commit
PLACES = (
    ("metrics/report.md", "all of it on one page"),
    ("samples/grids", "grids of samples with their captions"),
    ("samples/images", "all samples"),
    ("samples/worst.png", "the worst samples, and what is wrong with them"),
    ("samples/nearest.png", "the samples that are most like a training image, beside it"),
    ("samples/progress", "how samples became better during training"),
    ("data/reconstructions.png", "originals above what the VAE keeps of them"),
    ("models/dit", "the trained model"),
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `where`."""
    parser = commands.add_parser("where", help="print where the results are and how to open MLflow")
    parser.set_defaults(action=run_where)


def run_where(arguments: argparse.Namespace) -> None:
    """Print what a run has left and where, and how to look at it."""
    if not Path("params.yaml").is_file():
        raise UserError("there is no params.yaml here; run from the project's folder")
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:
        print(f"before these commands:   . {os.path.relpath(sys.prefix)}/bin/activate")
    if Path("models/dit/model_index.json").exists():
        results = read_json(Path("metrics/evaluate.json")) or {}
        for name in ("prompt_accuracy", "prompt_accuracy_unseen", "clip_score", "val_loss"):
            if name in results:
                print(f"{name:24} {results[name]}")
        for path, what in PLACES:
            if Path(path).exists():
                print(f"{path:24} {what}")
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *RESULTS], capture_output=True).returncode == 1
        if changed:
            print(f"keep these results:      git commit -m Results {' '.join(RESULTS)}")
        print('generate an image:       dit generate --prompt "a red circle above a blue star"')
    else:
        print("no model yet:            `make repro` trains one; `dvc pull models/dit` fetches one that was pushed")
    uri = without_password(os.environ.get("MLFLOW_TRACKING_URI", ""))
    command = "mlflow ui --backend-store-uri sqlite:///mlflow.db   then open http://127.0.0.1:5000"
    if not uri and not Path("mlflow.db").exists():
        command = "none here yet: a training or an evaluation on this machine makes the first one"
    print(f"runs and curves:         {uri or command}")
    if Path(".state/unsent").exists():
        print("unsent runs:             dit sync-runs sends what MLflow's server did not take")
