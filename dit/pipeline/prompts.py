"""What the text encoder does not read of a prompt: what is beyond its length, and words that it does not know."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches

from transformers import CLIPTokenizer

# A vocabulary as small as that of the bundled CLIP (644 entries) has a token for each word that it was fitted on, and spells
# the others. OpenAI's has 49,408 entries, and composes other words from pieces that it knows.
LARGE_VOCABULARY = 10_000
END = "</w>"  # of a token that ends a word


def truncated_text(tokenizer: CLIPTokenizer, prompt: str) -> str:
    """Return the end of `prompt` that does not fit into the tokenizer's length, 77 tokens; "" where all of it does."""
    ids = tokenizer(prompt, verbose=False).input_ids
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip()


def unknown_words(tokenizer: CLIPTokenizer, prompt: str) -> list[str]:
    """Return the words of `prompt` that a small text encoder has never seen; none where its vocabulary is large.

    They are those that take several tokens.
    """
    if len(tokenizer) > LARGE_VOCABULARY:
        return []
    encoded = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length)
    tokens_of = Counter(word for word in encoded.word_ids() if word is not None)
    spans = [encoded.word_to_chars(word) for word, tokens in tokens_of.items() if tokens > 1]
    return list(dict.fromkeys(prompt[span.start : span.end].lower() for span in spans))


def prompt_warnings(tokenizer: CLIPTokenizer, prompt: str) -> list[str]:
    """Return a line for each part of `prompt` that the image will not show."""
    rest, unknown = truncated_text(tokenizer, prompt), unknown_words(tokenizer, prompt)
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
