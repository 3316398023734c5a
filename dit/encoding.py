"""Turn a data set of pictures and captions into the latent cache, and show what the VAE loses on the way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit.config import Encode
from dit.encoders import PRECISIONS, EncoderSource, load_text_encoder, load_vae
from dit.images import grid, load_square, to_images, to_tensor
from dit.latents import CacheWriter
from dit.sources.captions import has_side
from dit.sources.dataset import Entry, read_metadata

SHARD_BYTES = 256 * 2**20
SHOWN = 8  # originals beside their reconstructions
SAMPLED = 256  # pictures that the reconstruction error is measured on


def encode_dataset(raw: Path, folder: Path, settings: Encode, picture: Path) -> dict[str, float | int]:
    """Encode the data set in `raw` into a cache in `folder`.

    Args:
        raw: what a source wrote: `metadata.json` and `images/`.
        folder: where the cache goes.
        settings: which encoders, image size, batch size and precision.
        picture: where originals (upper rows) beside reconstructions (lower rows) are drawn.

    Returns:
        `reconstruction_psnr` in dB over a sample of the set, and how many images and captions there are.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = PRECISIONS[settings.precision]
    vae, vae_source = load_vae(EncoderSource(settings.vae, settings.vae_revision), dtype, device)
    if settings.vae_slicing:
        vae.enable_slicing()
    text = TextEncoder(EncoderSource(settings.clip, settings.clip_revision), dtype, device)
    images = _by_image(read_metadata(raw))
    writer = CacheWriter(folder)
    shard: list[dict] = []
    limit = None
    progress = tqdm(total=len(images), desc="encode", unit="image")
    for start in range(0, len(images), settings.batch_size):
        chunk = images[start : start + settings.batch_size]
        pictures = [load_square(raw / entries[0].image, settings.image_size) for entries in chunk]
        moments = encode_moments(vae, to_tensor(pictures).to(device, dtype))
        captions = iter(text.encode([entry.text for entries in chunk for entry in entries]))
        for entries, both in zip(chunk, moments, strict=True):
            texts = [(entry.text, *next(captions), has_side(entry.text)) for entry in entries]
            shard.append({"image": entries[0].image, "val": entries[0].split == "val", "moments": both, "captions": texts})
        limit = limit or max(1, SHARD_BYTES // _bytes(shard[0]))
        if len(shard) >= limit:
            writer.add_shard(shard)
            shard = []
        progress.update(len(chunk))
    if shard:
        writer.add_shard(shard)
    progress.close()
    (empty,) = text.encode([""])
    writer.close(
        {
            "image_size": settings.image_size,
            "precision": settings.precision,
            "vae": vae_source.to_dict(),
            "vae_scaling": vae.config.scaling_factor,
            "vae_shift": vae.config.shift_factor or 0.0,
            "clip": text.source.to_dict(),
            "val_images": sum(entries[0].split == "val" for entries in images),
        },
        empty,
    )
    quality = measure_reconstruction(vae, raw, images, settings, picture)
    return {"reconstruction_psnr": quality, "images": len(images), "captions": sum(map(len, images))}


@torch.no_grad()
def encode_moments(vae, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior moments of pictures (N, 3, H, W) in [-1, 1] and of their mirror images: (N, 2, 2C, h, w) fp16 on the CPU."""
    moments = []
    for side in (pixels, pixels.flip(-1)):
        posterior = vae.encode(side).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu())
    return torch.stack(moments, dim=1)


class TextEncoder:
    """CLIP's text side: captions to ragged rows of last hidden states, and a projected pooled vector each."""

    def __init__(self, source: EncoderSource, dtype: torch.dtype, device: torch.device):
        self.model, self.tokenizer, self.source = load_text_encoder(source, dtype, device)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each caption its tokens (L, E) up to end-of-text and its pooled vector (P,), fp16 on the CPU.

        Longer captions are cut at the model's 77 tokens, as CLIP itself does. Every caption is padded to that length
        while it is encoded, so that its numbers do not depend on its neighbours.
        """
        length = self.model.config.max_position_embeddings
        inputs = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        lengths = inputs.attention_mask.sum(1).tolist()
        out = self.model(input_ids=inputs.input_ids.to(self.model.device))
        hidden, pooled = out.last_hidden_state.half().cpu(), out.text_embeds.half().cpu()
        return [(row[:count], vector) for row, count, vector in zip(hidden, lengths, pooled, strict=True)]


def _by_image(entries: list[Entry]) -> list[list[Entry]]:
    """Group the captions of each image, in the order in which the images appear."""
    images: dict[str, list[Entry]] = {}
    for entry in entries:
        images.setdefault(entry.image, []).append(entry)
    return list(images.values())


def _bytes(image: dict) -> int:
    """How much of a shard an image takes, roughly."""
    return 2 * image["moments"].numel() + sum(2 * tokens.numel() + 2 * len(pooled) for _, tokens, pooled, _ in image["captions"])


@torch.no_grad()
def measure_reconstruction(vae, raw: Path, images: list[list[Entry]], settings: Encode, picture: Path) -> float:
    """PSNR in dB of up to SAMPLED pictures of the set decoded again; the ceiling of anything that is trained on the cache."""
    chosen = np.random.default_rng(0).permutation(len(images))[:SAMPLED]
    squared, shown = [], []
    for start in range(0, len(chosen), settings.batch_size):
        originals = [
            load_square(raw / images[i][0].image, settings.image_size) for i in chosen[start : start + settings.batch_size]
        ]
        pixels = to_tensor(originals)
        decoded = vae.decode(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()).sample.float().cpu().clamp(-1, 1)
        squared.append((decoded - pixels).square().flatten(1).mean(1))
        if len(shown) < SHOWN:
            shown += list(zip(originals, to_images(decoded), strict=True))
    _draw_pairs(shown[:SHOWN], picture)
    return round(10 * math.log10(4 / torch.cat(squared).mean().item()), 2)


def _draw_pairs(pairs: list[tuple[Image.Image, Image.Image]], picture: Path) -> None:
    originals, decoded = zip(*pairs, strict=True)
    scale = max(1, 128 // originals[0].width)
    sheet = grid([*originals, *decoded], columns=len(pairs), scale=scale)
    picture.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(picture)
