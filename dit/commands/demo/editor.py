"""What the editor of the page holds: the image to change, and the mask that is painted over it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

from PIL import Image

from dit.commands.demo.orders import Order
from dit.commands.inputs import InputImage
from dit.dataset.rgb import to_rgb

BRUSH = ("#ff7a00", 0.6)  # colour and opacity: what is below stays visible


def read_editor(editor: dict | None) -> tuple[InputImage | None, InputImage | None]:
    """Return the image to change, and the mask that was painted; None where there is none."""
    if editor is None or editor["background"] is None:
        return None, None
    painted = [layer.getchannel("A").point(lambda alpha: 255 * (alpha > 255 * BRUSH[1] / 2)) for layer in editor["layers"]]
    mask = next((layer for layer in painted if layer.getbbox()), None)
    return as_input(to_rgb(editor["background"])), mask and as_input(mask)


def as_input(image: Image.Image) -> InputImage:
    """Return `image` with a hash of its size and pixels: it is no file."""
    return InputImage(image, sha256(f"{image.size}".encode() + image.tobytes()).hexdigest())


def editor_value(order: Order) -> dict[str, Any] | None:
    """Return what the editor held when `order` was given; None if nothing."""
    if order.image is None:
        return None
    background, layers = order.image.image, []
    if order.mask:
        paint = Image.new("RGBA", background.size, BRUSH[0])
        paint.putalpha(order.mask.image.point(lambda white: int(BRUSH[1] * white)))
        layers = [paint]
    return {"background": background, "layers": layers, "composite": None}
