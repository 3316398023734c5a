"""Where the model is that `train.init_from` names, and whether it is the one that DVC knows of."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from dit.errors import UserError
from dit.training.init_weights import weights_digest
from dit.utils.files import expand_home
from stages.dvc_files import read_init

if TYPE_CHECKING:
    from dit.training.init_model import InitModel

OWN = Path("models/dit")  # an out of the train stage


def find_init(name: str) -> Path:
    """Return the folder or the file that `name` stands for: a path in the project, or an address of MLflow's registry.

    Raises:
        UserError: it is the train stage's own out, or not to be had from the registry.
    """
    if name.startswith("models:"):
        if not re.fullmatch(r"models:/[^/]+/\d+", name):
            raise UserError(f"train.init_from: {name}: a name and a number would be right, such as models:/dit-coco/3")
        from dit.tracking.registry import registered_folder

        return registered_folder(name)
    project = Path(os.environ.get("DVC_ROOT", "."))  # `dvc exp run --temp` runs in a copy of what git tracks
    path = project / expand_home(name)
    if any(path.resolve().is_relative_to((root / OWN).resolve()) for root in (project, Path())):
        raise UserError(
            f"train.init_from: {name} is what this training writes, and DVC deletes it before; copy it (`cp -r {OWN.as_posix()} "
            "models/base`) and name the copy"
        )
    return path


def identify_init(name: str | None, known: dict) -> tuple[dict, list[str]]:
    """Return what the watch stage writes of the model `name`, and lines for the terminal.

    Args:
        name: `train.init_from`; None for random weights.
        known: what was written the last time. A model that is not here is taken for unchanged, as a folder of images is.
    """
    if name is None:
        return {}, []
    try:
        path = find_init(name)
        sha256 = weights_digest(path, name)
    except UserError as error:
        if known.get("init_from") == name:
            return known, [f"{error}; taken for unchanged"]
        raise
    return {"init_from": name, "sha256": sha256}, [f"{name}: sha256:{sha256}"]


def open_init(name: str | None) -> tuple[InitModel | None, str | None]:
    """Load the model `name` for a training; return it and the SHA-256 of its weights, None and None for random weights.

    Raises:
        UserError: it is not there, not a model, or another one than the watch stage has found.
    """
    if name is None:
        return None, None
    from dit.training.init_model import load_init  # imports torch, which the watch stage need not wait for

    path, known = find_init(name), read_init()
    sha256 = weights_digest(path, name)
    if known.get("init_from") == name and known["sha256"] != sha256:
        raise UserError(f"train.init_from: {name} has changed since DVC looked; `dvc repro` looks again")
    return load_init(path, name), sha256
