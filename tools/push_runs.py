"""Send all that was ever run here to a DVC remote, so that nobody who uses the remote runs it again.

    python tools/push_runs.py [REMOTE]

`dvc push --run-cache` sends the records of the runs, and of their outputs only those of the workspace; and `dvc push` never
sends an output with `cache: false`, such as the metrics. This sends the records and every output that they name and that is
still in the cache. The others type `dvc pull --run-cache`, and from then on `dvc repro --pull` or `dvc exp run --pull`.
"""

from __future__ import annotations

import argparse
import os
import sys

from dvc.exceptions import CollectCacheError
from dvc.repo import Repo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("remote", nargs="?", help="name of a DVC remote; default: the default one")
    try:
        print(push_runs(parser.parse_args().remote))
    except Exception as error:  # each kind of storage raises its own
        sys.exit(f"push_runs: {error}")


def push_runs(remote: str | None) -> str:
    """Send records and outputs; returns what was done.

    Raises:
        RuntimeError: some outputs did not arrive.
    """
    with Repo() as repo:
        os.chdir(repo.root_dir)  # records name their outputs from here
        with repo.lock:
            runs = repo.stage_cache.push(remote)
            outputs, gone = set(), 0
            outputs.update(*repo.used_objs(["watch"]).values())  # which has no record, and is a dep of those of download
            for run in runs:
                try:
                    outputs.update(*repo.stage_cache.get_used_objs([run]).values())
                except CollectCacheError:
                    gone += 1
            sent = repo.cloud.push(outputs, remote=remote)
    if sent.failed:
        raise RuntimeError(f"{len(sent.failed)} files or folders could not be sent")
    left_out = f"; of {gone} of them the outputs are no longer in the cache" if gone else ""
    return f"{len(runs)} runs, {len(sent.transferred)} new files or folders{left_out}"


if __name__ == "__main__":
    main()
