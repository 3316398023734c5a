"""Descriptions that differ in one attribute: what a text encoder must be able to tell apart."""

from __future__ import annotations

from dataclasses import replace

from dit.sources.scene import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, UNSEEN_PAIRS, Description


def alternatives(description: Description) -> list[Description]:
    """Every description that differs from `description` in one colour, shape, size, relation or the background.

    Only what the description states is changed, so each reads differently. Pairs that training never shows are left
    out, and so is naming the same thing twice.
    """
    found = []
    for k, thing in enumerate(description.things):
        others = [replace(thing, colour=colour) for colour in COLOURS if colour != thing.colour]
        others += [replace(thing, shape=shape) for shape in SHAPES if shape != thing.shape]
        taken = {other.pair for other in description.things} | UNSEEN_PAIRS
        changed = [other for other in others if other.pair not in taken]
        if thing.size:
            changed.append(replace(thing, size="small" if thing.size == "large" else "large"))
        found += [replace(description, things=(*description.things[:k], new, *description.things[k + 1 :])) for new in changed]
    relations = description.relations
    if relations:
        first, both = relations[0], relations[1:]
        axis = {first[1], OPPOSITE[first[1]]}
        names = [name for name in RELATIONS if name != first[1] and (not both or name in axis)]
        found += [replace(description, relations=((0, name, 1), *both)) for name in names]
        if both:
            turned = tuple((i, OPPOSITE[name], j) for i, name, j in both)
            found.append(replace(description, relations=(first, *turned)))
    if description.background:
        found += [replace(description, background=name) for name in BACKGROUNDS if name != description.background]
    return found
