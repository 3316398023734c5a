"""Rendered scenes and their captions: each caption is true of its scene, and unseen pairs are never shown."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dit.shapes.captions import describe, parse
from dit.shapes.placement import GAP, MARGIN, position_between, sample_scene
from dit.shapes.prompts import unseen_prompts
from dit.shapes.render import outline, render
from dit.shapes.scene import (
    BACKGROUNDS,
    BETWEEN,
    COLOURS,
    CORNERS,
    DIRECTIONS,
    PAIRS,
    PLAIN,
    RADII,
    SEEN_PAIRS,
    SHAPES,
    TURNED,
    UNSEEN_PAIRS,
    Description,
    Kind,
    Object,
    Relation,
    sample_description,
)
from tools.fit_encoders.alternatives import alternatives

KINDS = [Kind("free", 1), Kind("free", 2), Kind("free", 3), Kind("quarters", 1), Kind("quarters", 2)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.layout}-{kind.level}")


def samples(count: int, kind: Kind) -> Iterator[tuple[Description, np.random.Generator]]:
    for k in range(count):
        rng = np.random.default_rng([555, k])
        yield sample_description(rng, kind), rng


@every_kind
def test_sample_description_is_of_its_level(kind):
    described = [description for description, _ in samples(1000, kind)]
    assert {len(description.objects) for description in described} == set(range(1, kind.level + 2))
    several = [description.objects for description in described if len(description.objects) > 2]
    assert all(len({named.shape for named in objects}) == len(objects) for objects in several)
    stated = {relation.name for description in described for relation in description.relations}
    free = kind.layout == "free"
    expected = set(DIRECTIONS) | (set(CORNERS) if free and kind.level > 1 else set()) | ({BETWEEN} if kind.level > 2 else set())
    assert stated == expected
    assert {description.background for description in described} == {None, *(BACKGROUNDS if free else PLAIN)}


@every_kind
def test_parse_inverts_describe(kind):
    single, several = [], []
    for description, rng in samples(2000, kind):
        caption = describe(description, rng)
        assert parse(caption) == description, caption
        (several if len(description.objects) > 1 else single).append(caption)
    assert len(set(several)) > 0.99 * len(several)
    assert len(set(single)) > 0.8 * len(single)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A large red circle.", Description((Object("red", "circle", "large"),))),
        (
            "an orange star under a blue heart",
            Description((Object("orange", "star"), Object("blue", "heart")), (Relation(0, "below", (1,)),)),
        ),
        ("a red cross on dark blue", Description((Object("red", "cross"),), (), "dark blue")),
        (
            "a red heart between a blue star and a green circle",
            Description(
                (Object("red", "heart"), Object("blue", "star"), Object("green", "circle")), (Relation(0, "between", (1, 2)),)
            ),
        ),
        (
            "a big red cross in the bottom left corner on white to cream",
            Description((Object("red", "cross", "large"),), (Relation(0, "bottom left"),), "white to cream"),
        ),
        ("a man riding a wave on top of a surfboard", None),
    ],
)
def test_parse_other_wordings(caption, expected):
    assert parse(caption) == expected


@every_kind
def test_sample_scene_keeps_objects_apart(kind):
    for description, rng in samples(300, kind):
        scene = sample_scene(description, rng, kind.layout)
        for i, (x, y) in enumerate(scene.positions):
            r = scene.radii[i]
            assert RADII[scene.objects[i].size][0] <= r <= RADII[scene.objects[i].size][1]
            assert min(x, y) - r >= MARGIN - 1e-9 and max(x, y) + r <= 1 - MARGIN + 1e-9
            for j in range(i):
                apart = np.abs(np.subtract(scene.positions[i], scene.positions[j])).max()
                assert apart >= r + scene.radii[j] + GAP - 1e-9


@every_kind
def test_sample_scene_fits_description(kind):
    for description, rng in samples(300, kind):
        scene = sample_scene(description, rng, kind.layout)
        centres = [np.array(position) for position in scene.positions]
        for subject, name, others in description.relations:
            if name in CORNERS:
                assert np.abs(centres[subject] - (np.array(CORNERS[name]) + 1) / 2).max() < 0.32
            elif name == BETWEEN:
                along, beside = position_between(centres[subject], *(centres[other] for other in others))
                assert 0.3 <= along <= 0.7 and beside <= 0.15
            else:
                offset = centres[subject] - centres[others[0]]
                assert offset @ DIRECTIONS[name] >= 0.28
                if others == (1,):  # straight, so that no other relation of the two is true
                    assert abs(offset @ DIRECTIONS[name][::-1]) <= 0.7 * (offset @ DIRECTIONS[name])
        for named, shown in zip(description.objects, scene.objects, strict=True):
            assert named.pair == shown.pair and named.size in (None, shown.size)
        assert description.background in (None, scene.background)


@every_kind
def test_sample_scene_without_relation_names_from_top_to_bottom(kind):
    compared = 0
    for description, rng in samples(500, kind):
        if len(description.objects) > 1 and not description.relations:
            rows = [y for _, y in sample_scene(description, rng, kind.layout).positions]
            assert rows == sorted(rows) and rows[0] < rows[1]
            compared += 1
    assert compared > 50


def test_free_scenes_are_continuous_and_do_not_repeat():
    kind = Kind("free", 1)
    shown = [sample_scene(description, rng, "free") for description, rng in samples(500, kind)]
    assert len({scene.positions for scene in shown}) == len({render(scene).tobytes() for scene in shown}) == 500
    x = np.array([scene.positions[0][0] for scene in shown])
    assert len(np.unique(np.round(x * 64))) > 35  # of some 50 pixels where a centre may be
    turned = {each.shape for scene in shown for each, turn in zip(scene.objects, scene.turns, strict=True) if turn}
    assert turned == set(TURNED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("turn", [0, 17])
def test_outline_fills_its_box(shape, turn):
    points = outline(shape, turn)
    assert np.abs(points).max() == pytest.approx(1)
    assert np.allclose(points.min(axis=0), -points.max(axis=0))


@every_kind
def test_render_is_deterministic(kind):
    first, second = (sample_scene(*next(samples(1, kind)), kind.layout) for _ in range(2))
    assert np.array_equal(render(first), render(second))
    others = [sample_scene(description, rng, kind.layout) for description, rng in samples(2, kind)]
    assert not np.array_equal(render(others[0]), render(others[1]))


def test_unseen_pairs_cover_each_shape_once_and_no_colour_twice():
    assert sorted(shape for _, shape in UNSEEN_PAIRS) == sorted(SHAPES)
    colours = [colour for colour, _ in UNSEEN_PAIRS]
    assert len(set(colours)) == len(colours)
    assert len(PAIRS) == len(SEEN_PAIRS) + len(UNSEEN_PAIRS)


def test_describe_names_every_seen_pair_and_no_other():
    named = {each.pair for description, rng in samples(3000, KINDS[0]) for each in parse(describe(description, rng)).objects}
    assert named == set(SEEN_PAIRS)


def test_unseen_prompts_each_name_one_unseen_pair():
    prompts = unseen_prompts(300, 1, Kind())
    assert len(set(prompts)) == 300 and prompts == unseen_prompts(300, 1, Kind())
    named = [[each.pair for each in parse(prompt).objects if each.pair in UNSEEN_PAIRS] for prompt in prompts]
    assert all(len(pairs) == 1 for pairs in named)
    assert {pair for pairs in named for pair in pairs} == UNSEEN_PAIRS


@every_kind
def test_alternatives_differ_in_one_attribute(kind):
    for description, _ in samples(200, kind):
        for other in [other for same_attribute in alternatives(description).values() for other in same_attribute]:
            differences = sum(a != b for a, b in zip(description.objects, other.objects, strict=True))
            differences += description.relations != other.relations
            differences += description.background != other.background
            assert differences == 1
            assert not {each.pair for each in other.objects} & UNSEEN_PAIRS
            assert describe(other, np.random.default_rng(3)) != describe(description, np.random.default_rng(3))


def test_backgrounds_differ_from_every_colour():
    for top, bottom in BACKGROUNDS.values():
        for share in np.linspace(0, 1, 11):
            background = np.array(top) + share * np.subtract(bottom, top)
            assert min(np.linalg.norm(background - colour) for colour in COLOURS.values()) > 100
