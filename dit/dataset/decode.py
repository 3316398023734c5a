"""Decode the files of images. Whatever Pillow raises for one becomes an `ImageError`, here and nowhere else."""

from __future__ import annotations

import io
from pathlib import Path

import psutil
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from dit.dataset.rgb import to_rgb, turn_upright
from dit.errors import UserError, one_line

MIN_SIDE = 16  # pixels
ANIMATED = ("PNG", "WEBP", "GIF")  # formats that can be; a telephone's JPEG with a second image in it is a photograph
BYTES_PER_PIXEL = 8  # while decoding: Pillow takes four for RGB, and there is a second copy
SHARE_OF_MEMORY = 0.25  # that one image may take; several are decoded side by side

# Pillow's limits are meant for servers, and refuse the photographs of telephones (108 and 200 megapixels) and the settings
# that other generators write into their files. What memory holds is checked below instead, before pixels are decoded.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class ImageError(UserError):
    """Why an image cannot be used, without its name."""


def open_rgb(content: bytes) -> Image.Image:
    """Decode an image file as RGB, upright and in sRGB; what is transparent becomes white.

    Raises:
        ImageError: it cannot be used.
    """
    if not content:
        raise ImageError("empty file")
    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_header(image)
            image.load()
            return to_rgb(turn_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("a web page, not an image" if content.lstrip()[:1] == b"<" else "not an image") from None
    except MemoryError:
        raise ImageError("more pixels than the memory holds") from None
    except Exception as error:  # plugins raise what comes: OSError, SyntaxError, TypeError, struct.error, KeyError …
        raise ImageError(f"damaged: {one_line(error)}") from None


def open_named(content: bytes, name: Path | str) -> Image.Image:
    """Decode an image file as `open_rgb` does; an error begins with `name`."""
    try:
        return open_rgb(content)
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
