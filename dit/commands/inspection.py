"""What is in a latent cache, for a person: a summary, and decoded latents beside their originals and captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dit.dataset.image_io import center_crop, open_rgb
from dit.dataset.reader import read_metadata
from dit.dataset.storage import StoredImages
from dit.encoders.loading import EncoderSource, load_vae
from dit.errors import UserError
from dit.latents.cache import CLIP_TOKENS, LatentCache, bytes_per_image, sample_posterior
from dit.latents.index import EncoderEntry
from dit.utils.images import labelled_grid, to_images

GAP = 2  # pixels between an original and what was decoded
SAMPLED = 512  # images that the spread of the latents is measured on


def describe_cache(cache: LatentCache) -> str:
    """Return a readable summary, a fact a line."""
    index = cache.index
    stored, naive = bytes_per_image(cache)
    chosen = np.random.default_rng(0).permutation(len(cache))[:SAMPLED]
    batch = cache.read(chosen, np.zeros(len(chosen)), np.zeros(len(chosen), dtype=bool))
    latents = sample_posterior(
        batch.moments, torch.zeros(len(chosen), *cache.latent_shape), index["vae_scaling"], index["vae_shift"]
    )
    size = sum(shard["bytes"] for shard in index["shards"])
    crops = f" and {cache.crops} random crops" if cache.crops else ""
    mean_tokens = index["tokens"] / index["captions"]
    facts = {
        "images": f"{len(cache)}, {len(cache.train)} to train on and {len(cache.val)} to validate with",
        "captions": f"{index['captions']}, {mean_tokens:.1f} tokens on average, {index['longest_caption']} at most",
        "views": f"{2 * (1 + cache.crops)} of each image: the central square{crops}, and mirrored",
        "image size": f"{index['image_size']} pixels, as latents {' x '.join(map(str, cache.latent_shape))}",
        "latents": f"mean {latents.mean():.3f}, deviation {latents.std():.3f}, after scaling",
        "vae": _source(index["vae"]),
        "clip": f"{_source(index['clip'])}, tokens of {cache.cross_attention_dim}, pooled {cache.pooled_projection_dim}",
        "precision": str(index.get("precision", "not recorded")),
        "shards": f"{len(index['shards'])}, {size / 1e6:.1f} MB",
        "bytes per image": f"{stored:,.0f}; {naive / stored:.1f} times as many in float32 with captions of {CLIP_TOKENS} tokens",
        "made by": index["fingerprint"],
    }
    return "\n".join(f"{name:16} {fact}" for name, fact in facts.items())


def _source(source: EncoderEntry) -> str:
    return ", ".join(part for part in (source["name"], source["revision"], source["resolved"]) if part)


@torch.no_grad()
def decode_pictures(cache: LatentCache, raw: Path, count: int) -> Image.Image:
    """Return a sheet of `count` images of the cache: the original beside the decoded latents, the first caption below.

    Without the data set in `raw`, only the decoded latents.

    Raises:
        UserError: the VAE cannot be loaded.
    """
    chosen = np.random.default_rng(0).permutation(len(cache))[:count]
    batch = cache.read(chosen, np.zeros(len(chosen)), np.zeros(len(chosen), dtype=bool))
    vae, _ = load_vae(EncoderSource(**cache.index["vae"]))
    means = batch.moments.float().chunk(2, dim=1)[0]
    decoded = [to_images(vae.decode(mean[None]).sample)[0] for mean in means]  # one at a time: any size fits into memory
    captions = cache.captions(chosen)
    originals = _originals(raw, [rows[0]["image"] for rows in captions], decoded[0].width)
    pairs = [_side_by_side(*pair) for pair in zip(originals, decoded, strict=True)] if originals else decoded
    columns = 4 if originals else 8
    cell = 320 if originals else 160  # pixels
    return labelled_grid(pairs, [rows[0]["text"] for rows in captions], columns=min(columns, len(pairs)), cell=cell)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
    both.paste(left)
    both.paste(right, (left.width + GAP, 0))
    return both


def _originals(raw: Path, names: list[str], image_size: int) -> list[Image.Image]:
    """Return the images of these names as squares; none if the data set is not there."""
    try:
        stored = {entry.image: entry.stored for entry in read_metadata(raw)}
        images = StoredImages(raw)
        return [center_crop(open_rgb(images.read(stored[name])), image_size) for name in names]
    except (UserError, KeyError):
        return []
