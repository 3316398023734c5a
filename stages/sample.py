"""Stage 4: draw the evaluation prompts with the trained model's EMA weights, one seed per prompt."""

from __future__ import annotations

from pathlib import Path

from dit.config import Params
from dit.sampling import choose_prompts, draw_prompts
from stages import run_stage


def main(params: Params) -> None:
    prompts = choose_prompts(Path("data/raw"), params.recipe, params.sample.num_samples, params.sample.seed)
    draw_prompts(Path("models/dit"), prompts, params.sample, images=Path("samples/images"), grids=Path("samples/grids"))


if __name__ == "__main__":
    run_stage("sample", main, metrics=[])
