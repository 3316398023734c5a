"""What dvc.yaml and dvc.lock say of a stage, and how to get back what DVC has deleted before a run that failed."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from dit.yaml_file import read_yaml

INIT = Path("data", "watch", "init.json")  # which model a training begins with, and the SHA-256 of its weights; {} for none


def _locked(stage: str) -> dict:
    """Return what dvc.lock records of `stage`."""
    lock = Path("dvc.lock")
    stages = (read_yaml(lock.read_text(encoding="utf-8"), "dvc.lock") or {}).get("stages", {}) if lock.exists() else {}
    return stages.get(stage, {})


def locked_outs(stage: str) -> list[dict]:
    """Return what dvc.lock records of the outs of `stage`."""
    return _locked(stage).get("outs", [])


def locked_params(stage: str) -> dict:
    """Return the settings of params.yaml that `stage` ran with last, by their keys."""
    return _locked(stage).get("params", {}).get("params.yaml", {})


def watched_file(recipe: str) -> Path:
    """Return the file in which the watch stage keeps which version of the data `recipe` fetches."""
    return Path("data", "watch", f"{recipe}.json")


def read_watched(recipe: str) -> dict:
    """Return what the watch stage has written; {} where it has not run."""
    return _read_json(watched_file(recipe))


def read_init() -> dict:
    """Return what the watch stage has written of the model that a training begins with; {} for none, and where it has not run."""
    return _read_json(INIT)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def locked_digest(stage: str, out: Path) -> str | None:
    """Return DVC's hash of an out of `stage`; None if dvc.lock does not record it."""
    return next((known["md5"] for known in locked_outs(stage) if known["path"] == out.as_posix()), None)


def lost_outs(stage: str) -> list[str]:
    """Return the outs of `stage` that DVC has deleted and has in its cache."""
    return [out["path"] for out in locked_outs(stage) if not Path(out["path"]).exists() and _cached(out).exists()]


def unlink_outs(stage: str) -> None:
    """Make copies of the outs of `stage` that are links into DVC's cache, as `dvc unprotect` does.

    DVC deletes them before it runs the stage. One that is run by hand would write into the cache through them (`cache.type`
    hardlink, symlink).
    """
    for out in map(Path, (out["path"] for out in locked_outs(stage))):
        for path in [out] if out.is_file() else list(out.rglob("*")):
            if path.is_file() and (path.is_symlink() or path.stat().st_nlink > 1):
                part = path.with_name(path.name + ".part")
                shutil.copyfile(path, part)
                part.replace(path)


def restore_metrics(stage: str, metrics: list[str]) -> None:
    """Put back the metrics files that dvc.lock records for `stage`: from DVC's cache or, after a clone, from the last commit.

    DVC caches files with `cache: false`, too, for its run cache, but `dvc checkout` does not bring them back.
    """
    for out in locked_outs(stage):
        path = Path(out["path"])
        if out["path"] not in metrics or path.exists():
            continue
        if _cached(out).exists():
            shutil.copyfile(_cached(out), path)
            continue
        shown = subprocess.run(["git", "show", f"HEAD:./{path.as_posix()}"], capture_output=True, check=False)
        if shown.returncode == 0 and hashlib.md5(shown.stdout).hexdigest() == out["md5"]:
            path.write_bytes(shown.stdout)


def code_digest(stage: str) -> str:
    """Return a SHA-256 of the code that `stage` depends on, as dvc.yaml lists it; comments and docstrings do not count."""
    deps = read_yaml(Path("dvc.yaml").read_text(encoding="utf-8"), "dvc.yaml")["stages"][stage]["deps"]
    digest = hashlib.sha256()
    for dep in map(Path, deps):
        for path in sorted(dep.rglob("*.py")) if dep.is_dir() else [dep] if dep.suffix == ".py" else []:
            digest.update(_without_docstrings(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


@functools.cache
def _cache_folder() -> Path:
    asked = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    return Path(asked.stdout.strip()) / "files" / "md5"


def _cached(out: dict) -> Path:
    """Return where DVC's cache has the file or the list of a folder's files, if it has it."""
    return _cache_folder() / out["md5"][:2] / out["md5"][2:]
