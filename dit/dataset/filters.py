"""Decide which captions and file names can be used, and why the others cannot."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

MAX_WORDS = 1000  # of a caption; a CLIP reads 77 tokens
MAX_NAME, MAX_PATH = 255, 1000  # bytes of a file's or folder's name, and of a path, on every common file system
PLAIN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # names with which nothing is wrong; ten million are checked in seconds
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # colours of a terminal (ECMA-48, section 5.4)
JOINERS = "\u200c\u200d"  # format characters that are part of words, in Persian and Hindi for instance, and of emoji
SIDES = re.compile(r"\b(left|right|leftmost|rightmost|clockwise|counterclockwise)\b")


def check_captions(captions: list[str]) -> str | None:
    """Return why the captions of an image cannot be used, None if they can."""
    if not captions:
        return "no caption"
    if not all(is_text(caption) for caption in captions):
        return "a caption that is no text (half a surrogate pair, which UTF-8 has no bytes for)"
    longest = max(len(caption.split()) for caption in captions)
    return f"a caption of {longest} words; {MAX_WORDS} are the most" if longest > MAX_WORDS else None


def clean_caption(text: str) -> str:
    """Strip `text`, fold newlines and runs of blanks to one blank, and drop characters that control a terminal or a layout."""
    if not text.isprintable():
        kinds = [(character, unicodedata.category(character)) for character in ESCAPES.sub("", text)]
        text = "".join(" " if kind == "Cc" else c for c, kind in kinds if kind != "Cf" or c in JOINERS)
        if all(unicodedata.category(character) in ("Cf", "Mn", "Zs") for character in text):
            return ""  # nothing that could be seen
    return " ".join(text.split())


def check_name(name: str) -> str | None:
    """Return why a name from a folder, an archive or a list cannot be that of a file below the data set's folder."""
    if len(name) <= MAX_NAME and PLAIN.fullmatch(name):
        return None
    if not is_text(name):
        return "a name that is not UTF-8; rename it"
    if "\0" in name:
        return "a name with a NUL in it"
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        return "a name that does not stay in its folder"
    longest, whole = max(len(part.encode()) for part in path.parts), len(name.encode())
    if whole > MAX_PATH:
        return f"a path of {whole} bytes; {MAX_PATH} are the most"
    return f"a name of {longest} bytes; {MAX_NAME} are the most" if longest > MAX_NAME else None


def is_text(value: str) -> bool:
    """Return whether `value` can be written as UTF-8; JSON can hold what cannot, and so can a command line."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def printable(name: str) -> str:
    """Return `name` with escapes in place of bytes that are not UTF-8 and of what controls a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def forbids_flip(caption: str) -> bool:
    """Return whether `caption` speaks of left or right, so that the mirrored image would make it wrong."""
    return SIDES.search(caption.lower()) is not None
