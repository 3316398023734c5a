"""What the five stages share: reading params.yaml, writing metrics, and failing with one clear line."""

from __future__ import annotations

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
    except UserError as error:
        _copy_all(metrics, kept, Path())
        print(f"{name}: {error}", file=sys.stderr)
        print(f"{name}: nothing is lost: `dvc checkout` brings the earlier outputs back", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _copy_all(metrics, kept, Path())
        print(f"{name}: stopped; `dvc checkout` brings the earlier outputs back", file=sys.stderr)
        sys.exit(130)
    _copy_all(metrics, Path(), kept)


def _copy_all(names: list[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
