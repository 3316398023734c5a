"""Stage 2: images and captions become latents and text embeddings, once, so that training touches neither encoder."""

from __future__ import annotations

from pathlib import Path

from dit.config import Params
from dit.encode.encode import encode_dataset
from dit.encoders.loading import check_sides
from dit.utils.files import write_json
from stages import run_stage

METRICS = "metrics/encode.json"


def main(params: Params) -> None:
    """Encode data/raw into data/latents; several processes share the work."""
    check_sides(params.recipe, params.active)
    metrics = encode_dataset(
        raw=Path("data/raw"),
        folder=Path("data/latents"),
        settings=params.active.encode,
        runtime=params.runtime,
        reconstructions=Path("data/reconstructions.png"),
    )
    if metrics is None:  # not the first of several processes
        return
    write_json(Path(METRICS), metrics)
    print(f"reconstruction {metrics['reconstruction_psnr']} dB: see data/reconstructions.png", flush=True)


if __name__ == "__main__":
    run_stage("encode", main, metrics=[METRICS], parallel=True)
