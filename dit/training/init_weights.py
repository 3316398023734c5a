"""Which files hold the weights of the model that a training begins with, and their hash: this module imports no torch."""

from __future__ import annotations

from pathlib import Path

from dit.errors import UserError
from dit.utils.files import sha256_files

NEEDED = "a folder such as models/base or an export, or a step-….safetensors that runtime.keep_state kept, would be right"


def find_weights(path: Path, name: str) -> list[Path]:
    """Return the files of weights of the model at `path`, a model folder or a checkpoint, in their order.

    Raises:
        UserError: there are none; the line calls it `name`.
    """
    found = [path] if path.is_file() and path.suffix == ".safetensors" else sorted(path.glob("transformer/*.safetensors"))
    if not found:
        what = "has no transformer/*.safetensors" if path.exists() else f"is not there, there is no {path}"
        raise UserError(f"train.init_from: {name} {what}; {NEEDED}")
    return found


def weights_digest(path: Path, name: str) -> str:
    """Return the SHA-256 of the model's weights, in hexadecimal, by which DVC notices another one."""
    return sha256_files(find_weights(path, name))
