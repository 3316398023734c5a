"""Where a command writes what its user names."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from dit.errors import UserError


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


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in the format that the end of its name says, into a folder that is made if it is missing."""
    make_folder_of(path)
    try:
        picture.save(path)
    except ValueError as error:
        raise UserError(f"--output {path}: {error}; a name that ends in .png will do") from None
