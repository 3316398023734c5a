"""The latent cache: the encoders' output for every image and caption, computed once, read at random.

A cache folder holds `shard-00000.safetensors` … (see dit/latents/shards.py), `captions.jsonl` with a row per caption, and
`index.json`: what made it, the sizes, and the SHA-256 of every shard. `text.safetensors` holds `empty_tokens` (L, E) fp16
and `empty_pooled` (P,) fp16 of the caption "", and over all captions the mean and standard deviation of every channel of
the tokens and of the pooled vectors, float32: `tokens_mean`, `tokens_std` (E,), `pooled_mean`, `pooled_std` (P,).
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from dit.errors import UserError, one_line
from dit.latents.index import ShardEntry, image_sizes, read_index
from dit.latents.shards import Shard
from dit.utils.files import sha256_file
from dit.utils.images import per_channel

TEXT, CAPTIONS, INDEX = "text.safetensors", "captions.jsonl", "index.json"
CLIP_TOKENS = 77
AGAIN = "run `dvc repro encode`"


@dataclass(frozen=True)
class Batch:
    """The encoders' output for B (image, caption) pairs; text is padded to the cache's longest caption.

    moments (B, 2C, H, W) fp16, or latents (B, C, H, W) where the autoencoder has no posterior; tokens (B, L, E) fp16, mask (B, L)
    bool, pooled (B, P) fp16.
    """

    moments: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Move all tensors to `device`."""
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))

    def pin_memory(self) -> Batch:
        """Copy to memory that a GPU reads by itself; torch's DataLoader calls this."""
        return Batch(*(value.pin_memory() for value in vars(self).values()))


@dataclass(frozen=True)
class Rows:
    """Which rows of the cache, counted through all shards, make a batch; each (B,) int64."""

    augmentations: np.ndarray
    captions: np.ndarray
    first_tokens: np.ndarray
    lengths: np.ndarray


class LatentCache:
    """Random access to a cache folder. Images are numbered through all shards, in the order they were written.

    Opening looks at the headers only, so it takes as long for 118,000 images as for 1,000; `verify` reads everything.

    Attributes:
        index: the content of index.json.
        sizes: width and height in pixels of the images; the buckets, of which the one with the most images comes first.
        latent_shapes: (C, H, W) of the latents of each bucket.
        grid_shapes: the shape of what is stored of an image of each bucket: (2C, H, W), or (C, H, W) without a posterior.
        counts: how many images each bucket has.
        train, val: numbers of the images of each split, int64 arrays.
        train_buckets, val_buckets: the same, divided into buckets; some may be empty.
        empty: (tokens (L, E), pooled (P,)) of the caption "".
        text_statistics: `tokens_mean`, `tokens_std` (E,), `pooled_mean` and `pooled_std` (P,), float32.

    Raises:
        UserError: the cache is not whole, damaged, or holds a shard of another one; one line that names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.index = read_index(self.folder / INDEX)
            self._shards = [self._open(shard) for shard in self.index["shards"]]
            text = load_file(self.folder / TEXT)
            self.empty = (text.pop("empty_tokens"), text.pop("empty_pooled"))
        except FileNotFoundError as error:
            missing = error.filename or self.folder / TEXT  # safetensors does not name it
            raise UserError(f"{self.folder}: not a whole latent cache, {missing} is missing; {AGAIN}") from None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{self.folder}: not a readable latent cache ({one_line(error)}); {AGAIN}") from None
        self.text_statistics = text
        self._first = np.cumsum([0] + [len(shard.val) for shard in self._shards])
        self._first_caption = np.cumsum([0] + [len(shard.no_flip) for shard in self._shards])
        self._first_token = np.cumsum([0] + [int(shard.offsets[-1]) for shard in self._shards])
        self._captions = _join([shard.captions for shard in self._shards], self._first_caption)
        self._offsets = _join([shard.offsets for shard in self._shards], self._first_token)
        self._no_flip = np.concatenate([shard.no_flip for shard in self._shards])
        is_val = np.concatenate([shard.val for shard in self._shards])
        self.train, self.val = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        shapes = [shard.latent_shape for shard in self._shards]
        self.latent_shapes = list(dict.fromkeys(shapes))
        self.grid_shapes = list(dict.fromkeys(shard.shapes[shard.grids][2:] for shard in self._shards))
        self.sizes = image_sizes(self.index)
        if len(self.sizes) != len(self.latent_shapes):
            raise UserError(f"{self.folder}: {INDEX} has {len(self.sizes)} sizes, the shards {len(self.latent_shapes)}; {AGAIN}")
        self._bucket = np.repeat([self.latent_shapes.index(shape) for shape in shapes], np.diff(self._first))  # of each image
        self.counts = np.bincount(self._bucket).tolist()
        self.train_buckets, self.val_buckets = self._divide(self.train), self._divide(self.val)

    def _divide(self, images: np.ndarray) -> list[np.ndarray]:
        return [images[self._bucket[images] == k] for k in range(len(self.latent_shapes))]

    def _open(self, entry: ShardEntry) -> Shard:
        path = self.folder / entry["file"]
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: {path.stat().st_size} bytes, not {entry['bytes']}: only half written?; {AGAIN}")
        try:
            shard = Shard(path)
        except (ValueError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable shard ({one_line(error)}); {AGAIN}") from None
        if shard.fingerprint != self.index["fingerprint"]:
            raise UserError(f"{path}: made by other encoders or settings than {INDEX} names; {AGAIN}")
        if len(shard.val) != entry["images"] or len(shard.no_flip) != entry["captions"]:
            raise UserError(f"{path}: {len(shard.val)} images, not {entry['images']} as in {INDEX}; {AGAIN}")
        return shard

    def verify(self) -> None:
        """Compare every byte with the hashes in the index, so that damage shows before training and not in the images.

        Raises:
            UserError: one line that names the first file that is not what it was.
        """
        expected = {shard["file"]: shard["sha256"] for shard in self.index["shards"]}
        expected |= {CAPTIONS: self.index["captions_sha256"], TEXT: self.index["text_sha256"]}
        paths = [self.folder / name for name in expected]
        try:
            with ThreadPoolExecutor(4) as pool:
                hashes = pool.map(sha256_file, paths)
                for path, found in zip(paths, tqdm(hashes, total=len(paths), desc="verify", unit="file", delay=2), strict=True):
                    if found != expected[path.name]:
                        raise UserError(f"{path}: damaged, its SHA-256 is not the one in {INDEX}; `dvc checkout` or {AGAIN}")
        except FileNotFoundError as error:
            raise UserError(f"{self.folder}: not a whole latent cache, {error.filename} is missing; {AGAIN}") from None

    def __len__(self) -> int:
        return self.index["images"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of most images: of all where there is one bucket."""
        return self.latent_shapes[0]

    def scaling_and_shift(self, device: torch.device) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Return what `sample_posterior` needs: numbers, or (C, 1, 1) on `device` where every channel has its own."""
        return per_channel(self.index["vae_scaling"], device), per_channel(self.index["vae_shift"], device)

    def first_val(self, limit: int | None = None) -> list[np.ndarray]:
        """Return `val_buckets`, or where that is more than `limit` images, the first of each bucket, to equal shares."""
        if limit is None or len(self.val) <= limit:
            return self.val_buckets
        return [images[: -(-len(images) * limit // len(self.val))] for images in self.val_buckets]

    @property
    def augmentations(self) -> int:
        """How many moments there are of each image: of every crop and of its mirror image."""
        shard = self._shards[0]
        return shard.shapes[shard.grids][1]

    @property
    def crops(self) -> int:
        """How many crops there are of each image, beside the central one."""
        return self.augmentations // 2 - 1

    @property
    def cross_attention_dim(self) -> int:
        """Width E of the text tokens."""
        return self._shards[0].shapes["tokens"][1]

    @property
    def pooled_projection_dim(self) -> int:
        """Width P of the pooled text vector."""
        return self._shards[0].shapes["pooled"][1]

    @property
    def max_tokens(self) -> int:
        """Length that captions are padded to: the longest of the set, rounded up to a multiple of 8."""
        return -(-self.index["longest_caption"] // 8) * 8

    def captions(self, images: np.ndarray) -> list[list[dict[str, str]]]:
        """Of each of `images` (numbers), its captions as rows of `image` (name), `text` and `split`."""
        ranges = [range(*self._captions[number : number + 2].tolist()) for number in images]
        wanted = set().union(*ranges)
        with (self.folder / CAPTIONS).open(encoding="utf-8") as lines:
            rows = {k: json.loads(line) for k, line in enumerate(lines) if k in wanted}
        return [[rows[k] for k in each] for each in ranges]

    def read(
        self, images: np.ndarray, caption_choice: np.ndarray, mirrored: np.ndarray, crop_choice: np.ndarray | None = None
    ) -> Batch:
        """Gather a batch.

        Args:
            images: (B,) numbers of images, all of one bucket.
            caption_choice: (B,) float in [0, 1): which of an image's captions, as a fraction of their number.
            mirrored: (B,) bool: take the mirror image, unless the chosen caption contains left or right.
            crop_choice: (B,) float in [0, 1): which of an image's crops; None for the central one.
        """
        rows = self.locate(images, caption_choice, mirrored, crop_choice)
        moments = torch.empty(len(images), *self.grid_shapes[self.bucket_of(images)], dtype=torch.float16)
        tokens = torch.zeros(len(images), self.max_tokens, self.cross_attention_dim, dtype=torch.float16)
        pooled = torch.empty(len(images), self.pooled_projection_dim, dtype=torch.float16)
        numbers = np.searchsorted(self._first, images, side="right") - 1  # of the shards
        augmentations = rows.augmentations - self._first[numbers] * self.augmentations
        captions = rows.captions - self._first_caption[numbers]
        first_tokens = rows.first_tokens - self._first_token[numbers]
        for k, number in enumerate(numbers):
            shard = self._shards[number]
            shard.read_rows(shard.grids, int(augmentations[k]), moments.numpy()[k])
            shard.read_rows("tokens", int(first_tokens[k]), tokens.numpy()[k, : rows.lengths[k]])
            shard.read_rows("pooled", int(captions[k]), pooled.numpy()[k])
        mask = torch.arange(self.max_tokens)[None] < torch.from_numpy(rows.lengths)[:, None]
        return Batch(moments, tokens, mask, pooled)

    def locate(
        self, images: np.ndarray, caption_choice: np.ndarray, mirrored: np.ndarray, crop_choice: np.ndarray | None = None
    ) -> Rows:
        """Return the rows that `read` reads for the same arguments."""
        starts, ends = self._captions[images], self._captions[images + 1]
        captions = starts + (caption_choice * (ends - starts)).astype(np.int64)
        crops = (np.zeros(len(images)) if crop_choice is None else crop_choice * (1 + self.crops)).astype(np.int64)
        augmentations = images * self.augmentations + 2 * crops + (np.asarray(mirrored) & ~self._no_flip[captions])
        return Rows(augmentations, captions, self._offsets[captions], self._offsets[captions + 1] - self._offsets[captions])

    def bucket_of(self, images: np.ndarray) -> int:
        """Return the bucket of `images` (B,), which are all of the same one; 0 where there are none."""
        buckets = self._bucket[images]
        if len(buckets) and (buckets != buckets[0]).any():
            raise ValueError("images of several buckets do not make a batch")
        return int(buckets[0]) if len(buckets) else 0

    def place_in_bucket(self, images: np.ndarray) -> np.ndarray:
        """Return the how manieth of its bucket each of `images` is, counted as `copy_rows` copies them."""
        if len(self.counts) == 1:
            return images
        places = np.empty(len(self), dtype=np.int64)
        for k in range(len(self.counts)):
            places[self._bucket == k] = np.arange(self.counts[k])
        return places[images]

    def copy_rows(self, name: str, target: torch.Tensor, bucket: int | None = None) -> None:
        """Fill `target` with all rows of a tensor, shard by shard.

        Args:
            name: "grids" (N * V, 2C or C, H, W), "tokens" (K, E) or "pooled" (M, P).
            target: any device, fp16.
            bucket: that of whose images alone; None for all.
        """
        start = 0
        for shard in self._shards:
            if bucket is not None and shard.latent_shape != self.latent_shapes[bucket]:
                continue
            tensor = shard.grids if name == "grids" else name
            rows = torch.empty(shard.shapes[tensor], dtype=torch.float16)
            rows = rows.flatten(0, 1) if name == "grids" else rows
            shard.read_rows(tensor, 0, rows.numpy())
            target[start : start + len(rows)].copy_(rows)
            start += len(rows)

    def read_empty(self, count: int) -> Batch:
        """`count` rows of the caption ""; the moments are zeros."""
        tokens, length = torch.zeros(self.max_tokens, self.cross_attention_dim, dtype=torch.float16), len(self.empty[0])
        tokens[:length] = self.empty[0]
        mask = torch.arange(self.max_tokens) < length
        moments = torch.zeros(count, *self.grid_shapes[0], dtype=torch.float16)
        return Batch(moments, tokens.expand(count, -1, -1), mask.expand(count, -1), self.empty[1].expand(count, -1))


def _join(starts: list[np.ndarray], first: np.ndarray) -> np.ndarray:
    """Join the starts of all shards' rows to one array: each shard's, shifted by the rows before it, and the end."""
    return np.concatenate([part[:-1] + before for part, before in zip(starts, first[:-1], strict=True)] + [first[-1:]])


def bytes_per_image(cache: LatentCache) -> tuple[float, float]:
    """Return what an image takes on disk, and what it would take as float32 with every caption padded to 77 tokens."""
    augmentations = 2 * (1 + cache.crops)
    captions = cache.index["captions"] / len(cache)
    text = captions * (CLIP_TOKENS * cache.cross_attention_dim + cache.pooled_projection_dim)
    naive = 4 * (augmentations * math.prod(cache.grid_shapes[0]) + text)
    return sum(shard["bytes"] for shard in cache.index["shards"]) / len(cache), naive


def sample_posterior(
    moments: torch.Tensor, noise: torch.Tensor, scaling: float | torch.Tensor, shift: float | torch.Tensor = 0.0
) -> torch.Tensor:
    """Sample latents (B, C, H, W) float32 from `moments` (B, 2C, H, W) and standard normal `noise` (B, C, H, W).

    Scaled and shifted as the diffusion model sees them: `(mean + std * noise - shift) * scaling`. Without a posterior `moments`
    are the latents themselves, (B, C, H, W).
    """
    if moments.shape == noise.shape:
        return (moments.float() - shift) * scaling
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise - shift) * scaling
