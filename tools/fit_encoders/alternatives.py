"""Descriptions that differ in one attribute: what a text encoder must be able to tell apart."""

from __future__ import annotations

from dataclasses import replace

from dit.shapes.scene import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, UNSEEN_PAIRS, Description


def alternatives(description: Description) -> dict[str, list[Description]]:
    """Every description that differs from `description` in one attribute, listed by attribute.

    Only what the description states is changed, so each reads differently. Pairs that training never shows are left
    out, and so is naming the same thing twice.
    """
    found: dict[str, list[Description]] = {}
    taken = {thing.pair for thing in description.things} | UNSEEN_PAIRS
    for k, thing in enumerate(description.things):
        changed = [("colour", replace(thing, colour=colour)) for colour in COLOURS]
        changed += [("shape", replace(thing, shape=shape)) for shape in SHAPES]
        changed = [(attribute, other) for attribute, other in changed if other.pair not in taken]
        if thing.size:
            changed.append(("size", replace(thing, size="small" if thing.size == "large" else "large")))
        for attribute, other in changed:
            things = (*description.things[:k], other, *description.things[k + 1 :])
            found.setdefault(attribute, []).append(replace(description, things=things))
    if description.relations:
        first, *both = description.relations
        along = (first[1], OPPOSITE[first[1]])
        names = [name for name in (along if both else RELATIONS) if name != first[1]]
        found["relation"] = [replace(description, relations=((0, name, 1), *both)) for name in names]
        if both:
            turned = tuple((i, OPPOSITE[name], j) for i, name, j in both)
            found["relation"].append(replace(description, relations=(first, *turned)))
    if description.background:
        names = [name for name in BACKGROUNDS if name != description.background]
        found["background"] = [replace(description, background=name) for name in names]
    return found
