"""Load the VAE and the CLIP text encoder: the small pair in the box, a Hub id or a local folder, all the same way."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dit.errors import UserError

BUILTIN = Path(__file__).parent / "builtin"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder's weights are, and exactly which they were.

    Attributes:
        name: "builtin", a Hub id or a local folder, as in params.yaml.
        revision: branch, tag or commit asked for; None for the default or where there is none.
        resolved: commit of the Hub repository, or `sha256:…` of the weights for a local folder.
    """

    name: str
    revision: str | None = None
    resolved: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)


def load_vae(source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """Load an `AutoencoderKL`; returns it and its `EncoderSource` with `resolved` filled in.

    Raises:
        UserError: there are no such weights, or they are of another class.
    """
    from diffusers import AutoencoderKL

    return _load(AutoencoderKL, "vae", source, dtype, device)


def load_text_encoder(source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """Load a CLIP text model with its projection, and its tokenizer; returns both and the resolved `EncoderSource`."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the image side's weights are not needed here is no news
    model, resolved = _load(CLIPTextModelWithProjection, "clip", source, dtype, device)
    tokenizer = CLIPTokenizer.from_pretrained(**_where("clip", resolved))
    return model, tokenizer, resolved


def load_clip(source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """Load the whole CLIP, text and image side, with its processor; returns both. For the CLIP score."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    model, resolved = _load(CLIPModel, "clip", source, dtype, device)
    where = _where("clip", resolved)
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(**where), CLIPTokenizer.from_pretrained(**where))
    return model, processor


def _where(kind: str, source: EncoderSource) -> dict[str, str | None]:
    """The arguments of `from_pretrained` that find `source`."""
    if source.name == "builtin":
        return {"pretrained_model_name_or_path": str(BUILTIN / kind)}
    pinned = source.resolved if source.resolved and not source.resolved.startswith("sha256:") else source.revision
    return {"pretrained_model_name_or_path": source.name, "revision": pinned}


def _load(model_class, kind: str, source: EncoderSource, dtype: torch.dtype, device):
    where = _where(kind, source)
    folder = Path(where["pretrained_model_name_or_path"])
    try:
        model = model_class.from_pretrained(**where, torch_dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        # Both libraries report missing repositories, files and connections, and weights of another shape, as one of these.
        first = " ".join(str(error).split())[:200]
        hint = "check the folder" if folder.is_dir() else "check the id and your network, or set it to a local folder"
        raise UserError(f"encode.{kind}: cannot load {source.name!r} as {model_class.__name__}: {first} ({hint})") from None
    if folder.is_dir():
        resolved = _weights_hash(folder)
    else:
        resolved = getattr(model.config, "_commit_hash", None) or source.revision
    if source.resolved and resolved != source.resolved:
        raise UserError(
            f"encode.{kind}: {source.name!r} is now {resolved}, but {source.resolved} is needed: the weights have changed"
        )
    return model.requires_grad_(False).eval().to(device), EncoderSource(source.name, source.revision, resolved)


def _weights_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"
