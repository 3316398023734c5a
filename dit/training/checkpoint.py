"""Checkpoints: all that a training needs to go on to the same weights, in safetensors and JSON.

A checkpoint of step 500 is `step-00000500.safetensors` and, written after it, `step-00000500.json` with the SHA-256 of
the first: without a record that fits, it is not one. Nothing in it is executed when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors.torch import load_file, save_file

from dit.errors import UserError
from dit.files import file_hash, write_json

# What the result depends on beside the settings and the data: the code of a training step.
CODE = ("diffusion.py", "latents.py", "model.py", "padding.py", "shards.py", "training")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: after how many steps, where, and the record that was saved with its tensors."""

    step: int
    path: Path
    record: dict[str, Any]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path)


class Checkpoints:
    """Writes checkpoints into `folder` while training goes on, and keeps the last `keep`."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(1)
        self._pending: Future | None = None

    def save(self, step: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Copy `tensors` and write them with `record`. What the last writing ran into is raised here or by `wait`."""
        self.wait()
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        self._pending = self._writer.submit(self._write, step, copies, record)

    def wait(self) -> None:
        """Until what was saved last is on the disk."""
        if self._pending:
            self._pending, pending = None, self._pending
            pending.result()

    def _write(self, step: int, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.safetensors"
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)  # the disk is full: what is left of it should not stay so
            raise
        part.replace(path)
        write_json(path.with_suffix(".json"), {"step": step, "sha256": file_hash(path), "record": record})
        for old in sorted(self.folder.glob("step-*.json"))[: -self.keep]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def lock(self) -> AcquireReturnProxy:
        """A context in which no other training writes here: two of the same settings would overwrite each other's checkpoints.

        Raises:
            UserError: there is another one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(self.folder / "lock").acquire(timeout=10)
        except Timeout:
            raise UserError(f"{self.folder}: another training with the same settings is running") from None

    def newest(self, log: Callable[[str], None]) -> Checkpoint | None:
        """The last one that is whole; one that is not is named to `log`."""
        for path in sorted(self.folder.glob("step-*.json"), reverse=True):
            try:
                return open_checkpoint(path)
            except UserError as error:
                log(f"{error}; taking the one before it")
        return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Look whether the checkpoint at `path` (either of its two files) is whole.

    Raises:
        UserError: it is not; one line that names it.
    """
    tensors, record = path.with_suffix(".safetensors"), path.with_suffix(".json")
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        whole = file_hash(tensors) == content["sha256"]
        checkpoint = Checkpoint(content["step"], tensors, content["record"])
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read ({error.strerror}), so it is no checkpoint") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{record}: not the record of a checkpoint") from None
    if not whole:
        raise UserError(f"{tensors}: damaged, its SHA-256 is not the one in {record.name}")
    return checkpoint


def open_named(path: Path, folder: Path) -> Checkpoint:
    """The checkpoint that the user names.

    Raises:
        UserError: there is none; the line names some that there are in `folder`.
    """
    if path.is_file():
        return open_checkpoint(path)
    known = sorted(folder.glob("*/step-*.safetensors"), key=lambda file: file.stat().st_mtime)[-3:]
    raise UserError(f"--resume {path}: no such file; there are " + (", ".join(map(str, known)) or f"no checkpoints in {folder}"))


def check_alike(key: str, resume: Checkpoint | None) -> None:
    """Processes, which may be on several machines, have to train the same thing from the same step.

    Args:
        key: `training_key` of what this process is about to train.
        resume: the checkpoint that it found.

    Raises:
        UserError: in all of them, where they differ.
    """
    found = gather_object([(key, resume.step if resume else 0)])
    if len({key for key, _ in found}) > 1:
        raise UserError("the machines have different settings, code or latents; give all of them the same commit and `dvc pull`")
    steps = [step for _, step in found]
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes would go on from steps {', '.join(map(str, steps))}; put .state on a disk that all machines share "
            "(or copy .state/train from the first one to the others)"
        )


def training_key(*settings: Any) -> str:
    """A name for everything that determines the result of a training: `settings`, and the code of its steps."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    package = Path(__file__).parent.parent
    for name in CODE:
        path = package / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
