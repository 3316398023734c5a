"""One shard of the latent cache: a safetensors file of N images with V views each, M captions and K text tokens in all.

    moments   (N, V, 2C, H, W) fp16   posterior mean and log-variance; view 2k of crop k, view 2k + 1 of its mirror image;
                                      crop 0 is the central one
    captions  (N + 1,)         int64  captions of image i are rows captions[i] to captions[i + 1]
    tokens    (K, E)           fp16   last hidden states of all captions, one after the other, end-of-text included
    offsets   (M + 1,)         int64  tokens of caption m are rows offsets[m] to offsets[m + 1]
    pooled    (M, P)           fp16   projected pooled text vectors
    sided     (M,)             bool   the caption says left or right, so the mirror image would contradict it
    val       (N,)             bool   the image belongs to the validation set

Beside it lie its captions, a JSON row a line, and its record, written last: a shard without one is not whole.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit.errors import UserError
from dit.files import file_hash, write_json

BLOCK = 8192  # rows of text that are summed at once, in float64


class ShardBuffer:
    """The tensors of one shard, filled batch by batch, so that its images are in memory once.

    Args:
        val: of each image of the shard, whether it is for validation.
        captions: of each image, its captions' number.
        lengths: of each caption, the number of its tokens.
        sided: of each caption, whether it says left or right.
    """

    def __init__(self, val: list[bool], captions: list[int], lengths: list[int], sided: list[bool]):
        self.tensors = {
            "captions": _starts(captions),
            "offsets": _starts(lengths),
            "sided": torch.tensor(sided),
            "val": torch.tensor(val),
        }
        self._images = self._captions = 0

    def add(self, moments: torch.Tensor, tokens: list[torch.Tensor], pooled: torch.Tensor) -> None:
        """Take in the next images: moments (B, V, 2C, H, W), and of their captions tokens (L, E) each and pooled (M, P)."""
        if "moments" not in self.tensors:
            counts = (len(self.tensors["val"]), int(self.tensors["offsets"][-1]), len(self.tensors["sided"]))
            for name, count, like in zip(("moments", "tokens", "pooled"), counts, (moments, tokens[0], pooled), strict=True):
                self.tensors[name] = torch.zeros(count, *like.shape[1:], dtype=torch.float16)
        self.tensors["moments"][self._images : self._images + len(moments)] = moments
        start = int(self.tensors["offsets"][self._captions])
        rows = torch.cat(tokens)
        self.tensors["tokens"][start : start + len(rows)] = rows
        self.tensors["pooled"][self._captions : self._captions + len(pooled)] = pooled
        self._images += len(moments)
        self._captions += len(pooled)

    def write(self, folder: Path, number: int, rows: list[dict], made_by: str, inputs: str = "") -> None:
        """Write shard `number` into `folder`.

        Args:
            rows: of each caption, its image's name, its text and its split.
            made_by: which encoders and settings; goes into the file, so that a shard of others is recognised.
            inputs: digest of the images and captions that it was made from.
        """
        if self._images != len(self.tensors["val"]) or self._captions != len(self.tensors["sided"]):
            raise ValueError(f"shard {number}: {self._images} images and {self._captions} captions are not all of it")
        file, listed, record = shard_paths(folder, number)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        save_file(self.tensors, part, metadata={"made_by": made_by})
        part.replace(file)
        with listed.open("w", encoding="utf-8", newline="\n") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        offsets = self.tensors["offsets"]
        about = {
            "file": file.name,
            "images": len(self.tensors["val"]),
            "captions": len(self.tensors["sided"]),
            "tokens": int(offsets[-1]),
            "longest_caption": int((offsets[1:] - offsets[:-1]).max()),
            "bytes": file.stat().st_size,
            "sha256": file_hash(file),
        }
        sums = {name: channel_sums(self.tensors[name]) for name in ("tokens", "pooled")}
        write_json(record, {"about": about, "inputs": inputs, "sums": sums})


def shard_paths(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Where shard `number`, its captions and its record are."""
    name = f"shard-{number:05d}"
    return folder / f"{name}.safetensors", folder / f"{name}.jsonl", folder / f"{name}.json"


def read_record(folder: Path, number: int) -> dict | None:
    """What is known of a shard that was written as a whole; None of any other."""
    file, listed, record = shard_paths(folder, number)
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        whole = listed.exists() and file_hash(file) == content["about"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if whole else None


class Shard:
    """Random access to a shard. Opening it reads the header and the small tensors; rows of the others are read one by one.

    Rows are read from the file (`os.preadv`) straight into the batch, not through a memory map: the kernel maps whole huge
    pages around every row, so that after 100 random batches 6.4 GB of a cache of 6.6 GB counted as this process's memory.

    Attributes:
        made_by: as it was written.
        captions, offsets, sided, val: see the top of this file.
        shapes: of every tensor.

    Raises:
        OSError, SafetensorError, ValueError: it is not there or not whole.
    """

    SMALL = ("captions", "offsets", "sided", "val")

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as opened:  # looks whether header and file fit together
            self.made_by = (opened.metadata() or {}).get("made_by", "")
            self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            if set(self.shapes) != {"moments", "tokens", "pooled", *self.SMALL}:
                raise ValueError(f"{path.name} holds {', '.join(sorted(self.shapes))}")
            self.captions, self.offsets, self.sided, self.val = (opened.get_tensor(name).numpy().copy() for name in self.SMALL)
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self._starts = {name: 8 + length + header[name]["data_offsets"][0] for name in self.shapes}
        # A row of the moments is a view: (2C, H, W).
        self._row_bytes = {name: 2 * int(np.prod(self.shapes[name][2 if name == "moments" else 1 :])) for name in self.shapes}

    def read_rows(self, name: str, first: int, target: np.ndarray) -> None:
        """Fill `target`, fp16 and contiguous, from row `first` of tensor `name` on; a row of the moments is one view."""
        place = self._starts[name] + first * self._row_bytes[name]
        if os.preadv(self._file.fileno(), [target.view(np.uint8).reshape(-1)], place) != target.nbytes:
            raise UserError(f"{self._file.name}: ends early; has it been changed while it was read?")


def channel_sums(rows: torch.Tensor) -> dict:
    """Number of `rows` (N, channels), and of each channel the sum and the sum of squares."""
    total, squares = 0.0, 0.0
    for block in rows.split(BLOCK):
        block = block.double()
        total, squares = total + block.sum(0), squares + block.square().sum(0)
    return {"count": len(rows), "sum": total.tolist(), "squares": squares.tolist()}


def mean_std(sums: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every channel, float32, from the sums of all shards.

    A channel that never changes has the deviation 1.
    """
    count = sum(each["count"] for each in sums)
    mean = torch.tensor([each["sum"] for each in sums], dtype=torch.float64).sum(0) / count
    squares = torch.tensor([each["squares"] for each in sums], dtype=torch.float64).sum(0) / count
    std = (squares - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
