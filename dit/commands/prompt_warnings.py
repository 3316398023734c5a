"""Warnings of what the text encoder does not read of a prompt."""

from __future__ import annotations

from difflib import get_close_matches

from transformers import CLIPTokenizer

from dit.encoders.text import LongCaptions
from dit.encoders.vocabulary import truncated_text, unknown_words

END = "</w>"  # of a token that ends a word


def prompt_warnings(tokenizer: CLIPTokenizer, prompt: str, long_captions: LongCaptions = "cut") -> list[str]:
    """Return a line for each part of `prompt` that the image will not show."""
    rest = truncated_text(tokenizer, prompt) if long_captions == "cut" else ""
    unknown = unknown_words(tokenizer, prompt, long_captions)
    lines = []
    if rest:
        lines.append(f"the prompt is longer than {tokenizer.model_max_length} tokens; not read: {rest!r}")
    if unknown:
        words = [token.removesuffix(END) for token in tokenizer.get_vocab() if token.endswith(END)]
        words = [word for word in words if len(word) > 2]
        close = [match for word in unknown for match in get_close_matches(word, words, n=1, cutoff=0.75)]
        hint = f"; it knows {', '.join(map(repr, dict.fromkeys(close)))}" if close else ""
        lines.append(f"the text encoder does not know {', '.join(map(repr, unknown))}, in {shortened(prompt)!r}{hint}")
    return lines


def shortened(prompt: str, most: int = 60) -> str:
    """`prompt` on one line, and no more than about `most` characters of it."""
    line = " ".join(prompt.split())
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"
