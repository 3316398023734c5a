"""Source `coco`: photographs with five captions each, from the COCO site or any server with its layout.

Lin et al. 2014, "Microsoft COCO: Common Objects in Context"; captions from the 2017 annotations.
"""

from __future__ import annotations

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit.config import CocoData, Runtime
from dit.errors import UserError
from dit.sources.dataset import Report, check_image, clean_caption, inside, refuse_too_many_bad, write_dataset
from dit.sources.http import Downloader

ANNOTATIONS = "annotations/annotations_trainval2017.zip"
KEY = "coco.data.base_url"


def check_host(base_url: str) -> None:
    """Raise a `UserError` unless the annotations can be had from `base_url`."""
    Downloader(KEY).check(f"{base_url.rstrip('/')}/{ANNOTATIONS}")


def fetch(data: CocoData, folder: Path, runtime: Runtime) -> Report:
    """Download `data.num_samples` images, chosen by `data.seed`, and their captions into `folder`."""
    base = data.base_url.rstrip("/")
    downloader = Downloader(KEY)
    archive = downloader.cached(f"{base}/{ANNOTATIONS}")
    chosen = choose_images(read_captions(archive, data.split), data)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    report = Report()
    captions: dict[str, list[str]] = {}
    received = 0

    def download(name: str) -> tuple[int, str | None]:
        target = folder / "images" / name
        problem = downloader.save(f"{base}/{data.split}/{name}", target)
        if problem:
            return 0, problem
        content = target.read_bytes()
        problem = check_image(content)
        if problem:
            target.unlink()
        return len(content), problem

    with ThreadPoolExecutor(runtime.download_connections) as pool:
        names = list(chosen)
        progress = tqdm(zip(names, pool.map(download, names), strict=True), total=len(names), desc="download", unit="image")
        try:
            for name, (size, problem) in progress:
                received += size
                seconds = progress.format_dict["elapsed"] or 1
                progress.set_postfix_str(f"{received / 1e6 / seconds:.1f} MB/s")
                if problem:
                    report.set_aside(name, problem)
                else:
                    captions[f"images/{name}"] = chosen[name]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    refuse_too_many_bad(report, len(chosen), data.max_bad_fraction, "coco.data.max_bad_fraction")
    return write_dataset(folder, captions, data, report)


def read_captions(archive: Path, split: str) -> dict[str, list[str]]:
    """File name to captions in the order of their ids, read straight from the zip; images in the order of theirs."""
    member = f"annotations/captions_{split}.json"
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as file:
            content = json.load(file)
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        rows = sorted((int(row["id"]), int(row["image_id"]), str(row["caption"])) for row in content["annotations"])
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{archive}: no readable {member} ({error}); delete the file to download it again") from None
    captions: dict[str, list[str]] = {names[number]: [] for number in sorted(names)}
    for _, image, text in rows:
        if image in names and clean_caption(text):
            captions[names[image]].append(clean_caption(text))
    return captions


def choose_images(captions: dict[str, list[str]], data: CocoData) -> dict[str, list[str]]:
    """`data.num_samples` images that have captions, by `data.seed`; the same on every machine.

    Raises:
        UserError: there are fewer, or a file name would leave the folder.
    """
    usable = [name for name, texts in captions.items() if texts]
    for name in usable:
        if not inside(name) or "/" in name or "\\" in name:
            raise UserError(f"{KEY}: the annotations name a file {name!r}, which does not stay in its folder; not downloading")
    if len(usable) < data.num_samples:
        raise UserError(f"coco.data.num_samples: {data.num_samples} images wanted, {data.split} has {len(usable)} with captions")
    order = np.random.default_rng(data.seed).permutation(len(usable))[: data.num_samples]
    return {usable[k]: captions[usable[k]][: data.captions_per_image] for k in order}
