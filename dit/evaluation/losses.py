"""The validation loss per image, which gives its interval, and per timestep, which shows where a model is weak."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit.config import Evaluate
from dit.evaluation.intervals import mean_with_interval
from dit.latents.cache import LatentCache
from dit.model.objectives import make_objective
from dit.model.transformer import DiT
from dit.training.validation import validation_losses

TIMESTEPS = tuple(round(0.05 + 0.1 * k, 2) for k in range(10))
BATCH_SIZE = 100


def measure_losses(
    model: Path, cache: LatentCache, settings: Evaluate, device: str
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Measure `val_loss` with its interval, and a row of `t`, `val_loss`, `low`, `high` for each of `TIMESTEPS`.

    The intervals are over validation images; a single one has none, and then the ends are missing.
    """
    prediction_type = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["prediction_type"]
    objective = make_objective("flow" if prediction_type == "flow_prediction" else "ddpm", prediction_type)
    transformer = DiT.from_pretrained(model, subfolder="transformer").eval().to(device)
    total = (settings.val_passes + len(TIMESTEPS)) * len(cache.val)
    with tqdm(total=total, desc="validation loss", unit="image", delay=1) as progress:
        arguments = (transformer, cache, objective, BATCH_SIZE)
        overall = validation_losses(*arguments, passes=settings.val_passes, progress=progress).mean(0)
        at = {t: validation_losses(*arguments, timestep=t, progress=progress)[0] for t in TIMESTEPS}

    def metrics(losses: np.ndarray) -> dict[str, float]:
        return mean_with_interval("val_loss", losses, settings, (0, np.inf), digits=5)

    names = {"val_loss": "val_loss", "val_loss_low": "low", "val_loss_high": "high"}
    return metrics(overall), [{"t": t} | {names[key]: value for key, value in metrics(of).items()} for t, of in at.items()]
