"""Object-level accuracy by an open-vocabulary detector: GenEval's rules, and an OWLv2 of the real class with small weights."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import TypeAdapter
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil

from dit.benchmark.object_scoring import (
    Box,
    ObjectPrompt,
    directions,
    find_problem,
    intersection_over_union,
    parse_object_prompts,
    without_repeats,
)
from dit.benchmark.objects import (
    QUERY,
    ColourNames,
    ObjectDetector,
    ObjectResult,
    objects_table,
    summarise,
)
from dit.cli import main
from dit.encoders.loading import BUILTIN
from dit.errors import UserError
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import Description, Object, Scene

KINDS = {"circle": "red", "cross": "blue"}  # with their colours: so small a model tells no shapes apart
LEFT, RIGHT, BELOW = Box(0, 40, 20, 60, 0.9), Box(60, 40, 80, 60, 0.8), Box(2, 80, 20, 99, 0.7)


def line(*include: dict, **more) -> dict:
    return {"tag": "test", "prompt": "a test", "include": list(include)} | more


def prompt(*include: dict, **more) -> ObjectPrompt:
    return TypeAdapter(ObjectPrompt).validate_python(line(*include, **more))


def wanted(name: str = "dog", count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


def reds(_: str, boxes) -> list[str]:
    return ["red"] * len(boxes)


@pytest.mark.parametrize(
    ("asked", "boxes", "problem"),
    [
        (prompt(wanted()), {"dog": [LEFT]}, ""),
        (prompt(wanted()), {"dog": [LEFT, RIGHT]}, ""),  # as in GenEval, more than are wanted are fine
        (prompt(wanted()), {"dog": []}, "0 instead of 1 dog"),
        (prompt(wanted(count=3)), {"dog": [LEFT, RIGHT]}, "2 instead of 3 dog"),
        (prompt(wanted(count=2), exclude=[wanted(count=3)]), {"dog": [LEFT, RIGHT]}, ""),
        (prompt(wanted(count=2), exclude=[wanted(count=3)]), {"dog": [LEFT, RIGHT, BELOW]}, "3 dog"),
        (prompt(wanted(color="red")), {"dog": [LEFT]}, ""),
        (prompt(wanted(color="blue")), {"dog": [LEFT]}, "dog is red, not blue"),
        (prompt(wanted("tree"), wanted(position=("right of", 0))), {"dog": [RIGHT], "tree": [LEFT]}, ""),
        (prompt(wanted("tree"), wanted(position=("left of", 0))), {"dog": [RIGHT], "tree": [LEFT]}, "dog not left of tree"),
        (prompt(wanted("tree"), wanted(position=("below", 0))), {"dog": [BELOW], "tree": [LEFT]}, ""),
        # The surest of each class counts, whatever else there is.
        (prompt(wanted("tree"), wanted(position=("below", 0))), {"dog": [RIGHT, BELOW], "tree": [LEFT]}, "dog not below tree"),
    ],
)
def test_find_problem(asked, boxes, problem):
    assert find_problem(asked, boxes, reds) == problem


@pytest.mark.parametrize(
    ("x", "y", "found"),
    [
        (50, 0, {"right of"}),
        (-50, 0, {"left of"}),
        (0, -50, {"above"}),
        (40, 40, {"right of", "below"}),
        (50, 20, {"right of"}),  # 22 degrees
        (3, 0, set()),  # centres nearer than a tenth of both widths
        (0, 0, set()),
    ],
)
def test_directions(x, y, found):
    assert directions(Box(x - 10, y - 10, x + 10, y + 10, 1), Box(-10, -10, 10, 10, 1)) == found


def test_without_repeats_keeps_the_surest_of_each_object():
    near = Box(1, 41, 21, 61, 0.95)
    assert without_repeats([LEFT, RIGHT, near, BELOW], 0.5) == [near, RIGHT, BELOW]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no prompt in it"),
        ("{", "line 1: .*JSON"),
        (json.dumps(line()), r"line 1: include: .*at least 1"),
        (json.dumps(line(wanted(count=0))), r"line 1: include\.0\.count: "),
        (json.dumps(line(wanted(color="beige"))), r"line 1: include\.0\.color: .*'red'"),
        (json.dumps(line(wanted(position=("near", 0)))), r"line 1: include\.0\.position"),
        (json.dumps(line(wanted(position=("above", 0)))), r"include\.0\.position: 0 is not an earlier entry"),
        (json.dumps(line(wanted(size="large"))), r"line 1: include\.0\.size: Unexpected"),
    ],
)
def test_prompt_that_cannot_be_read(text, problem):
    with pytest.raises(UserError, match=f"prompts.jsonl.*{problem}"):
        parse_object_prompts(text.split("\n"), "prompts.jsonl")


def test_summarise_counts_prompts_in_intervals_and_groups_in_the_mean():
    def result(tag: str, text: str, problem: str) -> ObjectResult:
        return ObjectResult(prompt(wanted(), tag=tag, prompt=text), 0, {}, problem)

    results = [result("one", "a", ""), result("one", "a", ""), result("one", "b", ""), result("one", "b", "wrong")]
    rows = summarise([*results, result("two", "c", "wrong")])
    assert [(row["group"], row["prompts"], row["images"], row["right"]) for row in rows] == [
        ("one", 2, 4, 0.75),
        ("two", 1, 1, 0.0),
        ("mean of the groups", 3, 5, 0.375),
    ]
    assert rows[0]["low"] < 0.3 and rows[0]["high"] > 0.95  # two prompts say little
    assert objects_table(rows).splitlines()[2].startswith("| one | 2 | 4 | 0.750 | 0.")


def random_detector(folder: Path) -> Owlv2ForObjectDetection:
    """Save an OWLv2 of 64 x 64 pixels with random weights, which reads what the bundled CLIP reads."""
    tokenizer = CLIPTokenizer.from_pretrained(BUILTIN / "clip")
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config=size | ends | {"vocab_size": len(tokenizer)},
        vision_config=size | {"image_size": 64, "patch_size": 8},
        projection_dim=64,
    )
    model = Owlv2ForObjectDetection(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.xavier_uniform_(module.weight)  # with its own, small ones it learns far more slowly
    torch.nn.init.normal_(model.owlv2.text_model.embeddings.token_embedding.weight)
    for layer in (model.box_head.dense2, model.class_head.logit_scale, model.class_head.logit_shift):
        torch.nn.init.zeros_(layer.weight)  # each box begins about its own patch
    torch.nn.init.constant_(model.class_head.logit_scale.bias, 4.0)  # of cosines, which would never make a sure score
    save_detector(model, folder)
    return model


def save_detector(model: Owlv2ForObjectDetection, folder: Path) -> None:
    model.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(BUILTIN / "clip").save_pretrained(folder)


def test_boxes_are_in_pixels_of_images_of_any_shape(tmp_path, monkeypatch):
    """OWLv2 pads an image to a square, below or to the right: its box at 0.5, 0.25 is at 40, 20 of 80 x 48 and of 48 x 80."""
    random_detector(tmp_path)
    detector = ObjectDetector(str(tmp_path), threshold=0.5)
    logits = torch.tensor([[3.0, -9], [-9, 2], [-9, 1], [-2, -2]])  # of four boxes: a circle, two crosses, and nothing
    places = torch.tensor([[0.5, 0.25, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4], [0.12, 0.1, 0.4, 0.4], [0.5, 0.5, 1, 1]])
    seen = Namespace(logits=logits.repeat(2, 1, 1), pred_boxes=places.repeat(2, 1, 1))
    monkeypatch.setattr(type(detector.model), "forward", lambda *_, **__: seen)
    for width, height in ((80, 48), (48, 80)):
        for found in detector.find([Image.new("RGB", (width, height))] * 2, ["circle", "cross"]):
            (circle,), (cross,) = found["circle"], found["cross"]  # the second cross is the first one again
            assert circle == pytest.approx((32, 16, 48, 24, 0.953), abs=1e-3)
            assert cross == pytest.approx((0, 0, 24, 24, 0.881), abs=1e-3)  # cut at the border


def test_command_prints_a_row_for_each_group_and_writes_each_verdict(tmp_path, model, capsys):
    random_detector(tmp_path / "owlv2")
    lines = [line(wanted("circle", color="red"), tag="colors"), line(wanted("circle"), wanted("cross", count=9), tag="counting")]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    files = ["--output", str(tmp_path / "out" / "objects.json")]
    models = ["--detector", str(tmp_path / "owlv2"), "--clip", "builtin", "--checkpoint", str(model)]
    few = ["--images", "2", "--num_inference_steps", "2", "--threshold", "0.5"]
    assert main(["benchmark", "objects", str(tmp_path / "prompts.jsonl"), *models, *few, *files]) == 0
    printed = capsys.readouterr().out
    assert (
        "| colors | 1 | 2 | " in printed
        and "| counting | 1 | 2 | 0.000 | " in printed
        and "| mean of the groups | 2 | 4 | " in printed
    )
    written = json.loads((tmp_path / "out" / "objects.json").read_text())
    assert [image["seed"] for image in written["images"]] == [0, 1, 0, 1] and written["settings"]["threshold"] == 0.5
    assert all(image["problem"] for image in written["images"][2:])
    assert Image.open(tmp_path / "out" / "objects.png").width > 300


@pytest.mark.parametrize(
    ("arguments", "problem"), [("--threshold 1", "--threshold: 1.0 is not between"), ("--images 0", "--images")]
)
def test_command_refuses(tmp_path, capsys, arguments, problem):
    assert main(["benchmark", "objects", str(tmp_path / "prompts.jsonl"), *arguments.split()]) == 1
    assert problem in capsys.readouterr().err


def test_clip_that_is_not_there_is_named_by_its_flag(tmp_path, model, capsys):
    random_detector(tmp_path / "owlv2")
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line(wanted(color="red"))))
    flags = ["--detector", str(tmp_path / "owlv2"), "--clip", "./nowhere", "--checkpoint", str(model)]
    assert main(["benchmark", "objects", str(tmp_path / "prompts.jsonl"), *flags, "--output", str(tmp_path / "o.json")]) == 1
    assert "dit: --clip: './nowhere' is no folder" in capsys.readouterr().err


def test_detector_of_another_class_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--detector: .* is of class 'clip', and owlv2 is needed; choose another"):
        ObjectDetector(str(BUILTIN / "clip"), threshold=0.1)


def scenes(seed: int, count: int) -> list[Scene]:
    """Scenes of one or two different objects of `KINDS`."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        kinds = rng.permutation(list(KINDS))[: 1 + int(rng.integers(2))].tolist()
        objects = tuple(Object(KINDS[kind], kind, "large") for kind in kinds)
        found.append(sample_scene(Description(objects), rng, "free"))
    return found


def boxes_of(scene: Scene) -> dict[str, tuple[float, float, float, float]]:
    """The corners of the objects of `scene`, as parts of its width."""
    objects = zip(scene.objects, scene.positions, scene.radii, strict=True)
    return {of.shape: (x - radius, y - radius, x + radius, y + radius) for of, (x, y), radius in objects}


def fit(model: Owlv2ForObjectDetection, steps: int, batch: int = 24) -> None:
    """Teach `model` where red circles and blue crosses are: each patch on one names it, and says its box."""
    processor, tokenizer = (
        Owlv2ImageProcessorPil(size={"height": 64, "width": 64}),
        CLIPTokenizer.from_pretrained(BUILTIN / "clip"),
    )
    texts = tokenizer([QUERY.format(kind) for kind in KINDS], padding="max_length", max_length=16, return_tensors="pt")
    queries = {name: rows.repeat(batch, 1) for name, rows in texts.items()}
    across, down = (torch.arange(64) % 8 + 0.5) / 8, (torch.arange(64) // 8 + 0.5) / 8  # centres of the patches
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        shown = scenes(1000 + step, batch)
        named, corners = torch.zeros(batch, 64, len(KINDS)), torch.zeros(batch, 64, 4)
        for k, scene in enumerate(shown):
            for kind, (left, top, right, bottom) in boxes_of(scene).items():
                on = (across > left) & (across < right) & (down > top) & (down < bottom)
                named[k, on, list(KINDS).index(kind)] = 1
                corners[k, on] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
        pixels = processor(images=[render(scene) for scene in shown], return_tensors="pt")["pixel_values"]
        output, there = model(**queries, pixel_values=pixels), named.any(-1)
        loss = F.binary_cross_entropy_with_logits(output.logits, named) + F.l1_loss(output.pred_boxes[there], corners[there])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> ObjectDetector:
    folder = tmp_path_factory.mktemp("owner") / "owlv2-shapes"
    model = random_detector(folder)
    fit(model, 300)
    save_detector(model.eval(), folder)
    return ObjectDetector(str(folder), threshold=0.3)


@pytest.mark.slow
def test_scenes_are_scored_as_they_were_made(detector):
    """An OWLv2 that was fitted on shapes finds what is there, and where, in fresh scenes; the bundled CLIP names its colour."""
    colours, right, absent, overlaps = ColourNames("builtin"), [], [], []
    for scene in scenes(1, 60):
        image, places = render(scene), boxes_of(scene)
        (boxes,) = detector.find([image], list(KINDS))

        def colours_of(kind, of, image=image):
            return colours.name(image, kind, of)

        right.append(find_problem(prompt(*(wanted(each.shape, color=each.colour) for each in scene.objects)), boxes, colours_of))
        absent += [find_problem(prompt(wanted(kind)), boxes, colours_of) for kind in KINDS if kind not in places]
        for kind, corners in places.items():
            truth = Box(*(64 * edge for edge in corners), 1.0)
            overlaps.append(max((intersection_over_union(box, truth) for box in boxes[kind]), default=0.0))
    print(f"right {right.count('')} of {len(right)}, absent {absent}, overlap {np.mean(overlaps):.2f}")
    assert right.count("") >= 0.8 * len(right) and np.mean(overlaps) > 0.6
    assert len(absent) > 20 and sum(problem.startswith("0 instead of 1") for problem in absent) >= 0.9 * len(absent)
