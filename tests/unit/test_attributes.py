"""Scores by attribute: each mistake is counted where it belongs and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from dit.evaluation.accuracy import accuracy, accuracy_by_attribute, accuracy_by_number
from dit.shapes.captions import parse
from dit.shapes.detector import detect
from dit.shapes.render import render
from dit.shapes.scene import Object, Scene
from dit.shapes.scoring import PromptScore, attribute_scores, score_image
from helpers.scenes import QUARTERS, captions, descriptions, rendered, scenes

RED, BLUE = Object("red", "circle", "small"), Object("blue", "star", "large")
SIZES = {"small": 0.12, "large": 0.2}


def image_of(*objects: Object) -> Image.Image:
    positions = ((0.27, 0.3), (0.73, 0.7), (0.27, 0.75))[: len(objects)]
    return render(Scene(objects, positions, tuple(SIZES[shown.size] for shown in objects), "white"))


def scored(caption: str, *objects: Object) -> dict[str, tuple[int, int]]:
    return attribute_scores(detect(image_of(*objects)), parse(caption))


BOTH = "a small red circle above a blue star"
RIGHT = {"colour": (2, 2), "shape": (2, 2), "size": (1, 1), "relation": (1, 1), "count": (1, 1)}


@pytest.mark.parametrize(
    ("objects", "wrong"),
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
def test_attribute_scores_count_a_mistake_where_it_belongs(objects, wrong):
    assert scored(BOTH, *objects) == RIGHT | wrong


def test_attribute_scores_choose_the_best_partners():
    """Each circle could be either; only one way round both sizes and the relation are right."""
    caption = "a small red circle below a large red circle"
    assert scored(caption, Object("red", "circle", "large"), Object("red", "circle", "small"))["relation"] == (1, 1)
    assert scored(caption, Object("red", "circle", "small"), Object("red", "circle", "large")) == {
        "colour": (2, 2),
        "shape": (2, 2),
        "size": (2, 2),
        "relation": (0, 1),
        "count": (1, 1),
    }


def test_attribute_scores_skip_what_is_not_stated():
    assert scored("a red circle", RED) == {"colour": (1, 1), "shape": (1, 1), "count": (1, 1)}


def test_attribute_scores_of_noise_are_fast():
    """Dozens of specks for a caption of seven objects: only the largest few are tried."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    caption = ", ".join(f"a {colour} circle" for colour in ("red", "orange", "yellow", "green", "teal", "blue", "purple"))
    assert attribute_scores(detect(noise), parse(caption))["shape"] == (0, 7)


def test_accuracy_by_attribute_of_right_and_shuffled_captions():
    described = descriptions(21, 150)
    images, texts = rendered(described, 21), captions(described)
    rows = accuracy_by_attribute([score_image(p, t) for p, t in zip(images, texts, strict=True)], 0.95)
    assert [row["attribute"] for row in rows] == ["colour", "shape", "size", "relation", "count"]
    assert all(row["accuracy"] >= 0.99 for row in rows)
    assert rows[0]["count"] == rows[1]["count"] == sum(len(d.objects) for d in described) and rows[4]["count"] == 150
    shuffled = [score_image(p, t) for p, t in zip(images, [*texts[1:], texts[0]], strict=True)]
    for row in accuracy_by_attribute(shuffled, 0.95):
        assert row["low"] < row["accuracy"] < row["high"] and row["accuracy"] < 0.75
    assert accuracy("prompt_accuracy", shuffled, 0.95)["prompt_accuracy"] < 0.05


@pytest.mark.parametrize("attribute", ["colour", "shape", "size"])
def test_accuracy_by_attribute_falls_for_the_changed_one_only(attribute):
    """The first object of every other scene is changed."""
    others = {"colour": ("pink", "teal"), "shape": ("cross", "circle"), "size": ("small", "large")}[attribute]
    described = descriptions(22, 100, kind=QUARTERS)
    changed = []
    for k, scene in enumerate(scenes(described, 22, "quarters")):
        shown = scene.objects[0]
        other = others[getattr(shown, attribute) == others[0]]
        first = replace(shown, **{attribute: other if k % 2 else getattr(shown, attribute)})
        radii = ({"small": 0.125, "large": 0.2}[first.size], *scene.radii[1:])
        changed.append(render(replace(scene, objects=(first, *scene.objects[1:]), radii=radii)))
    rows = accuracy_by_attribute([score_image(p, t) for p, t in zip(changed, captions(described), strict=True)], 0.95)
    found = {row["attribute"]: row["accuracy"] for row in rows}
    assert found.pop(attribute) < 0.8
    assert min(found.values()) >= 0.95


def test_accuracy_by_attribute_interval_counts_images():
    """Here 3 of 4 colours in two images: not as sure as 3 of 4 in four."""
    texts = ("a red circle and a blue star", "a teal circle and a blue star")
    scores = [score_image(image_of(RED, BLUE), text) for text in texts]
    (colour,) = [row for row in accuracy_by_attribute(scores, 0.95) if row["attribute"] == "colour"]
    assert (colour["accuracy"], colour["count"]) == (0.75, 4)
    four = binomtest(3, 4).proportion_ci(0.95, method="wilson")
    assert colour["low"] < four.low and colour["high"] > four.high


def test_score_image_of_another_prompt_is_none():
    assert score_image(image_of(RED), "a dog on a sofa") is None


def test_accuracy_of_no_scores_is_empty():
    assert accuracy("prompt_accuracy", [], 0.95) == {}
    assert accuracy_by_attribute([], 0.95) == []
    assert accuracy_by_number({"val": [], "unseen": []}, 0.95) == []


def test_accuracy_by_number_has_a_row_per_group_and_number():
    one, two = "a red circle", "a red circle and a blue star"
    val = [score_image(image_of(RED), one), score_image(image_of(BLUE), one), score_image(image_of(RED, BLUE), two)]
    unseen = [PromptScore("", 2, {})] * 49 + [PromptScore("wrong", 2, {})]
    rows = accuracy_by_number({"val": val, "unseen": unseen}, 0.9)
    assert [(row["group"], row["things"], row["accuracy"], row["count"]) for row in rows] == [
        ("val", 1, 0.5, 2),
        ("val", 2, 1.0, 1),
        ("unseen", 2, 0.98, 50),
    ]
    expected = binomtest(49, 50).proportion_ci(0.9, method="wilson")
    assert (rows[2]["low"], rows[2]["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_score_image_problem_counts_objects():
    assert score_image(image_of(RED), "a red circle and a blue star").problem.startswith("1 thing instead of 2: ")
    assert score_image(image_of(), "a red circle").problem == "0 things instead of 1: nothing"
