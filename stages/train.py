"""Stage 3: train the transformer on the latent cache, and nothing but the transformer.

    python -m stages.train                      as `dvc repro train` does; goes on where a killed run of the same settings was
    python -m stages.train --resume CHECKPOINT  goes on from this one, on purpose
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from dit.config import Params
from dit.encoders.loading import EncoderSource, load_vae
from dit.encoders.vae import decode_latents
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.training.checkpoint import Checkpoints, check_ranks_agree, check_shapes, open_named, run_fingerprint
from dit.training.export import save_model
from dit.training.logging import MetricLogger, NullLogger
from dit.training.setup import build_model
from dit.training.stop import Stopped
from dit.training.trainer import Trainer
from dit.utils.files import sha256_file, warn_stale_state, write_json
from dit.utils.images import to_images
from stages import code_digest, run_stage
from stages.runs import begin_run

METRICS, CURVES, RUN = "metrics/train.json", "metrics/curves.csv", "metrics/mlflow.json"
MODEL, LOG, PROGRESS = Path("models/dit"), Path("models/train.log"), Path("samples/progress")


def main(params: Params) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="a step-….safetensors of .state/train")
    arguments = parser.parse_args()
    recipe, latents = params.active, Path("data/latents")
    cache = LatentCache(latents)
    cache.verify()
    digest = sha256_file(latents / "index.json")
    settings = [asdict(block) for block in (recipe.model, recipe.optim, params.train)]
    states = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "train"
    key = run_fingerprint(digest, settings, code_digest("train"))
    given = open_named(arguments.resume, states) if arguments.resume else None
    if given:
        check_shapes(given, given.tensors(), build_model(cache, recipe.model, params.train.seed))  # before anything is written
    foreign = given is not None and given.path.resolve().parent != (states / key).resolve()
    if foreign:  # its training is another one than that of the settings alone, and is kept apart from it
        key = run_fingerprint(key, sha256_file(given.path))
        print(f"{given.path}: of other settings or a copy; `dvc repro` by itself never goes on from it", flush=True)
    state = states / key
    checkpoints = Checkpoints(state, params.runtime.keep_checkpoints)
    resume = given if given and not foreign else checkpoints.newest(print) or given
    process = PartialState(cpu=not torch.cuda.is_available())
    check_ranks_agree(state.name, resume)
    vae, _ = load_vae(EncoderSource(**cache.index["vae"]), device="cuda" if torch.cuda.is_available() else "cpu")

    def decode(latents: torch.Tensor) -> list[Image.Image]:
        return to_images(decode_latents(vae, latents))

    def run(logger: MetricLogger) -> tuple:
        blocks = (recipe.model, recipe.optim, params.train, params.runtime)
        return Trainer(cache, *blocks, logger, decode, checkpoints, resume).train()

    if not process.is_main_process:
        run(NullLogger())
        return
    warn_stale_state("train", state)
    tracker = begin_run(params, digest, state)
    logger = MetricLogger(
        LOG,
        PROGRESS,
        state / "progress",
        on_metrics=lambda step, values: tracker.metrics(values, step),
        on_preview=lambda step, picture: tracker.picture(picture, "preview", step),
        echo=tqdm.write,
    )
    status = "FAILED"
    try:
        with checkpoints.lock():
            try:
                transformer, summary = run(logger)
            except UserError:
                if not any(state.glob("step-*")):
                    shutil.rmtree(state)  # nothing that could go on
                raise
        save_model(MODEL, transformer, cache, recipe.model, recipe.optim, params.train)
        steps = int(summary["steps"])
        tracker.metrics({"training_seconds": summary["seconds"]}, steps)
        if params.runtime.register_model:
            tracker.model(MODEL, f"dit-{params.recipe}", steps)
        status = "FINISHED"
    except Stopped:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
    logger.write_curves(Path(CURVES))
    write_json(Path(METRICS), {key: round(value, 5) for key, value in summary.items()})
    write_json(Path(RUN), {"run_id": tracker.run_id})
    shutil.rmtree(state)


if __name__ == "__main__":
    run_stage("train", main, metrics=[METRICS, CURVES, RUN], parallel=True)
