"""What the tests of training share: a small transformer, quick settings, and a logger in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from PIL import Image

from dit.config import Lora, Model, Optim, Runtime, Train
from dit.latents.cache import LatentCache
from dit.model.transformer import DiT
from dit.training.checkpoint import Checkpoint, Checkpoints
from dit.training.init_model import InitModel
from dit.training.logging import NullLogger
from dit.training.trainer import Trainer

TRAIN = Train(
    method="scratch",
    init_from=None,
    lora=Lora(rank=4, alpha=4, target_modules=("attn.qkv", "cross_attn.kv", "mlp.0")),
    batch_size=6,
    mixed_precision="no",
    objective="flow",
    prediction_type="v_prediction",
    snr_gamma=None,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,
    max_grad_norm=1.0,
    weight_decay=0.01,
    warmup_steps=2,
    lr_scheduler="cosine",
    ema_decay=0.999,
    caption_dropout=0.1,
    horizontal_flip=True,
    validate_every=4,
    early_stopping_patience=None,
    max_nonfinite_steps=20,
    seed=0,
)
RUNTIME = Runtime(
    num_workers=0,
    prefetch_factor=2,
    num_processes=1,
    sharding="none",
    checkpoint_every=4,
    keep_checkpoints=2,
    sample_every=4,
    log_every=2,
    deterministic=False,
    download_connections=1,
    data_on_device="auto",
    register_model=False,
    keep_state=False,
)
OPTIM = Optim(num_epochs=3, learning_rate=1e-3, logit_mean=0.0, compile_model=False)
MODEL = Model(patch_size=2, hidden_size=64, num_layers=2, num_heads=4, conv_channels=0, output="velocity")
CPU = torch.device("cpu")


class MemoryLogger(NullLogger):
    """A logger that keeps everything in memory."""

    def __init__(self, on_log: Callable[[str], None] = lambda line: None):
        super().__init__()
        self.previews: dict[int, Image.Image] = {}
        self.on_log = on_log

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # as the real one
        self.curves.setdefault(step, {}).update(values)

    def log_preview(self, step: int, image: Image.Image) -> None:
        self.previews[step] = image

    def log_line(self, line: str, echo: bool = True) -> None:
        self.lines.append(line)
        self.on_log(line)

    def echo(self, line: str) -> None:
        self.lines.append(line)

    def restore(self, state: dict, step: int) -> None:
        self.curves, self.lines = dict(state["curves"]), list(state["lines"])


def settings(train: dict | None = None, runtime: dict | None = None, **optim) -> tuple[Optim, Train, Runtime]:
    """Settings for seconds: 9 steps of 6 of the 18 training images of `write_cache`, unless told otherwise."""
    return replace(OPTIM, **optim), replace(TRAIN, **train or {}), replace(RUNTIME, **runtime or {})


def run(
    cache: LatentCache,
    folder: Path,
    train: dict | None = None,
    runtime: dict | None = None,
    logger: MemoryLogger | None = None,
    resume: Checkpoint | None = None,
    init: InitModel | None = None,
    keep: Path | None = None,
    **optim,
) -> tuple[DiT, dict[str, float]]:
    """Train with checkpoints in `folder`, and with the last state in `keep`."""
    AcceleratorState._reset_state()  # accelerate keeps the precision of a process's first training
    checkpoints = Checkpoints(folder, keep=2)

    def decode(latents: torch.Tensor) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64))] * len(latents)

    blocks = (MODEL, *settings(train, runtime, **optim))
    kept = keep and Checkpoints(keep, 1)
    return Trainer(cache, *blocks, logger or MemoryLogger(), decode, checkpoints, resume, init, kept).train()


def same(first: DiT, second: DiT) -> bool:
    """Return whether all weights are equal, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
