"""What the five stages share: reading params.yaml, writing metrics, and failing with one clear line."""

from __future__ import annotations

import errno
import hashlib
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

    DVC deletes a stage's outs before it starts it. `dvc checkout --force` brings those in its cache back; `metrics`, the outs
    that live in git instead, are brought back here: every good run leaves a copy in .state/metrics/ under its hash, and
    after a clone the last commit has them.
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
        if lost and not getattr(error, "goes_on", False):
            print(f"{name}: `dvc checkout --force` brings the earlier outputs back", file=sys.stderr)
        sys.exit(1)
    kept.mkdir(parents=True, exist_ok=True)
    for path in metrics:
        shutil.copyfile(path, kept / hashlib.md5(Path(path).read_bytes()).hexdigest())


def locked_outs(stage: str) -> list[dict]:
    """What dvc.lock records of the outs of `stage`."""
    lock = Path("dvc.lock")
    stages = (yaml.safe_load(lock.read_text(encoding="utf-8")) or {}).get("stages", {}) if lock.exists() else {}
    return stages.get(stage, {}).get("outs", [])


def _lost_outs(stage: str) -> list[str]:
    """Outs that DVC has deleted, and that are in its cache."""
    deleted = [out for out in locked_outs(stage) if not Path(out["path"]).exists()]
    if not deleted:
        return []
    asked = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    cache = Path(asked.stdout.strip()) / "files" / "md5"
    return [out["path"] for out in deleted if (cache / out["md5"][:2] / out["md5"][2:]).exists()]


def _restore(stage: str, metrics: list[str], kept: Path) -> None:
    """Put back the files that dvc.lock records for `stage`: from the copies, or as git has them, after a clone."""
    for out in locked_outs(stage):
        path, copy = Path(out["path"]), kept / out["md5"]
        if out["path"] not in metrics:
            continue
        content = copy.read_bytes() if copy.exists() else _committed(path)
        if content is not None and hashlib.md5(content).hexdigest() == out["md5"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _committed(path: Path) -> bytes | None:
    """The file as the last commit has it; None if it has none."""
    shown = subprocess.run(["git", "show", f"HEAD:./{path.as_posix()}"], capture_output=True)
    return shown.stdout if shown.returncode == 0 else None


def _in_one_line(error: BaseException) -> str | None:
    """What a user can act on; None for what is a defect of ours and needs its stack trace."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some (`dvc gc -w` drops what no commit uses) and run again"
    return None
