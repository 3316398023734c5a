"""A small random transformer for the bundled encoders, and a model folder that holds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dit.config import Model
from dit.encoders.loading import EncoderSource
from dit.model.transformer import DiT
from dit.training.export import save_model
from helpers.cache import write_cache
from helpers.training import OPTIM, TRAIN


def random_transformer() -> DiT:
    torch.manual_seed(0)
    transformer = DiT(hidden_size=32, num_layers=2, num_heads=2, cross_attention_dim=128, pooled_projection_dim=128)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def save(folder: Path, **train) -> None:
    cache = write_cache(folder / "latents")
    model = Model(patch_size=2, hidden_size=32, num_layers=2, num_heads=2)
    cache.index["clip"] = cache.index["vae"] = EncoderSource("builtin").to_dict()
    save_model(folder / "dit", random_transformer(), cache, model, OPTIM, replace(TRAIN, **train))
