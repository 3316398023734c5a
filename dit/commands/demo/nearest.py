"""Which training images are nearest to an image: is it new, or a copy?"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dit.config import load_config
from dit.dataset.reader import Entry
from dit.encoders.loading import EncoderSource
from dit.evaluation.clip import ClipFeatures, fastest_device, open_images, read_split
from dit.latents.index import image_sizes, read_index

SHOWN = 5
LATENTS, RAW = Path("data/latents"), Path("data/raw")


class NearestTrainingImages:
    """Looks an image up among the training images, by the features of the recipe's CLIP, which are computed once.

    Args:
        root: the project's folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self.clip: ClipFeatures | None = None

    def find(self, image: Image.Image) -> list[tuple[Image.Image, str]] | None:
        """Return the nearest training images, each with its caption and its cosine; None where there are none here."""
        if not (self.root / LATENTS / "index.json").is_file() or not (self.root / RAW / "metadata.json").is_file():
            return None
        if self.clip is None:
            self._read()
        assert self.clip is not None
        cosines = (self.clip.embed_images([image], 1, "image") @ self.features.T)[0]
        found = torch.topk(cosines, min(SHOWN, len(cosines)))
        chosen = [self.entries[k] for k in found.indices.tolist()]
        images = open_images(self.root / RAW, chosen, self.sizes, self.runtime)
        pairs = zip(images, chosen, found.values.tolist(), strict=True)
        return [(one, f"{entry.text} ({cosine:.3f})") for one, entry, cosine in pairs]

    def _read(self) -> None:
        index = read_index(self.root / LATENTS / "index.json")
        self.runtime, self.sizes = load_config(self.root / "params.yaml").runtime, image_sizes(index)
        clip = ClipFeatures(EncoderSource(**index["clip"]), fastest_device())
        self.entries: list[Entry] = read_split(self.root / RAW, "train")
        images = open_images(self.root / RAW, self.entries, self.sizes, self.runtime)
        self.features = clip.embed_images(images, len(self.entries), "training images")
        self.clip = clip
