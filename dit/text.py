"""What of a prompt the text encoder does not take in: what is too long for it, and what it has no word for."""

from __future__ import annotations

from transformers import CLIPTokenizer


def unread(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """The end of `prompt` that does not fit into the tokenizer's length, 77 tokens; "" where all of it does."""
    ids = tokenizer(prompt, verbose=False).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()
