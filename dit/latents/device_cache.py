"""The latent cache as tensors in a device's memory: a batch is gathered there, and no worker has to read anything."""

from __future__ import annotations

import numpy as np
import torch

from dit.latents.cache import Batch, LatentCache

SHARE = 1 / 8  # of a GPU's memory; the rest is for the training. 4,750 COCO images with five captions each are 0.65 GB


class DeviceLatentCache:
    """Reads what `LatentCache.read` reads, bit for bit, from `device`'s memory.

    Args:
        cache: read once, shard by shard.
        device: where its tensors go.
    """

    def __init__(self, cache: LatentCache, device: torch.device):
        self.cache, self.device = cache, device
        self._tokens = torch.empty(cache.index["tokens"], cache.cross_attention_dim, dtype=torch.float16, device=device)
        self._pooled = torch.empty(cache.index["captions"], cache.pooled_projection_dim, dtype=torch.float16, device=device)
        cache.copy_rows("tokens", self._tokens)
        cache.copy_rows("pooled", self._pooled)
        self._moments = []  # of each bucket
        for bucket, shape in enumerate(cache.grid_shapes):
            count = cache.counts[bucket] * cache.augmentations
            self._moments.append(torch.empty(count, *shape, dtype=torch.float16, device=device))
            cache.copy_rows("grids", self._moments[-1], bucket)
        self._place = cache.place_in_bucket(np.arange(len(cache)))
        self._places = torch.arange(cache.max_tokens, device=device)

    @property
    def train_buckets(self) -> list[np.ndarray]:
        """Numbers of the training images of each bucket, as `LatentCache.train_buckets`."""
        return self.cache.train_buckets

    def read(
        self, images: np.ndarray, caption_choice: np.ndarray, mirrored: np.ndarray, crop_choice: np.ndarray | None = None
    ) -> Batch:
        """Gather a batch on the device; the arguments are those of `LatentCache.read`."""
        rows = self.cache.locate(images, caption_choice, mirrored, crop_choice)
        augmentations = rows.augmentations + (self._place[images] - images) * self.cache.augmentations
        numbers = torch.from_numpy(np.stack([augmentations, rows.captions, rows.first_tokens, rows.lengths]))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        moments, captions, first_tokens, lengths = numbers.to(self.device, non_blocking=True)
        mask = self._places < lengths[:, None]
        wanted = first_tokens[:, None] + torch.where(mask, self._places, 0)
        tokens = torch.where(mask[:, :, None], self._tokens[wanted], 0)
        return Batch(self._moments[self.cache.bucket_of(images)][moments], tokens, mask, self._pooled[captions])


def fits_on_device(cache: LatentCache, device: torch.device) -> bool:
    """Whether the cache takes at most an eighth of a GPU's memory; false on a CPU, where files are read from memory anyway."""
    if device.type != "cuda":
        return False
    size = sum(shard["bytes"] for shard in cache.index["shards"])
    return size <= SHARE * torch.cuda.get_device_properties(device).total_memory
