"""The last state of a finished training (`runtime.keep_state`), from which a training of more epochs goes on.

It lies in a folder whose name is a fingerprint of everything that determines the result, but for the number of epochs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit.config import Optim, Train
from dit.training.checkpoint import Checkpoint, Checkpoints
from dit.training.setup import learning_rate_factor, warmup_steps


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
    facts = kept.record["model"]["facts"]
    totals = kept.step, max(1, optim.num_epochs * facts["images"] // facts["batch_size"])
    before, at_once = (
        [learning_rate_factor(train.lr_scheduler, step, warmup_steps(train, total), total) for step in range(kept.step)]
        for total in totals
    )
    if before == at_once:
        return ""
    why = "its warm-up was shorter" if train.lr_scheduler == "constant" else f"train.lr_scheduler {train.lr_scheduler}"
    return f"other weights than all epochs at once, since its learning rates were others ({why})"
