"""What share of a model's images show the objects that their prompts name, by an open-vocabulary detector: for photographs.

In the manner of GenEval (dit/benchmark/object_scoring.py), whose detector knows the classes of COCO alone. OWLv2 (Minderer et al.
2023, arXiv:2306.09683) finds what a text names, so any class can be asked for. Its scores are others, so are the shares: compare
models by the same detector and threshold, and not with published tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import CLIPTokenizer, Owlv2ForObjectDetection, Owlv2ImageProcessorPil, Owlv2Processor

from dit.benchmark.object_scoring import COLOURS, Box, ObjectPrompt, find_problem, object_names, without_repeats
from dit.benchmark.results import markdown_table
from dit.encoders.loading import EncoderSource, find_encoder
from dit.errors import UserError, one_line
from dit.evaluation.clip import ClipFeatures
from dit.evaluation.intervals import wilson
from dit.pipeline.generate import generate_images, load_pipeline
from dit.utils.images import labelled_grid

HEADER = ("group", "prompts", "images", "right", "95 % interval")
QUERY = "a photo of a {}"  # the words in which OWLv2 is asked
COLOUR_QUERIES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
MOST_OVERLAP = 0.5  # of two objects of one class; boxes that share more are one object
COLUMNS, CELL = 6, 190  # images in a row of the sheet, and pixels of each


@contextmanager
def _named(flag: str, setting: str) -> Iterator[None]:
    """Let errors of an encoder speak of the flag of the command instead of the setting in params.yaml."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{setting}:", f"{flag}:", 1).replace(", or to clip", "")) from None


class ObjectDetector:
    """An OWLv2, in float32.

    Args:
        name: a Hub id or a local folder.
        threshold: scores, in [0, 1], from which on a box is an object; 0.1 is what the model's own examples take.
        device: where it runs.

    Raises:
        UserError: there is none of that name, it is damaged, or of another class.
    """

    def __init__(self, name: str, threshold: float, device: str | torch.device = "cpu"):
        with _named("--detector", "evaluate.features"):
            folder, _ = find_encoder("features", EncoderSource(name))
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "owlv2":
            raise UserError(f"--detector: {name!r} is of class {kind!r}, and owlv2 is needed; choose another")
        try:
            model, found = Owlv2ForObjectDetection.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
            if found["missing_keys"]:  # which would be initialised at random
                raise ValueError(f"the weights lack {min(found['missing_keys'])}")
            self.processor = Owlv2Processor(Owlv2ImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"--detector: {name!r} cannot be loaded ({one_line(error)}); download or save it again") from None
        self.model, self.threshold = model.requires_grad_(False).eval().to(device), threshold

    @torch.inference_mode()
    def find(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[dict[str, list[Box]]]:
        """Return, for each of the RGB `images`, the boxes of each of `names`, in pixels, the surest first."""
        queries = [[QUERY.format(name) for name in names]] * len(images)
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(text=queries, images=list(images), max_length=length, truncation=True, return_tensors="pt")
        sizes = [(image.height, image.width) for image in images]
        output = self.model(**inputs.to(self.model.device))
        found = self.processor.post_process_grounded_object_detection(output, threshold=self.threshold, target_sizes=sizes)
        return [self._sort(of_image, names, image.size) for of_image, image in zip(found, images, strict=True)]

    def _sort(self, found: dict[str, torch.Tensor], names: Sequence[str], size: tuple[int, int]) -> dict[str, list[Box]]:
        boxes: dict[str, list[Box]] = {name: [] for name in names}
        for corners, score, label in zip(
            found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
        ):
            left, top, right, bottom = (min(max(edge, 0.0), float(most)) for edge, most in zip(corners, size * 2, strict=True))
            if right > left and bottom > top:
                boxes[names[label]].append(Box(left, top, right, bottom, score))
        return {name: without_repeats(of_name, MOST_OVERLAP) for name, of_name in boxes.items()}


class ColourNames:
    """Names the colour of an object, by a CLIP: the nearest of `COLOURS`, as sentences about this class.

    Args:
        name: "builtin", a Hub id or a local folder.
        device: where it runs.

    Raises:
        UserError: there is no CLIP of that name.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        with _named("--clip", "encode.clip"):
            self.clip = ClipFeatures(EncoderSource(name), device)
        self.known: dict[str, torch.Tensor] = {}

    def name(self, image: Image.Image, kind: str, boxes: Sequence[Box]) -> list[str]:
        """Return the colour of what is in each of the `boxes` of `image`, of which all are of class `kind`."""
        if kind not in self.known:
            texts = [query.format(colour=colour, name=kind) for colour in COLOURS for query in COLOUR_QUERIES]
            features = self.clip.embed_texts(texts).unflatten(0, (len(COLOURS), len(COLOUR_QUERIES)))
            self.known[kind] = torch.nn.functional.normalize(features.mean(1), dim=-1)
        pieces = [image.crop((int(box.left), int(box.top), math.ceil(box.right), math.ceil(box.bottom))) for box in boxes]
        nearest = (self.clip.embed_images(pieces, len(pieces), "colours") @ self.known[kind].T).argmax(1)
        return [COLOURS[k] for k in nearest.tolist()]


@dataclass(frozen=True)
class ObjectResult:
    """An image of a prompt: its seed, what was found in it, and what is wrong with it, "" for nothing."""

    prompt: ObjectPrompt
    seed: int
    boxes: dict[str, list[Box]]
    problem: str


def benchmark_objects(
    model: Path,
    prompts: Sequence[ObjectPrompt],
    detector: ObjectDetector,
    colours: ColourNames | None,
    images: int,
    **settings: Any,
) -> Iterator[tuple[ObjectResult, Image.Image]]:
    """Generate `images` images of each prompt, with seeds from 0 on, and yield the verdict on each with the image.

    Args:
        model: folder of the model.
        prompts: what to generate.
        detector: finds the objects.
        colours: names their colours; may be None where no prompt wants one.
        images: of each prompt, which are generated at once.
        settings: of the pipeline's call.

    Raises:
        UserError: a setting is impossible, or the memory does not hold a batch.
    """
    pipeline = load_pipeline(model)
    for prompt in tqdm(prompts, desc="objects", unit="prompt"):
        generated = list(generate_images(pipeline, [prompt.prompt] * images, range(images), images, **settings))
        for seed, (image, boxes) in enumerate(zip(generated, detector.find(generated, object_names(prompt)), strict=True)):

            def colours_of(kind: str, of: Sequence[Box], image: Image.Image = image) -> list[str]:
                assert colours is not None  # a prompt wants one
                return colours.name(image, kind, of)

            yield ObjectResult(prompt, seed, boxes, find_problem(prompt, boxes, colours_of)), image


def summarise(results: Sequence[ObjectResult]) -> list[dict[str, Any]]:
    """Return a row for each group of prompts, and one of all: `right` is the share of images, and for all the mean of the groups.

    The intervals count a prompt, and not each of its images, as one trial: images of the same prompt are alike.
    """
    rows: list[dict[str, Any]] = []
    for tag in dict.fromkeys(result.prompt.tag for result in results):
        own = [result for result in results if result.prompt.tag == tag]
        prompts = len({result.prompt.prompt for result in own})
        right = sum(not result.problem for result in own) / len(own)
        low, high = wilson(right, prompts, 0.95)
        rows.append({"group": tag, "prompts": prompts, "images": len(own), "right": right, "low": low, "high": high})
    if len(rows) > 1:
        sums = {name: sum(row[name] for row in rows) for name in ("prompts", "images")}
        rows.append({"group": "mean of the groups", **sums, "right": sum(row["right"] for row in rows) / len(rows)})
    return rows


def objects_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows of `summarise` as a Markdown table."""
    cells = []
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        cells.append((row["group"], str(row["prompts"]), str(row["images"]), f"{row['right']:.3f}", interval))
    return markdown_table(HEADER, cells)


def draw_boxes(image: Image.Image, boxes: dict[str, list[Box]]) -> Image.Image:
    """Return a copy of `image`, at least `CELL` pixels wide, with a frame around each object that was found."""
    scale = -(-CELL // image.width)
    drawn = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(drawn)
    for number, of_name in enumerate(boxes.values()):
        for box in of_name:
            corners = [edge * scale for edge in box[:4]]
            pen.rectangle(corners, outline=("#e6194b", "#0082c8", "#3cb44b", "#f58231")[number % 4], width=2)
    return drawn


def objects_sheet(results: Sequence[tuple[ObjectResult, Image.Image]]) -> Image.Image:
    """Return all the images, with what was found in them, the prompt, and what is wrong."""
    labels = [f"{result.prompt.prompt}: {result.problem or 'right'}" for result, _ in results]
    drawn = [draw_boxes(image, result.boxes) for result, image in results]
    return labelled_grid(drawn, labels, columns=min(COLUMNS, len(results)), cell=CELL)
