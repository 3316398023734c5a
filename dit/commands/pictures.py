"""Pictures that a command writes where its user says."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dit.errors import UserError


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, in the format that the end of its name says, into a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(path)
    except ValueError as error:
        raise UserError(f"--output {path}: {error}; a name that ends in .png will do") from None
