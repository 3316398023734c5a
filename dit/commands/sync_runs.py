"""`dit sync-runs`: send to MLflow what its server did not take."""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `sync-runs`."""
    parser = commands.add_parser("sync-runs", help="send to MLflow what its server did not take while it was away")
    parser.set_defaults(action=run_sync)


def run_sync(arguments: argparse.Namespace) -> None:
    """Send the runs that wait in .state/unsent, and print their number."""
    from dit.tracking.sync import sync_runs

    sent = sync_runs()
    print(f"{len(sent)} runs sent" if sent else "no run waits to be sent")
