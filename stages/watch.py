"""Before stage 1: which data would be fetched, and which model a training would begin with, so that DVC notices changes."""

from __future__ import annotations

from dit.config import Params
from dit.sources.watch import identify
from dit.utils.files import write_json
from stages import run_stage
from stages.dvc_files import INIT, read_init, read_watched, watched_file
from stages.init_model import identify_init


def main(params: Params) -> None:
    """Write the versions of what the settings name; DVC keeps the files of the last run for that (`persist`)."""
    version, lines = identify(params.active.data, read_watched(params.recipe))
    init, about = identify_init(params.train.init_from, read_init())
    for line in [*lines, *about]:
        print(f"watch: {line}", flush=True)
    write_json(watched_file(params.recipe), version)
    write_json(INIT, init)


if __name__ == "__main__":
    run_stage("watch", main, metrics=[])
