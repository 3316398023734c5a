"""Between images and tensors; grids of images, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

WIDEST = 1200  # pixels of a sheet of large images: the report shows no more, and labels in a wider one could not be read

Statistic = float | list[float]  # one number, or one of each channel


def to_tensor(pixels: torch.Tensor) -> torch.Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """Convert (N, 3, H, W) in [-1, 1] to RGB images; values outside are clipped."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in pixels]


def per_channel(value: Statistic, device: torch.device) -> float | torch.Tensor:
    """Return one number as it is, and one of each channel as (C, 1, 1) on `device`: what (N, C, H, W) can be multiplied by."""
    return torch.tensor(value, device=device)[:, None, None] if isinstance(value, list) else value


def lies_over(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two images, (width, height) each, have one shape, up to a pixel of rounding where one was resized."""
    (width, height), (other_width, other_height) = size, other
    # Of the sides of one, a resize gives one exactly, or both a little off in the same direction: a pixel along its longer side.
    return abs(width * other_height - height * other_width) <= max(*size, *other)


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of two batches of images (N, 3, H, W) in [-1, 1]."""
    return float(10 * torch.log10(4 / (first - second).square().mean()))


def grid(images: list[Image.Image], columns: int, gap: int = 4, scale: int = 1) -> Image.Image:
    """Lay images out in rows of `columns`, `gap` pixels apart, enlarged `scale` times, in cells that hold the largest."""
    width, height = max(image.width for image in images) * scale, max(image.height for image in images) * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for k, image in enumerate(images):
        if scale > 1:
            image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
        across, down = (width - image.width) // 2, (height - image.height) // 2
        sheet.paste(image, (gap + k % columns * (width + gap) + across, gap + k // columns * (height + gap) + down))
    return sheet


def labelled_grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int, cell: int = 190) -> Image.Image:
    """Like `grid`, with each image's label in small print below it.

    Images of up to `cell` pixels are enlarged a whole number of times, as far as `cell`. Wider ones are reduced to `cell`, or
    further, so that the sheet is not wider than `WIDEST`.
    """
    gap = 8
    width, height = max(image.width for image in images), max(image.height for image in images)
    factor: float = cell // width if width <= cell else min(cell, (WIDEST - gap) // columns - gap) / width
    width, height = round(width * factor), round(height * factor)
    fonts = [label_font(label) for label in labels]
    texts = [wrap(label, font, width) for label, font in zip(labels, fonts, strict=True)]
    below = 16 * max(len(lines) for lines in texts) + 4
    tiles = []
    for image, lines, font in zip(images, texts, fonts, strict=True):
        tile = Image.new("RGB", (width, height + below), "white")
        size = round(image.width * factor), round(image.height * factor)
        tile.paste(image.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
        draw_label(tile, (2, height + 2), lines, font, (60, 60, 60))
        tiles.append(tile)
    return grid(tiles, columns, gap)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int = 5) -> list[str]:
    """Break `text` into lines of at most `width` pixels, with a margin of 4.

    Lines end between words, or within one that no line holds: an address, or Chinese, which is written without blanks. After
    `most` lines, the rest is left out.
    """

    def fits(line: str) -> bool:
        return font.getlength(line) <= width - 4

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if fits(longer):
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and not fits(lines[-1] + character):
                lines.append("")
            lines[-1] += character
        if len(lines) > most:
            break
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and not fits(f"{last} …"):
        last = last[:-1].rstrip()
    return [*lines[: most - 1], f"{last} …".strip()]


def draw_label(
    sheet: Image.Image, corner: tuple[int, int], lines: Sequence[str], font: ImageFont.FreeTypeFont, colour: tuple[int, int, int]
) -> None:
    """Draw `lines` below each other, 14 pixels apart whatever the font's own height is; `corner` is the upper left one."""
    canvas, (x, y) = ImageDraw.Draw(sheet), corner
    for k, line in enumerate(lines):
        canvas.text((x, y + 12 + 14 * k), line, fill=colour, font=font, anchor="ls")


def label_font(text: str, size: int = 11) -> ImageFont.FreeTypeFont:
    """Return a font that has the characters of `text`.

    That is DejaVu Sans: Latin, Greek, Cyrillic, Arabic, symbols. Of other scripts, the system's font that has most of `text`;
    where there is none, they are boxes.
    """
    import matplotlib  # here and below, since few need it: it brings DejaVu

    dejavu = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    characters = set(map(ord, "".join(text.split())))
    if text.isascii() or characters <= _characters(dejavu):
        return ImageFont.truetype(dejavu, size)
    shares = {path: len(characters & _characters(path)) for path in (dejavu, *_system_fonts())}
    better = [path for path in shares if shares[path] > shares[dejavu]]
    for path in sorted(better, key=lambda path: (-shares[path], "regular" not in path.name.lower(), path)):
        try:
            return ImageFont.truetype(path, size)
        except OSError:  # a bitmap font that has not this size, as most emoji are
            continue
    return ImageFont.truetype(dejavu, size)


@cache
def _system_fonts() -> list[Path]:
    """Return the files of the system's fonts, but for macOS' LastResort, which has a box for every character there is."""
    from matplotlib.font_manager import findSystemFonts

    return [path for path in map(Path, findSystemFonts()) if not path.name.lower().startswith("lastresort")]


@cache
def _characters(path: Path) -> frozenset[int]:
    """Return the code points that a font file has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
