"""What the five stages share: reading params.yaml, writing metrics, and failing with one clear line."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from dit.config import Params, load_config
from dit.errors import UserError


def run_stage(name: str, main: Callable[[Params], None], metrics: list[str]) -> None:
    """Run `main` on params.yaml as stage `name`; on a `UserError`, say it in one line and exit with 1.

    DVC deletes a stage's outs before it starts it. `dvc checkout` brings those in its cache back; `metrics`, the outs
    that live in git instead, are brought back here from the copy that the last good run left in .state/.
    """
    kept = Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "metrics" / name
    try:
        main(load_config())
    except BaseException as error:
        _copy_all(metrics, kept, Path())
        problem = _in_one_line(error)
        if problem is None:
            raise
        print(f"{name}: {problem}\n{name}: `dvc checkout` brings the earlier outputs back", file=sys.stderr)
        sys.exit(1)
    _copy_all(metrics, Path(), kept)


def _in_one_line(error: BaseException) -> str | None:
    """What a user can act on; None for what is a defect of ours and needs its stack trace."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some (`dvc gc -w` drops what no commit uses) and run again"
    return None


def _copy_all(names: list[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
