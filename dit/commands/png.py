"""PNG files whose text chunks say how the image was generated."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from dit.errors import UserError, one_line


def write_png(path: Path, image: Image.Image, facts: dict[str, str]) -> None:
    """Write `image` with a text chunk for each of `facts`, first to a neighbour, then renamed. The same gives the same bytes.

    Args:
        path: where; its folder exists.
        image: the pixels.
        facts: values are Latin-1 where they can be (tEXt), else UTF-8 (iTXt), as the PNG specification has it.
    """
    chunks = PngInfo()
    for key, value in facts.items():
        chunks.add_text(key, value)
    part = path.with_name(path.name + ".part")
    try:
        image.save(part, format="PNG", pnginfo=chunks)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)  # the disk is full, or Ctrl-C
        raise


def read_facts(path: Path) -> dict[str, str]:
    """Return the text chunks of a PNG file, in their order.

    Raises:
        UserError: the file cannot be read, or is no image.
    """
    try:
        with Image.open(path) as image:
            image.load()  # chunks may follow the pixels
            return dict(getattr(image, "text", {}))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None
