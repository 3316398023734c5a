"""Before stage 1: which version of the data the download stage would fetch, so that DVC notices a change of it."""

from __future__ import annotations

from dit.config import Params
from dit.sources.watch import identify
from dit.utils.files import write_json
from stages import run_stage
from stages.dvc_files import read_watched, watched_file


def main(params: Params) -> None:
    """Write the version of what the recipe's settings name; DVC keeps the file of the last run for that (`persist`)."""
    version, lines = identify(params.active.data, read_watched(params.recipe))
    for line in lines:
        print(f"watch: {line}", flush=True)
    write_json(watched_file(params.recipe), version)


if __name__ == "__main__":
    run_stage("watch", main, metrics=[])
