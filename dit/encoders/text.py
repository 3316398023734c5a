"""Captions to text embeddings with CLIP's text side, the same for the latent cache and for the pipeline."""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from dit.encoders.loading import EncoderSource, load_text_encoder


@torch.no_grad()
def embed_captions(
    text_encoder: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, captions: list[str]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Embed captions: of each the last hidden states (L, E) up to end-of-text, and the projected pooled vectors (N, P).

    Longer captions are cut at the model's 77 tokens, as CLIP itself does. Every caption is padded to that length while it is
    encoded, so that its numbers do not depend on its neighbours. Dtype and device are the model's.
    """
    length = text_encoder.config.max_position_embeddings
    inputs = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    lengths = inputs.attention_mask.sum(1).tolist()
    out = text_encoder(input_ids=inputs.input_ids.to(text_encoder.device))
    return [row[:count] for row, count in zip(out.last_hidden_state, lengths, strict=True)], out.text_embeds


def pad_tokens(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of tokens (L_i, E) with zeros to (N, L, E); also return the mask (N, L), True where a token is."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = pad_sequence(rows, batch_first=True)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]


class TextEncoder:
    """A CLIP text encoder and its tokenizer, as the encode stage uses them."""

    def __init__(self, source: EncoderSource, dtype: torch.dtype, device: torch.device):
        self.model, self.tokenizer, self.source = load_text_encoder(source, dtype, device)
        self.longest = self.model.config.max_position_embeddings

    def count_tokens(self, captions: list[str]) -> list[int]:
        """Count the tokens of each caption, those beyond `longest`, which `encode` does not read, too."""
        return [len(row) for row in self.tokenizer(captions, verbose=False).input_ids]

    def encode(self, captions: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Embed captions as `embed_captions` does; fp16 on the CPU."""
        rows, pooled = embed_captions(self.model, self.tokenizer, captions)
        return [row.half().cpu() for row in rows], pooled.half().cpu()
