"""Any image as the encoders see it: upright, in sRGB, without transparency."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 0x0112  # the EXIF tag, 1 to 8 (CIPA DC-008, section 4.6.4)
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # orientations with width and height exchanged
SRGB = ImageCms.createProfile("sRGB")
WITHOUT_ALPHA = {"RGBA": "RGB", "P": "RGB", "PA": "RGB", "LA": "L"}  # modes of images that a profile is for


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB: 16 bits to 8, by its colour profile, with white behind what is transparent."""
    if image.mode.startswith("I") and image.has_transparency_data:  # 16-bit grey of which one value is transparent
        grey, holes = to_8bit(image), np.asarray(image) == image.info["transparency"]
        grey.paste(255, mask=Image.fromarray(holes))
        return grey.convert("RGB")
    image = to_srgb(to_8bit(image))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Return whether an image is transparent anywhere."""
    return image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255


def to_8bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits, 65,535 to 255; return other images as they are.

    Pillow's own conversion makes all from 256 on white.
    """
    if not image.mode.startswith("I"):
        return image
    grey = Image.fromarray((np.asarray(image).clip(0, 65_535).astype(np.float32) / 257).round().astype(np.uint8))
    if "icc_profile" in image.info:
        grey.info["icc_profile"] = image.info["icc_profile"]
    return grey


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert colours from the image's own profile (Display P3, Adobe RGB, CMYK of a press) to sRGB.

    An image without a profile, or with one that is damaged or not for its mode, is returned as it is.
    """
    content = image.info.get("icc_profile")
    if not content:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image.convert(WITHOUT_ALPHA.get(image.mode, image.mode))
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if ImageCms.getProfileDescription(profile).startswith("sRGB IEC61966"):
            return image  # nothing to do, and no rounding; "Linear sRGB" is another one
        converted = ImageCms.profileToProfile(colours, profile, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if converted is None:
        return image
    if alpha:
        converted.putalpha(alpha)
    return converted


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say; return it as it is where they cannot be read.

    `ImageOps.exif_transpose` also writes the data back, and raises where one of the other tags is not as the standard has it.
    """
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever Pillow raises for data that cameras and editors have written wrongly
        return image
    return image if method is None else image.transpose(method)
