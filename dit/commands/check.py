"""`dit check`: what can be known to go wrong before anything is deleted or computed.

Nothing heavy is imported at the top, so that a pipeline that is up to date needs no time for it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from dit.config import VAE_FACTOR, CocoData, Params, load_config
from dit.errors import UserError, without_passwords

# Bytes on disk per image, generously: raw data, latent cache (moments of two augmentations, text rows), and DVC's copy of both.
RAW_BYTES = {"shapes": 4_000, "coco": 200_000, "folder": 0, "hub": 200_000, "webdataset": 60_000}
LONGEST = 77  # tokens of a caption
MODEL_BYTES = 16  # per parameter: weights, DVC's copy, and as much again


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `check`."""
    parser = commands.add_parser("check", help="check configuration, disk space, data source and weights before running")
    parser.set_defaults(action=run_check)


def run_check(arguments: argparse.Namespace) -> None:
    """Check configuration and disk space, and that data and weights that are not here yet can be downloaded.

    Raises:
        UserError: the first thing that is wrong.
    """
    params = load_config()
    check_disk(params)
    if read_json(Path("data/raw/source.json")) != json.loads(json.dumps(without_passwords(asdict(params.active.data)))):
        check_data(params)
    check_weights(params)
    check_features(params.evaluate.features)
    print("settings, disk space, data and weights: nothing is missing")


def check_disk(params: Params) -> None:
    """Check that what the pipeline writes will fit."""
    recipe = params.active
    count = getattr(recipe.data, "num_samples", 0) or 0  # of all that there are, the number is not known
    augmentations = 2 * (1 + recipe.encode.crops)
    latents = (recipe.encode.image_size // VAE_FACTOR) ** 2 * 4 * 2 * augmentations * 2 + 60_000
    parameters = recipe.model.num_layers * 24 * recipe.model.hidden_size**2
    needed = 2 * count * (RAW_BYTES[params.recipe] + latents) + MODEL_BYTES * parameters
    free = shutil.disk_usage(".").free
    if free < needed:
        raise UserError(
            f"disk: about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free here; "
            "free some (`dvc gc -w` drops what the workspace does not use) or lower num_samples"
        )


def check_data(params: Params) -> None:
    """Check that the download stage will find its source."""
    data = params.active.data
    if isinstance(data, CocoData):
        from dit.sources.coco import check_host

        check_host(data.base_url)
    elif data.source == "folder":
        from dit.sources.folder import find_images

        find_images(data)
    elif data.source == "hub":
        from dit.sources.hub import open_stream

        open_stream(data)
    elif data.source == "webdataset":
        from dit.sources.webdataset import check_shards

        check_shards(data)


def check_weights(params: Params) -> None:
    """Check that the encoders that the cache was not made with can be loaded and fit the images; print what they cost."""
    index, encode = read_json(Path("data/latents/index.json")) or {}, params.active.encode
    unknown = False
    for kind, name, revision in (("vae", encode.vae, encode.vae_revision), ("clip", encode.clip, encode.clip_revision)):
        made_with = index.get(kind) or {}
        known = made_with.get("name") == name and made_with.get("revision") == revision
        unknown |= not known
        if known or name == "builtin":
            continue
        from dit.encoders.loading import EncoderSource, find_encoder

        find_encoder(kind, EncoderSource(name, revision), weights=False)
    if unknown:
        from dit.encoders.loading import check_sides

        check_sides(params.recipe, params.active)
        print(describe_cost(params))
        print(describe_memory(params))


def describe_cost(params: Params) -> str:
    """Say what the settings make of an image: latents, tokens, bytes in the cache, and operations of a training step."""
    import torch

    from dit.encoders.loading import EncoderSource, read_config
    from dit.model.transformer import DiT, forward_flops
    from dit.utils.autoencoder import HAS_POSTERIOR, vae_factor

    encode, model = params.active.encode, params.active.model
    vae = read_config("vae", EncoderSource(encode.vae, encode.vae_revision))
    clip = read_config("clip", EncoderSource(encode.clip, encode.clip_revision))
    channels, side = vae["latent_channels"], encode.image_size // vae_factor(vae)
    text, pooled = clip.get("text_config", clip).get("hidden_size", 512), clip.get("projection_dim", 512)  # their defaults
    with torch.device("meta"):  # its weights take no memory
        transformer = DiT(**asdict(model), in_channels=channels, cross_attention_dim=text, pooled_projection_dim=pooled)
    values = channels * side**2 * (2 if HAS_POSTERIOR[vae["_class_name"]] else 1)
    images = params.train.batch_size * params.train.gradient_accumulation_steps
    flops = 3 * images * forward_flops(transformer, (side, side), LONGEST)
    return (
        f"an image of {encode.image_size} x {encode.image_size} pixels is {(side // model.patch_size) ** 2} tokens, from latents "
        f"of {channels} x {side} x {side}: {4 * values * (1 + encode.crops):,} bytes in the cache, with its mirror image; a "
        f"training step of {images} images, with the longest captions: {flops / 1e12:.3g} TFLOP"
    )


def describe_memory(params: Params) -> str:
    """Say how much of a GPU's memory each stage will need, and what to change where that is more than there is."""
    import torch

    from dit.benchmark.memory import CUDA_BYTES, RTX_4090, StageMemory
    from dit.encoders.loading import EncoderSource, read_config

    encode, gpu = params.active.encode, torch.cuda.is_available()
    there = torch.cuda.get_device_properties(0).total_memory if gpu else RTX_4090
    vae = read_config("vae", EncoderSource(encode.vae, encode.vae_revision))
    clip = read_config("clip", EncoderSource(encode.clip, encode.clip_revision))
    stages = StageMemory(params, vae, clip, getattr(params.active.data, "num_samples", 0) or 0, there).count()
    needed = max(stages.values()) + CUDA_BYTES
    each = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in stages.items())
    line = f"memory of a GPU, counted, not compiled: {each}; with CUDA itself at most {needed / 1e9:.1f} of {there / 1e9:.0f} GB"
    if needed <= there:
        return line
    return f"{line}: too much. train.gradient_checkpointing, or a smaller batch_size of that stage, would take less"


def check_features(features: str) -> None:
    """Check that the image model of the evaluation can be had, before anything is trained."""
    from dit.encoders.loading import EncoderSource, find_encoder

    if features != "clip":
        find_encoder("features", EncoderSource(features), weights=False)


def read_json(path: Path) -> dict | None:
    """Return the content of a JSON file, None if it is not there or not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
