"""Source `coco`: photographs with five captions each, from the COCO site or any server with its layout.

Lin et al. 2014, "Microsoft COCO: Common Objects in Context"; captions from the 2017 annotations.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit.config import CocoData, Runtime
from dit.dataset.decode import check_image
from dit.dataset.filters import check_captions, check_name, clean_caption
from dit.errors import UserError, one_line, without_password
from dit.sources.http import Downloader
from dit.sources.writer import DatasetWriter, FetchResult

ANNOTATIONS = "annotations/annotations_trainval2017.zip"
KEY = "coco.data.base_url"
UNPACKING = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)  # what zipfile raises for a damaged archive
SPLITS = {"train2017": ("train2017",), "val2017": ("val2017",), "both": ("train2017", "val2017")}


def check_host(base_url: str) -> None:
    """Raise a `UserError` unless the annotations can be had from `base_url`."""
    Downloader(KEY).check(f"{base_url.rstrip('/')}/{ANNOTATIONS}")


def fetch(data: CocoData, folder: Path, runtime: Runtime) -> FetchResult:
    """Download `data.num_samples` images, chosen by `data.seed`, and their captions into `folder`."""
    base = data.base_url.rstrip("/")
    downloader = Downloader(KEY)
    splits = SPLITS[data.split]
    archive, problem = downloader.cached(f"{base}/{ANNOTATIONS}", lambda path: check_archive(path, splits), progress=True)
    if problem:
        raise UserError(f"{KEY}: {without_password(base)}/{ANNOTATIONS}: {problem}; check the address")
    chosen = choose_images(read_captions(archive, splits), data)
    result = FetchResult()
    writer = DatasetWriter(folder, data, len(chosen))
    received = 0

    def download(image: CocoImage) -> tuple[Path, str | None]:
        problem = image.problem or check_captions(image.captions)
        if problem:
            return Path(), problem
        return downloader.cached(f"{base}/{image.split}/{image.name}", lambda path: check_image(path.read_bytes()))

    with ThreadPoolExecutor(runtime.download_connections) as pool:
        results = zip(chosen, pool.map(download, chosen), strict=True)
        progress = tqdm(results, total=len(chosen), desc="download", unit="image")
        try:
            for image, (cached, problem) in progress:
                if problem:
                    result.reject(image.name, problem)
                    continue
                content = cached.read_bytes()
                writer.add(f"images/{image.name}", content, image.captions[: data.captions_per_image], image.licence, cached)
                received += len(content)
                seconds = progress.format_dict["elapsed"] or 1
                progress.set_postfix_str(f"{received / 1e6 / seconds:.1f} MB/s")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return writer.close(result)


@dataclass(frozen=True)
class CocoImage:
    """One image of the annotations.

    Attributes:
        name: its file's name.
        split: the split that it lies in.
        captions: in the order of their ids.
        licence: its address, "" if not known.
        problem: why it must not be downloaded; None if it may.
    """

    name: str
    split: str
    captions: list[str]
    licence: str
    problem: str | None


def check_archive(archive: Path, splits: tuple[str, ...]) -> str | None:
    """Return why what is needed of the annotations cannot be unpacked; None if it can, or if the archive does not have it."""
    try:
        with zipfile.ZipFile(archive) as files:
            for split in splits:
                with files.open(_captions_of(split)) as file:
                    while file.read(1 << 20):  # compares the checksum at the end
                        pass
    except KeyError:
        return None
    except UNPACKING as error:
        return f"a damaged archive ({one_line(error)})"
    return None


def read_captions(archive: Path, splits: tuple[str, ...]) -> list[CocoImage]:
    """Read all images that have captions straight from the zip, in the order of their ids, split by split.

    Nothing else of the archive is read, and nothing of it is unpacked. Of images whose name or id comes twice the
    first is kept; the others, and those whose name would leave the folder, have a `problem`.

    Raises:
        UserError: the archive is damaged, or what it holds is not COCO's.
    """
    found: list[CocoImage] = []
    names: set[str] = set()
    for split in splits:
        licences, images, captions = _read_annotations(archive, _captions_of(split))
        numbers: set[int] = set()
        for number, name, licence in sorted(images, key=lambda image: image[0]):
            if number not in captions:
                continue
            problem = check_name(name) or ("a name that is a path" if "/" in name or "\\" in name else None)
            if problem is None and number in numbers:
                problem = f"image id {number} comes twice in the annotations"
            elif problem is None and name in names:
                problem = "its name comes twice in the annotations"
            names.add(name)
            numbers.add(number)
            found.append(CocoImage(name, split, captions[number], licences.get(licence, ""), problem))
    return found


def _captions_of(split: str) -> str:
    return f"annotations/captions_{split}.json"


def _read_annotations(archive: Path, member: str) -> tuple[dict[int, str], list[tuple[int, str, int]], dict[int, list[str]]]:
    """Return licences' addresses by id, (id, name, licence) of each image, captions by image."""
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as file:
            content = json.load(file)
        licences = {int(row["id"]): str(row["url"]) for row in content.get("licenses", [])}
        images = [(int(row["id"]), str(row["file_name"]), int(row.get("license", -1))) for row in content["images"]]
        rows = sorted((int(row["id"]), int(row["image_id"]), str(row["caption"])) for row in content["annotations"])
    except (*UNPACKING, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{archive}: no readable {member} ({one_line(error)}); delete the file to download it again") from None
    captions: dict[int, list[str]] = {}
    for _, image, text in rows:
        if clean_caption(text):
            captions.setdefault(image, []).append(clean_caption(text))
    return licences, images, captions


def choose_images(images: list[CocoImage], data: CocoData) -> list[CocoImage]:
    """Choose `data.num_samples` images at random, by `data.seed`; the same on every machine.

    Raises:
        UserError: there are fewer.
    """
    if len(images) < data.num_samples:
        raise UserError(f"coco.data.num_samples: {data.num_samples} images wanted, {data.split} has {len(images)} with captions")
    return [images[k] for k in np.random.default_rng(data.seed).permutation(len(images))[: data.num_samples]]
