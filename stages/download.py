"""Stage 1: images and captions into data/raw, the bytes as they come."""

from __future__ import annotations

from pathlib import Path

from dit.config import Params
from dit.sources import fetch
from dit.utils.files import write_json
from stages import run_stage

METRICS = "metrics/download.json"


def main(params: Params) -> None:
    """Fetch the data set that the recipe names."""
    result = fetch(params.active.data, Path("data/raw"), params.runtime)
    write_json(Path(METRICS), result.metrics())
    for line in result.summary():
        print(f"download: {line}", flush=True)


if __name__ == "__main__":
    run_stage("download", main, metrics=[METRICS])
