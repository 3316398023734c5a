"""Stage 3: train the transformer on the latent cache, and nothing but the transformer.

python -m stages.train                      as `dvc repro train` does; resumes a killed run of the same settings
python -m stages.train --resume CHECKPOINT  resumes from this one, on purpose
"""

from __future__ import annotations

import argparse
import json
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
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.model.transformer import DiT
from dit.tracking.runs import begin_run, log_result
from dit.training.checkpoint import Checkpoint, Checkpoints, check_ranks_agree, check_shapes, open_named, run_fingerprint
from dit.training.export import save_model
from dit.training.init_model import InitModel
from dit.training.kept_state import explain_difference, find_kept, trained_epochs
from dit.training.logging import MetricLogger, NullLogger
from dit.training.setup import build_trainable
from dit.training.stop import Stopped
from dit.training.trainer import Trainer
from dit.utils.autoencoder import decode_latents
from dit.utils.files import sha256_file, warn_stale_state, write_json
from dit.utils.images import to_images
from stages import run_stage
from stages.dvc_files import code_digest, locked_digest, locked_params
from stages.init_model import open_init

METRICS, CURVES, RUN = "metrics/train.json", "metrics/curves.csv", "metrics/mlflow.json"
LATENTS, MODEL, LOG, PREVIEWS = Path("data/latents"), Path("models/dit"), Path("models/train.log"), Path("samples/progress")


def main(params: Params) -> None:
    """Train, from scratch, from another model or from a checkpoint, and write the model, its metrics and its run in MLflow."""
    cache = LatentCache(LATENTS)
    cache.verify()
    digest = sha256_file(LATENTS / "index.json")
    init, init_digest = open_init(params.train.init_from)
    state, kept_state, named = find_state(params, cache, [digest, init_digest] if init_digest else digest, init)
    checkpoints = Checkpoints(state, params.runtime.keep_checkpoints)
    is_own = named is not None and named.path.resolve().parent == state.resolve()
    own = named if is_own else checkpoints.newest(print) or named
    kept = None if own else find_kept(kept_state, params.active.optim, print)
    resume = own or kept
    process = PartialState(cpu=not torch.cuda.is_available())
    check_ranks_agree(state.name, resume)
    vae, _ = load_vae(EncoderSource(**cache.index["vae"]), device="cuda" if torch.cuda.is_available() else "cpu")

    def decode(latents: torch.Tensor) -> list[Image.Image]:
        return to_images(decode_latents(vae, latents))

    def train(logger: MetricLogger) -> tuple[DiT, dict[str, float]]:
        blocks = (params.active.model, params.active.optim, params.train, params.runtime)
        keep = Checkpoints(kept_state, keep=1) if params.runtime.keep_state else None
        return Trainer(cache, *blocks, logger, decode, checkpoints, resume, init, keep).train()

    if not process.is_main_process:
        train(NullLogger())
        return
    warn_stale_state("train", state)
    epochs = finished_epochs(params)
    if epochs and not resume:
        print(
            f"train: num_epochs was {epochs}, and its training is finished, without a state to go on from (runtime.keep_state): "
            f"all {params.active.optim.num_epochs} epochs are trained, from the first on",
            flush=True,
        )
    if kept:
        differs = explain_difference(kept, params.active.optim, params.train) or "the same weights as all epochs at once"
        print(f"train: goes on after the {trained_epochs(kept)} epochs whose state was kept; {differs}", flush=True)
    tracker = begin_run(params, locked_digest("encode", LATENTS) or digest, state)
    logger = MetricLogger(
        LOG,
        PREVIEWS,
        state / "progress",
        on_metrics=lambda step, values: tracker.log_metrics(values, step),
        on_preview=lambda step, image: tracker.log_image(image, "preview", step),
        echo=tqdm.write,
    )
    status = "FAILED"
    try:
        with checkpoints.lock():
            try:
                transformer, summary = train(logger)
            except UserError:
                if not any(state.glob("step-*")):
                    shutil.rmtree(state)  # there is nothing to resume from
                raise
        save_model(MODEL, transformer, cache, params.active.model, params.active.optim, params.train)
        log_result(tracker, params, summary)
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


def finished_epochs(params: Params) -> int | None:
    """Return the number of epochs of the last finished training, if it differs from this one in nothing else."""
    block, last = f"{params.recipe}.optim", locked_params("train")
    epochs = last.get(block, {}).get("num_epochs")
    own = {"recipe": params.recipe, f"{params.recipe}.model": asdict(params.active.model)}
    own["train"] = json.loads(json.dumps(asdict(params.train)))  # lists, as DVC has them
    if epochs == params.active.optim.num_epochs or last != own | {block: asdict(params.active.optim) | {"num_epochs": epochs}}:
        return None
    return epochs


def find_state(
    params: Params, cache: LatentCache, digest: str | list[str], init: InitModel | None
) -> tuple[Path, Path, Checkpoint | None]:
    """Return the folders of this training's checkpoints and of its kept state, and the checkpoint that `--resume` names.

    The folders' names are fingerprints of all that determines the result: settings, what the training reads (`digest`: of the
    latents and, where there is one, of the model `init`) and code; of the kept state but for the number of epochs.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="a step-….safetensors of .state/train")
    named = parser.parse_args().resume
    states = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "train"
    settings, code = [asdict(block) for block in (params.active.model, params.active.optim, params.train)], code_digest("train")
    any_number = [settings[0], settings[1] | {"num_epochs": None}, settings[2]]
    kept_state = states.with_name("kept") / run_fingerprint(digest, any_number, code)
    key = run_fingerprint(digest, settings, code)
    if not named:
        return states / key, kept_state, None
    checkpoint = open_named(named, states)
    check_shapes(checkpoint, checkpoint.tensors(), build_trainable(cache, params.active.model, params.train, init))
    if checkpoint.path.resolve().parent != (states / key).resolve():
        # Its training is another one than that of the settings alone, and is kept apart from it.
        key = run_fingerprint(key, sha256_file(checkpoint.path))
        print(f"{checkpoint.path}: of other settings or a copy; `dvc repro` by itself never resumes from it", flush=True)
    return states / key, kept_state, checkpoint


if __name__ == "__main__":
    run_stage("train", main, metrics=[METRICS, CURVES, RUN], parallel=True)
