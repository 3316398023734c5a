"""Decide which images, captions and file names can be used, and why the others cannot."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from dit.errors import one_line

MIN_SIDE = 16  # pixels
MAX_WORDS = 1000  # of a caption; a CLIP reads 77 tokens
ANIMATED = ("PNG", "WEBP", "GIF")  # formats that can be; a telephone's JPEG with a second image in it is a photograph
SIDES = re.compile(r"\b(left|right|leftmost|rightmost|clockwise|counterclockwise)\b")


def check_image(content: bytes) -> str | None:
    """Return why an image file cannot be used, None if it can; decodes it whole, as training would."""
    if not content:
        return "empty file"
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) < MIN_SIDE:
                    return f"only {image.width} x {image.height} pixels; {MIN_SIDE} a side are the least"
                if image.format in ANIMATED and getattr(image, "is_animated", False):
                    return f"an animation of {getattr(image, 'n_frames', 2)} images, not one"
                image.load()
                if image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255:
                    return "transparent in places; put it on a background first"
        except UnidentifiedImageError:
            return "a web page, not an image" if content.lstrip()[:1] == b"<" else "not an image"
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return "more pixels than any honest image (a decompression bomb)"
        except (OSError, SyntaxError, ValueError) as error:
            return f"damaged: {one_line(error)}"
    return None


def check_captions(captions: list[str]) -> str | None:
    """Return why the captions of an image cannot be used, None if they can."""
    if not captions:
        return "no caption"
    if not all(is_text(caption) for caption in captions):
        return "a caption that is no text (half a surrogate pair, which UTF-8 has no bytes for)"
    longest = max(len(caption.split()) for caption in captions)
    return f"a caption of {longest} words; {MAX_WORDS} are the most" if longest > MAX_WORDS else None


def clean_caption(text: str) -> str:
    """Strip `text` and fold newlines and runs of blanks to one blank."""
    return " ".join(text.split())


def inside(name: str) -> bool:
    """Return whether a file name from an archive or a list stays in the folder it is meant for."""
    path = PurePosixPath(name.replace("\\", "/"))
    printable = name.isprintable() and is_text(name)
    return bool(path.parts) and printable and not path.is_absolute() and ".." not in path.parts and ":" not in name


def is_text(value: str) -> bool:
    """Return whether `value` can be written as UTF-8; JSON can hold what cannot, and so can a command line."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def forbids_flip(caption: str) -> bool:
    """Return whether `caption` speaks of left or right, so that the mirrored image would make it wrong."""
    return SIDES.search(caption.lower()) is not None
