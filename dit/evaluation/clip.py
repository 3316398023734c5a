"""CLIP features of images and captions: unit vectors, from which all metrics but prompt accuracy and the loss are computed.

CLIP is the one of the recipe, in float32. Each image goes through it once, however many metrics use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from dit.config import Runtime
from dit.dataset.aspect_ratios import Size
from dit.dataset.image_io import load_crops
from dit.dataset.reader import Entry, read_images
from dit.encoders.loading import EncoderSource, load_clip

BATCH_SIZE = 32  # as fast as any on one core with the bundled CLIP: 1.6 ms an image, at 100 it was 1.8 to 2.3


def fastest_device() -> str:
    """Return a GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class ClipFeatures:
    """The image and the text side of a CLIP.

    Args:
        source: which CLIP, as the latent cache's index names it.
        device: where it runs; features come back to the CPU.
    """

    def __init__(self, source: EncoderSource, device: str | torch.device = "cpu"):
        self.clip, self.processor = load_clip(source, device=device)

    @torch.inference_mode()
    def embed_images(self, images: Iterable[Image.Image], total: int, label: str) -> torch.Tensor:
        """Embed `total` = N RGB images of any size, which CLIP's own processor resizes: (N, P) float32, rows of length 1."""
        found = []
        with tqdm(total=total, desc=label, unit="image", delay=1, leave=None) as progress:
            for batch in in_batches(images):
                pixels = self.processor.image_processor(images=batch, return_tensors="pt")["pixel_values"]
                found.append(_unit(self.clip.get_image_features(pixel_values=pixels.to(self.clip.device))))
                progress.update(len(batch))
        return torch.cat(found) if found else torch.empty(0, self.clip.config.projection_dim)

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Embed N captions, cut off at CLIP's context: (N, P) float32, rows of length 1."""
        length = self.clip.config.text_config.max_position_embeddings
        found = []
        for batch in in_batches(texts):
            rows = self.processor.tokenizer(batch, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            found.append(_unit(self.clip.get_text_features(**rows.to(self.clip.device))))
        return torch.cat(found) if found else torch.empty(0, self.clip.config.projection_dim)


def in_batches(items: Iterable) -> Iterator[list]:
    """Yield lists of `BATCH_SIZE` items, the last one shorter."""
    items = iter(items)
    while batch := list(islice(items, BATCH_SIZE)):
        yield batch


def _unit(output) -> torch.Tensor:
    """Return the projected vectors in CLIP's `output`, on the CPU, each divided by its length, as CLIP does for its logits."""
    return F.normalize(output.pooler_output.float(), dim=-1).cpu()


def read_split(raw: Path, split: str) -> list[Entry]:
    """Return the images of `split` in the data set's folder `raw`, each once, with its first caption."""
    return [captions[0] for captions in read_images(raw) if captions[0].split == split]


def open_images(raw: Path, images: list[Entry], sizes: list[Size], runtime: Runtime) -> Iterator[Image.Image]:
    """Yield the images as training sees them: cropped and resized (Lanczos) to the one of `sizes` that fits each best."""
    # A batch has one size, and the images have to stay in their order.
    groups = in_batches(images) if len(sizes) == 1 else [[entry] for entry in images]
    batches = [[(entry.image, entry.stored) for entry in group] for group in groups]
    pixels_in_all = len(images) * sizes[0][0] * sizes[0][1]
    workers = runtime.num_workers if pixels_in_all > 1e8 else 0  # a few small images are decoded before workers start
    for pixels, *_ in load_crops(raw, batches, sizes, workers=workers, prefetch=runtime.prefetch_factor):
        for image in pixels[:, 0]:
            yield Image.fromarray(image.numpy())


def clip_scores(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return 100 max(cosine, 0): CLIPScore without its factor 2.5 (Hessel et al. 2021, arXiv:2104.08718, equation 1).

    Args:
        images, texts: features (N, P) of images and of their captions.

    Returns:
        (N,) float32 in [0, 100].
    """
    return 100 * (images * texts).sum(-1).clamp(min=0)
