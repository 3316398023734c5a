"""`dit benchmark objects`: what share of a model's images show the objects that their prompts name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from dit.commands._args import add_flag, save_image
from dit.commands._benchmark import add_kind, require_positive
from dit.commands.inputs import read_lines
from dit.config import DEFAULTS
from dit.errors import UserError

if TYPE_CHECKING:
    from dit.benchmark.objects import ObjectResult

SHOWN = 24  # images on the sheet, as many of each group


def add_objects(kinds: argparse._SubParsersAction) -> None:
    """Add `objects` and its flags."""
    parser = add_kind(
        kinds,
        "objects",
        run_objects,
        "measure what share of a model's images show the objects that their prompts name, by an open-vocabulary detector",
        "  dit benchmark objects evaluation_metadata.jsonl             GenEval's prompts, for a model of photographs\n"
        "  dit benchmark objects mine.jsonl --detector weights/owlv2   your own prompts; docs/evaluation.md has the format",
    )
    parser.add_argument("prompts", type=Path, metavar="FILE", help="a JSON object a line: tag, prompt, include, exclude")
    detector, clip = "google/owlv2-base-patch16-ensemble", "openai/clip-vit-large-patch14"
    add_flag(parser, "detector", default=detector, metavar="NAME", help="an OWLv2, a Hub id or a folder; default: %(default)s")
    add_flag(parser, "clip", default=clip, metavar="NAME", help="names the colours of objects; default: %(default)s")
    add_flag(parser, "checkpoint", type=Path, default=Path("models/dit"), metavar="FOLDER", help="default: %(default)s")
    add_flag(parser, "images", type=int, default=4, help="of each prompt; default: %(default)s")
    add_flag(parser, "threshold", type=float, default=0.1, help="score from which on a box is an object; default: %(default)s")
    add_flag(parser, "num_inference_steps", type=int, default=DEFAULTS.num_inference_steps, help="default: %(default)s")
    add_flag(parser, "guidance_scale", type=float, default=DEFAULTS.guidance_scale, help="default: %(default)s")


def run_objects(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate, detect, print the table, and write a sheet of some images beside what `--output` names."""
    require_positive(arguments, "images", "num_inference_steps")
    if not 0 < arguments.threshold < 1:
        raise UserError(f"--threshold: {arguments.threshold} is not between 0 and 1")

    from dit.benchmark.object_scoring import parse_object_prompts
    from dit.pipeline.model_folder import read_index, weights_hash

    prompts = parse_object_prompts(read_lines(arguments.prompts, str(arguments.prompts)), str(arguments.prompts))
    read_index(arguments.checkpoint)

    from dit.benchmark.objects import ColourNames, ObjectDetector, benchmark_objects, objects_sheet, objects_table, summarise
    from dit.benchmark.results import default_device

    detector = ObjectDetector(arguments.detector, arguments.threshold, default_device())
    needs_colours = any(wanted.color for prompt in prompts for wanted in prompt.include)
    colours = ColourNames(arguments.clip, default_device()) if needs_colours else None
    how = {name: getattr(arguments, name) for name in ("num_inference_steps", "guidance_scale")}
    results: list[ObjectResult] = []
    shown: list[tuple[ObjectResult, Image.Image]] = []
    of_each = max(1, SHOWN // len({prompt.tag for prompt in prompts}))
    for result, image in benchmark_objects(arguments.checkpoint, prompts, detector, colours, arguments.images, **how):
        results.append(result)
        if result.seed == 0 and sum(other.prompt.tag == result.prompt.tag for other, _ in shown) < of_each:
            shown.append((result, image))
    rows, sheet = summarise(results), arguments.output.with_suffix(".png")
    print(objects_table(rows))
    save_image(objects_sheet(shown), sheet)
    print(f"\n{sheet}")
    model = {"checkpoint": str(arguments.checkpoint), "weights": weights_hash(arguments.checkpoint)}
    settings = model | {name: getattr(arguments, name) for name in ("detector", "clip", "threshold")} | how
    images = [
        {"tag": one.prompt.tag, "prompt": one.prompt.prompt, "seed": one.seed, "boxes": one.boxes, "problem": one.problem}
        for one in results
    ]
    return {"settings": settings, "groups": rows, "images": images}
