"""The diffusers pipeline, its schedulers, and what samples many prompts with it.

Model cards of version 0.1 say `from dit.pipeline import DiTTextToImagePipeline`: that still works.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "DiTTextToImagePipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dit.pipeline.pipeline import DiTTextToImagePipeline

    return DiTTextToImagePipeline
