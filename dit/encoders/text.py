"""CLIP's text side, as the latent cache and the pipeline use it."""

from __future__ import annotations

import torch

from dit.encoders import EncoderSource, load_text_encoder


class TextEncoder:
    """CLIP's text side: captions to ragged rows of last hidden states, and a projected pooled vector each."""

    def __init__(self, source: EncoderSource, dtype: torch.dtype, device: torch.device):
        self.model, self.tokenizer, self.source = load_text_encoder(source, dtype, device)
        self.longest = self.model.config.max_position_embeddings

    def count_tokens(self, captions: list[str]) -> list[int]:
        """How many tokens `encode` will make of each caption."""
        return [len(row) for row in self.tokenizer(captions, truncation=True, max_length=self.longest).input_ids]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Of each caption its tokens (L, E) up to end-of-text, and the pooled vectors (N, P); fp16 on the CPU.

        Longer captions are cut at the model's 77 tokens, as CLIP itself does. Every caption is padded to that length
        while it is encoded, so that its numbers do not depend on its neighbours.
        """
        inputs = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt")
        lengths = inputs.attention_mask.sum(1).tolist()
        out = self.model(input_ids=inputs.input_ids.to(self.model.device))
        hidden, pooled = out.last_hidden_state.half().cpu(), out.text_embeds.half().cpu()
        return [row[:count] for row, count in zip(hidden, lengths, strict=True)], pooled
