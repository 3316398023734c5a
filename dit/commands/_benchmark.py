"""What the kinds of `dit benchmark` share: a parser whose results are also written as JSON, and a check of numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit.commands._args import make_folder_of
from dit.errors import UserError


def add_kind(
    kinds: argparse._SubParsersAction, name: str, action: Callable[[argparse.Namespace], dict[str, Any]], help: str, examples: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose `action` prints tables and returns what `--output` receives as JSON."""
    parser = kinds.add_parser(
        name, help=help, description=help, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"results as JSON; default: benchmark-{name}.json")

    def run(arguments: argparse.Namespace) -> None:
        output = arguments.output = arguments.output or Path(f"benchmark-{name}.json")
        make_folder_of(output)
        results = action(arguments)

        from dit.benchmark.results import default_device, device_name
        from dit.utils.files import write_json

        write_json(output, {"device": device_name(default_device())} | results)
        print(f"\n{output}")

    parser.set_defaults(action=run, parser=parser)
    return parser


def require_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raise a `UserError` for the first of the flags `names` that is given and not positive."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: {value} is not a positive number")
