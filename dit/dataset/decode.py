"""Decode the files of images. Whatever Pillow raises for one becomes an `ImageError`, here and nowhere else."""

from __future__ import annotations

import io
import struct
from functools import cache
from pathlib import Path

import psutil
from PIL import Image, UnidentifiedImageError

from dit.dataset.rgb import ORIENTATION, SIDEWAYS, to_rgb, turn_upright
from dit.errors import UserError, one_line

MIN_SIDE = 16  # pixels
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")  # of pixels: EPS would run Ghostscript
ANIMATED = ("PNG", "WEBP", "GIF", "AVIF")  # formats that can be; a telephone's JPEG with a second image in it is a photograph
BYTES_PER_PIXEL = 16  # while decoding: Pillow takes four for RGB; turning and converting colours make copies
SHARE_OF_MEMORY = 0.5  # that one image may take
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"  # how such files begin
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # of a PNG

# Pillow's limit is meant for servers, and refuses the photographs of telephones (108 and 200 megapixels). What memory holds is
# checked below instead, before pixels are decoded.
Image.MAX_IMAGE_PIXELS = None


class ImageError(UserError):
    """Why an image cannot be used, without its name."""


def open_rgb(content: bytes) -> Image.Image:
    """Decode an image file as RGB, upright and in sRGB; what is transparent becomes white.

    A PNG whose pixels are whole is used, whatever is wrong with the rest of it: texts that other generators have written into
    it, a profile, a checksum.

    Raises:
        ImageError: it cannot be used.
    """
    if not content:
        raise ImageError("empty file")
    try:
        return _decode(content)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("more pixels than the memory holds") from None
    except Exception as error:  # plugins raise what comes: OSError, SyntaxError, TypeError, struct.error, KeyError …
        if content.startswith(PNG) and (pixels := _pixel_chunks(content)) != content:
            return open_rgb(pixels)
        raise ImageError(_explain(content, error)) from None


@cache
def _formats() -> list[str]:
    """Return those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _decode(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        _check_header(image)
        image.load()
        return to_rgb(turn_upright(image))


def _pixel_chunks(content: bytes) -> bytes:
    """Return a PNG with those chunks alone that its pixels need (ISO/IEC 15948, section 5.3: length, type, data, checksum)."""
    kept, start = [PNG], len(PNG)
    while start + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        if kind in PIXEL_CHUNKS:
            kept.append(content[start : start + 12 + length])
        start += 12 + length
    return b"".join(kept)


def _explain(content: bytes, error: Exception) -> str:
    if not isinstance(error, UnidentifiedImageError):
        return f"damaged: {one_line(error)}"
    if content[4:8] == b"ftyp":
        return "HEIC or AVIF of a kind that is not read; save it as JPEG or PNG"
    if content.startswith((PNG, JPEG, b"RIFF")):
        return "damaged: its header is not readable"
    return "a web page, not an image" if content.lstrip()[:1] == b"<" else "not an image"


def open_named(content: bytes, name: Path | str) -> Image.Image:
    """Decode an image file as `open_rgb` does; an error begins with `name`."""
    try:
        return open_rgb(content)
    except ImageError as error:
        raise UserError(f"{name}: {error}") from None


def read_named_size(content: bytes, name: Path | str) -> tuple[int, int]:
    """Return the `image_size` of an image file; an error begins with `name`."""
    try:
        return image_size(content)
    except ImageError as error:
        raise UserError(f"{name}: {error}") from None


def check_image(content: bytes) -> str | None:
    """Return why an image file cannot be used, None if it can; decodes it whole, as the encode stage will."""
    try:
        open_rgb(content)
    except ImageError as error:
        return str(error)
    return None


def image_format(content: bytes) -> str:
    """Return the ending (jpg, png, webp, …) of the name of a file with this content, which can be decoded."""
    with Image.open(io.BytesIO(content)) as image:
        kind = (image.format or "").lower()
    return "jpg" if kind in ("jpeg", "mpo") else kind


def image_size(content: bytes) -> tuple[int, int]:
    """Return width and height of an image file as `open_rgb` returns it, from its header alone where that is readable.

    Raises:
        ImageError: it cannot be used.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            _check_header(image)
            width, height = image.size
            if image.format == "TIFF":  # turned already
                return width, height
            if image.format == "PNG" and "exif" not in image.info and b"eXIf" not in content:
                return width, height  # to look for what is not there would decode the image
            turned = image.getexif().get(ORIENTATION) in SIDEWAYS
    except Exception:  # whatever plugins raise: decoding finds a way round it, or says what is wrong
        return open_rgb(content).size
    return (height, width) if turned else (width, height)


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"only {width} x {height} pixels; {MIN_SIDE} a side are the least")
    needed, most = width * height * BYTES_PER_PIXEL, SHARE_OF_MEMORY * memory_bytes()
    if needed > most:
        raise ImageError(
            f"{width} x {height} pixels take {needed / 1e9:.1f} GB to decode, and an image may take {most / 1e9:.1f} GB "
            f"({SHARE_OF_MEMORY:.0%} of the memory); make it smaller"
        )
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        raise ImageError(f"an animation of {getattr(image, 'n_frames', 2)} images, not one")


def memory_bytes() -> int:
    """Return the memory of this machine in bytes, or of the container that this process runs in."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total
