"""The parts of the pipeline, from a trained model's folder: `models/dit`, or what `dit export` and `save_pretrained` write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin
from safetensors import SafetensorError
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dit.config import DEFAULTS
from dit.encoders import EncoderSource, load_text_encoder, load_vae
from dit.errors import UserError
from dit.model import DiT
from dit.model_folder import read_index
from dit.schedulers import make_scheduler


def load_components(folder: Path, dtype: torch.dtype, transformer_dtype: torch.dtype) -> dict[str, Any]:
    """Load what `DiTTextToImagePipeline` is made of, as its arguments.

    The encoders are in the folder where it is self-contained; else they are those that the encode stage recorded. The scheduler
    is the saved one or, in what the train stage wrote, which is Euler's method whatever is best, the one that `dit generate`
    takes. The base class of the pipeline would look the transformer up in diffusers' own module of the name `dit`.

    Raises:
        UserError: there is no such folder, it holds another kind of model, it is damaged, or an encoder is not to be had.
    """
    index = read_index(folder)
    try:
        parts = {"transformer": _load_transformer(folder, transformer_dtype), "prediction_type": index["prediction_type"]}
        if (folder / "vae").is_dir():
            scheduler = _load_scheduler(folder, index["scheduler"][1])
            return parts | {"scheduler": scheduler, "image_size": index["image_size"]} | _load_own_encoders(folder, dtype)
        encoders = index["encoders"]
        vae_source, clip_source = EncoderSource(**encoders["vae"]), EncoderSource(**encoders["clip"])
        parts |= {
            "scheduler": make_scheduler(DEFAULTS["scheduler"], index["prediction_type"]),
            "image_size": encoders["image_size"],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"{folder}: not a trained model, or a damaged one ({reason}); `dvc repro` trains one") from None
    vae, _ = load_vae(vae_source, dtype)
    text_encoder, tokenizer, _ = load_text_encoder(clip_source, dtype)
    return parts | {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}


def _load_transformer(folder: Path, dtype: torch.dtype) -> DiT:
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    if config["_class_name"] != "DiT":
        raise ValueError(f"its transformer is a {config['_class_name']}, and a DiT of this project is needed")
    transformer, loading = DiT.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    astray = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if astray:  # diffusers would fill in at random what is missing
        raise ValueError(f"the weights do not fit transformer/config.json: {astray[0]}")
    return transformer.eval()


def _load_scheduler(folder: Path, name: str) -> SchedulerMixin:
    scheduler = getattr(diffusers, name)
    if not issubclass(scheduler, SchedulerMixin):
        raise TypeError(f"{name} is no scheduler")
    return scheduler.from_pretrained(folder, subfolder="scheduler")


def _load_own_encoders(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype, use_safetensors=True)
    text_encoder = CLIPTextModelWithProjection.from_pretrained(
        folder, subfolder="text_encoder", dtype=dtype, use_safetensors=True
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    return {
        "vae": vae.requires_grad_(False).eval(),
        "text_encoder": text_encoder.requires_grad_(False).eval(),
        "tokenizer": tokenizer,
    }
