"""Train a text-to-image Diffusion Transformer on one GPU, with latents and text embeddings computed once.

`dit.DiT`, `dit.DiTTextToImagePipeline` and `dit.load_pipeline` are imported when they are first used: `import dit` loads no
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit.model.transformer import DiT
    from dit.pipeline.generate import load_pipeline
    from dit.pipeline.pipeline import DiTTextToImagePipeline

__version__ = "0.2.0"
__all__ = ["DiT", "DiTTextToImagePipeline", "__version__", "load_pipeline"]
LAZY = {
    "DiT": "dit.model.transformer",
    "DiTTextToImagePipeline": "dit.pipeline.pipeline",
    "load_pipeline": "dit.pipeline.generate",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LAZY[name]), name)
