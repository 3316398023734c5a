"""What each setting of the default recipe buys: the share of right images after about the same time of training.

Each variant is trained by itself with a short schedule and scored as the speedrun does; a variant whose steps take longer gets
fewer epochs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from dit.benchmark.speedrun import Point, speedrun
from dit.config import Params

EPOCHS = 6.0
PROMPTS = 500  # of which half are captions of the validation set
HEADER = ("variant", "steps", "seconds of training", "prompt_accuracy")
# Name: changes by block, and what a step of as many images costs beside the default's, measured on 2 cores in bf16.
VARIANTS: dict[str, tuple[dict[str, dict[str, Any]], float]] = {
    "default": ({}, 1.0),
    "batch-48": ({"train": {"batch_size": 48}}, 1.15),
    "batch-192": ({"train": {"batch_size": 192}}, 0.95),
    "learning-rate-3e-3": ({"optim": {"learning_rate": 3e-3}}, 1.0),
    "learning-rate-9e-3": ({"optim": {"learning_rate": 9e-3}}, 1.0),
    "constant-rate": ({"train": {"lr_scheduler": "constant"}}, 1.0),
    "ema-0.99": ({"train": {"ema_decay": 0.99}}, 1.0),
    "no-caption-dropout": ({"train": {"caption_dropout": 0.0}, "sample": {"guidance_scale": 1.0}}, 1.0),
    "caption-dropout-0.2": ({"train": {"caption_dropout": 0.2}}, 1.0),
    "timesteps-logit-mean-0": ({"optim": {"logit_mean": 0.0}}, 1.0),
    "width-192": ({"model": {"hidden_size": 192, "num_heads": 6}}, 1.5),
    "width-96": ({"model": {"hidden_size": 96, "num_heads": 3}}, 0.8),
    "patch-4": ({"model": {"patch_size": 4}}, 0.6),
    "convolutions": ({"model": {"conv_channels": 64}}, 1.3),
    "velocity-output": ({"model": {"output": "velocity"}}, 1.0),
}


def variant_params(params: Params, name: str) -> Params:
    """Return the settings of the variant `name`, with as many epochs as take as long as `EPOCHS` of the default."""
    changes, cost = VARIANTS[name]
    recipe = replace(params.shapes, optim=replace(params.shapes.optim, num_epochs=round(EPOCHS / cost)))
    recipe = replace(
        recipe,
        model=replace(recipe.model, **changes.get("model", {})),
        optim=replace(recipe.optim, **changes.get("optim", {})),
    )
    train = replace(params.train, **changes.get("train", {}))
    sample = replace(params.sample, num_samples=PROMPTS, **changes.get("sample", {}))
    return replace(params, recipe="shapes", shapes=recipe, train=train, sample=sample)


def run_variant(params: Params, name: str, latents: Path, raw: Path) -> Point:
    """Train the variant `name` and score it at its end."""
    return speedrun(variant_params(params, name), latents, raw, first_share=1.0)[-1]
