"""Accuracy by attribute: each mistake is counted where it belongs and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from dit.evaluation.accuracy import accuracy, accuracy_by_attribute, accuracy_by_number
from dit.shapes.captions import parse
from dit.shapes.detector import detect
from dit.shapes.scene import Object, Scene, render
from dit.shapes.scoring import PromptScore, attributes, score_image
from helpers.scenes import captions, descriptions, drawn, scenes

RED, BLUE = Object("red", "circle", "small"), Object("blue", "star", "large")
SIZES = {"small": 0.12, "large": 0.2}


def picture(*things: Object, at=((0.27, 0.3), (0.73, 0.7), (0.27, 0.75))) -> Image.Image:
    return render(Scene(things, at[: len(things)], tuple(SIZES[thing.size] for thing in things), "white"))


def found(caption: str, *things: Object) -> dict[str, tuple[int, int]]:
    return attributes(detect(picture(*things)), parse(caption))


BOTH = "a small red circle above a blue star"
RIGHT = {"colour": (2, 2), "shape": (2, 2), "size": (1, 1), "relation": (1, 1), "count": (1, 1)}


@pytest.mark.parametrize(
    ("things", "wrong"),
    [
        ((RED, BLUE), {}),
        ((replace(RED, colour="teal"), BLUE), {"colour": (1, 2)}),
        ((RED, replace(BLUE, shape="heart")), {"shape": (1, 2)}),
        ((replace(RED, size="large"), BLUE), {"size": (0, 1)}),
        ((RED, replace(BLUE, size="small")), {}),  # whose size the caption leaves open
        ((BLUE, RED), {"relation": (0, 1)}),
        ((RED,), {"colour": (1, 2), "shape": (1, 2), "relation": (0, 1), "count": (0, 1)}),
        ((RED, BLUE, Object("pink", "cross", "small")), {"count": (0, 1)}),
        ((Object("blue", "circle", "small"), Object("red", "star", "large")), {"colour": (0, 2)}),
        ((Object("pink", "cross", "small"), BLUE), {"colour": (1, 2), "shape": (1, 2), "size": (0, 1), "relation": (0, 1)}),
        ((), {"colour": (0, 2), "shape": (0, 2), "size": (0, 1), "relation": (0, 1), "count": (0, 1)}),
    ],
)
def test_a_mistake_is_counted_where_it_belongs(things, wrong):
    assert found(BOTH, *things) == RIGHT | wrong


def test_partners_are_those_with_which_most_is_right():
    """Each circle could be either; only one way round both sizes and the relation are right."""
    caption = "a small red circle below a large red circle"
    assert found(caption, Object("red", "circle", "large"), Object("red", "circle", "small"))["relation"] == (1, 1)
    assert found(caption, Object("red", "circle", "small"), Object("red", "circle", "large")) == {
        "colour": (2, 2),
        "shape": (2, 2),
        "size": (2, 2),
        "relation": (0, 1),
        "count": (1, 1),
    }


def test_what_a_caption_does_not_state_is_not_counted():
    assert found("a red circle", RED) == {"colour": (1, 1), "shape": (1, 1), "count": (1, 1)}


def test_noise_is_judged_without_delay():
    """Dozens of specks for a caption of eight things: only the largest few are tried."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    caption = ", ".join(f"a {colour} circle" for colour in ("red", "orange", "yellow", "green", "teal", "blue", "purple"))
    assert attributes(detect(noise), parse(caption))["shape"] == (0, 7)


def test_drawings_are_right_in_every_attribute_and_with_other_captions_in_few():
    described = descriptions(21, 150)
    pictures, texts = drawn(described, 21), captions(described)
    rows = accuracy_by_attribute([score_image(p, t) for p, t in zip(pictures, texts, strict=True)], 0.95)
    assert [row["attribute"] for row in rows] == ["colour", "shape", "size", "relation", "count"]
    assert all(row["accuracy"] >= 0.99 for row in rows)
    assert rows[0]["count"] == rows[1]["count"] == sum(len(d.things) for d in described) and rows[4]["count"] == 150
    shuffled = [score_image(p, t) for p, t in zip(pictures, [*texts[1:], texts[0]], strict=True)]
    for row in accuracy_by_attribute(shuffled, 0.95):
        assert row["low"] < row["accuracy"] < row["high"] and row["accuracy"] < 0.75
    assert accuracy("prompt_accuracy", shuffled, 0.95)["prompt_accuracy"] < 0.05


@pytest.mark.parametrize("attribute", ["colour", "shape", "size"])
def test_only_the_attribute_that_was_changed_falls(attribute):
    """The first thing of every other drawing is changed."""
    others = {"colour": ("pink", "teal"), "shape": ("cross", "circle"), "size": ("small", "large")}[attribute]
    described = descriptions(22, 100)
    changed = []
    for k, scene in enumerate(scenes(described, 22)):
        thing = scene.things[0]
        other = others[getattr(thing, attribute) == others[0]]
        first = replace(thing, **{attribute: other if k % 2 else getattr(thing, attribute)})
        radii = ({"small": 0.1425, "large": 0.2025}[first.size], *scene.radii[1:])
        changed.append(render(replace(scene, things=(first, *scene.things[1:]), radii=radii)))
    rows = accuracy_by_attribute([score_image(p, t) for p, t in zip(changed, captions(described), strict=True)], 0.95)
    found = {row["attribute"]: row["accuracy"] for row in rows}
    assert found.pop(attribute) < 0.8
    assert min(found.values()) >= 0.95


def test_the_interval_has_as_many_trials_as_there_are_pictures():
    """Here 3 of 4 colours in two pictures: not as sure as 3 of 4 in four."""
    texts = ("a red circle and a blue star", "a teal circle and a blue star")
    judged = [score_image(picture(RED, BLUE), text) for text in texts]
    (colour,) = [row for row in accuracy_by_attribute(judged, 0.95) if row["attribute"] == "colour"]
    assert (colour["accuracy"], colour["count"]) == (0.75, 4)
    four = binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert colour["low"] < four.low and colour["high"] > four.high


def test_captions_about_other_things_are_not_judged():
    assert score_image(picture(RED), "a dog on a sofa") is None
    assert accuracy("prompt_accuracy", [], 0.95) == {} and accuracy_by_attribute([], 0.95) == []
    assert accuracy_by_number({"val": [], "unseen": []}, 0.95) == []


def test_accuracy_has_a_row_for_each_group_and_number_of_things():
    one, two = "a red circle", "a red circle and a blue star"
    val = [score_image(picture(RED), one), score_image(picture(BLUE), one), score_image(picture(RED, BLUE), two)]
    unseen = [PromptScore("", 2, {})] * 49 + [PromptScore("wrong", 2, {})]
    rows = accuracy_by_number({"val": val, "unseen": unseen}, 0.9)
    assert [(row["group"], row["things"], row["accuracy"], row["count"]) for row in rows] == [
        ("val", 1, 0.5, 2),
        ("val", 2, 1.0, 1),
        ("unseen", 2, 0.98, 50),
    ]
    expected = binomtest(49, 50).proportion_ci(0.9, method="wilson")
    assert (rows[2]["low"], rows[2]["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_one_thing_is_one_thing():
    assert score_image(picture(RED), "a red circle and a blue star").problem.startswith("1 thing instead of 2: ")
    assert score_image(picture(), "a red circle").problem == "0 things instead of 1: nothing"
