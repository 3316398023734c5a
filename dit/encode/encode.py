"""Encode a data set of images and captions into the latent cache, shard by shard.

Only one batch and one shard are in memory, whatever the size of the data set. Batches and shards depend on the data set and
the settings alone: a run that was killed resumes with the first incomplete shard, several processes share the work, and the
shards are the same byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from dit.config import Encode, Runtime
from dit.dataset.aspect_ratios import Size, choose_sizes, cut_share, nearest_sizes
from dit.dataset.decode import read_named_size
from dit.dataset.filters import forbids_flip
from dit.dataset.image_io import load_crops
from dit.dataset.reader import Entry, read_images, select_images
from dit.dataset.storage import StoredImages
from dit.encode.cache_writer import ShardBuffer, assemble_cache, read_record
from dit.encode.moments import encode_moments
from dit.encode.reconstruction import measure_latents, measure_reconstruction, sample_images
from dit.encoders.loading import PRECISIONS, EncoderSource, load_vae, with_fast_precision
from dit.encoders.text import TextEncoder
from dit.encoders.vocabulary import unknown_words
from dit.errors import UserError
from dit.latents.index import LONGEST_CAPTION
from dit.utils.autoencoder import has_posterior, has_scaling, scaling_and_shift, set_statistics, vae_factor
from dit.utils.files import warn_stale_state

if TYPE_CHECKING:
    from dit.utils.autoencoder import Autoencoder

SHARD_BYTES = 256 * 2**20
MIN_PSNR = 30  # dB; below, the VAE's error is clearly visible


class Part(NamedTuple):
    """Part `number`, from 1 on, of `of` equal parts of the shards."""

    number: int
    of: int


WHOLE = Part(1, 1)


@dataclass(frozen=True)
class Plan:
    """The content of shard `number`: the size of its images, the captions of each, and the number of tokens of every caption."""

    number: int
    size: Size
    images: Sequence[list[Entry]]
    lengths: list[int]

    @property
    def captions(self) -> list[Entry]:
        """Return the captions of all images, in their order."""
        return list(chain.from_iterable(self.images))


def encode_dataset(
    raw: Path, folder: Path, settings: Encode, runtime: Runtime, reconstructions: Path, part: Part = WHOLE
) -> dict[str, float | int] | None:
    """Encode the data set in `raw` into a cache in `folder`.

    Under `accelerate launch` the processes share the shards; the first one assembles the cache.

    Machines that do not know of each other share them by `part`: each writes the shards of its own, and the one on which all of
    them are together in the folder of unfinished shards assembles the cache, since it finds nothing left to encode.

    Args:
        raw: the data set, as a source wrote it: `metadata.json` and the images.
        folder: where the cache goes.
        settings: which encoders, image size, batch size and precision.
        runtime: how many workers decode images.
        reconstructions: an image file to write, originals in the upper rows and their reconstructions in the lower ones.
        part: which shards are written; all of them, unless several machines share the work.

    Returns:
        `reconstruction_psnr` in dB over a sample of the set; the numbers of `images` and `captions`, of `enlarged_images`, of
        `truncated_captions` and of `captions_with_unknown_words`; `cut_area`, the share of an image's area that is cut off on
        average, in [0, 1). None in all processes but the first, and for a part.
    """
    # Where workers are forked, the tokenizer was used before and warns, although they use none: this keeps it quiet.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    state = PartialState(cpu=not torch.cuda.is_available())
    wanted, settings = settings, with_fast_precision(settings, state.device)
    if settings != wanted and state.is_main_process:
        print("encode: this processor has no bf16 instructions: encoding in fp32", flush=True)
    dtype = PRECISIONS[settings.precision]
    vae, vae_source = load_vae(EncoderSource(settings.vae, settings.vae_revision), dtype, state.device)
    vae.to(memory_format=torch.channels_last)  # with it, 1.9 times as many images in bf16 on a CPU with AMX, 1.3 in fp32
    if settings.vae_slicing:
        vae.enable_slicing()
    if settings.vae_tiling:
        vae.enable_tiling()
    text = TextEncoder(EncoderSource(settings.clip, settings.clip_revision), dtype, state.device, settings.long_captions)
    images = read_images(raw)
    groups = group_by_size(raw, images, settings)
    about: dict[str, Any] = {
        "image_size": settings.image_size,
        "precision": settings.precision,
        "crops": settings.crops,
        "vae": vae_source.to_dict(),
        "vae_tiling": settings.vae_tiling,
        "vae_scaling": scaling_and_shift(vae)[0],
        "vae_shift": scaling_and_shift(vae)[1],
        "clip": text.source.to_dict(),
    }
    if type(vae).__name__ != "AutoencoderKL":
        about["vae_class"] = type(vae).__name__
    if settings.aspect_ratios == "buckets":
        about["sizes"] = list(groups)
    if settings.long_captions == "chunks":
        about["long_captions"] = settings.long_captions
    about = {"fingerprint": _digest(about), **about}

    def samples(desc: str) -> Iterator[torch.Tensor]:
        return sample_images(raw, images, settings.image_size, settings.batch_size, desc)

    if not has_scaling(vae):
        (measured,) = broadcast_object_list([measure_latents(vae, samples("measure")) if state.is_main_process else None])
        set_statistics(vae, *measured)
        vae_source = replace(vae_source, latents_mean=measured[0], latents_std=measured[1])
        about["vae"], (about["vae_scaling"], about["vae_shift"]) = vae_source.to_dict(), scaling_and_shift(vae)
    encoder = Encoder(vae, text, settings, about["fingerprint"], raw, runtime)
    plans = list(plan_shards(groups, encoder))
    parts = unfinished_folder(about["fingerprint"], settings.batch_size, state.device)

    own = [plan for plan in plans if plan.number % part.of == part.number - 1]
    quality = float("nan")
    if state.is_main_process and part == WHOLE:
        if "sizes" in about:
            counts_of_sizes = ", ".join(f"{width} x {height} ({len(of)} images)" for (width, height), of in groups.items())
            print(f"encode: width and height are {counts_of_sizes}", flush=True)
        quality = measure_reconstruction(vae, samples("reconstruct"), reconstructions)
        if quality < MIN_PSNR and settings.vae == "builtin":
            print(
                "encode: the bundled VAE was fitted on rendered scenes and keeps little of these images "
                f"({quality} dB: see {reconstructions}); "
                "set encode.vae to stabilityai/sd-vae-ft-mse and encode.clip to openai/clip-vit-large-patch14",
                flush=True,
            )
        warn_stale_state("encode", parts)
    encoder.write(own[state.process_index :: state.num_processes], parts)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if part != WHOLE:
        print(f"encode: part {part.number} of {part.of}, {len(own)} of {len(plans)} shards, is in {parts}", flush=True)
        return None
    (empty,), pooled = text.encode([""])
    records = [record for plan in plans if (record := read_record(parts, plan.number))]
    data = _digest([record["inputs"] for record in records])
    about |= {"data": data, "val_images": sum(entries[0].split == "val" for entries in images)}
    assemble_cache(parts, len(plans), folder, about, (empty, pooled[0]))
    shutil.rmtree(parts)
    counts = {"images": len(images), "captions": sum(map(len, images))}
    counts["enlarged_images"] = sum(record["enlarged"] for record in records)
    cut = sum(record["cut"] for record in records) / len(images)
    counts |= {"truncated_captions": encoder.unread.truncated, "captions_with_unknown_words": encoder.unread.unknown}
    for line in _warnings(counts, encoder.unread.words, settings, text.longest):
        print(f"encode: {line}", flush=True)
    return {"reconstruction_psnr": quality, **counts, "cut_area": round(cut, 4)}


@dataclass
class Unread:
    """How many captions the text encoder does not read whole, and which words it does not know, with their counts."""

    truncated: int = 0
    unknown: int = 0
    words: Counter[str] = field(default_factory=Counter)


def _warnings(counts: dict[str, int], words: Counter[str], settings: Encode, longest: int) -> Iterator[str]:
    images, captions = counts["images"], counts["captions"]
    if counts["enlarged_images"]:
        yield (
            f"{counts['enlarged_images']} of {images} images are smaller than encode.image_size {settings.image_size} asks for "
            "and were enlarged, so they are blurred; a smaller encode.image_size suits them"
        )
    if counts["truncated_captions"]:
        yield (
            f"{counts['truncated_captions']} of {captions} captions are longer than CLIP's {longest} tokens: cut off; "
            "encode.long_captions: chunks reads all of them"
        )
    if counts["captions_with_unknown_words"]:
        most = ", ".join(f"{word} ({count})" for word, count in words.most_common(8))
        yield (
            f"{counts['captions_with_unknown_words']} of {captions} captions have words that this CLIP was not fitted on, "
            f"most often {most}; set encode.clip to openai/clip-vit-large-patch14"
        )


def group_by_size(raw: Path, images: Sequence[list[Entry]], settings: Encode) -> dict[Size, Sequence[list[Entry]]]:
    """Return the images of each size that they are encoded at, the most frequent size first: squares, or those of the buckets."""
    if settings.aspect_ratios == "square":
        return {(settings.image_size, settings.image_size): images}
    found = np.empty((len(images), 2), dtype=np.int32)
    if PartialState().is_main_process:
        stored = StoredImages(raw)
        for k, entries in enumerate(tqdm(images, desc="read sizes", unit="image", delay=2)):
            found[k] = read_named_size(stored.read(entries[0].stored), raw / entries[0].stored)
    (found,) = broadcast_object_list([found])
    sizes = choose_sizes(found, settings.image_size)
    nearest = nearest_sizes(found, sizes)
    numbers = {size: np.flatnonzero(nearest == k) for k, size in enumerate(sizes)}
    order = sorted(sizes, key=lambda size: -len(numbers[size]))
    return {size: select_images(images, numbers[size]) for size in order if len(numbers[size])}


def plan_shards(groups: dict[Size, Sequence[list[Entry]]], encoder: Encoder) -> Iterator[Plan]:
    """Divide the images of each size into shards of whole batches, each of at most `SHARD_BYTES` if one batch allows it.

    What the text encoder does not read of the captions is counted in `encoder.unread`.
    """
    batch_size, number = encoder.settings.batch_size, 0
    total = sum(-(-len(images) // batch_size) for images in groups.values())
    with tqdm(total=total, desc="plan", unit="batch", delay=2) as progress:
        for size, images in groups.items():
            for plan in _plan_group(size, images, number, encoder, progress):
                yield plan
                number += 1


def _plan_group(size: Size, images: Sequence[list[Entry]], number: int, encoder: Encoder, progress: tqdm) -> Iterator[Plan]:
    lengths: list[int] = []
    first = shard_bytes = 0
    batch_size = encoder.settings.batch_size
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        texts = [entry.text for entry in chain.from_iterable(batch)]
        whole, counted = encoder.text.count_tokens(texts)
        if max(counted) > LONGEST_CAPTION:
            entry = list(chain.from_iterable(batch))[int(np.argmax(counted))]
            raise UserError(
                f"encode.long_captions: a caption of {entry.image} has {max(counted)} tokens, and {LONGEST_CAPTION} is the "
                "limit; shorten it, or take cut"
            )
        encoder.unread.truncated += sum(count < of_all for count, of_all in zip(counted, whole, strict=True))
        for text in texts:
            words = unknown_words(encoder.text.tokenizer, text, encoder.settings.long_captions)
            encoder.unread.unknown += bool(words)
            encoder.unread.words.update(words)
        needed = encoder.bytes_of(size, len(batch), counted)
        if first < start and shard_bytes + needed > SHARD_BYTES:
            yield Plan(number, size, images[first:start], lengths)
            first, lengths, shard_bytes, number = start, [], 0, number + 1
        lengths, shard_bytes = lengths + counted, shard_bytes + needed
        progress.update()
    yield Plan(number, size, images[first:], lengths)


class Encoder:
    """Encodes the images and captions of shards with both encoders."""

    def __init__(self, vae: Autoencoder, text: TextEncoder, settings: Encode, fingerprint: str, raw: Path, runtime: Runtime):
        self.vae, self.text, self.settings = vae, text, settings
        self.fingerprint, self.raw, self.runtime = fingerprint, raw, runtime
        self.unread = Unread()

    def bytes_of(self, size: Size, images: int, lengths: list[int]) -> int:
        """Return the bytes in a shard of this number of images of `size`, and of captions of these lengths in tokens."""
        text, augmentations = self.text.model.config, 2 * (1 + self.settings.crops)
        factor, values = vae_factor(self.vae.config), self.vae.config.latent_channels * (2 if has_posterior(self.vae) else 1)
        latent = values * (size[0] // factor) * (size[1] // factor)
        return 2 * (images * augmentations * latent + sum(lengths) * text.hidden_size + len(lengths) * text.projection_dim)

    def write(self, plans: list[Plan], parts: Path) -> None:
        """Write the shards of `plans` into `parts`, except those that are there completely, of the same images and captions.

        Raises:
            UserError: an image cannot be read, the VAE's output overflows, or a batch does not fit into memory.
        """
        parts.mkdir(parents=True, exist_ok=True)
        size = self.settings.batch_size
        checked = tqdm(plans, desc="check written shards", unit="shard", delay=2)
        missing = [plan for plan in checked if not self._is_written(plan, parts)]
        count = sum(len(plan.images) for plan in missing)
        total = sum(len(plan.images) for plan in plans)
        if count < total:
            print(f"encode: resuming, {total - count} of {total} images are done", flush=True)
        crops = self._load(missing)
        progress = tqdm(total=total, initial=total - count, desc="encode", unit="image")
        for plan in missing:
            buffer = ShardBuffer(
                [entries[0].split == "val" for entries in plan.images],
                [len(entries) for entries in plan.images],
                plan.lengths,
                [forbids_flip(entry.text) for entry in plan.captions],
                "moments" if has_posterior(self.vae) else "latents",
            )
            digests: list[str] = []
            enlarged, cut, (width, height) = 0, 0.0, plan.size
            for start in range(0, len(plan.images), size):
                chunk = plan.images[start : start + size]
                pixels, found, sizes = next(crops)
                enlarged += sum(across < width or down < height for across, down in sizes)
                cut += sum(cut_share(size, plan.size) for size in sizes)
                tokens, pooled = self.text.encode([entry.text for entry in chain.from_iterable(chunk)])
                buffer.add(encode_moments(self.vae, pixels, self.settings), tokens, pooled)
                digests += found
                progress.update(len(chunk))
            rows = [{"image": entry.image, "text": entry.text, "split": entry.split} for entry in plan.captions]
            buffer.write(parts, plan.number, rows, self.fingerprint, _inputs(plan, digests), enlarged, cut)
        progress.close()

    def _load(self, plans: list[Plan]) -> Iterator[tuple[torch.Tensor, list[str], list[Size]]]:
        """Load all batches of these shards, one after the other, as `load_crops` does."""
        size = self.settings.batch_size
        batches = Batches([plan.images for plan in plans], size)
        sizes, runtime = list(dict.fromkeys(plan.size for plan in plans)), self.runtime
        return load_crops(self.raw, batches, sizes, self.settings.crops, runtime.num_workers, runtime.prefetch_factor, size)

    def _is_written(self, plan: Plan, parts: Path) -> bool:
        record = read_record(parts, plan.number)
        if record is None:
            return False
        images = StoredImages(self.raw)
        digests = [hashlib.sha256(images.read(entries[0].stored)).hexdigest() for entries in plan.images]
        return record["inputs"] == _inputs(plan, digests)


class Batches(Sequence[list[tuple[str, str]]]):
    """The images of several shards in batches of `size`, none across two shards: of each its name and where it is stored."""

    def __init__(self, shards: list[Sequence[list[Entry]]], size: int):
        self.shards, self.size = shards, size
        self.ends = list(accumulate(-(-len(shard) // size) for shard in shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, k: int) -> list[tuple[str, str]]:  # type: ignore[override]
        number = bisect_right(self.ends, k)
        start = (k - (self.ends[number - 1] if number else 0)) * self.size
        return [(entries[0].image, entries[0].stored) for entries in self.shards[number][start : start + self.size]]


def unfinished_folder(fingerprint: str, batch_size: int, device: torch.device) -> Path:
    """Return the folder of the shards of an incomplete run: outside DVC's outs, which DVC deletes before a stage starts."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    key = _digest([fingerprint, batch_size, hardware, torch.__version__])[:12]
    return Path(os.environ.get("DVC_ROOT", ".")) / ".state" / "encode" / key


def _inputs(plan: Plan, digests: list[str]) -> str:
    """Return the digest of all that a shard is made of: the captions, and the bytes of the images."""
    return _digest([[(entry.image, entry.text, entry.split) for entry in plan.captions], digests])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
