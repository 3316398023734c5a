"""Whether the evaluation in this folder is of a given model: DVC knows what each figure was made from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dit.config import Params, load_config
from dit.errors import UserError
from dit.pipeline.model_folder import weights_hash

MODEL, FIGURES, PICTURE = Path("models/dit"), Path("metrics/evaluate.json"), Path("samples/grids/val.png")
# What ties the figures to the model; that code has changed since then makes them no figures of another model.
TIES = {"models/dit", "samples/images", "samples/grids", "metrics/evaluate.json", "params.yaml"}


@dataclass(frozen=True)
class Evaluation:
    """The figures of a model, the settings that they were measured with, and a grid of its images if there is one."""

    figures: dict[str, float]
    params: Params
    picture: Path | None


def find_evaluation(checkpoint: Path) -> tuple[Evaluation | None, str]:
    """Return the evaluation of the model in the folder `checkpoint`, or None and, in a few words, why there is none."""
    if not FIGURES.is_file():
        return None, f"there is no {FIGURES}"
    if weights_hash(checkpoint) != weights_hash(MODEL):
        return None, f"{FIGURES} is not of this model"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", "sample", "evaluate"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return None, f"DVC does not say what {FIGURES} is of"
    changed = sorted(_changed(json.loads(done.stdout)) & TIES)
    if changed:
        return None, f"{FIGURES} is older than {changed[0]}; `dvc repro` evaluates anew"
    try:
        figures, params = json.loads(FIGURES.read_text(encoding="utf-8")), load_config()
    except (OSError, ValueError, UserError):
        return None, f"{FIGURES} or params.yaml is not readable"
    return Evaluation(figures, params, PICTURE if PICTURE.is_file() else None), ""


def _changed(status: dict[str, list]) -> set[str]:
    """Return what is no longer as it was when the stages ran, from `dvc status --json`. Not being in DVC's cache is no change."""
    parts = [part for parts in status.values() for part in parts if isinstance(part, dict)]
    return {name for part in parts for names in part.values() for name, how in names.items() if how != "not in cache"}
