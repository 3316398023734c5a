"""The transformer, its objectives and its loss; `dit.model.DiT` is what model_index.json of a trained model names."""

from dit.model.transformer import DiT

__all__ = ["DiT"]
