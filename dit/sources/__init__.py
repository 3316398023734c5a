"""Where images and captions come from. Each source is a module with `fetch(data, folder, runtime) -> Report`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any


def fetch(data: Any, folder: Path, runtime: Any):
    """Fill `folder` from the source that `data.source` names; returns its `Report`."""
    return import_module(f"dit.sources.{data.source}").fetch(data, folder, runtime)
