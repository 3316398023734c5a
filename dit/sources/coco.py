"""Source `coco`: photographs with five captions each, from the COCO site or any server with its layout.

Lin et al. 2014, "Microsoft COCO: Common Objects in Context"; captions from the 2017 annotations.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit.config import CocoData, Runtime
from dit.errors import UserError
from dit.files import place
from dit.sources.dataset import Report, check_captions, check_image, clean_caption, inside, refuse_too_many_bad, write_dataset
from dit.sources.http import Downloader

ANNOTATIONS = "annotations/annotations_trainval2017.zip"
KEY = "coco.data.base_url"
SPLITS = {"train2017": ("train2017",), "val2017": ("val2017",), "both": ("train2017", "val2017")}


def check_host(base_url: str) -> None:
    """Raise a `UserError` unless the annotations can be had from `base_url`."""
    Downloader(KEY).check(f"{base_url.rstrip('/')}/{ANNOTATIONS}")


def fetch(data: CocoData, folder: Path, runtime: Runtime) -> Report:
    """Download `data.num_samples` images, chosen by `data.seed`, and their captions into `folder`."""
    base = data.base_url.rstrip("/")
    downloader = Downloader(KEY)
    archive, problem = downloader.cached(f"{base}/{ANNOTATIONS}", progress=True)
    if problem:
        raise UserError(f"{KEY}: {base}/{ANNOTATIONS}: {problem}")
    chosen = choose_images(read_captions(archive, SPLITS[data.split]), data)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    report = Report()
    captions: dict[str, list[str]] = {}
    licences: dict[str, str] = {}
    received = 0

    def download(photo: Photo) -> tuple[int, str | None]:
        kept, problem = downloader.cached(f"{base}/{photo.split}/{photo.name}")
        if problem is None:
            content = kept.read_bytes()
            problem = check_captions(photo.captions)
            if problem is None and (problem := check_image(content)):
                kept.unlink()  # so that the next run asks for it again
            if problem is None:
                place(kept, folder / "images" / photo.name)
                return len(content), None
        return 0, problem

    with ThreadPoolExecutor(runtime.download_connections) as pool:
        results = zip(chosen, pool.map(download, chosen), strict=True)
        progress = tqdm(results, total=len(chosen), desc="download", unit="image")
        try:
            for photo, (size, problem) in progress:
                received += size
                seconds = progress.format_dict["elapsed"] or 1
                progress.set_postfix_str(f"{received / 1e6 / seconds:.1f} MB/s")
                if problem:
                    report.set_aside(photo.name, problem)
                else:
                    captions[f"images/{photo.name}"] = photo.captions[: data.captions_per_image]
                    licences[f"images/{photo.name}"] = photo.licence
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    refuse_too_many_bad(report, len(chosen), data.max_bad_fraction, "coco.data.max_bad_fraction")
    return write_dataset(folder, captions, data, report, licences)


@dataclass(frozen=True)
class Photo:
    """One image: its file's name, the split that it lies in, its captions in the order of their ids, its licence's address."""

    name: str
    split: str
    captions: list[str]
    licence: str


def read_captions(archive: Path, splits: tuple[str, ...]) -> list[Photo]:
    """All images that have captions, read straight from the zip; in the order of their ids, split by split."""
    photos = []
    for split in splits:
        member = f"annotations/captions_{split}.json"
        try:
            with zipfile.ZipFile(archive) as files, files.open(member) as file:
                content = json.load(file)
            licences = {row["id"]: str(row["url"]) for row in content.get("licenses", [])}
            images = {int(row["id"]): (str(row["file_name"]), licences.get(row.get("license"), "")) for row in content["images"]}
            rows = sorted((int(row["id"]), int(row["image_id"]), str(row["caption"])) for row in content["annotations"])
        except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{archive}: no readable {member} ({error}); delete the file to download it again") from None
        captions: dict[int, list[str]] = {}
        for _, image, text in rows:
            if clean_caption(text):
                captions.setdefault(image, []).append(clean_caption(text))
        photos += [
            Photo(name, split, captions[number], licence)
            for number, (name, licence) in sorted(images.items())
            if number in captions
        ]
    return photos


def choose_images(photos: list[Photo], data: CocoData) -> list[Photo]:
    """`data.num_samples` images, by `data.seed`; the same on every machine.

    Raises:
        UserError: there are fewer, two have the same name, or a file name would leave the folder.
    """
    names = Counter(photo.name for photo in photos)
    for name, count in names.items():
        if not inside(name) or "/" in name or "\\" in name:
            raise UserError(f"{KEY}: the annotations name a file {name!r}, which does not stay in its folder; not downloading")
        if count > 1:
            raise UserError(f"{KEY}: the annotations name the file {name!r} {count} times; not downloading")
    if len(photos) < data.num_samples:
        raise UserError(f"coco.data.num_samples: {data.num_samples} images wanted, {data.split} has {len(photos)} with captions")
    return [photos[k] for k in np.random.default_rng(data.seed).permutation(len(photos))[: data.num_samples]]
