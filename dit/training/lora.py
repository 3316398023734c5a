"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) in the transformer: add, count, save, merge. By `peft`.

Beside a matrix W of the model, which stays as it is, two small ones are trained: the layer computes (W + alpha / rank B A) x.
B is zero at first, so that a training begins with exactly the model that it was given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit.config import Lora
from dit.errors import UserError
from dit.model.transformer import DiT

ADAPTER = "default"  # the name of the one that is trained, in memory; the file has no name in it
FOLDER = "lora"  # in the model folder


def add_adapters(transformer: DiT, settings: Lora, seed: int) -> None:
    """Add adapters to the modules that `settings` names; from now on they are all that is trained.

    Raises:
        UserError: the transformer has no such module.
    """
    from peft import LoraConfig

    linear = [name for name, module in transformer.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in settings.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = dict.fromkeys(".".join(name.split(".")[2 if name.startswith("blocks.") else 0 :]) for name in linear)
            raise UserError(f"train.lora.target_modules: {target} is no layer of the transformer; known: {', '.join(known)}")
    torch.manual_seed(seed)  # of the A matrices
    targets = sorted(set(settings.target_modules))
    transformer.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets), ADAPTER)


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name: all of them or, beside frozen weights, those of the adapters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def has_adapters(transformer: DiT) -> bool:
    """Return whether `add_adapters` has added some that are not merged."""
    return ADAPTER in getattr(transformer, "peft_config", {})


def count_parameters(transformer: DiT) -> int:
    """Return the number of parameters without those of adapters, which merging adds to the others."""
    return sum(parameter.numel() for name, parameter in transformer.named_parameters() if "lora_" not in name)


def save_adapters(transformer: DiT, folder: Path) -> None:
    """Write `pytorch_lora_weights.safetensors` into `folder`, as diffusers' `save_lora_weights` does."""
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin  # one of those with adapters in `transformer` alone
    from peft import get_peft_model_state_dict

    about = transformer.peft_config[ADAPTER].to_dict()
    SanaLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=ADAPTER),
        transformer_lora_adapter_metadata={name: _ordered(value) for name, value in about.items()},
    )
    _sort_metadata(folder / LORA_WEIGHT_NAME_SAFE)


def merge_adapters(transformer: DiT) -> None:
    """Add what the adapters have learned to the weights, and remove them: a transformer as any other."""
    transformer.fuse_lora()
    transformer.unload_lora()
    transformer.requires_grad_(True)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in a safetensors file into their order: safetensors writes several in a random one.

    The file is the length of its header, 8 bytes, the header, which is JSON, and the tensors.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    part.replace(path)


def _ordered(value: Any) -> Any:
    """Return sets, whose order differs from process to process, as sorted lists."""
    return sorted(value) if isinstance(value, (set, frozenset)) else value
