"""Image files of all kinds, as bytes."""

from __future__ import annotations

import io

from PIL import Image

from helpers.sources import noise_file


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def frames(kind: str) -> bytes:
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    return saved(images[0], kind, save_all=True, append_images=images[1:])


# Files that cannot be used, and a part of the reason.
BAD = {
    "frames.png": (frames("PNG"), "an animation of 3 images"),
    "frames.webp": (frames("WEBP"), "an animation of 3 images"),
    "zero.jpg": (b"", "empty file"),
    "page.jpg": (b"<html><body>404</body></html>", "a web page"),
    "half.jpg": (noise_file(5)[:700], "damaged"),
    "text.jpg": (b"this is no image at all", "not an image"),
    "dot.png": (noise_file(6, (1, 1), "PNG"), "only 1 x 1 pixels"),
}
