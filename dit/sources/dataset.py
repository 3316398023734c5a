"""What all sources write: `images/` with the bytes as they came, `metadata.json` with a row per caption.

Rows are `{"image": "images/x.jpg", "text": "…", "split": "train" | "val"}`, with the address of the image's "licence" where
the source knows it; several may share an image. `source.json` holds the settings that the folder was made from.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dit.errors import UserError
from dit.files import write_json

SMALLEST_SIDE = 16  # pixels
LONGEST_CAPTION = 1000  # words; a CLIP reads 77 tokens
ANIMATED = ("PNG", "WEBP", "GIF")  # what can be; a telephone's JPEG with a second picture in it is a photograph


@dataclass(frozen=True)
class Entry:
    """One caption of one image; `image` is relative to the data set's folder, `split` is "train" or "val"."""

    image: str
    text: str
    split: str


@dataclass
class Report:
    """What a source found; becomes metrics/download.json. `bad` and `unpaired` say which files were set aside, and why."""

    images: int = 0
    captions: int = 0
    train_images: int = 0
    val_images: int = 0
    bad: list[dict[str, str]] = field(default_factory=list)
    unpaired: list[str] = field(default_factory=list)

    def set_aside(self, image: str, reason: str) -> None:
        self.bad.append({"image": image, "reason": reason})

    def metrics(self) -> dict[str, Any]:
        return asdict(self) | {"bad_images": len(self.bad)}


def split_by_image(images: list[str], val_fraction: float, seed: int) -> dict[str, str]:
    """ "train" or "val" for each image name; the same on every machine, at least one image in each split.

    Raises:
        UserError: there are fewer than two images.
    """
    if len(images) < 2:
        raise UserError(f"data: {len(images)} usable image; at least 2 are needed, one of them for validation")
    count = min(max(1, round(val_fraction * len(images))), len(images) - 1)
    order = np.random.default_rng(seed).permutation(sorted(images))
    return dict.fromkeys(order[:count].tolist(), "val") | dict.fromkeys(order[count:].tolist(), "train")


def write_dataset(
    folder: Path, captions: dict[str, list[str]], data: Any, report: Report, licences: dict[str, str] | None = None
) -> Report:
    """Write metadata.json and source.json; completes `report`.

    Args:
        folder: where the images are.
        captions: of each image, whose name is relative to `folder`.
        data: the source's settings.
        report: what was set aside so far.
        licences: the address of each image's licence, "" where it is not known.
    """
    splits = split_by_image(list(captions), data.val_fraction, data.seed)
    rows = []
    for image, texts in captions.items():
        licence = {"licence": licences[image]} if licences and licences[image] else {}
        rows += [asdict(Entry(image, text, splits[image])) | licence for text in texts]
    write_json(folder / "metadata.json", rows)
    write_json(folder / "source.json", asdict(data))
    report.images, report.captions = len(captions), len(rows)
    report.val_images = sum(split == "val" for split in splits.values())
    report.train_images = report.images - report.val_images
    return report


def refuse_too_many_bad(report: Report, total: int, limit: float, key: str) -> None:
    """Raise a `UserError` if more than the share `limit` of `total` images were set aside; `key` is the limit's name."""
    if len(report.bad) > limit * total:
        first = report.bad[0]
        raise UserError(
            f"{key}: {len(report.bad)} of {total} images are unusable, more than {limit:.1%}; "
            f"the first is {first['image']}: {first['reason']}"
        )


def check_image(content: bytes) -> str | None:
    """Why a picture file cannot be used, None if it can. Decodes it whole, as training would."""
    if not content:
        return "empty file"
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content)) as image:
                if min(image.size) < SMALLEST_SIDE:
                    return f"only {image.width} x {image.height} pixels; {SMALLEST_SIDE} a side are the least"
                if image.format in ANIMATED and getattr(image, "is_animated", False):
                    return f"an animation of {image.n_frames} pictures, not one"
                image.load()
                if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] < 255:
                    return "transparent in places; put it on a background first"
        except UnidentifiedImageError:
            return "a web page, not a picture" if content.lstrip()[:1] == b"<" else "not a picture"
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return "more pixels than any honest picture (a decompression bomb)"
        except (OSError, SyntaxError, ValueError) as error:
            return f"damaged: {' '.join(str(error).split())}"
    return None


def check_captions(captions: list[str]) -> str | None:
    """Why the captions of an image cannot be used, None if they can."""
    if not captions:
        return "no caption"
    longest = max(len(caption.split()) for caption in captions)
    return f"a caption of {longest} words; {LONGEST_CAPTION} are the most" if longest > LONGEST_CAPTION else None


def clean_caption(text: str) -> str:
    """Strip `text` and fold newlines and runs of blanks to one blank."""
    return " ".join(text.split())


def inside(name: str) -> bool:
    """Whether a file name from an archive or a list stays in the folder it is meant for."""
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(name) and not path.is_absolute() and ".." not in path.parts and ":" not in name


def read_metadata(folder: Path) -> list[Entry]:
    """The rows of `folder`'s metadata.json.

    Raises:
        UserError: it is missing or is not what `write_dataset` writes; one line that names the row.
    """
    path = folder / "metadata.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run `dvc repro download`") from None
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); run `dvc repro download`") from None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: expected a list of captions")
    entries = []
    for k, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "text", "split")):
            raise UserError(f"{path}: row {k}: expected image, text and split")
        if not inside(row["image"]) or row["split"] not in ("train", "val"):
            raise UserError(f"{path}: row {k}: image must lie in the folder and split be train or val, not {row}")
        entries.append(Entry(row["image"], row["text"], row["split"]))
    return entries
