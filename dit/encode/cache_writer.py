"""Write the latent cache: shards, in the format that dit/latents/shards.py describes, and the index that makes them a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dit.latents.cache import CAPTIONS, INDEX, TEXT
from dit.latents.index import FORMAT, FORMAT_OF_SIZES
from dit.utils.files import link_or_copy, sha256_file, write_json

BLOCK = 8192  # rows of text that are summed at once, in float64


class ShardBuffer:
    """The tensors of one shard, filled batch by batch, so that its images are in memory only once.

    Args:
        val: of each image of the shard, whether it is for validation.
        captions: of each image, the number of its captions.
        lengths: of each caption, the number of its tokens.
        no_flip: of each caption, whether it says left or right.
        grids: what is stored of the images, "moments" or "latents".
    """

    def __init__(self, val: list[bool], captions: list[int], lengths: list[int], no_flip: list[bool], grids: str = "moments"):
        self.grids = grids
        self.tensors = {
            "captions": _starts(captions),
            "offsets": _starts(lengths),
            "no_flip": torch.tensor(no_flip),
            "val": torch.tensor(val),
        }
        self._images = self._captions = 0

    def add(self, moments: torch.Tensor, tokens: list[torch.Tensor], pooled: torch.Tensor) -> None:
        """Append the next images: moments (B, V, 2C or C, H, W), and of their captions tokens (L, E) each and pooled (M, P)."""
        if self.grids not in self.tensors:
            counts = (len(self.tensors["val"]), int(self.tensors["offsets"][-1]), len(self.tensors["no_flip"]))
            for name, count, like in zip((self.grids, "tokens", "pooled"), counts, (moments, tokens[0], pooled), strict=True):
                self.tensors[name] = torch.zeros(count, *like.shape[1:], dtype=torch.float16)
        self.tensors[self.grids][self._images : self._images + len(moments)] = moments
        start = int(self.tensors["offsets"][self._captions])
        rows = torch.cat(tokens)
        self.tensors["tokens"][start : start + len(rows)] = rows
        self.tensors["pooled"][self._captions : self._captions + len(pooled)] = pooled
        self._images += len(moments)
        self._captions += len(pooled)

    def write(
        self, folder: Path, number: int, rows: list[dict], fingerprint: str, inputs: str = "", enlarged: int = 0, cut: float = 0.0
    ) -> None:
        """Write shard `number` into `folder`.

        Args:
            rows: of each caption, its image's name, its text and its split.
            fingerprint: of the encoders and settings; stored in the file, so that a shard of others is recognised.
            inputs: digest of the images and captions that it was made from.
            enlarged: how many of its images were smaller than what was made of them.
            cut: the shares of their area that were cut off, added up.
        """
        if self._images != len(self.tensors["val"]) or self._captions != len(self.tensors["no_flip"]):
            raise ValueError(f"shard {number}: {self._images} images and {self._captions} captions are not all of them")
        file, listed, record = shard_paths(folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        save_file(self.tensors, part, metadata={"fingerprint": fingerprint})
        part.replace(file)
        with listed.open("w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        offsets = self.tensors["offsets"]
        about = {
            "file": file.name,
            "images": len(self.tensors["val"]),
            "captions": len(self.tensors["no_flip"]),
            "tokens": int(offsets[-1]),
            "longest_caption": int((offsets[1:] - offsets[:-1]).max()),
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
        }
        sums = {name: channel_sums(self.tensors[name]) for name in ("tokens", "pooled")}
        write_json(record, {"about": about, "inputs": inputs, "sums": sums, "enlarged": enlarged, "cut": cut})


def shard_paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Return the paths of shard `number`, its captions and its record."""
    name = f"shard-{number:05d}"
    return folder / f"{name}.safetensors", folder / f"{name}.jsonl", folder / f"{name}.json"


def read_record(folder: Path, number: int) -> dict | None:
    """Return the record of a shard that was written completely; None of any other."""
    file, listed, record = shard_paths(folder, number)
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        whole = listed.exists() and sha256_file(file) == content["about"]["sha256"] and "cut" in content
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if whole else None


def channel_sums(rows: torch.Tensor) -> dict:
    """Count `rows` (N, channels), and sum each channel and its squares."""
    total = squares = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(BLOCK):
        block = block.double()
        total, squares = total + block.sum(0), squares + block.square().sum(0)
    return {"count": len(rows), "sum": total.tolist(), "squares": squares.tolist()}


def mean_std(sums: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of every channel, float32, from the sums of all shards.

    A channel that never changes has the deviation 1.
    """
    count = sum(each["count"] for each in sums)
    mean = torch.tensor([each["sum"] for each in sums], dtype=torch.float64).sum(0) / count
    squares = torch.tensor([each["squares"] for each in sums], dtype=torch.float64).sum(0) / count
    std = (squares - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def assemble_cache(
    parts: Path, count: int, folder: Path, about: dict[str, Any], empty: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Make a cache of the complete shards in `parts`; `index.json` comes last: a folder without it is not a cache.

    The shards stay in `parts`, too (as hard links where the file system has them), so that this can be repeated.

    Args:
        parts: where `ShardBuffer.write` wrote.
        count: the number of shards.
        folder: where the cache goes.
        about: what made it, for the index.
        empty: tokens (L, E) and pooled vector (P,) of the caption "".
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = [json.loads(shard_paths(parts, number)[2].read_text(encoding="utf-8")) for number in range(count)]
    with (folder / CAPTIONS).open("wb") as captions:
        for number in range(count):
            file, listed, _ = shard_paths(parts, number)
            link_or_copy(file, folder / file.name)
            captions.write(listed.read_bytes())
    tensors = {"empty_tokens": empty[0].half().contiguous(), "empty_pooled": empty[1].half()}
    for name in ("tokens", "pooled"):
        tensors[f"{name}_mean"], tensors[f"{name}_std"] = mean_std([record["sums"][name] for record in records])
    save_file(tensors, folder / TEXT)
    shards = [record["about"] for record in records]
    index = {
        "format": FORMAT_OF_SIZES if "sizes" in about else FORMAT,
        **about,
        "images": sum(shard["images"] for shard in shards),
        "captions": sum(shard["captions"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "longest_caption": max(len(empty[0]), *(shard["longest_caption"] for shard in shards)),
        "captions_sha256": sha256_file(folder / CAPTIONS),
        "text_sha256": sha256_file(folder / TEXT),
        "shards": shards,
    }
    write_json(folder / INDEX, index)
