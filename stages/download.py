"""Stage 1: images and captions into data/raw, the bytes as they come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit.config import Params
from dit.sources import fetch
from dit.sources.watch import pin
from dit.utils.files import write_json
from stages import run_stage
from stages.dvc_files import read_watched

METRICS = "metrics/download.json"


def main(params: Params) -> None:
    """Fetch the data set that the recipe names."""
    data = params.active.data
    commit = pin(data, read_watched(params.recipe))
    result = fetch(replace(data, **commit), Path("data/raw"), params.runtime)
    write_json(Path(METRICS), result.metrics() | commit)
    for line in result.summary():
        print(f"download: {line}", flush=True)


if __name__ == "__main__":
    run_stage("download", main, metrics=[METRICS])
