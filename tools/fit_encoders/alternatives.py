"""Descriptions that differ in one attribute: what a text encoder must be able to tell apart."""

from __future__ import annotations

from dataclasses import replace

from dit.shapes.scene import BACKGROUNDS, COLOURS, OPPOSITE, RELATIONS, SHAPES, UNSEEN_PAIRS, Description


def alternatives(description: Description) -> dict[str, list[Description]]:
    """Return every description that differs from `description` in one attribute, by attribute.

    Only what the description states is changed, so each reads differently. Pairs that training never shows are left
    out, and so is naming the same object twice.
    """
    found: dict[str, list[Description]] = {}
    taken = {named.pair for named in description.objects} | UNSEEN_PAIRS
    for k, named in enumerate(description.objects):
        changed = [("colour", replace(named, colour=colour)) for colour in COLOURS]
        changed += [("shape", replace(named, shape=shape)) for shape in SHAPES]
        changed = [(attribute, other) for attribute, other in changed if other.pair not in taken]
        if named.size:
            changed.append(("size", replace(named, size="small" if named.size == "large" else "large")))
        for attribute, other in changed:
            objects = (*description.objects[:k], other, *description.objects[k + 1 :])
            found.setdefault(attribute, []).append(replace(description, objects=objects))
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
