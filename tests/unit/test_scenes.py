"""Drawn scenes and their captions: the one says what the other shows, and some things are never shown."""

from __future__ import annotations

import numpy as np
import pytest

from dit.dataset.filters import forbids_flip
from dit.shapes.captions import describe, parse
from dit.shapes.prompts import unseen_prompts
from dit.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    MARGIN,
    PAIRS,
    RADII,
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


def samples(count: int):
    for k in range(count):
        rng = np.random.default_rng([555, k])
        yield sample_description(rng), rng


def test_there_is_enough_to_draw():
    assert len(COLOURS) >= 8 and len(SHAPES) >= 6 and len(RADII) == 2 and len(RELATIONS) == 4
    counts = [len(description.things) for description, _ in samples(300)]
    assert set(counts) == {1, 2, 3}
    threes = [description.things for description, _ in samples(1000) if len(description.things) == 3]
    assert threes and all(len({thing.shape for thing in things}) == 3 for things in threes)


def test_reading_a_caption_gives_back_what_it_was_written_from():
    single, several = [], []
    for description, rng in samples(2000):
        caption = describe(description, rng)
        assert parse(caption) == description, caption
        (several if len(description.things) > 1 else single).append(caption)
    assert len(set(several)) > 0.99 * len(several)
    assert len(set(single)) > 0.8 * len(single)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A large red circle.", Description((Object("red", "circle", "large"),))),
        ("an orange star under a blue heart", Description((Object("orange", "star"), Object("blue", "heart")), ((0, "below", 1),))),
        ("a red cross on dark blue", Description((Object("red", "cross"),), (), "dark blue")),
        ("a man riding a wave on top of a surfboard", None),
    ],
)
def test_captions_are_read_as_a_person_would(caption, expected):
    assert parse(caption) == expected


def test_scenes_keep_things_apart_and_relations_true():
    for description, rng in samples(500):
        scene = sample_scene(description, rng)
        for i, (x, y) in enumerate(scene.positions):
            r = scene.radii[i]
            assert min(x, y) - r > 0 and max(x, y) + r < 1
            for j in range(i):
                apart = np.abs(np.subtract(scene.positions[i], scene.positions[j])).max()
                assert apart >= r + scene.radii[j] + 2 * MARGIN - 1e-9
        for i, relation, j in description.relations:
            offset = np.subtract(scene.positions[i], scene.positions[j])
            assert offset @ RELATIONS[relation] >= 0.2 - 1e-9
            if j == 1:  # straight, so that no other relation of the two is true
                assert not offset @ RELATIONS[relation][::-1]
        for said, shown in zip(description.things, scene.things, strict=True):
            assert said.pair == shown.pair and said.size in (None, shown.size)
        assert description.background in (None, scene.background)


def test_without_a_relation_the_first_thing_is_on_top():
    compared = 0
    for description, rng in samples(500):
        if len(description.things) > 1 and not description.relations:
            rows = [y for _, y in sample_scene(description, rng).positions]
            assert rows[0] < min(rows[1:])
            compared += 1
    assert compared > 50


def test_the_same_seed_draws_the_same_pixels():
    first, second = (sample_scene(*next(samples(1))) for _ in range(2))
    assert np.array_equal(render(first), render(second))
    others = [sample_scene(description, rng) for description, rng in samples(2)]
    assert not np.array_equal(render(others[0]), render(others[1]))


def test_every_shape_is_in_one_unseen_pair_and_every_colour_in_one_at_most():
    assert sorted(shape for _, shape in UNSEEN_PAIRS) == sorted(SHAPES)
    colours = [colour for colour, _ in UNSEEN_PAIRS]
    assert len(set(colours)) == len(colours)
    assert len(PAIRS) == len(SEEN_PAIRS) + len(UNSEEN_PAIRS)


def test_training_never_shows_or_names_an_unseen_pair():
    shown = {thing.pair for description, rng in samples(3000) for thing in parse(describe(description, rng)).things}
    assert shown == set(SEEN_PAIRS)


def test_unseen_prompts_are_different_and_each_names_one_unseen_pair():
    prompts = unseen_prompts(300, seed=1)
    assert len(set(prompts)) == 300 and prompts == unseen_prompts(300, seed=1)
    named = [[thing.pair for thing in parse(prompt).things if thing.pair in UNSEEN_PAIRS] for prompt in prompts]
    assert all(len(pairs) == 1 for pairs in named)
    assert {pair for pairs in named for pair in pairs} == UNSEEN_PAIRS


def test_alternatives_differ_in_one_attribute_and_never_name_an_unseen_pair():
    for description, _ in samples(300):
        for other in [other for same_attribute in alternatives(description).values() for other in same_attribute]:
            differences = sum(a != b for a, b in zip(description.things, other.things, strict=True))
            differences += description.relations != other.relations
            differences += description.background != other.background
            assert differences == 1
            assert not {thing.pair for thing in other.things} & UNSEEN_PAIRS
            assert describe(other, np.random.default_rng(3)) != describe(description, np.random.default_rng(3))


def test_captions_with_a_side_are_recognised():
    assert forbids_flip("A dog to the LEFT of a cat") and forbids_flip("turn right")
    assert not forbids_flip("a bright copyright sign") and not forbids_flip("a red circle above a star")


def test_every_background_can_be_told_from_every_colour():
    for background in BACKGROUNDS.values():
        for colour in COLOURS.values():
            assert np.linalg.norm(np.subtract(background, colour)) > 100
