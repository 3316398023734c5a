"""Stage 3: train the transformer on the latent cache, and nothing but the transformer."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from dit.config import Params
from dit.encoders import EncoderSource, load_vae
from dit.files import file_hash, write_json
from dit.images import to_images
from dit.latents import LatentCache
from dit.tracking import flatten, start_run
from dit.training.export import save_model
from dit.training.loop import Watchers, train_transformer
from stages import run_stage

METRICS, CURVES, RUN = "metrics/train.json", "metrics/curves.csv", "metrics/mlflow.json"
MODEL, LOG, PROGRESS = Path("models/dit"), Path("models/train.log"), Path("samples/progress")


def main(params: Params) -> None:
    recipe = params.active
    latents = Path("data/latents")
    cache = LatentCache(latents)
    cache.verify()
    digest = file_hash(latents / "index.json")
    tracker = start_run(params.recipe, tags={"data.latents": digest})
    blocks = {"data": recipe.data, "encode": recipe.encode, "model": recipe.model, "schedule": recipe.schedule}
    for name, block in (blocks | {"train": params.train}).items():
        tracker.params(flatten(name, block))
    tracker.dataset(params.recipe, digest, "data/latents")
    vae, _ = load_vae(EncoderSource(**cache.index["vae"]), device="cuda" if torch.cuda.is_available() else "cpu")
    curves: dict[int, dict[str, float]] = {}
    for folder in (MODEL, PROGRESS, Path("metrics")):
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def decode(values: torch.Tensor) -> list[Image.Image]:
        return to_images(vae.decode(values / cache.index["vae_scaling"] + cache.index["vae_shift"]).sample)

    def on_metrics(step: int, values: dict[str, float]) -> None:
        curves.setdefault(step, {}).update(values)
        tracker.metrics(values, step)

    def on_preview(step: int, picture: Image.Image) -> None:
        picture.save(PROGRESS / f"step-{step:06d}.png")
        tracker.picture(picture, "preview", step)

    with LOG.open("w", encoding="utf-8", newline="\n") as log:

        def on_log(line: str) -> None:
            log.write(line + "\n")
            log.flush()
            if not line.startswith("step "):
                tqdm.write(line)

        status = "FAILED"
        try:
            transformer, summary = train_transformer(
                cache,
                recipe.model,
                recipe.schedule,
                params.train,
                params.runtime,
                Watchers(on_metrics, on_preview, on_log, decode),
            )
            status = "FINISHED"
        finally:
            tracker.finish(status)
    save_model(MODEL, transformer, cache, recipe.model, recipe.schedule, params.train)
    table = pd.DataFrame.from_dict(curves, orient="index").rename_axis("step").sort_index()
    table.to_csv(CURVES, float_format="%.6g", lineterminator="\n")
    write_json(Path(METRICS), {key: round(value, 5) for key, value in summary.items()})
    write_json(Path(RUN), {"run_id": tracker.run_id})


if __name__ == "__main__":
    run_stage("train", main, metrics=[METRICS, CURVES, RUN])
