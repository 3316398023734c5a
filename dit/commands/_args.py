"""How the commands spell and read their flags."""

from __future__ import annotations

import argparse
import os
from difflib import get_close_matches
from pathlib import Path

from PIL import Image

from dit.errors import UserError


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


def make_folder_of(path: Path, flag: str = "--output") -> None:
    """Make the folder that the file `path`, which `flag` names, is to lie in.

    Raises:
        UserError: `path` is a folder itself, or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it, such as {path / ('name' + path.suffix)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: {path.parent} cannot be made: {error.strerror}") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: you may not write {'it' if path.exists() else f'into {path.parent}'}")


def image_path(text: str, name: str = "generated.png") -> Path:
    """Return the image file that `text`, of a flag, stands for: `name` in it, if it is a folder or named as one.

    A folder is what there is as one, what ends in a slash, and what has no suffix.
    """
    path = Path(text)
    is_folder = text.endswith(("/", os.sep)) or path.is_dir() or not path.suffix
    return path / name if is_folder else path


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image, in the format that the end of its name says, into a folder that is made if it is missing."""
    make_folder_of(path)
    try:
        image.save(path)
    except ValueError as error:
        raise UserError(f"--output {path}: {error}; a name that ends in .png will do") from None
