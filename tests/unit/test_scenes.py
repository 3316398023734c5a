"""Rendered scenes and their captions: each caption is true of its scene, and unseen pairs are never shown."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dit.shapes.captions import describe, parse
from dit.shapes.prompts import unseen_prompts
from dit.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MARGIN,
    PAIRS,
    RELATIONS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Description,
    Object,
    render,
    sample_description,
    sample_scene,
)
from tools.fit_encoders.alternatives import alternatives


def samples(count: int) -> Iterator[tuple[Description, np.random.Generator]]:
    for k in range(count):
        rng = np.random.default_rng([555, k])
        yield sample_description(rng), rng


def test_sample_description_counts():
    described = [description for description, _ in samples(1000)]
    assert {len(description.objects) for description in described} == {1, 2, 3}
    threes = [description.objects for description in described if len(description.objects) == 3]
    assert all(len({named.shape for named in objects}) == 3 for objects in threes)


def test_parse_inverts_describe():
    single, several = [], []
    for description, rng in samples(2000):
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
            Description((Object("orange", "star"), Object("blue", "heart")), ((0, "below", 1),)),
        ),
        ("a red cross on dark blue", Description((Object("red", "cross"),), (), "dark blue")),
        ("a man riding a wave on top of a surfboard", None),
    ],
)
def test_parse_other_wordings(caption, expected):
    assert parse(caption) == expected


def test_sample_scene_keeps_objects_apart():
    for description, rng in samples(500):
        scene = sample_scene(description, rng)
        for i, (x, y) in enumerate(scene.positions):
            r = scene.radii[i]
            assert min(x, y) - r > 0 and max(x, y) + r < 1
            for j in range(i):
                apart = np.abs(np.subtract(scene.positions[i], scene.positions[j])).max()
                assert apart >= r + scene.radii[j] + 2 * MARGIN - 1e-9


def test_sample_scene_fits_description():
    for description, rng in samples(500):
        scene = sample_scene(description, rng)
        for i, relation, j in description.relations:
            offset = np.subtract(scene.positions[i], scene.positions[j])
            assert offset @ RELATIONS[relation] >= 0.2 - 1e-9
            if j == 1:  # straight, so that no other relation of the two is true
                assert not offset @ RELATIONS[relation][::-1]
        for named, shown in zip(description.objects, scene.objects, strict=True):
            assert named.pair == shown.pair and named.size in (None, shown.size)
        assert description.background in (None, scene.background)


def test_sample_scene_without_relation_has_first_object_on_top():
    compared = 0
    for description, rng in samples(500):
        if len(description.objects) > 1 and not description.relations:
            rows = [y for _, y in sample_scene(description, rng).positions]
            assert rows[0] < min(rows[1:])
            compared += 1
    assert compared > 50


def test_render_is_deterministic():
    first, second = (sample_scene(*next(samples(1))) for _ in range(2))
    assert np.array_equal(render(first), render(second))
    others = [sample_scene(description, rng) for description, rng in samples(2)]
    assert not np.array_equal(render(others[0]), render(others[1]))


def test_unseen_pairs_cover_each_shape_once_and_no_colour_twice():
    assert sorted(shape for _, shape in UNSEEN_PAIRS) == sorted(SHAPES)
    colours = [colour for colour, _ in UNSEEN_PAIRS]
    assert len(set(colours)) == len(colours)
    assert len(PAIRS) == len(SEEN_PAIRS) + len(UNSEEN_PAIRS)


def test_describe_names_every_seen_pair_and_no_other():
    named = {each.pair for description, rng in samples(3000) for each in parse(describe(description, rng)).objects}
    assert named == set(SEEN_PAIRS)


def test_unseen_prompts_each_name_one_unseen_pair():
    prompts = unseen_prompts(300, seed=1)
    assert len(set(prompts)) == 300 and prompts == unseen_prompts(300, seed=1)
    named = [[each.pair for each in parse(prompt).objects if each.pair in UNSEEN_PAIRS] for prompt in prompts]
    assert all(len(pairs) == 1 for pairs in named)
    assert {pair for pairs in named for pair in pairs} == UNSEEN_PAIRS


def test_alternatives_differ_in_one_attribute():
    for description, _ in samples(300):
        for other in [other for same_attribute in alternatives(description).values() for other in same_attribute]:
            differences = sum(a != b for a, b in zip(description.objects, other.objects, strict=True))
            differences += description.relations != other.relations
            differences += description.background != other.background
            assert differences == 1
            assert not {each.pair for each in other.objects} & UNSEEN_PAIRS
            assert describe(other, np.random.default_rng(3)) != describe(description, np.random.default_rng(3))


def test_backgrounds_differ_from_every_colour():
    for background in BACKGROUNDS.values():
        for colour in COLOURS.values():
            assert np.linalg.norm(np.subtract(background, colour)) > 100
