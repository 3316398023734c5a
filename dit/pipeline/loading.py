"""Load the components of the pipeline from the folder of a trained model, `models/dit` or an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import diffusers
import torch
from diffusers import SchedulerMixin
from safetensors import SafetensorError
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dit.config import DEFAULTS
from dit.encoders.loading import EncoderSource, load_text_encoder, load_vae
from dit.errors import UserError, one_line
from dit.model.objectives import PredictionType
from dit.model.transformer import DiT
from dit.pipeline.model_folder import read_index
from dit.pipeline.schedulers import make_scheduler
from dit.utils.autoencoder import HAS_POSTERIOR

# What the libraries raise for files that are missing, incomplete or of another kind.
DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, SafetensorError)


def load_components(folder: Path, dtype: torch.dtype, transformer_dtype: torch.dtype) -> dict[str, Any]:
    """Load the components of `DiTTextToImagePipeline`, as its arguments.

    An export holds its encoders and its scheduler. For the folder of the train stage, the encoders are those that the encode
    stage recorded, and the scheduler is the default of `dit generate`. diffusers' own `from_pretrained` cannot load either: it
    looks the transformer up in its own module `dit`.

    Raises:
        UserError: there is no such folder, it holds another kind of model, it is damaged, or an encoder cannot be loaded.
    """
    index = read_index(folder)
    try:
        prediction_type, complete = index["prediction_type"], (folder / "vae").is_dir()
        trained_on = index if complete else index["encoders"]
        image_size = trained_on["image_size"]
        if prediction_type not in get_args(PredictionType) or not isinstance(image_size, int):
            raise ValueError(f"model_index.json has {prediction_type!r} and {image_size!r} for prediction_type and image_size")
        parts = {
            "transformer": _load_transformer(folder, transformer_dtype),
            "prediction_type": prediction_type,
            "image_size": image_size,
            "sizes": trained_on.get("sizes"),
            "long_captions": trained_on.get("long_captions", "cut"),
        }
        if complete:
            return (
                parts
                | {"scheduler": _load_scheduler(folder, index["scheduler"][1])}
                | _load_own_encoders(folder, index["vae"][1], dtype)
            )
        sources = recorded_encoders(folder)
        parts["scheduler"] = make_scheduler(DEFAULTS.scheduler, prediction_type)
    except DAMAGE as error:
        reason = one_line(error, with_type=True)
        raise UserError(f"{folder}: not a trained model, or a damaged one ({reason}); `dvc repro` trains one") from None
    vae, _ = load_vae(sources["vae"], dtype)
    text_encoder, tokenizer, _ = load_text_encoder(sources["clip"], dtype)
    return parts | {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}


def recorded_encoders(folder: Path) -> dict[str, EncoderSource]:
    """Return which "vae" and "clip" the model folder of the train stage records; KeyError or TypeError if it is damaged."""
    encoders = read_index(folder)["encoders"]
    return {kind: EncoderSource(**encoders[kind], recorded_in=folder) for kind in ("vae", "clip")}


def _load_transformer(folder: Path, dtype: torch.dtype) -> DiT:
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    if config["_class_name"] != "DiT":
        raise ValueError(f"its transformer is a {config['_class_name']}, and a DiT of this project is needed")
    return _load_network(DiT, folder, "transformer", torch_dtype=dtype)


def _load_network(network_class: Any, folder: Path, part: str, **dtype: torch.dtype) -> Any:
    default = torch.get_default_dtype()
    try:
        network, loading = network_class.from_pretrained(
            folder, subfolder=part, use_safetensors=True, output_loading_info=True, **dtype
        )
    finally:
        torch.set_default_dtype(default)  # diffusers leaves it changed where the configuration is impossible
    misfits = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if misfits:  # the libraries initialise what is missing at random
        raise ValueError(f"the weights do not fit {part}/config.json: {misfits[0]}")
    return network.requires_grad_(False).eval()


def _load_scheduler(folder: Path, name: str) -> SchedulerMixin:
    scheduler = getattr(diffusers, name)
    if not issubclass(scheduler, SchedulerMixin):
        raise TypeError(f"{name} is no scheduler")
    return scheduler.from_pretrained(folder, subfolder="scheduler")


def _load_own_encoders(folder: Path, vae_class: str, dtype: torch.dtype) -> dict[str, Any]:
    if vae_class not in HAS_POSTERIOR:
        raise ValueError(f"model_index.json has {vae_class!r} for the VAE's class")
    for name in ("tokenizer_config.json", "tokenizer.json"):  # without them the library makes an empty tokenizer
        if not (folder / "tokenizer" / name).is_file():
            raise FileNotFoundError(f"there is no tokenizer/{name}")
    return {
        "vae": _load_network(getattr(diffusers, vae_class), folder, "vae", torch_dtype=dtype),
        "text_encoder": _load_network(CLIPTextModelWithProjection, folder, "text_encoder", dtype=dtype),
        "tokenizer": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
    }
