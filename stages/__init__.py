"""What the stages share: reading params.yaml, writing metrics, and failing with one clear line."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from dit.config import Params, load_config
from dit.errors import UserError


def run_stage(name: str, main: Callable[[Params], None], metrics: list[str], parallel: bool = False) -> None:
    """Run `main` on params.yaml as stage `name`; on a `UserError`, say it in one line and exit with 1.

    A `parallel` stage runs `runtime.num_processes` times side by side, as accelerate does it: one process per GPU. What
    stands behind its name on the command line is passed on.

    DVC deletes a stage's outs before it starts it. `dvc checkout --force` brings those in its cache back; `metrics`, the files
    and folders that live in git instead, are brought back here: every good run leaves a copy in .state/metrics/ under its hash,
    and after a clone the last commit has them.
    """
    if "RANK" in os.environ:  # one of several processes: the one that started them does the rest
        from stages.processes import leave_processes  # imports torch, which the download stage needs not wait for

        try:
            main(load_config())
            leave_processes()
        except BaseException as error:
            problem = _in_one_line(error)
            if problem is None:
                raise
            print(f"{name}: {problem}", file=sys.stderr)
            sys.exit(1)
        return
    kept = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "metrics"
    try:
        params = load_config()
        if parallel and params.runtime.num_processes > 1:
            from stages.processes import run_processes

            run_processes([sys.executable, "-m", f"stages.{name}", *sys.argv[1:]], params.runtime.num_processes)
        else:
            main(params)
    except BaseException as error:
        lost = _lost_outs(name)
        _restore(name, metrics, kept)
        problem = _in_one_line(error)
        if problem is None:
            raise
        print(f"{name}: {problem}", file=sys.stderr)
        if lost and not getattr(error, "resumes", False):
            print(f"{name}: `dvc checkout --force` brings the earlier outputs back", file=sys.stderr)
        sys.exit(1)
    for path in metrics:
        files = _read(Path(path))
        _write(kept / _digest(files), files)


def locked_outs(stage: str) -> list[dict]:
    """What dvc.lock records of the outs of `stage`."""
    lock = Path("dvc.lock")
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.exists() else {}
    return stages.get(stage, {}).get("outs", [])


def code_digest(stage: str) -> str:
    """Return a SHA-256 of the code that `stage` depends on, as dvc.yaml lists it; comments and docstrings do not count."""
    deps = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    digest = hashlib.sha256()
    for dep in map(Path, deps):
        for path in sorted(dep.rglob("*.py")) if dep.is_dir() else [dep] if dep.suffix == ".py" else []:
            digest.update(_without_docstrings(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


def _lost_outs(stage: str) -> list[str]:
    """Outs that DVC has deleted, and that are in its cache."""
    deleted = [out for out in locked_outs(stage) if not Path(out["path"]).exists()]
    if not deleted:
        return []
    asked = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    cache = Path(asked.stdout.strip()) / "files" / "md5"
    return [out["path"] for out in deleted if (cache / out["md5"][:2] / out["md5"][2:]).exists()]


def _restore(stage: str, metrics: list[str], kept: Path) -> None:
    """Put back the metrics that dvc.lock records for `stage`: from the copies, or as git has them, after a clone."""
    for out in locked_outs(stage):
        if out["path"] not in metrics:
            continue
        path = Path(out["path"])
        files = _read(kept / out["md5"]) or _committed(path)
        if files and _digest(files) == out["md5"]:
            _write(path, files)


def _read(path: Path) -> dict[str, bytes]:
    """The files in the folder at `path` by their names in it; "." where it is a file itself; none where there is nothing."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _write(path: Path, files: dict[str, bytes]) -> None:
    """Make the file or folder at `path` what `_read` has read."""
    if path.is_dir():
        shutil.rmtree(path)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def _digest(files: dict[str, bytes]) -> str:
    """The hash by which DVC knows a file, or a folder: that of the list of hashes."""
    hashes = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    if "." in hashes:
        return hashes["."]
    listed = [{"md5": hashes[name], "relpath": name} for name in sorted(hashes)]
    return hashlib.md5(json.dumps(listed).encode()).hexdigest() + ".dir"


def _committed(path: Path) -> dict[str, bytes]:
    """The file or folder as the last commit has it; none if it has none."""
    listing = ["git", "ls-tree", "-rz", "--name-only", "HEAD", f"./{path.as_posix()}"]
    listed = subprocess.run(listing, capture_output=True, text=True)
    files = {}
    for name in filter(None, listed.stdout.split("\0")):
        shown = subprocess.run(["git", "show", f"HEAD:./{name}"], capture_output=True, check=True)
        files[Path(name).relative_to(path).as_posix()] = shown.stdout
    return files


def _in_one_line(error: BaseException) -> str | None:
    """What a user can act on; None for what is a defect of ours and needs its stack trace."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some (`dvc gc -w` drops what no commit uses) and run again"
    return None
