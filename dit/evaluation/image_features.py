"""Features of images by any image model of transformers, as papers compare generated images with real ones.

CLIP has learned from captions, Inception from a thousand classes. Stein et al. 2023 (arXiv:2306.04675) compare metrics with what
people see, and propose DINOv2 ViT-L/14, `facebook/dinov2-large`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from PIL import Image
from tqdm import tqdm

from dit.encoders.loading import EncoderSource, load_image_model
from dit.errors import UserError
from dit.evaluation.clip import in_batches


class ImageFeatures:
    """An image model, in float32.

    Args:
        name: a Hub id or a local folder, as in `evaluate.features`.
        device: where it runs; features come back to the CPU.

    Attributes:
        name: what metrics are named after: dinov2_large for facebook/dinov2-large.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.source = EncoderSource(name)
        self.model, self.processor = load_image_model(self.source, device)
        self.name = re.sub(r"[^a-z0-9]+", "_", re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()).strip("_")
        if self.name == "clip":
            raise UserError(f"evaluate.features: {name!r} has the name of the recipe's CLIP; rename the folder")

    @torch.inference_mode()
    def embed_images(self, images: Iterable[Image.Image], total: int, label: str) -> torch.Tensor:
        """Embed `total` = N RGB images of any size, which the model's own processor resizes: (N, P) float32.

        Of a DINOv2 that is the class token after the last layer norm.

        Raises:
            UserError: the model makes no single vector of an image.
        """
        found = []
        embed = getattr(self.model, "get_image_features", self.model)  # of models that also read texts, the image side alone
        with tqdm(total=total, desc=label, unit="image", delay=1, leave=None) as progress:
            for batch in in_batches(images):
                pixels = self.processor(images=batch, return_tensors="pt")["pixel_values"]
                pooled = getattr(embed(pixel_values=pixels.to(self.model.device)), "pooler_output", None)
                if pooled is None:
                    problem = f"is a {type(self.model).__name__}, which makes no single vector of an image"
                    raise UserError(f"evaluate.features: {self.source.name!r} {problem}")
                found.append(pooled.flatten(1).float().cpu())
                progress.update(len(batch))
        return torch.cat(found)
