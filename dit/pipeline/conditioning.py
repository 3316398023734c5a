"""The texts of a call: prompts or their embeddings, encoded once, and kept as keys and values of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dit.errors import UserError
from dit.model.transformer import DiT

PARTS = {"prompt_embeds": "tokens", "pooled_prompt_embeds": "pooled", "prompt_attention_mask": "mask"}


class PromptEmbeds(NamedTuple):
    """Embeddings of N prompts: each field is an argument of the pipeline's call, in the order of SD3's `encode_prompt`.

    Attributes:
        prompt_embeds: tokens (N, L, E).
        negative_prompt_embeds: tokens (N, L, E), or (1, L, E) for all; None without guidance, as the other negative ones.
        pooled_prompt_embeds: (N, P).
        negative_pooled_prompt_embeds: (N, P) or (1, P).
        prompt_attention_mask: (N, L), True or 1 where a token is.
        negative_prompt_attention_mask: (N, L) or (1, L).
    """

    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    negative_prompt_attention_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class Embeds:
    """Embeddings of M texts as the transformer takes them: tokens (M, L, E), mask (M, L) bool, pooled (M, P)."""

    tokens: torch.Tensor
    mask: torch.Tensor
    pooled: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Any) -> Embeds:
        return Embeds(self.tokens[rows], self.mask[rows], self.pooled[rows])

    def to(self, device: torch.device) -> Embeds:
        """Return the same on `device`."""
        return Embeds(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))

    @classmethod
    def concatenate(cls, parts: list[Embeds]) -> Embeds:
        """Return the texts of all `parts`, padded to the longest; a single part as it is."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.tokens.shape[1] for part in parts)
        missing = [longest - part.tokens.shape[1] for part in parts]
        return cls(
            torch.cat([F.pad(part.tokens, (0, 0, 0, more)) for part, more in zip(parts, missing, strict=True)]),
            torch.cat([F.pad(part.mask, (0, more)) for part, more in zip(parts, missing, strict=True)]),
            torch.cat([part.pooled for part in parts]),
        )


Side = list[str] | Embeds  # what the images should show, or should not


def read_texts(prompt: Any, negative_prompt: Any, given: PromptEmbeds, transformer: DiT) -> tuple[Side, Side]:
    """Return the prompts, and one negative prompt for all or one for each; by default it is the empty caption.

    Args:
        prompt: a text or several, None where `given` has embeddings instead; `negative_prompt` likewise.
        negative_prompt: a text for all, or one for each prompt.
        given: embeddings that a call got.
        transformer: that takes them.

    Raises:
        UserError: texts and embeddings are both there, or neither; or they are of no fitting number, type or shape.
    """
    prompts, negatives = (_read_embeds(prefix, given, transformer) for prefix in ("", "negative_"))
    for name, texts, embeds in (("prompt", prompt, prompts), ("negative_prompt", negative_prompt, negatives)):
        if texts is not None and embeds is not None:
            raise UserError(f"{name}, {name}_embeds: both are given; one of them would be right")
    positive: Side = _as_list(prompt) if prompts is None else prompts
    negative: Side = _as_list(negative_prompt or "") if negatives is None else negatives
    texts = [text for side in (positive, negative) if isinstance(side, list) for text in side]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("prompt, negative_prompt: texts, or lists of texts, would be right")
    if not len(positive):
        raise UserError("prompt: at least one is needed, or prompt_embeds")
    one_for_all = len(negative) == 1 and not isinstance(negative_prompt, (list, tuple))
    if not one_for_all and len(negative) != len(positive):
        name = "negative_prompt" if negatives is None else "negative_prompt_embeds"
        raise UserError(f"{name}: one for all, or one for each of {len(positive)} prompts")
    return positive, negative


def _as_list(texts: Any) -> list[str]:
    return list(texts) if isinstance(texts, (list, tuple)) else [] if texts is None else [texts]


def _read_embeds(prefix: str, given: PromptEmbeds, transformer: DiT) -> Embeds | None:
    """Return the embeddings of prompts (`prefix` "") or of negative ones ("negative_"); None where none are given."""
    tensors = {prefix + name: getattr(given, prefix + name) for name in PARTS}
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if len(missing) == len(tensors):
        return None
    if missing:
        raise UserError(f"{missing[0]}: needed, too, where one of {', '.join(tensors)} is given; encode_prompt returns all three")
    tokens, pooled, mask = tensors.values()
    config = transformer.config
    count, length = tokens.shape[:2] if isinstance(tokens, torch.Tensor) and tokens.ndim == 3 else (0, 0)
    shapes = [(count, length, config.cross_attention_dim), (count, config.pooled_projection_dim), (count, length)]
    for (name, tensor), shape, letters in zip(tensors.items(), shapes, ("N, L, {}", "N, {}", "N, L"), strict=True):
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape or not tensor.numel():
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"{name}: {found}; a tensor ({letters.format(shape[-1])}) as encode_prompt returns it would be right")
    if not mask.bool().any(1).all():
        raise UserError(f"{prefix}prompt_attention_mask: True nowhere in a row; each prompt has at least one token")
    return Embeds(tokens, mask.bool(), pooled)


def encode_sides(
    embed: Callable[[list[str]], Embeds], sides: Iterable[Side], device: torch.device
) -> tuple[Embeds, list[list[int]]]:
    """Encode the texts of `sides` with `embed`, each different one once, all in one batch; bring all to `device`.

    Returns:
        The embeddings, those that `sides` already hold among them; and for each side, which row of them each of its texts is.
    """
    sides = list(sides)
    numbers: dict[str, int] = {}
    for text in (text for side in sides if isinstance(side, list) for text in side):
        numbers.setdefault(text, len(numbers))
    parts = [embed(list(numbers)).to(device)] if numbers else []
    rows, count = [], len(numbers)
    for side in sides:
        if isinstance(side, list):
            rows.append([numbers[text] for text in side])
        else:
            parts.append(side.to(device))
            rows.append(list(range(count, count + len(side))))
            count += len(side)
    return Embeds.concatenate(parts), rows


class Conditioning:
    """What the steps of a call look at: the texts of N images and, with guidance, negative ones after them.

    Args:
        transformer: makes keys and values, once for each different text.
        texts: the different texts.
        rows: which of them each image has: N, or 2 N with guidance.
        count: N.
    """

    def __init__(self, transformer: DiT, texts: Embeds, rows: list[int], count: int):
        self._transformer, self._count = transformer, count
        self._set(texts, torch.tensor(rows, device=texts.tokens.device))

    def _set(self, texts: Embeds, rows: torch.Tensor) -> None:
        self._texts, self._rows = texts, rows
        onload(self._transformer)
        self._keys_values = [(k[rows], v[rows]) for k, v in self._transformer.text_keys_values(texts.tokens)]
        self._mask, self._pooled = texts.mask[rows], texts.pooled[rows]

    def predict(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the transformer's output (n, C, h, w) for `latents` at `sigma` in [0, 1]; n is N or 2 N, the negative last."""
        n = len(latents)
        keys_values = [(k[:n], v[:n]) for k, v in self._keys_values]
        return self._transformer(latents, sigma.expand(n), None, self._mask[:n], self._pooled[:n], keys_values)

    def tensor(self, name: str) -> torch.Tensor | None:
        """Return the field `name` of `PromptEmbeds`, a row for each of N images; None of negative ones without guidance."""
        rows = self._rows[self._half(name)]
        return getattr(self._texts, PARTS[name.removeprefix("negative_")])[rows] if len(rows) else None

    def replace(self, tensors: dict[str, Any]) -> None:
        """Use `tensors`, by the names of `PromptEmbeds`, from now on; others among them are left alone.

        Raises:
            UserError: one is of another shape than what it replaces.
        """
        changed = {}
        for name in PromptEmbeds._fields:
            new, old = tensors.get(name), self.tensor(name)
            if new is None or (old is not None and old.shape == new.shape and torch.equal(old, new)):
                continue
            if old is None or old.shape != new.shape:
                needed = "nothing, since this call is without guidance," if old is None else tuple(old.shape)
                raise UserError(f"callback_on_step_end: it returned {name} of {tuple(new.shape)}; {needed} would be right")
            changed[name] = new
        if not changed:
            return
        texts = self._texts[self._rows]  # of every image its own
        for name, new in changed.items():
            getattr(texts, PARTS[name.removeprefix("negative_")])[self._half(name)] = new
        self._set(texts, torch.arange(len(texts), device=self._rows.device))

    def _half(self, name: str) -> slice:
        return slice(self._count, None) if name.startswith("negative_") else slice(self._count)


def onload(module: torch.nn.Module) -> None:
    """Bring a module to the GPU that `enable_model_cpu_offload` keeps on the CPU: its hook sees calls of `forward` alone."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
