"""Captions of scenes in plain English: `describe` writes one, `parse` reads back what one claims."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from dit.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Description, Object

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "", "", "there is ", "a picture of ", "a drawing of ")
BACKGROUND_PHRASES = ("on a {} background", "against a {} background", "on {}")
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_RELATION_OF = {phrase: relation for relation, phrases in RELATION_PHRASES.items() for phrase in phrases}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_OBJECT = re.compile(rf"\ban? (?:({_any(_SIZE_OF)}) )?({_any(COLOURS)}) ({_any(SHAPES)})\b")
_RELATION = re.compile(rf"({_any(_RELATION_OF)})")
_BACKGROUND = re.compile(rf"\b(?:on|against) (?:an? )?({_any(BACKGROUNDS)})(?: background)?$")


def describe(description: Description, rng: np.random.Generator) -> str:
    """Put `description` into words; `rng` chooses among synonyms only, so the meaning does not depend on it."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    size_words = {size: pick(words) for size, words in SIZE_WORDS.items()}
    if len(description.objects) < 3:
        opening = pick(OPENINGS)
        relation_words = {relation: pick(phrases) for relation, phrases in RELATION_PHRASES.items()}
        background_phrase = pick(BACKGROUND_PHRASES)
    else:  # brief, so that no caption is much longer than the others: every batch is padded to the longest
        opening = ""
        relation_words = {relation: phrases[-1] for relation, phrases in RELATION_PHRASES.items()}
        background_phrase = BACKGROUND_PHRASES[-1]

    names = [_name(named, size_words) for named in description.objects]
    relations = {(i, j): relation for i, relation, j in description.relations}
    text = names[0]
    if len(names) > 1:
        if (0, 1) in relations:
            text += f" {relation_words[relations[0, 1]]} {names[1]}"
            if len(names) == 3:
                text += f", both {relation_words[relations[0, 2]]} {names[2]}" if (0, 2) in relations else f", and {names[2]}"
        else:
            text = ", ".join(names[:-1]) + f" and {names[-1]}"
    if description.background:
        text += " " + background_phrase.format(description.background)
    return opening + text


def _name(named: Object, size_words: dict[str, str]) -> str:
    words = [size_words[named.size]] if named.size else []
    words += [named.colour, named.shape]
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def parse(caption: str) -> Description | None:
    """Return what `caption` claims, None if it names no coloured shape of ours; the inverse of `describe`."""
    caption = " ".join(caption.lower().split()).rstrip(".")
    matches = list(_OBJECT.finditer(caption))
    if not matches:
        return None
    objects = tuple(Object(m[2], m[3], _SIZE_OF.get(m[1])) for m in matches)
    relations: list[tuple[int, str, int]] = []
    for k in range(1, len(matches)):
        between = caption[matches[k - 1].end() : matches[k].start()]
        phrase = _RELATION.search(between)
        if phrase:
            relation = _RELATION_OF[phrase[1]]
            if "both" in between:
                relations += [(i, relation, k) for i in range(k)]
            else:
                relations.append((k - 1, relation, k))
    background = _BACKGROUND.search(caption)
    return Description(objects, tuple(relations), background[1] if background else None)
