"""Prompt accuracy: the share of pictures that show what they were asked for, as a whole and attribute by attribute."""

from __future__ import annotations

from collections.abc import Iterable

from dit.evaluation.intervals import wilson, with_interval
from dit.shapes.scoring import ATTRIBUTES, PromptScore


def accuracy(name: str, judged: list[PromptScore], confidence: float) -> dict[str, float]:
    """The share of pictures with nothing wrong, its Wilson interval, and the number of prompts; nothing where there are none."""
    if not judged:
        return {}
    share = sum(not judgement.problem for judgement in judged) / len(judged)
    return with_interval(name, share, wilson(share, len(judged), confidence)) | {f"{name}_prompts": len(judged)}


def accuracy_by_attribute(judged: Iterable[PromptScore], confidence: float) -> list[dict[str, str | float]]:
    """A row for each attribute that any prompt states: `attribute`, `accuracy`, `low`, `high`, `count`.

    `accuracy` is the share that is right of all `count` colours, shapes, sizes, relations or numbers of things. The things
    of one picture may well be right or wrong together, so the interval is Wilson's of as many trials as there are pictures
    that state the attribute: rather too wide than too narrow.
    """
    rows = []
    for name in ATTRIBUTES:
        pairs = [judgement.attributes[name] for judgement in judged if name in judgement.attributes]
        if pairs:
            right, stated = map(sum, zip(*pairs, strict=True))
            rows.append({"attribute": name} | _share(right / stated, len(pairs), confidence) | {"count": stated})
    return rows


def accuracy_by_number(groups: dict[str, list[PromptScore]], confidence: float) -> list[dict[str, str | float]]:
    """A row for each group of prompts and number of things in a caption: `group`, `things`, `accuracy`, `low`, `high`, `count`.

    `accuracy` is the share of the `count` pictures with nothing wrong; `low` and `high` are the ends of Wilson's interval.
    """
    rows = []
    for group, judged in groups.items():
        for things in sorted({judgement.num_objects for judgement in judged}):
            right = [not judgement.problem for judgement in judged if judgement.num_objects == things]
            share = _share(sum(right) / len(right), len(right), confidence)
            rows.append({"group": group, "things": things} | share | {"count": len(right)})
    return rows


def _share(share: float, trials: int, confidence: float) -> dict[str, float]:
    low, high = wilson(share, trials, confidence)
    return {key: round(value, 4) for key, value in {"accuracy": share, "low": low, "high": high}.items()}
