"""Check the folder of a trained model, without loading it: this module imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit.errors import UserError
from dit.utils.files import sha256_files

PIPELINE = "DiTTextToImagePipeline"
WEIGHTS = "transformer/*.safetensors"
LORA = "pytorch_lora_weights.safetensors"  # as diffusers calls the file of adapters
TRAINED = "`dvc repro` trains models/dit, `dvc pull models/dit` fetches it"


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of `models/dit`, or of what `dit export` and `save_pretrained` wrote.

    Raises:
        UserError: there is none, or it is that of another architecture; one line that says what was found, and what to do.
    """
    if folder.is_file():
        raise UserError(f"{folder}: {_kind(folder)}; a model's folder is needed, such as models/dit")
    if not folder.is_dir():
        what = TRAINED if Path("params.yaml").is_file() else "run from the project's folder, or name one with --checkpoint"
        raise UserError(f"{folder}: no such folder; {what}")
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a trained model, it has no model_index.json; {TRAINED}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not readable, so this is not a trained model, or a damaged one; {TRAINED}") from None
    if found != PIPELINE:
        raise UserError(f"{folder}: holds a {found}; a {PIPELINE} is needed, as `dvc repro` and `dit export` write it")
    return index


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 of the transformer's weights, in hexadecimal: of the file, or of all its parts, one after the other."""
    return sha256_files(sorted(folder.glob(WEIGHTS)))


def find_lora(path: Path) -> Path:
    """Return the file of adapters that `path` stands for: itself, or in the folder, which may be a model's.

    Raises:
        UserError: there is none.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return path
    found = [file for file in (path / LORA, path / "lora" / LORA) if file.is_file()]
    if found:
        return found[0]
    what = f"there is no {LORA} in it" if path.is_dir() else "is no safetensors, and what may hold code is never loaded"
    what = what if path.exists() else "no such file or folder"
    raise UserError(f"{path}: {what}; a training with train.method lora writes models/dit/lora/{LORA}")


def _kind(file: Path) -> str:
    """Return what kind of file somebody took for a model, in a few words."""
    if file.suffix == ".safetensors" and file.name.startswith("step-"):
        return f"a checkpoint of a training that is not done (`dit generate --checkpoint {file}` generates images with it)"
    if file.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pkl"):
        return "a pickle, which may hold code and is never loaded"
    return "weights alone, without what they belong to" if file.suffix == ".safetensors" else "a file"
