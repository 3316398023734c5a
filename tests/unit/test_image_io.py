"""Images as the encoders see them: upright, RGB, square."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dit.dataset.decode import open_rgb
from dit.dataset.image_io import center_crop, random_crop


def jpeg(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=100, subsampling=0, **options)
    return stream.getvalue()


def test_open_rgb_turns_upright():
    halves = Image.new("RGB", (40, 20), "red")
    halves.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise make it upright
    upright = open_rgb(jpeg(halves, exif=exif))
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_open_rgb_converts_mode(mode):
    assert open_rgb(jpeg(Image.new(mode, (20, 20)))).mode == "RGB"


def test_center_crop_size():
    assert center_crop(Image.new("RGB", (20, 40)), (16, 16)).size == (16, 16)


@pytest.fixture
def ramp() -> Image.Image:
    """100 pixels high, 200 wide; the value of a pixel is its column."""
    return Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))


def test_random_crop_depends_on_name_and_number(ramp):
    crop = np.asarray(random_crop(ramp, (32, 32), "images/x.jpg", 3))
    assert np.array_equal(crop, np.asarray(random_crop(ramp, (32, 32), "images/x.jpg", 3)))
    assert not np.array_equal(crop, np.asarray(random_crop(ramp, (32, 32), "y", 3)))


def test_random_crop_varies_within_the_image(ramp):
    crops = [np.asarray(random_crop(ramp, (32, 32), "images/x.jpg", number)) for number in range(1, 9)]
    widths = [int(crop[0, -1, 0]) - int(crop[0, 0, 0]) for crop in crops]
    assert len({crop[0, 0, 0] for crop in crops}) > 5 and all(60 <= width <= 100 for width in widths)  # of 100 at most
