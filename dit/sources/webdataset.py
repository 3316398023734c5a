"""Source `webdataset`: images and captions from tar shards, as img2dataset writes them (github.com/rom1504/img2dataset).

The shards are read one after the other, and one image is in memory at a time. What passes the filters is taken, in the shards'
own order, until there are `num_samples`; nothing that comes after them is read. An image is named after its shard's number in
the list and its own in the shard, so that other filters, or a shard that is missing, change no other image's name.
"""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dit.config import Runtime, WebdatasetData
from dit.dataset.decode import ImageError, check_image, image_format, image_size
from dit.dataset.filters import check_captions, clean_caption
from dit.dataset.storage import SHARDS_FROM
from dit.errors import UserError
from dit.sources.http import Downloader
from dit.sources.tar_shards import HTTP, KEY, Sample, Shard, ShardError, find_shards, find_version, read_shard
from dit.sources.writer import DatasetWriter, FetchResult

TRIED = 100  # samples that `check_shards` reads


def fetch(data: WebdatasetData, folder: Path, runtime: Runtime) -> FetchResult:
    """Copy the first `data.num_samples` images that pass, byte for byte, and their captions into `folder`."""
    shards = find_shards(data.shards)
    result = FetchResult()
    writer = DatasetWriter(folder, data, data.num_samples or SHARDS_FROM)
    downloader = Downloader(KEY)
    bad: list[str] = []
    with tqdm(total=data.num_samples, desc="download", unit="image") as progress:
        for number, shard in enumerate(shards):
            progress.set_postfix_str(f"shard {number + 1} of {len(shards)}")
            try:
                with closing(read_shard(shard, _endings(data), downloader)) as samples:
                    for position, sample in enumerate(samples):
                        _add(sample, f"images/{number:05d}/{position:06d}", shard, data, writer, result)
                        progress.update(writer.images - progress.n)
                        if data.num_samples:
                            writer.check_rejected(result, expected=data.num_samples)
                        if writer.images == data.num_samples:
                            return writer.close(result)
            except ShardError as error:
                bad.append(f"{shard.shown}: {error}")
                result.reject(shard.shown, str(error))
                _check_shards(bad, len(shards), data)
    if data.num_samples:
        writer.check_rejected(result)
        found = f"{data.num_samples} images wanted, {writer.images} are there and pass; null takes all"
        raise UserError("; ".join([f"webdataset.data.num_samples: {found}", *result.left_out()]))
    return writer.close(result)


def check_shards(data: WebdatasetData) -> None:
    """Check that the first shard can be had and that its first samples have images and captions, without downloading it.

    Raises:
        UserError: they have not; or the shard cannot be reached.
    """
    first, downloader = find_shards(data.shards)[0], Downloader(KEY)
    if find_version(first, downloader) is None:
        raise UserError(f"{KEY}: {first.shown}: no such shard; set it to where your tar files are")
    if first.address.startswith(HTTP):
        return
    problem: str | None = None
    try:
        with closing(read_shard(first, _endings(data), downloader)) as samples:
            for sample in islice(samples, TRIED):
                problem = _find_image(sample, data)[1] or read_captions(sample, data)[1]
                if problem is None:
                    return
    except ShardError as error:
        problem = str(error)
    raise UserError(f"{KEY}: nothing in the first {TRIED} samples of {first.shown} can be used: {problem or 'it is empty'}")


def _endings(data: WebdatasetData) -> set[str]:
    """Return the endings of the members that are read."""
    return {key.lower() for key in data.image_keys} | {key.partition(":")[0].lower() for key in data.caption_keys}


def _check_shards(bad: list[str], count: int, data: WebdatasetData) -> None:
    """Raise a `UserError` if more than `max_bad_fraction` of `count` shards are in `bad`."""
    if len(bad) > data.max_bad_fraction * count:
        raise UserError(
            f"webdataset.data.max_bad_fraction: {len(bad)} of {count} shards are unusable, more than "
            f"{data.max_bad_fraction:.1%}; mend or remove them, or raise the limit. {'; '.join(bad[:5])}"
        )


def _add(sample: Sample, name: str, shard: Shard, data: WebdatasetData, writer: DatasetWriter, result: FetchResult) -> None:
    """Write the image of a sample as `name` with its format's ending; or note why not."""
    shown = f"{shard.shown}/{sample.name}"
    content, problem = _find_image(sample, data)
    captions, no_caption = read_captions(sample, data)
    problem = problem or no_caption
    if problem is None:
        captions, reason = filter_captions(captions, data)
        try:
            reason = reason or filter_size(image_size(content), data)
        except ImageError as error:
            problem = str(error)
        else:
            if reason:
                result.filter_out(shown, reason)
                return
            problem = check_captions(captions) or check_image(content)
    if problem:
        result.reject(shown, problem)
    else:
        writer.add(f"{name}.{image_format(content)}", content, captions)


def _find_image(sample: Sample, data: WebdatasetData) -> tuple[bytes, str | None]:
    """Return the bytes of a sample's image; or what is wrong with it."""
    found = (sample.parts.get(key.lower()) for key in data.image_keys)
    content = next((content for content in found if content is not None), None)
    if content is None:
        return b"", f"no image: the sample has {', '.join(sample.parts)}, and none of {', '.join(data.image_keys)}"
    return content, None


def read_captions(sample: Sample, data: WebdatasetData) -> tuple[list[str], str | None]:
    """Return all captions of a sample, each once, and what is wrong with them if there are none."""
    captions: list[str] = []
    problems: list[str] = []
    for key in data.caption_keys:
        end, _, path = key.partition(":")
        content = sample.parts.get(end.lower())
        try:
            if content is None:
                raise ValueError(f"the sample has no {end}")
            texts = _follow(json.loads(content), key, path) if path else [content.decode("utf-8-sig")]
            captions += [clean_caption(text) for text in texts]
        except UnicodeDecodeError:
            problems.append(f"its {end} is not UTF-8")
        except (json.JSONDecodeError, RecursionError):
            problems.append(f"its {end} is not JSON")
        except ValueError as error:
            problems.append(str(error))
    captions = list(dict.fromkeys(filter(None, captions)))
    return captions, None if captions else f"no caption: {'; '.join(problems) or 'it is empty'}"


def _follow(value: Any, key: str, path: str) -> list[str]:
    """Return the texts at `path`, names with dots between them, in what a JSON file holds; raise ValueError if there are none."""
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"nothing at {key}")
        value = value[name]
    texts = [text for text in (value if isinstance(value, list) else [value]) if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"no text at {key}")
    return texts


def filter_captions(captions: list[str], data: WebdatasetData) -> tuple[list[str], str | None]:
    """Return the captions whose length in characters the settings want; if none has it, why the image is left out."""
    least, most = data.min_caption_length, data.max_caption_length
    kept = [caption for caption in captions if least <= len(caption) <= (most or len(caption))]
    if kept:
        return kept, None
    return [], f"no caption of {least} {f'to {most}' if most else 'or more'} characters"


def filter_size(size: tuple[int, int], data: WebdatasetData) -> str | None:
    """Return why an image of this size in pixels is left out, None if the settings want it."""
    shorter, longer = sorted(size)
    if shorter < data.min_side:
        return f"a side of less than {data.min_side} pixels"
    if data.max_aspect_ratio and longer > data.max_aspect_ratio * shorter:
        return f"sides of more than {data.max_aspect_ratio:g} to 1"
    return None
