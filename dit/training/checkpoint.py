"""All state needed to resume a training, and how it is kept: safetensors and JSON, nothing that is executed when loaded.

A checkpoint of step 500 is `step-00000500.safetensors` and, written after it, `step-00000500.json` with the SHA-256 of
the first: without a record that fits, it is not one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors.torch import load_file, save_file

from dit.errors import UserError
from dit.model.transformer import DiT
from dit.training.logging import RunningMetrics
from dit.training.lora import trainable_parameters
from dit.training.sharding import gather, like
from dit.utils.files import sha256_file, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch calls them


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: after how many steps, where, and the record that was saved with its tensors."""

    step: int
    path: Path
    record: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Load all tensors, by name."""
        return load_file(self.path)


@dataclass
class EarlyStopping:
    """The EMA weights with the lowest validation loss so far, and how many validations there were since."""

    loss: float = float("inf")
    step: int = 0
    num_bad_evals: int = 0
    weights: list[torch.Tensor] | None = None

    def update(self, val_loss: float, step: int, ema: EMAModel) -> None:
        """Take note of a validation of the EMA weights; keep them if they are the best."""
        if val_loss < self.loss:
            self.loss, self.step, self.num_bad_evals = val_loss, step, 0
            self.weights = [gather(shadow.detach()).to("cpu", copy=True) for shadow in ema.shadow_params]
        else:
            self.num_bad_evals += 1


@dataclass
class TrainingState:
    """Everything that changes from step to step."""

    accelerator: Accelerator
    transformer: DiT
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    metrics: RunningMetrics
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    step: int = 0

    @contextmanager
    def ema_weights(self) -> Iterator[DiT]:
        """Put the EMA weights in the place of the transformer's own, without a third copy of them."""
        self._swap()
        self.transformer.eval()
        try:
            yield self.transformer
        finally:
            self._swap()
            self.transformer.train()

    @torch.no_grad()
    def _swap(self) -> None:  # by copying: sharded parameters know their storage
        for parameter, shadow in zip(trainable_parameters(self.transformer).values(), self.ema.shadow_params, strict=True):
            own = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(own)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, without weights that are frozen; every process has to call this."""
        tensors = {"metrics": self.metrics.reduced(self.accelerator)}
        for k, (name, parameter) in enumerate(trainable_parameters(self.transformer).items()):
            tensors[f"weights.{name}"] = gather(parameter)
            tensors[f"ema.{name}"] = gather(self.ema.shadow_params[k])
            for moment, value in self.optimizer.state[parameter].items():  # empty before the first step
                tensors[f"{moment}.{name}"] = gather(value)
            if self.early_stopping.weights:
                tensors[f"best.{name}"] = self.early_stopping.weights[k]
        # The text's statistics never change; with them, the tensors named ema are all of a trained model's.
        return tensors | {f"ema.{name}": buffer for name, buffer in self.transformer.named_buffers()}

    def record(self) -> dict[str, Any]:
        """Return what is no tensor, as JSON."""
        scaler, best = self.accelerator.scaler, self.early_stopping
        return {
            "ema_steps": self.ema.optimization_step,
            "early_stopping": {"loss": best.loss, "step": best.step, "num_bad_evals": best.num_bad_evals},
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint.

        Raises:
            UserError: it is of a transformer of another shape.
        """
        tensors, record = checkpoint.tensors(), checkpoint.record
        check_shapes(checkpoint, tensors, self.transformer)
        best: list[torch.Tensor] = []
        for k, (name, parameter) in enumerate(trainable_parameters(self.transformer).items()):
            with torch.no_grad():
                parameter.copy_(like(parameter, tensors[f"weights.{name}"]))
            self.ema.shadow_params[k].copy_(like(parameter, tensors[f"ema.{name}"]))
            kept = {m: tensors[f"{m}.{name}"] for m in ("step", *MOMENTS) if f"{m}.{name}" in tensors}
            self.optimizer.state[parameter] = place_moments(parameter, kept)
            best += [tensors[f"best.{name}"]] if f"best.{name}" in tensors else []
        self.ema.optimization_step = record["ema_steps"]
        self.early_stopping = EarlyStopping(**record["early_stopping"], weights=best or None)
        if record["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(record["scaler"])
        self.metrics.restore(tensors["metrics"], self.accelerator)
        self.step = checkpoint.step


def place_moments(parameter: torch.nn.Parameter, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return AdamW's state of `parameter`, whole in `kept`, as it has to be where the parameter is."""
    return {name: like(parameter, value) if name in MOMENTS else value.to(parameter.device) for name, value in kept.items()}


def check_shapes(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], transformer: DiT) -> None:
    """Raise a `UserError` that names the first parameter whose shape in `tensors`, those of `checkpoint`, is another."""
    shapes = {f"weights.{name}": parameter.shape for name, parameter in trainable_parameters(transformer).items()}
    found = {name: value.shape for name, value in tensors.items() if name.startswith("weights.")}
    for name in shapes | found:
        if shapes.get(name) != found.get(name):
            raise UserError(
                f"{checkpoint.path}: of another transformer than the settings ask for: {name} is "
                f"{list(found.get(name, []))} in it, not {list(shapes.get(name, []))}"
            )


class Checkpoints:
    """Writes checkpoints into `folder` during the training, and keeps the last `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Copy `tensors` and write them with `record`; an error of the last write is raised here or by `wait`."""
        self.wait()
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        self._pending = self._writer.submit(self._write, step, copies, record)

    def wait(self) -> None:
        """Wait until what was saved last is on the disk."""
        if self._pending:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, step: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.safetensors"
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part)
            with part.open("r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)  # the disk is full: what is left of it should not stay so
            raise
        part.replace(path)
        write_json(path.with_suffix(".json"), {"step": step, "sha256": sha256_file(path), "record": record})
        for old in sorted(self.folder.glob("step-*.json"))[: -self.keep]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def lock(self) -> AcquireReturnProxy:
        """Keep other trainings of the same settings from writing here; use as a context.

        Raises:
            UserError: there is another one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.folder / "lock").acquire(timeout=10)
        except Timeout:
            raise UserError(f"{self.folder}: another training with the same settings is running") from None

    def newest(self, log: Callable[[str], None]) -> Checkpoint | None:
        """Return the last complete checkpoint; an incomplete one is named to `log`."""
        for path in sorted(self.folder.glob("step-*.json"), reverse=True):
            try:
                return open_checkpoint(path)
            except UserError as error:
                log(f"{error}; taking the one before it")
        return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path` (either of its two files) and compare it with its hash.

    Raises:
        UserError: it is not complete; one line that names it.
    """
    tensors, record = path.with_suffix(".safetensors"), path.with_suffix(".json")
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        whole = sha256_file(tensors) == content["sha256"]
        checkpoint = Checkpoint(content["step"], tensors, content["record"])
    except OSError as error:
        why = ": a training is still writing it, or has deleted it" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}), so it is no checkpoint{why}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record}: not the record of a checkpoint") from None
    if not whole:
        raise UserError(f"{tensors}: damaged, its SHA-256 is not the one in {record.name}")
    return checkpoint


def open_named(path: Path, folder: Path) -> Checkpoint:
    """Open the checkpoint that `--resume` names.

    Raises:
        UserError: there is none; the line names some that are in `folder`.
    """
    if path.is_file():
        return open_checkpoint(path)
    known = sorted(folder.glob("*/step-*.safetensors"), key=lambda file: file.stat().st_mtime)[-3:]
    raise UserError(f"--resume {path}: no such file; there are " + (", ".join(map(str, known)) or f"no checkpoints in {folder}"))


def check_ranks_agree(fingerprint: str, resume: Checkpoint | None) -> None:
    """Check that all processes, which may be on several machines, train the same thing from the same step.

    Args:
        fingerprint: `run_fingerprint` of what this process is about to train.
        resume: the checkpoint that it found.

    Raises:
        UserError: in all processes, if they differ.
    """
    found = gather_object([(fingerprint, resume.step if resume else 0)])
    if len({other for other, _ in found}) > 1:
        raise UserError("the machines have different settings, code or latents; give all of them the same commit and `dvc pull`")
    steps = [step for _, step in found]
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes would resume from steps {', '.join(map(str, steps))}; put .state on a disk that all machines share "
            "(or copy .state/train from the first one to the others)"
        )


def run_fingerprint(*inputs: Any) -> str:
    """Return a name for everything that determines the result of a training: its settings, its data and its code, as JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
