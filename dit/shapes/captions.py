"""Captions of scenes in plain English: `describe` writes one, `parse` reads back what one claims."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from dit.shapes.scene import BACKGROUNDS, BETWEEN, COLOURS, CORNERS, SHAPES, Description, Object, Relation

SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_PHRASES = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CORNER_PHRASES = ("in the {} corner", "at the {}")
OPENINGS = ("", "", "", "there is ", "a picture of ", "a drawing of ")
BACKGROUND_PHRASES = ("on a {} background", "against a {} background", "on {}")
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_RELATION_OF = {phrase: relation for relation, phrases in RELATION_PHRASES.items() for phrase in phrases}


def _any(words: Iterable[str]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_OBJECT = re.compile(rf"\ban? (?:({_any(_SIZE_OF)}) )?({_any(COLOURS)}) ({_any(SHAPES)})\b")
_RELATION = re.compile(rf"({_any(_RELATION_OF)})")
_CORNER = re.compile(rf"(?:in|at) the ({_any(CORNERS)})\b")
_BACKGROUND = re.compile(rf"\b(?:on|against) (?:an? )?({_any(BACKGROUNDS)})(?: background)?$")


def describe(description: Description, rng: np.random.Generator) -> str:
    """Put `description` into words; `rng` chooses among synonyms only, so the meaning does not depend on it."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    size_words = {size: pick(words) for size, words in SIZE_WORDS.items()}
    relation_words = {relation: pick(phrases) for relation, phrases in RELATION_PHRASES.items()}
    corner_phrase, opening, background_phrase = pick(CORNER_PHRASES), pick(OPENINGS), pick(BACKGROUND_PHRASES)
    # Three or four are named briefly, so that no caption is much longer than the others: every batch is padded to the longest.
    if len(description.objects) > 2:
        relation_words = {relation: phrases[-1] for relation, phrases in RELATION_PHRASES.items()}
        opening, background_phrase = "", BACKGROUND_PHRASES[-1]

    names = [_name(named, size_words) for named in description.objects]
    text, told = names[0], 1
    for relation in description.relations[:1]:
        if relation.name in CORNERS:
            text += " " + corner_phrase.format(relation.name)
        elif relation.name == BETWEEN:
            text, told = f"{text} between {names[1]} and {names[2]}", 3
        else:
            text, told = f"{text} {relation_words[relation.name]} {names[1]}", 2
    for relation in description.relations[1:2]:  # of the first two to the third
        text, told = f"{text}, both {relation_words[relation.name]} {names[2]}", 3
    others = names[told:]
    if others:
        joint = ", and " if told > 1 and len(others) == 1 else " and "
        text = ", ".join([text, *others[:-1]]) + joint + others[-1]
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
    relations: list[Relation] = []
    for k, match in enumerate(matches):
        after = caption[match.end() : matches[k + 1].start() if k + 1 < len(matches) else None]
        phrase = _RELATION.search(after)
        if corner := _CORNER.search(after):
            relations.append(Relation(k, corner[1]))
        elif " between " in after and k + 2 < len(matches):
            relations.append(Relation(k, BETWEEN, (k + 1, k + 2)))
        elif phrase and k + 1 < len(matches):
            subjects = range(k + 1) if "both" in after else [k]
            relations += [Relation(subject, _RELATION_OF[phrase[1]], (k + 1,)) for subject in subjects]
    background = _BACKGROUND.search(caption)
    return Description(objects, tuple(relations), background[1] if background else None)
