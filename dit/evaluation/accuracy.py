"""Prompt accuracy: the share of images that show what they were asked for, as a whole and attribute by attribute."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dit.evaluation.intervals import wilson, with_interval
from dit.shapes.scoring import ATTRIBUTES, PromptScore


def accuracy(name: str, scores: list[PromptScore], confidence: float) -> dict[str, float]:
    """Return the share of images with nothing wrong, its Wilson interval, and the number of prompts; nothing of none."""
    if not scores:
        return {}
    share = sum(not score.problem for score in scores) / len(scores)
    return with_interval(name, share, wilson(share, len(scores), confidence)) | {f"{name}_prompts": len(scores)}


def accuracy_by_attribute(scores: Iterable[PromptScore], confidence: float) -> list[dict[str, Any]]:
    """Return a row for each attribute that any prompt states: `attribute`, `accuracy`, `low`, `high`, `count`.

    `accuracy` is the share that is right of all `count` colours, shapes, sizes, relations or numbers of things. The things
    of one image may well be right or wrong together, so the interval is Wilson's of as many trials as there are images
    that state the attribute: rather too wide than too narrow.
    """
    rows: list[dict[str, Any]] = []
    for name in ATTRIBUTES:
        pairs = [score.attributes[name] for score in scores if name in score.attributes]
        if pairs:
            right, stated = map(sum, zip(*pairs, strict=True))
            rows.append({"attribute": name} | _share(right / stated, len(pairs), confidence) | {"count": stated})
    return rows


def accuracy_by_number(groups: dict[str, list[PromptScore]], confidence: float) -> list[dict[str, Any]]:
    """Return a row for each group of prompts and number of objects in a caption.

    Its keys are `group`, `things` (that number), `accuracy`, `low`, `high` and `count`. `accuracy` is the share of the `count`
    images with nothing wrong; `low` and `high` are the ends of Wilson's interval.
    """
    rows = []
    for group, scores in groups.items():
        for number in sorted({score.num_objects for score in scores}):
            right = [not score.problem for score in scores if score.num_objects == number]
            share = _share(sum(right) / len(right), len(right), confidence)
            rows.append({"group": group, "things": number} | share | {"count": len(right)})
    return rows


def _share(share: float, trials: int, confidence: float) -> dict[str, float]:
    low, high = wilson(share, trials, confidence)
    return {key: round(value, 4) for key, value in {"accuracy": share, "low": low, "high": high}.items()}
