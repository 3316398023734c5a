"""Does an image show the objects that its prompt names? By the rules of GenEval (Ghosh et al. 2023, arXiv:2310.11513).

Prompts are lines of JSON, as GenEval's evaluation_metadata.jsonl has them (one line each; broken here):

    {"tag": "position", "prompt": "a photo of a dog right of a tree",
     "include": [{"class": "tree", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}]}

`count` is how many there are at least, `color` one of `COLOURS`, `position` where an object is, seen from that of an earlier
entry of `include`, by its number. `exclude` has the same keys: so many of a class, or more, are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from dit.errors import UserError

DEAD_ZONE = (
    0.1  # of the widths (heights) of two objects together: centres that are nearer are neither left nor right (above, below)
)
LEAST_SHARE = 0.5  # of the way between two centres that has to go in a direction: up to 60 degrees off

Colour = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
COLOURS: tuple[str, ...] = get_args(Colour)
Direction = Literal["left of", "right of", "above", "below"]
Name = Annotated[str, Field(min_length=1)]
Class = Annotated[str, Field(min_length=1, alias="class")]
Count = Annotated[int, Field(ge=1)]
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Unwanted:
    """So many objects of a class, or more, are wrong."""

    name: Class
    count: Count


@dataclass(frozen=True, config=STRICT)
class Wanted:
    """How many objects of a class there are at least, in which colour, and where, seen from those of an earlier entry."""

    name: Class
    count: Count
    color: Colour | None = None
    position: tuple[Direction, Annotated[int, Field(ge=0)]] | None = None


@dataclass(frozen=True, config=STRICT)
class ObjectPrompt:
    """A prompt, the group that it is counted in, and what has to be in its image and what must not."""

    tag: Name
    prompt: Name
    include: Annotated[tuple[Wanted, ...], Field(min_length=1)]
    exclude: tuple[Unwanted, ...] = ()


class Box(NamedTuple):
    """Where an object is, in pixels, and how sure the detector is of it, in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float
    score: float


def parse_object_prompts(lines: Sequence[str], shown: str) -> list[ObjectPrompt]:
    """Read a prompt from each of `lines` that is not blank; errors call the file that they are of `shown`.

    Raises:
        UserError: there is none, or a line is not as the head of this module says.
    """
    adapter, prompts = TypeAdapter(ObjectPrompt), []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = adapter.validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            what = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
            raise UserError(f"{shown}, line {number}: {what}; docs/evaluation.md has the format") from None
        for k, wanted in enumerate(prompt.include):
            if wanted.position and wanted.position[1] >= k:
                raise UserError(f"{shown}, line {number}: include.{k}.position: {wanted.position[1]} is not an earlier entry")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{shown}: there is no prompt in it; docs/evaluation.md has the format")
    return prompts


def object_names(prompt: ObjectPrompt) -> list[str]:
    """Return the classes that a detector has to look for, each once."""
    return list(dict.fromkeys([wanted.name for wanted in prompt.include] + [unwanted.name for unwanted in prompt.exclude]))


def find_problem(
    prompt: ObjectPrompt, boxes: Mapping[str, Sequence[Box]], colours_of: Callable[[str, Sequence[Box]], Sequence[str]]
) -> str:
    """Return the first thing that is wrong with an image, in a few words; "" where everything is as `prompt` says.

    Of each class as many objects count as are wanted, those of the highest scores.

    Args:
        prompt: what it should show.
        boxes: what a detector has found, of each class the surest first.
        colours_of: is called with a class and its objects that count, where a colour is wanted; returns the colour of each.
    """
    counted: list[Sequence[Box]] = []
    for wanted in prompt.include:
        found = boxes.get(wanted.name, [])[: wanted.count]
        counted.append(found)
        if len(found) < wanted.count:
            return f"{len(found)} instead of {wanted.count} {wanted.name}"
        if wanted.color:
            seen = colours_of(wanted.name, found)
            if any(colour != wanted.color for colour in seen):
                return f"{wanted.name} is {' and '.join(dict.fromkeys(seen))}, not {wanted.color}"
        if wanted.position:
            direction, other = wanted.position
            if not all(direction in directions(box, seen_from) for box in found for seen_from in counted[other]):
                return f"{wanted.name} not {direction} {prompt.include[other].name}"
    for unwanted in prompt.exclude:
        if len(boxes.get(unwanted.name, [])) >= unwanted.count:
            return f"{len(boxes[unwanted.name])} {unwanted.name}"
    return ""


def directions(box: Box, seen_from: Box) -> set[str]:
    """Return where `box` is, seen from another: none, one or two of the directions; none where they nearly share a centre."""
    across = (box.left + box.right - seen_from.left - seen_from.right) / 2
    down = (box.top + box.bottom - seen_from.top - seen_from.bottom) / 2
    distance = (across**2 + down**2) ** 0.5
    widths = box.right - box.left + seen_from.right - seen_from.left
    heights = box.bottom - box.top + seen_from.bottom - seen_from.top
    ways = {
        "left of": -across - DEAD_ZONE * widths,
        "right of": across - DEAD_ZONE * widths,
        "above": -down - DEAD_ZONE * heights,
        "below": down - DEAD_ZONE * heights,
    }
    return {name for name, way in ways.items() if way > LEAST_SHARE * distance > 0}


def without_repeats(boxes: Sequence[Box], overlap: float) -> list[Box]:
    """Return `boxes`, the surest first, without those that share more than `overlap` of their union with a surer one."""
    kept: list[Box] = []
    for box in sorted(boxes, key=lambda box: -box.score):
        if all(intersection_over_union(box, other) <= overlap for other in kept):
            kept.append(box)
    return kept


def intersection_over_union(box: Box, other: Box) -> float:
    """Return what two boxes share, as a part of what they cover together, in [0, 1]."""
    width = min(box.right, other.right) - max(box.left, other.left)
    height = min(box.bottom, other.bottom) - max(box.top, other.top)
    shared = max(width, 0) * max(height, 0)
    both = sum((each.right - each.left) * (each.bottom - each.top) for each in (box, other)) - shared
    return shared / both if both > 0 else 0.0
