"""The memory that stages are counted to need with the published encoders, whose configurations stand here."""

from __future__ import annotations

from dataclasses import replace

from dit.benchmark.memory import StageMemory
from dit.config import Params, load_config
from helpers import REPO

# As stabilityai/sd-vae-ft-mse and openai/clip-vit-large-patch14 say of themselves.
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
CLIP = {"projection_dim": 768, "text_config": TEXT, "vision_config": VISION | {"image_size": 224, "projection_dim": 768}}


def memory(recipe: str = "coco", images: int = 5000, **train) -> StageMemory:
    return StageMemory(params(recipe, **train), VAE, CLIP, images)


def params(recipe: str = "coco", **train) -> Params:
    params = load_config(REPO / "params.yaml")
    return replace(params, recipe=recipe, train=replace(params.train, **train))
