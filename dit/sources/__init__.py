"""Where images and captions come from. Each source is a module with `fetch(data, folder, runtime) -> FetchResult`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit.config import Runtime
    from dit.sources.writer import FetchResult


def fetch(data: Any, folder: Path, runtime: Runtime) -> FetchResult:
    """Fill `folder` from the source that `data.source` names; `data` is its block of params.yaml."""
    return import_module(f"dit.sources.{data.source}").fetch(data, folder, runtime)
