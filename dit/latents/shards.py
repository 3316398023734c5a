"""One shard of the latent cache: a safetensors file of N images with V augmentations each, M captions and K text tokens in all.

    moments   (N, V, 2C, H, W) fp16   posterior mean and log-variance; augmentation 2k is crop k, 2k + 1 its mirror image;
                                      crop 0 is the central one
    latents   (N, V, C, H, W)  fp16   in place of the moments where the autoencoder has no posterior
    captions  (N + 1,)         int64  captions of image i are rows captions[i] to captions[i + 1]
    tokens    (K, E)           fp16   last hidden states of all captions, one after the other, end-of-text included
    offsets   (M + 1,)         int64  tokens of caption m are rows offsets[m] to offsets[m + 1]
    pooled    (M, P)           fp16   projected pooled text vectors
    no_flip   (M,)             bool   the caption contains left or right, so the mirror image would contradict it
    val       (N,)             bool   the image belongs to the validation set

Beside it are its captions, one JSON row per line, and its record, written last: a shard without one is incomplete.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock

import numpy as np
from safetensors import safe_open

from dit.errors import UserError


class Shard:
    """Random access to a shard. Opening it reads the header and the small tensors; rows of the others are read one by one.

    Rows are read from the file straight into the batch, not through a memory map: the kernel maps whole huge pages around every
    row, so that after 100 random batches 6.4 GB of a cache of 6.6 GB counted as this process's memory. Each process opens the
    file for itself: after a fork, processes that share a file share one position in it.

    Attributes:
        fingerprint: as it was written.
        captions, offsets, no_flip, val: see the top of this file.
        shapes: of every tensor.
        grids: the name of the images' tensor, "moments" or "latents".

    Raises:
        OSError, SafetensorError, ValueError: it is missing or incomplete.
    """

    SMALL = ("captions", "offsets", "no_flip", "val")

    def __init__(self, path: Path):
        with safe_open(path, framework="pt") as opened:  # checks that header and file fit together
            self.fingerprint = (opened.metadata() or {}).get("fingerprint", "")
            self.shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            self.grids = "latents" if "latents" in self.shapes else "moments"
            if set(self.shapes) != {self.grids, "tokens", "pooled", *self.SMALL}:
                raise ValueError(f"{path.name} holds {', '.join(sorted(self.shapes))}")
            self.captions, self.offsets, self.no_flip, self.val = (opened.get_tensor(name).numpy().copy() for name in self.SMALL)
        self.path, self._lock, self._owner = path, Lock(), 0
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        self._starts = {name: 8 + length + header[name]["data_offsets"][0] for name in self.shapes}
        # A row of the images' tensor is an augmentation: (2C, H, W).
        self._row_bytes = {name: 2 * int(np.prod(self.shapes[name][2 if name == self.grids else 1 :])) for name in self.shapes}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its latents."""
        channels, height, width = self.shapes[self.grids][2:]
        return channels // 2 if self.grids == "moments" else channels, height, width

    def __reduce__(self):
        return Shard, (self.path,)  # neither a lock nor an open file can be sent to another process

    def read_rows(self, name: str, first: int, target: np.ndarray) -> None:
        """Fill `target`, fp16 and contiguous, from row `first` of tensor `name` on; a row of an image is one augmentation."""
        with self._lock:
            if self._owner != os.getpid():
                self._file, self._owner = self.path.open("rb", buffering=0), os.getpid()
            self._file.seek(self._starts[name] + first * self._row_bytes[name])
            if self._file.readinto(target.data.cast("B")) != target.nbytes:
                raise UserError(f"{self.path}: ends early; has it been changed while it was read?")
