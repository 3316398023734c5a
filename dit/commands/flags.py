"""How the commands spell and read their flags."""

from __future__ import annotations

import argparse
from difflib import get_close_matches


def add_flag(group: argparse._ActionsContainer, name: str, **settings) -> None:
    """Add `--name`, as diffusers spells its arguments; with - in place of _, and the other way round, it is understood, too."""
    group.add_argument(f"--{name}", **settings)
    other = name.replace("_", "-") if "_" in name else name.replace("-", "_")
    if other != name:  # understood, and not shown
        dest = name.replace("-", "_")
        group.add_argument(f"--{other}", dest=dest, **settings | {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS})


def not_understood(parser: argparse.ArgumentParser, rest: list[str]) -> str:
    """One line on the arguments that are left over when `parser`, a command's own, has read the others."""
    line = f"not understood: {' '.join(rest)}"
    flag = rest[0].split("=")[0]
    if flag.startswith("-"):
        close = get_close_matches(flag, parser._option_string_actions, n=1)
        return f"{line}; did you mean {close[0]}?" if close else line
    if "--prompt" in parser._option_string_actions:
        return f'{line}; a prompt is one text behind its flag: --prompt "{" ".join(rest)}"'
    return line
