"""Find the folder of a model by its path, or by its id on the Hugging Face Hub: this module imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from dit.errors import UserError
from dit.hub import DownloadError, download_files
from dit.pipeline.model_folder import read_index

INDEX = "model_index.json"
PARTS = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
# Weights in safetensors alone, and what belongs to them: no pickle, and no code.
FILES = ("training.json", "tokenizer/*.txt", *(f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "safetensors")))


def is_hub_id(name: str | Path) -> bool:
    """Return whether `name` is an id of the Hub, owner/name, and no path, whether or not there is such a folder.

    It is a path if it is a `Path`, or if it begins with the name of a folder here, or with `models`: nobody on the Hub has that
    name, and models/dit is where the train stage writes.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return False
    owner = name.split("/")[0]
    return owner != "models" and not Path(owner).is_dir()


def find_model(
    name: str | Path,
    revision: str | None = None,
    subfolder: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a model; one of the Hub is downloaded into the Hub's own cache, if it is not there.

    Args:
        name: a folder, or owner/name on the Hub.
        revision: branch, tag or commit of the latter.
        subfolder: where in it the model is.
        local_files_only: whether to look for it in the cache alone.
        token: for the Hub, instead of the one that the user is logged in with; False for none.

    Raises:
        UserError: it cannot be downloaded, or is no model of this project. Whether a folder is one, `read_index` tells.
    """
    if not is_hub_id(name):
        if revision is not None:
            raise UserError(f"{name}: is a folder, and has no revision {revision!r}; a model on the Hub (owner/name) has")
        return Path(name) / (subfolder or "")

    within = f"{subfolder.strip('/')}/" if subfolder else ""

    def download(revision: str | None, patterns: tuple[str, ...]) -> Path:
        return download_files(str(name), revision, [within + pattern for pattern in patterns], (), local_files_only, token)

    try:
        # The index first: another kind of model should be noticed before gigabytes of it have been downloaded.
        snapshot = download(revision, (INDEX,))
        if not (snapshot / within / INDEX).is_file():
            raise DownloadError(f"has no {within}{INDEX}, and so is no model of this project")
        try:
            read_index(snapshot / within)
        except UserError as error:  # which names the folder in the cache
            raise UserError(str(error).replace(str(snapshot / within), f"{name}/{within}".rstrip("/"))) from None
        return download(snapshot.name, FILES) / within
    except DownloadError as error:
        raise UserError(f"{name}: there is no such folder, and on the Hub it {error}") from None
