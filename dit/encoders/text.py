"""Captions to text embeddings with CLIP's text side, the same for the latent cache and for the pipeline."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dit.encoders.loading import EncoderSource, load_text_encoder

LongCaptions = Literal["cut", "chunks"]
PADDED_TO = 16  # tokens: to a multiple of it each chunk is padded; 77, which most captions do not need, takes twice the time


@torch.no_grad()
def embed_captions(
    text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: list[str], long_captions: LongCaptions = "cut"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embed captions: of each the last hidden states (L, E) up to end-of-text, and the projected pooled vectors (N, P).

    A caption longer than the model's 77 tokens is cut, as CLIP itself does; or it is embedded in chunks, as in most programs for
    Stable Diffusion: each of 75 tokens between a start and an end of its own, their states one after the other, and the pooled
    vector of the first. Shorter captions have the same numbers either way.

    How far a chunk is padded while it is encoded depends on its own length alone, so that its numbers do not depend on its
    neighbours. Dtype and device are the model's.
    """
    length = text_encoder.config.max_position_embeddings
    chunks = [_split(ids, length, long_captions) for ids in tokenizer(captions, verbose=False).input_ids]
    flat = [chunk for of_caption in chunks for chunk in of_caption]
    padded_lengths = [min(math.ceil(len(chunk) / PADDED_TO) * PADDED_TO, length) for chunk in flat]
    states, pooled = [torch.empty(0)] * len(flat), [torch.empty(0)] * len(flat)
    for padded_length in sorted(set(padded_lengths)):
        rows = [row for row, own in enumerate(padded_lengths) if own == padded_length]
        group = {"input_ids": [flat[row] for row in rows]}
        inputs = tokenizer.pad(group, padding="max_length", max_length=padded_length, return_tensors="pt")
        out = text_encoder(input_ids=inputs.input_ids.to(text_encoder.device))
        for row, of_row, vector in zip(rows, out.last_hidden_state, out.text_embeds, strict=True):
            states[row], pooled[row] = of_row[: len(flat[row])], vector
    firsts = [0, *accumulate(map(len, chunks))][:-1]
    of_captions = [torch.cat(states[first : first + len(chunk)]) for first, chunk in zip(firsts, chunks, strict=True)]
    return of_captions, torch.stack([pooled[first] for first in firsts])


def _split(ids: list[int], length: int, long_captions: LongCaptions) -> list[list[int]]:
    """Return the tokens of a caption, start and end included, as chunks of at most `length` with a start and an end each."""
    start, words, end = ids[:1], ids[1:-1], ids[-1:]
    parts = [words[k : k + length - 2] for k in range(0, len(words), length - 2)] or [[]]
    return [start + part + end for part in (parts if long_captions == "chunks" else parts[:1])]


def pad_tokens(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of tokens (L_i, E) with zeros to (N, L, E); also return the mask (N, L), True where a token is."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = pad_sequence(rows, batch_first=True)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]


class TextEncoder:
    """A CLIP text encoder and its tokenizer, as the encode stage uses them; `longest` is the number of tokens that it reads."""

    def __init__(self, source: EncoderSource, dtype: torch.dtype, device: torch.device, long_captions: LongCaptions = "cut"):
        self.model, self.tokenizer, self.source = load_text_encoder(source, dtype, device)
        self.longest, self.long_captions = self.model.config.max_position_embeddings, long_captions

    def count_tokens(self, captions: list[str]) -> tuple[list[int], list[int]]:
        """Count the tokens of each caption: all that it has, and those that `encode` returns."""
        ids = self.tokenizer(captions, verbose=False).input_ids
        return [len(row) for row in ids], [sum(map(len, _split(row, self.longest, self.long_captions))) for row in ids]

    def encode(self, captions: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Embed captions as `embed_captions` does; fp16 on the CPU."""
        rows, pooled = embed_captions(self.model, self.tokenizer, captions, self.long_captions)
        return [row.half().cpu() for row in rows], pooled.half().cpu()
