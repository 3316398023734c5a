"""Everything that changes from step to step: weights, their moving average, the optimiser, and the sums since the last log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from dit.errors import UserError
from dit.model import DiT
from dit.training.checkpoint import Checkpoint
from dit.training.window import Window

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch calls them


@dataclass
class Best:
    """The moving average with the lowest validation loss so far, for early stopping."""

    loss: float = float("inf")
    step: int = 0
    worse: int = 0  # validations since then
    weights: list[torch.Tensor] | None = None


@dataclass
class TrainingState:
    """What a checkpoint holds and a training goes on with."""

    accelerator: Accelerator
    transformer: DiT
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    window: Window
    best: Best
    step: int = 0

    @contextmanager
    def averaged(self) -> Iterator[DiT]:
        """The transformer with the moving average in place of its weights, without a third copy of them."""
        self._swap()
        self.transformer.eval()
        try:
            yield self.transformer
        finally:
            self._swap()
            self.transformer.train()

    def _swap(self) -> None:
        for parameter, shadow in zip(self.transformer.parameters(), self.ema.shadow_params, strict=True):
            parameter.data, shadow.data = shadow.data, parameter.data

    def judge(self, val_loss: float) -> None:
        """Take note of a validation of the moving average; keep its weights if it is the best."""
        if val_loss < self.best.loss:
            weights = [shadow.detach().to("cpu", copy=True) for shadow in self.ema.shadow_params]
            self.best = Best(val_loss, self.step, 0, weights)
        else:
            self.best.worse += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name; every process calls this."""
        tensors = {"window": self.window.reduced(self.accelerator)}
        for k, (name, parameter) in enumerate(self.transformer.named_parameters()):
            tensors[f"weights.{name}"] = parameter
            tensors[f"ema.{name}"] = self.ema.shadow_params[k]
            for moment, value in self.optimizer.state[parameter].items():  # empty before the first step
                tensors[f"{moment}.{name}"] = value
            if self.best.weights:
                tensors[f"best.{name}"] = self.best.weights[k]
        return tensors

    def record(self) -> dict[str, Any]:
        """What is no tensor, as JSON."""
        scaler = self.accelerator.scaler
        return {
            "ema_steps": self.ema.optimization_step,
            "best": {"loss": self.best.loss, "step": self.best.step, "worse": self.best.worse},
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it is of a transformer of another shape.
        """
        tensors, record = checkpoint.tensors(), checkpoint.record
        names = [name for name, _ in self.transformer.named_parameters()]
        check_fits(checkpoint, tensors, self.transformer)
        for k, (name, parameter) in enumerate(self.transformer.named_parameters()):
            parameter.data.copy_(tensors[f"weights.{name}"])
            self.ema.shadow_params[k].copy_(tensors[f"ema.{name}"])
            kept = {m: tensors[f"{m}.{name}"] for m in ("step", *MOMENTS) if f"{m}.{name}" in tensors}
            self.optimizer.state[parameter] = {m: value.to(parameter.device) for m, value in kept.items()}
        self.ema.optimization_step = record["ema_steps"]
        weights = [tensors[f"best.{name}"] for name in names] if f"best.{names[0]}" in tensors else None
        self.best = Best(**record["best"], weights=weights)
        if record["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(record["scaler"])
        self.window.restore(tensors["window"], self.accelerator)
        self.step = checkpoint.step


def check_fits(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], transformer: DiT) -> None:
    """Whether `tensors`, those of `checkpoint`, are of a transformer like this one.

    Raises:
        UserError: they are not; the line names the first parameter that differs.
    """
    shapes = {f"weights.{name}": parameter.shape for name, parameter in transformer.named_parameters()}
    found = {name: value.shape for name, value in tensors.items() if name.startswith("weights.")}
    for name in shapes | found:
        if shapes.get(name) != found.get(name):
            raise UserError(
                f"{checkpoint.path}: of another transformer than the settings ask for: {name} is "
                f"{list(found.get(name, []))} in it, not {list(shapes.get(name, []))}"
            )
