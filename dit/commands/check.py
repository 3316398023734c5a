"""`dit check`: is everything there that the pipeline needs?"""

from __future__ import annotations

import argparse


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `check`."""
    parser = commands.add_parser("check", help="check configuration, disk space, data source and weights before running")
    parser.set_defaults(action=run_check)


def run_check(arguments: argparse.Namespace) -> None:
    """Say that nothing is missing, or what is."""
    from dit.commands.checks import check

    check()
    print("settings, disk space, data and weights: nothing is missing")
