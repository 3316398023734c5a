"""The validation loss image by image, so that it has an interval, and by timestep, so that it shows where a model is weak."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dit import diffusion
from dit.config import Evaluate
from dit.diffusion import Objective, make_objective
from dit.evaluation.intervals import mean_with_interval
from dit.latents import LatentCache, sample_posterior
from dit.model import DiT
from dit.training.batches import VALIDATION, generator
from dit.training.validation import SEED

TIMESTEPS = tuple(round(0.05 + 0.1 * k, 2) for k in range(10))
BATCH_SIZE = 100


@torch.no_grad()
def validation_losses(
    model: DiT, cache: LatentCache, objective: Objective, passes: int = 1, timestep: float | None = None, progress=None
) -> np.ndarray:
    """(passes, N) losses of the N validation images; the mean is what `dit.training.validation.validation_loss` returns.

    Args:
        model: any weights; used as they are.
        cache: where the validation images are.
        objective: the path and the loss.
        passes: how often each image is measured, each time at other noise and another timestep.
        timestep: one for all images instead, in (0, 1); the noise stays the same.
        progress: a tqdm bar that counts images.
    """
    device = next(model.parameters()).device
    count = len(cache.val)
    losses = np.empty((passes, count))
    for number in range(passes):
        source = generator(torch.device("cpu"), SEED, VALIDATION, number)
        noise = torch.randn(2, count, *cache.latent_shape, generator=source)
        timesteps = objective.timesteps((torch.randperm(count, generator=source) + 0.5) / count)
        if timestep is not None:
            timesteps = torch.full_like(timesteps, timestep)
        for start in range(0, count, BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            picked = cache.val[rows]
            batch = cache.read(picked, np.zeros(len(picked)), np.zeros(len(picked), dtype=bool)).to(device)
            posterior_noise, path_noise = noise[:, rows].to(device)
            latents = sample_posterior(batch.moments, posterior_noise, cache.index["vae_scaling"], cache.index["vae_shift"])
            t = timesteps[rows].to(device)
            noisy = objective.add_noise(latents, path_noise, t)
            prediction = model(noisy, t, batch.tokens.float(), batch.mask, batch.pooled.float())
            losses[number, rows] = diffusion.loss(objective, prediction, latents, path_noise, t).cpu().numpy()
            if progress is not None:
                progress.update(len(picked))
    return losses


def measure_losses(
    model: Path, cache: LatentCache, settings: Evaluate, device: str
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """`val_loss` with its interval, and a row of `t`, `val_loss`, `low`, `high` for each of `TIMESTEPS`.

    The intervals say what other validation images would change. A single validation image has none: then the ends are empty.
    """
    prediction_type = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["prediction_type"]
    objective = make_objective("flow" if prediction_type == "flow_prediction" else "ddpm", prediction_type)
    transformer = DiT.from_pretrained(model, subfolder="transformer").eval().to(device)
    total = (settings.val_passes + len(TIMESTEPS)) * len(cache.val)
    with tqdm(total=total, desc="validation loss", unit="image", delay=1) as progress:
        overall = validation_losses(transformer, cache, objective, settings.val_passes, progress=progress).mean(0)
        at = {t: validation_losses(transformer, cache, objective, timestep=t, progress=progress)[0] for t in TIMESTEPS}

    def figures(losses: np.ndarray) -> dict[str, float]:
        return mean_with_interval("val_loss", losses, settings, (0, np.inf), digits=5)

    names = {"val_loss": "val_loss", "val_loss_low": "low", "val_loss_high": "high"}
    return figures(overall), [{"t": t} | {names[key]: value for key, value in figures(of).items()} for t, of in at.items()]
