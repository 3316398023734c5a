"""The latent cache: what the encoders say about every image and caption, computed once, read by memory map.

A cache folder holds `shard-00000.safetensors` …, `captions.jsonl` and `index.json`. A shard of N images with M captions
and K text tokens in all holds

    moments   (N, 2, 2C, H, W) fp16   posterior mean and log-variance of the image [:, 0] and of its mirror image [:, 1]
    captions  (N + 1,)         int64  captions of image i are rows captions[i] to captions[i + 1]
    tokens    (K, E)           fp16   last hidden states of all captions, one after the other, end-of-text included
    offsets   (M + 1,)         int64  tokens of caption m are rows offsets[m] to offsets[m + 1]
    pooled    (M, P)           fp16   projected pooled text vectors
    sided     (M,)             bool   the caption says left or right, so the mirror image would contradict it
    val       (N,)             bool   the image belongs to the validation set

and `index.json` what made it, the sizes, and the SHA-256 of every shard. `text.safetensors` holds `empty_tokens` (L, E) fp16
and `empty_pooled` (P,) fp16 of the caption "", and over all captions the mean and standard deviation of every channel of the
tokens and of the pooled vectors, float32: `tokens_mean`, `tokens_std` (E,), `pooled_mean`, `pooled_std` (P,).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dit.errors import UserError
from dit.files import write_json

FORMAT = 1
TEXT = "text.safetensors"


@dataclass(frozen=True)
class Batch:
    """What the encoders say about B (image, caption) pairs; text is padded to the cache's longest caption.

    moments (B, 2C, H, W) fp16, tokens (B, L, E) fp16, mask (B, L) bool, pooled (B, P) fp16.
    """

    moments: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))


class CacheWriter:
    """Write a cache, shard by shard; `index.json` comes last, so that a folder without it is not a cache."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[dict] = []
        self._captions = (self.folder / "captions.jsonl.part").open("w", encoding="utf-8", newline="\n")
        self._tokens, self._pooled = Statistics(), Statistics()

    def add_shard(self, images: list[dict]) -> None:
        """Write one shard.

        Args:
            images: for each image `image` (name), `val`, `moments` (2, 2C, H, W) and `captions`: a list of
                (text, tokens (L, E), pooled (P,), sided).
        """
        captions = [caption for image in images for caption in image["captions"]]
        tensors = {
            "moments": torch.stack([image["moments"] for image in images]).half(),
            "captions": _starts([len(image["captions"]) for image in images]),
            "tokens": torch.cat([tokens for _, tokens, _, _ in captions]).half(),
            "offsets": _starts([len(tokens) for _, tokens, _, _ in captions]),
            "pooled": torch.stack([pooled for _, _, pooled, _ in captions]).half(),
            "sided": torch.tensor([sided for _, _, _, sided in captions]),
            "val": torch.tensor([image["val"] for image in images]),
        }
        self._tokens.add(tensors["tokens"])
        self._pooled.add(tensors["pooled"])
        name = f"shard-{len(self.shards):05d}.safetensors"
        self._save(tensors, name)
        for image in images:
            split = "val" if image["val"] else "train"
            for text, *_ in image["captions"]:
                row = {"image": image["image"], "text": text, "split": split}
                self._captions.write(json.dumps(row, ensure_ascii=False) + "\n")
        longest = int((tensors["offsets"][1:] - tensors["offsets"][:-1]).max())
        self.shards.append(
            {
                "file": name,
                "images": len(images),
                "captions": len(captions),
                "longest_caption": longest,
                "sha256": file_hash(self.folder / name),
            }
        )

    def _save(self, tensors: dict[str, torch.Tensor], name: str) -> None:
        part = self.folder / f"{name}.part"
        save_file(tensors, part)
        part.replace(self.folder / name)

    def close(self, about: dict, empty: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write what holds for all shards.

        Args:
            about: what made the cache.
            empty: tokens (L, E) and pooled vector (P,) of the caption "".
        """
        tensors = {"empty_tokens": empty[0].half().contiguous(), "empty_pooled": empty[1].half()}
        for name, statistics in (("tokens", self._tokens), ("pooled", self._pooled)):
            tensors[f"{name}_mean"], tensors[f"{name}_std"] = statistics.mean_std()
        self._save(tensors, TEXT)
        self._captions.close()
        Path(self._captions.name).replace(self.folder / "captions.jsonl")
        index = {
            "format": FORMAT,
            **about,
            "images": sum(shard["images"] for shard in self.shards),
            "captions": sum(shard["captions"] for shard in self.shards),
            "longest_caption": max(len(empty[0]), *(shard["longest_caption"] for shard in self.shards)),
            "captions_sha256": file_hash(self.folder / "captions.jsonl"),
            "shards": self.shards,
        }
        write_json(self.folder / "index.json", index)


class Statistics:
    """Mean and standard deviation of every channel, of rows that come a few at a time."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (N, channels)."""
        rows = rows.double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def mean_std(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both (channels,) float32; a channel that never changes has the deviation 1."""
        mean = self.sum / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LatentCache:
    """Random access to a cache folder. Images are numbered through all shards, in the order they were written.

    Attributes:
        index: the content of index.json.
        train, val: numbers of the images of each split, int64 arrays.
        empty: (tokens (L, E), pooled (P,)) of the caption "".
        text_statistics: `tokens_mean`, `tokens_std` (E,), `pooled_mean` and `pooled_std` (P,), float32.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
            if self.index["format"] != FORMAT:
                raise UserError(f"{self.folder}: a cache of format {self.index['format']}; run the encode stage again")
            self._shards = [self._open(shard) for shard in self.index["shards"]]
            text = load_file(self.folder / TEXT)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder}: not a whole latent cache, {error.filename} is missing; run `dvc repro encode`"
            ) from None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{self.folder}: not a readable latent cache ({error}); run `dvc repro encode`") from None
        self._first = np.cumsum([0] + [shard["images"] for shard in self.index["shards"]])
        is_val = np.concatenate([shard["val"].numpy() for shard in self._shards])
        self.train, self.val = np.flatnonzero(~is_val), np.flatnonzero(is_val)
        self.empty = (text.pop("empty_tokens"), text.pop("empty_pooled"))
        self.text_statistics = text

    def _open(self, shard: dict) -> dict[str, torch.Tensor]:
        with safe_open(self.folder / shard["file"], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping); views of the map
        if len(tensors["moments"]) != shard["images"]:
            raise UserError(f"{self.folder / shard['file']}: {len(tensors['moments'])} images, not {shard['images']}")
        return tensors

    def __len__(self) -> int:
        return self.index["images"]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        channels, height, width = self._shards[0]["moments"].shape[2:]
        return channels // 2, height, width

    @property
    def text_size(self) -> int:
        """Width E of the text tokens."""
        return self._shards[0]["tokens"].shape[1]

    @property
    def pooled_size(self) -> int:
        """Width P of the pooled text vector."""
        return self._shards[0]["pooled"].shape[1]

    @property
    def max_tokens(self) -> int:
        """Length that captions are padded to: the longest of the set, rounded up to a multiple of 8."""
        return -(-self.index["longest_caption"] // 8) * 8

    def texts(self) -> list[list[str]]:
        """The captions of every image, in order."""
        rows = [json.loads(line) for line in (self.folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
        counts = [np.diff(shard["captions"].numpy()) for shard in self._shards]
        starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return [[row["text"] for row in rows[a:b]] for a, b in zip(starts[:-1], starts[1:], strict=True)]

    def read(self, images: np.ndarray, caption_choice: np.ndarray, mirrored: np.ndarray) -> Batch:
        """Gather a batch.

        Args:
            images: (B,) numbers of images.
            caption_choice: (B,) float in [0, 1): which of an image's captions, as a fraction of their number.
            mirrored: (B,) bool: take the mirror image, unless the chosen caption says left or right.
        """
        numbers = np.searchsorted(self._first, images, side="right") - 1  # of the shards
        channels, height, width = self.latent_shape
        moments = torch.empty(len(images), 2 * channels, height, width, dtype=torch.float16)
        tokens = torch.empty(len(images), self.max_tokens, self.text_size, dtype=torch.float16)
        mask = torch.empty(len(images), self.max_tokens, dtype=torch.bool)
        pooled = torch.empty(len(images), self.pooled_size, dtype=torch.float16)
        for number in np.unique(numbers):
            shard, rows = self._shards[number], np.flatnonzero(numbers == number)
            i = torch.from_numpy(images[rows] - self._first[number])
            start, end = shard["captions"][i], shard["captions"][i + 1]
            caption = start + (torch.from_numpy(caption_choice[rows]) * (end - start)).long()
            mirror = torch.from_numpy(mirrored[rows]) & ~shard["sided"][caption]
            place = shard["offsets"][caption][:, None] + torch.arange(self.max_tokens)  # (rows, L)
            there = place < shard["offsets"][caption + 1][:, None]
            moments[rows] = shard["moments"][i, mirror.long()]
            tokens[rows] = shard["tokens"][place.clamp(max=len(shard["tokens"]) - 1)] * there[:, :, None]
            mask[rows] = there
            pooled[rows] = shard["pooled"][caption]
        return Batch(moments, tokens, mask, pooled)

    def read_empty(self, count: int) -> Batch:
        """`count` rows of the caption ""; the moments are zeros."""
        tokens, mask = pad([self.empty[0]] * count, self.max_tokens)
        channels, height, width = self.latent_shape
        moments = torch.zeros(count, 2 * channels, height, width, dtype=torch.float16)
        return Batch(moments, tokens, mask, self.empty[1].expand(count, -1))


def pad(rows: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of (L_i, E) to (B, length, E) with zeros behind, and the mask (B, length) that is True where a token is."""
    tokens = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for k, row in enumerate(rows):
        tokens[k, : len(row)] = row
        mask[k, : len(row)] = True
    return tokens, mask


def sample_posterior(moments: torch.Tensor, noise: torch.Tensor, scaling: float, shift: float = 0.0) -> torch.Tensor:
    """Latents (B, C, H, W) float32 from `moments` (B, 2C, H, W) and standard normal `noise` (B, C, H, W).

    Scaled and shifted as the diffusion model sees them: `(mean + std * noise - shift) * scaling`.
    """
    mean, log_variance = moments.float().chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise - shift) * scaling
