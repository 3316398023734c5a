"""A small random transformer for the bundled encoders, and a model folder that holds it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dit.config import Lora, Model
from dit.encoders.loading import BUILTIN, EncoderSource
from dit.model.transformer import OLD_BLOCK_MODULES, OLD_CONFIG, OLD_MODULES, DiT
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import make_scheduler
from dit.training.export import save_model
from dit.training.lora import add_adapters, save_adapters, trainable_parameters
from helpers.cache import write_cache
from helpers.training import OPTIM, TRAIN

CHANNELS = json.loads((BUILTIN / "vae" / "config.json").read_text())["latent_channels"]


def random_transformer() -> DiT:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
    transformer = DiT(in_channels=CHANNELS, **size, cross_attention_dim=128, pooled_projection_dim=128)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return transformer


def save(folder: Path, **train) -> None:
    cache = write_cache(folder / "latents", channels=CHANNELS)
    model = Model(patch_size=2, hidden_size=32, num_layers=2, num_heads=2, conv_channels=0, output="velocity")
    cache.index["clip"] = cache.index["vae"] = EncoderSource("builtin").to_dict()
    save_model(folder / "dit", random_transformer(), cache, model, OPTIM, replace(TRAIN, **train))


def euler_pipeline(model: Path) -> DiTTextToImagePipeline:
    """The model's pipeline with the scheduler euler, without a progress bar."""
    pipeline = DiTTextToImagePipeline.from_pretrained(model)
    pipeline.scheduler = make_scheduler("euler", "flow_prediction")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_latents(pipeline: DiTTextToImagePipeline, *args, **settings) -> torch.Tensor:
    """Latents of three steps under strong guidance, from the same noise."""
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"} | settings
    return pipeline(*args, generator=torch.Generator().manual_seed(0), **settings).images


def rename_as_version_0_1(folder: Path) -> None:
    """Give the settings and the weights of the `DiT` in `folder` the names that they had in version 0.1."""
    path, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    config = json.loads(path.read_text())
    for old, new in OLD_CONFIG.items():
        config[old] = config.pop(new)
    path.write_text(json.dumps(config))
    save_file({_old_name(name): value for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})


def _old_name(name: str) -> str:
    old_names = {new: old for modules in (OLD_MODULES, OLD_BLOCK_MODULES) for old, new in modules.items()}
    for new in sorted(old_names, key=len, reverse=True):
        if f".{new}." in f".{name}" and (name.startswith("blocks") == (new in OLD_BLOCK_MODULES.values())):
            return f".{name}".replace(f".{new}.", f".{old_names[new]}.", 1)[1:]
    return name


def save_lora(folder: Path, seed: int, transformer: DiT | None = None) -> None:
    """Write random adapters of `random_transformer`, of rank 4 and alpha 8, or of another one."""
    transformer = transformer or random_transformer()
    add_adapters(transformer, Lora(rank=4, alpha=8, target_modules=("attn.qkv", "cross_attn.kv", "mlp.2")), seed)
    for parameter in trainable_parameters(transformer).values():
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapters(transformer, folder)
