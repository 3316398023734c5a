"""The last state of a finished training (`runtime.keep_state`), from which a training of more epochs goes on.

It lies in a folder whose name is a fingerprint of everything that determines the result, but for the number of epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit.config import Optim, Train
from dit.training.checkpoint import Checkpoint, Checkpoints
from dit.training.setup import learning_rate_factor, warmup_steps


def keep_last(checkpoints: Checkpoints, step: int, patience: int | None, folder: Path, log: Callable[[str], None]) -> None:
    """Move the checkpoint of the last `step` into `folder`; one of more steps that is there stays instead.

    A training that has stopped early, after `patience` validations, keeps none: with more epochs it would have stopped as well.
    """
    last = checkpoints.newest(log)
    if last is None or last.step != step:
        return
    if patience and last.record["early_stopping"]["num_bad_evals"] >= patience:
        log("stopped early, so that no state is kept: more epochs would have ended at the same step")
        return
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / last.path.name
    for suffix in (".safetensors", ".json"):  # the record comes last: without it, there is no checkpoint
        last.path.with_suffix(suffix).replace(kept.with_suffix(suffix))
    for old in folder.glob("step-*.json"):
        if old.stem != kept.stem:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)
    log(f"kept: {kept}, from which a larger num_epochs goes on")


def find_kept(folder: Path, optim: Optim, log: Callable[[str], None]) -> Checkpoint | None:
    """Return the kept state in `folder`, if it is one of fewer epochs than `optim` asks for."""
    kept = Checkpoints(folder, keep=1).newest(log)
    return kept if kept and trained_epochs(kept) < optim.num_epochs else None


def trained_epochs(kept: Checkpoint) -> int:
    """Return the number of epochs that the training of a kept state was of."""
    return kept.record["model"]["facts"]["num_epochs"]


def explain_difference(kept: Checkpoint, optim: Optim, train: Train) -> str:
    """Word why going on from `kept` leads to other weights than a training of all epochs at once; "" if it does not.

    What a step sees is a function of seed and step, so the two can differ in the learning rates of the steps that are done.
    """
    totals = kept.step, kept.step * optim.num_epochs // trained_epochs(kept)
    before, at_once = (
        [learning_rate_factor(train.lr_scheduler, step, warmup_steps(train, total), total) for step in range(kept.step)]
        for total in totals
    )
    if before == at_once:
        return ""
    why = "its warm-up was shorter" if train.lr_scheduler == "constant" else f"train.lr_scheduler {train.lr_scheduler}"
    return f"other weights than all epochs at once, since its learning rates were others ({why})"
