"""The trained model that a training begins with (`train.init_from`): find its weights, check that they fit, take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dit.errors import UserError, one_line
from dit.model.transformer import DiT
from dit.training.checkpoint import MOMENTS, open_checkpoint, place_moments
from dit.training.init_weights import NEEDED, find_weights

DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)


@dataclass
class InitModel:
    """A trained model on the CPU.

    Attributes:
        name: as `train.init_from` gives it, for messages.
        path: the model folder or the checkpoint.
        transformer: with its EMA weights.
        prediction_type: what it predicts.
        clip: which text encoder it was trained with, as its folder records it; None where it does not.
        moments: of a kept state, AdamW's state of each parameter that has one.
    """

    name: str
    path: Path
    transformer: DiT
    prediction_type: str
    clip: dict[str, Any] | None = None
    moments: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def load_into(self, transformer: DiT) -> None:
        """Give `transformer` these weights, and the text statistics under which they were learned.

        Positions are no weights, so images of another size are no obstacle.

        Raises:
            UserError: the two differ in what they are made of; one line that names all of it.
        """
        ours, wanted = self.transformer.config, transformer.config
        names = [name for name in wanted if not name.startswith("_") and ours.get(name) != wanted[name]]
        if names:
            misfits = ", ".join(f"{name} {ours.get(name)} (wanted: {wanted[name]})" for name in names)
            raise UserError(
                f"train.init_from: {self.name} does not fit the settings and the latents: {misfits}; the same model and encoders "
                "as it was trained with would be right"
            )
        transformer.load_state_dict(self.transformer.state_dict())

    def load_moments(self, optimizer: torch.optim.Optimizer, named: dict[str, torch.nn.Parameter]) -> int:
        """Give AdamW its state of the parameters in `named` that have one of the same shape; return how many have."""
        taken = 0
        for name, parameter in named.items():
            moments = self.moments.get(name, {})
            if moments and all(moments[kind].shape == parameter.shape for kind in MOMENTS):
                optimizer.state[parameter] = place_moments(parameter, moments)
                taken += 1
        return taken

    def describe(self, log: Callable[[str], None], prediction_type: str, clip: dict[str, Any], moments: int) -> None:
        """Log what is taken, and what the training that now begins does otherwise.

        Args:
            log: called with each line.
            prediction_type, clip: of the training that begins.
            moments: of how many parameters the optimiser's state is taken.
        """
        state = f"; the optimiser's moments of {moments} parameters" if moments else "; the optimiser begins anew"
        log(f"begins with the EMA weights and the text statistics of {self.name}{state}")
        if self.prediction_type != prediction_type:
            log(f"{self.name} predicts {self.prediction_type}, and this training {prediction_type}: its first steps unlearn that")
        if self.clip and self.clip != clip:
            known, now = (f"{each.get('name')} ({each.get('resolved')})" for each in (self.clip, clip))
            log(f"{self.name} was trained with the text encoder {known}, and these latents are of {now}: it reads captions anew")


def load_init(path: Path, name: str) -> InitModel:
    """Load the model folder, the export or the checkpoint at `path`; messages call it `name`.

    Raises:
        UserError: it is none of them, or damaged; one line.
    """
    find_weights(path, name)
    try:
        return _load_checkpoint(path, name) if path.is_file() else _load_folder(path, name)
    except DAMAGE as error:
        raise UserError(f"train.init_from: {name}: not a trained model, or a damaged one ({one_line(error)}); {NEEDED}") from None


def _load_folder(path: Path, name: str) -> InitModel:
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    transformer, loading = DiT.from_pretrained(path, subfolder="transformer", use_safetensors=True, output_loading_info=True)
    misfits = [*loading["missing_keys"], *loading["unexpected_keys"]]
    if misfits:
        raise ValueError(f"the weights do not fit transformer/config.json: {misfits[0]}")
    return InitModel(name, path, transformer.float(), index["prediction_type"], index.get("encoders", {}).get("clip"))


def _load_checkpoint(path: Path, name: str) -> InitModel:
    checkpoint = open_checkpoint(path)
    description, tensors = checkpoint.record["model"], checkpoint.tensors()
    if "lora" in description:
        raise ValueError("it is of a training of adapters, which holds no whole model")
    transformer = DiT(**description["transformer"])
    transformer.load_state_dict({key: tensors[f"ema.{key}"] for key in transformer.state_dict()})
    index, kinds = description["index"], ("step", *MOMENTS)
    moments = {
        key: {kind: tensors[f"{kind}.{key}"] for kind in kinds}
        for key, _ in transformer.named_parameters()
        if f"{MOMENTS[0]}.{key}" in tensors
    }
    return InitModel(name, path, transformer, index["prediction_type"], index["encoders"]["clip"], moments)
