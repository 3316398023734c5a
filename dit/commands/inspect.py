"""`dit inspect`: what is in a latent cache; how an image was generated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dit.commands._args import save_image
from dit.dataset.filters import printable
from dit.errors import UserError

if TYPE_CHECKING:  # it takes a second to import torch
    import numpy as np
    import torch

    from dit.latents.cache import LatentCache
    from dit.latents.index import EncoderEntry

GAP = 2  # pixels between an original and its decoded latents
MEASURED = 512  # images that mean and deviation of the latents are measured on


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `inspect` and its flags."""
    parser = commands.add_parser(
        "inspect",
        help="summarise a latent cache, check it, show what is in it; or print how an image was generated",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit inspect data/latents --decode 16 --output latents.png\n"
        "  dit inspect generated.png                   the prompt, seed and settings that `dit generate` has written into it",
    )
    parser.add_argument(
        "what", nargs="?", type=Path, default=Path("data/latents"), help="a latent cache, or a .png; default: %(default)s"
    )
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="show N originals beside their decoded latents")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"), help="where the originals are; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("latents.png"), help="default: %(default)s")
    parser.set_defaults(action=run_inspect)


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print how an image was generated; or summarise a latent cache, compare it with its hashes, and show some of it."""
    what = arguments.what
    if what.is_file() or what.suffix.lower() == ".png":
        print_facts(what)
        return
    if not what.is_dir():
        raise UserError(f"{what}: no such file or folder; `dvc repro encode` makes data/latents")
    if (what / "model_index.json").is_file():
        raise UserError(f"{what}: a trained model, not a latent cache; `dit generate --checkpoint` generates images with it")
    if arguments.decode < 0:
        raise UserError(f"--decode: {arguments.decode} is not a number of images")

    from dit.latents.cache import LatentCache

    cache = LatentCache(what)
    print(describe_cache(cache), flush=True)
    cache.verify()
    print(f"{'checked':16} every file has the hash in {what / 'index.json'}")
    if arguments.decode > 0:
        save_image(decode_images(cache, arguments.raw, arguments.decode), arguments.output)
        print(f"{'image':16} {arguments.output}: originals on the left, decoded latents on the right")


def print_facts(path: Path) -> None:
    """Print what `dit generate` has written into a PNG file."""
    from dit.commands.png import read_facts

    facts = read_facts(path)
    if not facts:
        raise UserError(f"{path}: nothing is written in it on how it was generated")
    for name, value in facts.items():
        lines = ("\n" + 21 * " ").join(printable(line) for line in value.split("\n"))
        print(f"{printable(name):20} {lines}")


def describe_cache(cache: LatentCache) -> str:
    """Summarise a latent cache, a fact a line."""
    import torch

    from dit.latents.cache import CLIP_TOKENS, bytes_per_image

    index = cache.index
    stored, float32 = bytes_per_image(cache)
    values = torch.cat([each.flatten() for each in _mean_latents(cache, MEASURED)[1]])
    size = sum(shard["bytes"] for shard in index["shards"])
    crops = f" and {cache.crops} random crops" if cache.crops else ""
    mean_tokens = index["tokens"] / index["captions"]
    facts = {
        "images": f"{len(cache)}, {len(cache.train)} to train on and {len(cache.val)} to validate with",
        "captions": f"{index['captions']}, {mean_tokens:.1f} tokens on average, {index['longest_caption']} at most",
        "augmentations": f"{cache.augmentations} of each image: its middle{crops}, and mirrored",
        "image sizes": _sizes(cache),
        "latents": f"mean {values.mean():.3f}, deviation {values.std():.3f}, after scaling",
        "vae": _source(index["vae"]),
        "clip": f"{_source(index['clip'])}, tokens of {cache.cross_attention_dim}, pooled {cache.pooled_projection_dim}",
        "precision": str(index.get("precision", "not recorded")),
        "shards": f"{len(index['shards'])}, {size / 1e6:.1f} MB",
        "bytes per image": f"{stored:,.0f}; {float32 / stored:.1f} times as many in float32 with {CLIP_TOKENS} tokens a caption",
        "fingerprint": index["fingerprint"],
    }
    return "\n".join(f"{name:16} {fact}" for name, fact in facts.items())


def _sizes(cache: LatentCache) -> str:
    """Return how many images have which size, in pixels and in latents, the most frequent one first."""
    counts = [f"{count} of " if len(cache.sizes) > 1 else "" for count in cache.counts]
    shapes = [" x ".join(map(str, shape)) for shape in cache.latent_shapes]
    parts = zip(counts, cache.sizes, shapes, strict=True)
    return "; ".join(f"{count}{width} x {height} pixels, as latents {shape}" for count, (width, height), shape in parts)


def _mean_latents(cache: LatentCache, count: int) -> tuple[np.ndarray, list[torch.Tensor]]:
    """Return the numbers of `count` random images, always the same ones, and the latents (C, H, W) of each without noise."""
    import numpy as np
    import torch

    from dit.latents.cache import sample_posterior

    chosen = np.random.default_rng(0).permutation(len(cache))[:count]
    latents: list[torch.Tensor] = []
    for number in chosen:
        image = np.array([number])
        moments = cache.read(image, np.zeros(1), np.zeros(1, dtype=bool)).moments
        no_noise = torch.zeros(1, *cache.latent_shapes[cache.bucket_of(image)])
        latents += sample_posterior(moments, no_noise, *cache.scaling_and_shift(moments.device))
    return chosen, latents


def _source(source: EncoderEntry) -> str:
    return ", ".join(part for part in (source["name"], source["revision"], source["resolved"]) if part)


def decode_images(cache: LatentCache, raw: Path, count: int) -> Image.Image:
    """Return a sheet of `count` images of the cache: the original beside the decoded latents, the first caption below.

    Without the data set in `raw`, only the decoded latents.

    Raises:
        UserError: the VAE cannot be loaded.
    """
    from dit.encoders.loading import EncoderSource, load_vae
    from dit.utils.autoencoder import decode_latents
    from dit.utils.images import labelled_grid, to_images

    chosen, latents = _mean_latents(cache, count)
    vae, _ = load_vae(EncoderSource(**cache.index["vae"], recorded_in=cache.folder))
    decoded = [to_images(decode_latents(vae, each[None]))[0] for each in latents]  # one at a time: any size fits into memory
    captions = [rows[0] for rows in cache.captions(chosen)]
    originals = _originals(raw, [caption["image"] for caption in captions], [image.size for image in decoded])
    pairs = [_side_by_side(*pair) for pair in zip(originals, decoded, strict=True)] if originals else decoded
    columns, cell = (4, 320) if originals else (8, 160)  # pixels
    return labelled_grid(pairs, [caption["text"] for caption in captions], columns=min(columns, len(pairs)), cell=cell)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
    both.paste(left)
    both.paste(right, (left.width + GAP, 0))
    return both


def _originals(raw: Path, names: list[str], sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Return the images of these names, cropped and resized to `sizes`; none if the data set is not there."""
    from dit.dataset.decode import open_named
    from dit.dataset.image_io import center_crop
    from dit.dataset.reader import read_metadata
    from dit.dataset.storage import StoredImages

    try:
        wanted = set(names)
        stored = {entry.image: entry.stored for entry in read_metadata(raw) if entry.image in wanted}
        images = StoredImages(raw)
        opened = [open_named(images.read(stored[name]), name) for name in names]
        return [center_crop(image, size) for image, size in zip(opened, sizes, strict=True)]
    except (UserError, KeyError):
        return []
