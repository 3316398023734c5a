"""Image files: what can be decoded is, upright and in sRGB; of anything else one line says why not."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from dit.dataset import decode
from dit.dataset.decode import ImageError, check_image, open_rgb
from dit.dataset.rgb import ORIENTATION, UPRIGHT, turn_upright
from helpers.images import BAD, frames, saved
from helpers.sources import noise_file


@pytest.mark.parametrize("name", BAD)
def test_check_image_unusable(name):
    assert BAD[name][1] in check_image(BAD[name][0])


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.new("RGBA", (32, 32), (255, 0, 0, 255)), "PNG"),
        saved(Image.new("CMYK", (32, 32)), "JPEG"),
        saved(Image.new("L", (32, 32)), "JPEG"),
        saved(Image.new("1", (32, 32)), "PNG"),
        saved(Image.new("I;16", (32, 32)), "PNG"),
        frames("MPO"),  # a telephone's JPEG with a second image behind the first
    ],
)
def test_check_image_unusual(content):
    assert check_image(content) is None and open_rgb(content).mode == "RGB"


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.new("RGBA", (32, 32), (255, 0, 0, 0)), "PNG"),
        saved(Image.new("LA", (32, 32), (0, 0)), "PNG"),
        saved(Image.new("P", (32, 32)), "PNG", transparency=0),
        saved(Image.new("RGB", (32, 32), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
    ],
)
def test_open_rgb_transparent_becomes_white(content):
    assert open_rgb(content).getpixel((5, 5)) == (255, 255, 255)


def test_open_rgb_16_bits():
    deep = Image.fromarray(np.full((32, 32), 32_768, dtype=np.uint16))
    assert open_rgb(saved(deep, "PNG")).getpixel((5, 5)) == (128, 128, 128)


# Two pixels tall, three wide, each its own colour: where they come to lie tells the eight orientations apart.
CORNERS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10


def photograph(orientation: int, resolution: object = None) -> bytes:
    """A JPEG whose EXIF has an orientation and, as some cameras write it, a resolution of another type than the standard's."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = exif.tobytes()
    if resolution is not None:  # little-endian TIFF with two entries; Pillow writes no wrong types by itself
        text = str(resolution).encode() + b"\0"
        start = 8 + 2 + 2 * 12 + 4
        entries = struct.pack("<HHIHH", ORIENTATION, 3, 1, orientation, 0) + struct.pack("<HHII", 282, 2, len(text), start)
        content = b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 2) + entries + struct.pack("<I", 0) + text
    return saved(Image.fromarray(CORNERS).resize((48, 32), Image.Resampling.NEAREST), "JPEG", quality=100, exif=content)


@pytest.mark.parametrize("orientation", range(9))
def test_open_rgb_orientation_with_a_resolution_in_ascii(orientation):
    content = photograph(orientation, "72 dots per inch")
    with Image.open(io.BytesIO(content)) as plain:
        assert plain.getexif()[282] == "72 dots per inch"
    assert check_image(content) is None
    found = np.asarray(open_rgb(content).resize((3, 2) if orientation < 5 else (2, 3))).astype(int)
    method = UPRIGHT.get(orientation)
    wanted = Image.fromarray(CORNERS) if method is None else Image.fromarray(CORNERS).transpose(method)
    assert np.abs(found - np.asarray(wanted).astype(int)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turn_upright_as_pillow_does(orientation):
    from PIL import ImageOps

    with Image.open(io.BytesIO(photograph(orientation))) as image:
        assert np.array_equal(np.asarray(turn_upright(image)), np.asarray(ImageOps.exif_transpose(image)))


@settings(max_examples=200, deadline=None)
@given(exif=st.binary(max_size=80))
def test_open_rgb_any_exif(exif):
    plain = Image.new("RGB", (32, 48), "red")
    content = saved(plain, "JPEG", exif=b"Exif\0\0" + exif)
    assert open_rgb(content).getpixel((9, 9)) == (254, 0, 0)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_open_rgb_damaged_bytes_give_one_line(data):
    good = data.draw(st.sampled_from([noise_file(1), noise_file(1, kind="PNG"), noise_file(1, kind="WEBP"), frames("GIF")]))
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(400, len(content)) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_rgb(bytes(content)).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error) and len(str(error)) < 300


def test_open_rgb_a_photograph_of_108_megapixels():
    assert open_rgb(saved(Image.new("L", (12_000, 9_000)), "PNG", compress_level=1)).size == (12_000, 9_000)


def test_check_image_larger_than_the_memory(monkeypatch):
    monkeypatch.setattr(decode, "memory_bytes", lambda: 4_000_000)  # half of it for 125,000 pixels
    problem = check_image(noise_file(7, (500, 400)))
    assert problem == "500 x 400 pixels take 0.0 GB to decode, and an image may take 0.0 GB (50% of the memory); make it smaller"
    assert check_image(noise_file(7, (400, 300))) is None


def test_open_rgb_a_bomb_is_refused_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 0, 0, 0, 0)
    content = decode.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    assert "200000 x 200000 pixels take 640.0 GB to decode" in check_image(content)


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    known = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", known)


BOMB = b"a\0\0" + zlib.compress(bytes(300_000_000), 1)  # of a profile


@pytest.mark.parametrize(
    "wrong",
    [
        chunk(b"tEXt", b"Title\0x", checksum=1),
        chunk(b"gAMA", b"\0"),
        chunk(b"iCCP", b"x"),
        chunk(b"iCCP", BOMB),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000), 1)),
        chunk(b"pHYs", b"", checksum=7),
    ],
    ids=["checksum", "gamma", "short profile", "large profile", "large text", "resolution"],
)
def test_open_rgb_png_whose_pixels_are_whole(wrong):
    good = saved(Image.new("RGB", (32, 32), "red"), "PNG")
    assert open_rgb(good[:33] + wrong + good[33:]).getpixel((3, 3)) == (255, 0, 0)  # behind the header


def test_check_image_names_what_it_is():
    assert check_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic") == "HEIC or AVIF of a kind that is not read; save it as JPEG or PNG"
    assert check_image(b"\xff\xd8\xff\xe0" + bytes(20)).startswith("damaged")
    assert check_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n") == "not an image"


@pytest.mark.parametrize("compressed", [True, False])
def test_open_rgb_with_the_workflow_of_another_generator(compressed):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "x" * 3_000_000, zip=compressed)
    notes.add_itxt("prompt", "y" * 3_000_000, zip=compressed)
    assert open_rgb(saved(Image.new("RGB", (32, 32), "red"), "PNG", pnginfo=notes)).getpixel((3, 3)) == (255, 0, 0)


def display_p3() -> bytes:
    """The profile of Apple's screens: sRGB's curve, and a red and a green that are more saturated."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", content[128:132])[0]
    red = {"rXYZ": (0.51512, 0.24120, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189), "bXYZ": (0.15710, 0.06657, 0.78407)}
    for k in range(count):
        tag, offset, size = struct.unpack(">4sII", content[132 + 12 * k : 144 + 12 * k])
        if tag.decode() in red:
            content[offset + 8 : offset + 20] = struct.pack(">3i", *(round(value * 65_536) for value in red[tag.decode()]))
        if tag == b"desc":
            text = "Display P3".encode("utf-16-be")
            length, start = struct.unpack(">II", content[offset + 20 : offset + 28])
            content[offset + start : offset + start + length] = text.ljust(length, b"\0")[:length]
    return bytes(content)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_open_rgb_converts_display_p3(mode):
    image = Image.new("RGB", (32, 32), (200, 100, 50)).convert(mode)
    found = open_rgb(saved(image, "PNG", icc_profile=display_p3())).getpixel((3, 3))
    # By the matrices of both colour spaces, linear P3 to linear sRGB, with sRGB's curve (IEC 61966-2-1).
    linear = np.array([((v / 255 + 0.055) / 1.055) ** 2.4 for v in (200, 100, 50)])
    matrix = np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]])
    wanted = 255 * (1.055 * (matrix @ linear) ** (1 / 2.4) - 0.055)
    assert np.abs(np.array(found) - wanted).max() < 2.5 and found[0] > 205


def test_open_rgb_srgb_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = noise_file(3, kind="PNG")
    with Image.open(io.BytesIO(content)) as image:
        again = saved(image, "PNG", icc_profile=profile)
    assert np.array_equal(np.asarray(open_rgb(again)), np.asarray(open_rgb(content)))


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_open_rgb_profile_that_does_not_fit(profile):
    assert open_rgb(saved(Image.new("RGB", (32, 32), "red"), "PNG", icc_profile=profile)).getpixel((3, 3)) == (255, 0, 0)
