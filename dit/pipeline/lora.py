"""Adapters (LoRA) in the pipeline: load, weigh, merge and remove them, by the names that diffusers' pipelines have."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from safetensors import SafetensorError, safe_open

from dit.errors import UserError, one_line
from dit.pipeline.model_folder import find_lora


class LoraMixin(SanaLoraLoaderMixin):
    """diffusers' own methods for a pipeline whose adapters are in `transformer` alone; mistakes are one line.

    `set_adapters(names, weights)`, `fuse_lora()`, `unfuse_lora()`, `unload_lora_weights()`, `disable_lora()`, `enable_lora()`,
    `delete_adapters(names)`, `get_list_adapters()` and `get_active_adapters()` are those of diffusers.
    """

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Load adapters as a training with `train.method: lora` or diffusers' `save_lora_weights` wrote them.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder with a `pytorch_lora_weights.safetensors`, a repository of
                the Hub with one, or its tensors. What is no safetensors may hold code and is not loaded.
            adapter_name: a name for `set_adapters`; by default `default_0`, `default_1` and so on.
            kwargs: of diffusers, for instance `revision` and `weight_name` of the Hub.

        Raises:
            UserError: there are no adapters, they do not fit this model, or the name is taken; one line that says which.
        """
        source = pretrained_model_name_or_path_or_dict
        if adapter_name in self.get_list_adapters().get("transformer", []):
            raise UserError(f"adapter_name: {adapter_name} is taken; another one would be right, or delete_adapters before")
        if isinstance(source, dict) or not Path(source).exists():
            tensors, metadata = self._fetch_lora(source, kwargs)
        else:
            tensors, metadata = read_lora(Path(source))
        shown = "the adapters" if isinstance(source, dict) else f"{source}"
        problem = misfit(tensors, self.transformer)
        if problem:
            raise UserError(f"{shown}: {problem}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are no mistake
            self.load_lora_into_transformer(
                tensors, self.transformer, adapter_name=adapter_name, metadata=metadata, _pipeline=self
            )

    def _fetch_lora(self, source: Any, kwargs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        try:
            return self.lora_state_dict(source, return_lora_metadata=True, **kwargs | {"use_safetensors": True})
        except (OSError, ValueError) as error:  # also those of the Hub's library
            raise UserError(
                f"{source}: no such file or folder, and the Hub has no such adapters ({one_line(error)}); "
                "models/dit/lora is where a training of adapters writes them"
            ) from None


def apply_loras(pipeline: LoraMixin, loras: Sequence[tuple[Path, float]]) -> None:
    """Load the adapters of each path and weigh them by its scale: 0 is without, 1 as trained."""
    for number, (path, _) in enumerate(loras):
        pipeline.load_lora_weights(path, adapter_name=f"lora_{number}")
    if loras:
        pipeline.set_adapters([f"lora_{number}" for number in range(len(loras))], [scale for _, scale in loras])


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Return the tensors of the adapters at `path`, and their settings as `save_lora_weights` stores them.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    file = find_lora(path)
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dictionary)
            about = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
            return tensors, json.loads(about) if about else None
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: not readable ({one_line(error)}); write or copy it again") from None


def misfit(tensors: dict[str, torch.Tensor], transformer: torch.nn.Module) -> str:
    """Return why adapters cannot be loaded into `transformer`, "" if they can; diffusers would leave out what does not fit."""
    layers = {name: module.weight for name, module in transformer.named_modules() if hasattr(module, "weight")}
    for name, tensor in tensors.items():
        layer, _, kind = name.removeprefix("transformer.").rpartition(".lora_")
        if not layer or not name.startswith("transformer."):
            return f"holds {name}, which is no adapter of a transformer"
        if layer not in layers:
            return f"is of another model: this one has no {layer}"
        rows, columns = layers[layer].shape[:2]
        found, wanted = (tensor.shape[1], columns) if kind.startswith("A") else (tensor.shape[0], rows)
        if found != wanted:
            return f"is of another model: its {layer} has {found} channels, and this one's {wanted}"
    return "" if tensors else "is empty"
