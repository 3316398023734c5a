"""Descriptions that differ in one attribute: what a text encoder must be able to tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dit.shapes.scene import BACKGROUNDS, COLOURS, CORNERS, DIRECTIONS, OPPOSITE, SHAPES, UNSEEN_PAIRS, Description, Relation


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
    changed_relations = list(_other_relations(description.relations))
    if changed_relations:
        found["relation"] = [replace(description, relations=relations) for relations in changed_relations]
    if description.background:
        names = [name for name in BACKGROUNDS if name != description.background]
        found["background"] = [replace(description, background=name) for name in names]
    return found


def _other_relations(relations: Sequence[Relation]) -> Iterator[tuple[Relation, ...]]:
    """Yield what else may be stated of the same objects, in captions of the same form."""
    if not relations:
        return
    first, *both = relations
    if both:
        yield (first._replace(name=OPPOSITE[first.name]), *both)
        yield (first, *(relation._replace(name=OPPOSITE[relation.name]) for relation in both))
    else:
        family = next((names for names in (CORNERS, DIRECTIONS) if first.name in names), {})
        yield from ((first._replace(name=name),) for name in family if name != first.name)
