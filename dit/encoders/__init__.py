"""Load the VAE and the CLIP text encoder: the small pair in the box, a Hub id or a local folder, all the same way."""

from __future__ import annotations

import torch
from safetensors import SafetensorError

from dit.encoders.repository import BUILTIN, OTHERWISE, EncoderSource, find_encoder
from dit.errors import UserError

__all__ = ["BUILTIN", "PRECISIONS", "EncoderSource", "load_clip", "load_text_encoder", "load_vae"]
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_vae(source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """Load an `AutoencoderKL`; returns it and its `EncoderSource` with `resolved` filled in.

    Raises:
        UserError: there are no such weights, or they are of another class.
    """
    from diffusers import AutoencoderKL

    vae, resolved, _ = _load(AutoencoderKL, "vae", source, dtype, device)
    return vae, resolved


def load_text_encoder(source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """Load a CLIP text model with its projection, and its tokenizer; returns both and the resolved `EncoderSource`."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the image side's weights are not needed here is no news
    model, resolved, folder = _load(CLIPTextModelWithProjection, "clip", source, dtype, device)
    return model, CLIPTokenizer.from_pretrained(folder), resolved


def load_clip(source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """Load the whole CLIP, text and image side, with its processor; returns both. For the CLIP score."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    model, _, folder = _load(CLIPModel, "clip", source, dtype, device)
    return model, CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))


def _load(model_class, kind: str, source: EncoderSource, dtype: torch.dtype, device):
    """The model, its resolved source, and the folder that it was loaded from."""
    folder, resolved = find_encoder(kind, source)
    try:
        model = model_class.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # Both libraries report files that are missing or damaged, and weights of another shape, as one of these.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"encode.{kind}: {source.name!r} cannot be loaded as {model_class.__name__} ({reason}); "
            f"delete {folder} to download it again, {OTHERWISE}"
        ) from None
    return model.requires_grad_(False).eval().to(device), EncoderSource(source.name, source.revision, resolved), folder
