"""Stage 4: generate an image for each evaluation prompt with the trained model's EMA weights, one seed per prompt."""

from __future__ import annotations

from pathlib import Path

import stages.sleeping_threads  # noqa: F401 (before torch is loaded)
from dit.config import Params
from dit.pipeline.model_folder import read_index
from dit.pipeline.sampling import choose_prompts, sample
from dit.utils.files import write_json
from stages import run_stage

METRICS = "metrics/sample.json"


def main(params: Params) -> None:
    """Sample the prompts, and grids of settings."""
    model = Path("models/dit")
    sizes = read_index(model)["encoders"].get("sizes")
    prompts = choose_prompts(Path("data/raw"), params.recipe, params.sample, sizes)
    rate = sample(model, prompts, params.sample, images=Path("samples/images"), grids=Path("samples/grids"))
    write_json(Path(METRICS), rate)


if __name__ == "__main__":
    run_stage("sample", main, metrics=[METRICS])
