"""Find the metrics of a model, if those in this folder are its own: DVC knows what each file was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dit.config import Params, load_config
from dit.errors import UserError
from dit.pipeline.model_folder import weights_hash

MODEL, METRICS, SAMPLES = Path("models/dit"), Path("metrics/evaluate.json"), Path("samples/grids/val.png")
# What the metrics depend on; that code has changed since then does not make them those of another model.
TIES = {"models/dit", "samples/images", "samples/grids", "metrics/evaluate.json", "params.yaml"}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model, the settings that they were measured with, and a grid of its samples if there is one."""

    metrics: dict[str, float]
    params: Params
    image: Path | None


def find_evaluation(checkpoint: Path) -> tuple[Evaluation | None, str]:
    """Return the evaluation of the model in the folder `checkpoint`, or None and, in a few words, why there is none."""
    if not METRICS.is_file():
        return None, f"there is no {METRICS}"
    if weights_hash(checkpoint) != weights_hash(MODEL):
        return None, f"{METRICS} is not of this model"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", "sample", "evaluate"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None, f"DVC does not know what {METRICS} is of"
    changed = sorted(_changed(json.loads(done.stdout)) & TIES)
    if changed:
        return None, f"{METRICS} is older than {changed[0]}; `dvc repro` evaluates anew"
    try:
        metrics, params = json.loads(METRICS.read_text(encoding="utf-8")), load_config()
    except (OSError, ValueError, UserError):
        return None, f"{METRICS} or params.yaml is not readable"
    return Evaluation(metrics, params, SAMPLES if SAMPLES.is_file() else None), ""


def _changed(status: dict[str, list]) -> set[str]:
    """Return the names that have changed since the stages ran, from `dvc status --json`; a file that the cache lacks has not."""
    parts = [part for parts in status.values() for part in parts if isinstance(part, dict)]
    return {name for part in parts for names in part.values() for name, how in names.items() if how != "not in cache"}
