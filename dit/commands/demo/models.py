"""The models that the page offers, and those that are in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dit.config import Scheduler
from dit.errors import UserError
from dit.model.objectives import PredictionType
from dit.pipeline.generate import load_pipeline
from dit.pipeline.model_folder import LORA, find_lora, read_index, weights_hash
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.tracking.registry import registered_folder, registered_models

TRAINED = Path("models/dit")
NO_LORA = "–"  # in the list of adapters
KEPT = 2  # models in memory, so that two are compared without loading each time


@dataclass(frozen=True)
class Loaded:
    """A model in memory, and the hash of its weights."""

    pipeline: DiTTextToImagePipeline
    weights: str

    @property
    def size(self) -> int:
        """Return the longest side of the images that it was trained on."""
        return max(max(size) for size in self.pipeline.trained_sizes)

    @property
    def default_size(self) -> tuple[int, int]:
        """Return width and height that a call without them has."""
        return self.pipeline.trained_sizes[0]

    @property
    def cell(self) -> int:
        """Return what width and height must be multiples of."""
        return self.pipeline.vae_scale_factor * self.pipeline.transformer.config.patch_size

    @property
    def schedulers(self) -> list[str]:
        """Return the names of the schedulers that fit what it predicts."""
        return [name for name in get_args(Scheduler) if _fits(name, self.pipeline.config.prediction_type)]


def _fits(scheduler: str, prediction_type: PredictionType) -> bool:
    try:
        make_scheduler(scheduler, prediction_type)
    except UserError:
        return False
    return True


def find_models(root: Path, named: list[Path]) -> dict[str, Path | None]:
    """Return what the list of models shows, and the folder behind each; None for a registered one, which is fetched when chosen.

    Those that were named on the command line come first; then the trained model, other model folders in the project and in
    its `models/`, and the registered ones.

    Raises:
        UserError: a named folder is no model, or there is no model at all.
    """
    for folder in named:
        read_index(folder)
    nearby = [root / TRAINED, *sorted(root.glob("*/")), *sorted((root / TRAINED.parent).glob("*/"))]
    models: dict[str, Path | None] = {str(folder): folder for folder in named}
    models |= {folder.relative_to(root).as_posix(): folder for folder in nearby if _is_model(folder)}
    models |= dict.fromkeys(registered_models())
    if not models:
        read_index(root / TRAINED)  # which says what to do
    return models


def find_loras(root: Path, named: list[Path]) -> dict[str, Path]:
    """Return what the list of adapters shows, and the file behind each: those that were named, then those in the project.

    Raises:
        UserError: a named one is none.
    """
    loras = {str(path): find_lora(path) for path in named}
    known = {file.resolve() for file in loras.values()}
    for folder in (*sorted(root.glob("*/")), *sorted((root / TRAINED.parent).glob("*/"))):
        for file in (folder / LORA, folder / "lora" / LORA):
            if file.is_file() and file.resolve() not in known:
                loras[file.parent.relative_to(root).as_posix()] = file
    return loras


def _is_model(folder: Path) -> bool:
    try:
        read_index(folder)
    except UserError:
        return False
    return True


class Models:
    """Loads models when they are asked for, and keeps the `KEPT` used last.

    Attributes:
        folders: of the models, by the names that the page shows.
        loras: files of adapters, by the names that the page shows.
        lock: held by whoever loads or draws: a pipeline serves one drawing at a time, and is not dropped meanwhile.
    """

    def __init__(self, folders: dict[str, Path | None], loras: dict[str, Path] | None = None):
        self.folders, self.loras = folders, loras or {}
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        self.lock = threading.Lock()

    def load(self, name: str) -> Loaded:
        """Return the model called `name`, which is loaded unless it is in memory; `lock` is held.

        Raises:
            UserError: it cannot be loaded.
        """
        if name not in self.loaded:
            while len(self.loaded) >= KEPT:
                self.loaded.popitem(last=False)
            folder = self.folders[name] = self.folders[name] or registered_folder(name)
            self.loaded[name] = Loaded(load_pipeline(folder), weights_hash(folder))
        self.loaded.move_to_end(name)
        return self.loaded[name]
