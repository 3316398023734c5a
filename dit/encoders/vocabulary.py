"""What a text encoder does not read of a text: what is beyond its length, and words that it does not know."""

from __future__ import annotations

from collections import Counter

from transformers import CLIPTokenizer

# A vocabulary as small as that of the bundled CLIP (644 entries) has a token for each word that it was fitted on, and spells
# the others. OpenAI's has 49,408 entries, and composes other words from pieces that it knows.
LARGE_VOCABULARY = 10_000


def truncated_text(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """Return the end of `prompt` that does not fit into the tokenizer's length, 77 tokens; "" where all of it does."""
    ids = tokenizer(prompt, verbose=False).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()


def unknown_words(tokenizer: CLIPTokenizer, prompt: str, long_captions: str = "cut") -> list[str]:
    """Return the words of `prompt` that a small text encoder has never seen; none where its vocabulary is large.

    They are those that take several tokens, among those that are read: with "cut", within the tokenizer's length.
    """
    if len(tokenizer) > LARGE_VOCABULARY:
        return []
    is_cut = long_captions == "cut"
    encoded = tokenizer(prompt, truncation=is_cut, max_length=tokenizer.model_max_length if is_cut else None, verbose=False)
    tokens_of = Counter(word for word in encoded.word_ids() if word is not None)
    spans = [encoded.word_to_chars(word) for word, tokens in tokens_of.items() if tokens > 1]
    return list(dict.fromkeys(prompt[span.start : span.end].lower() for span in spans))
