"""`dit export`: a trained model and all that it needs, in one folder for other people."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, get_args

from dit.commands.find_metrics import find_evaluation
from dit.commands.inputs import parse_lora
from dit.config import DEFAULTS, Scheduler
from dit.errors import UserError, one_line
from dit.pipeline.model_folder import read_index
from dit.utils.files import write_json

if TYPE_CHECKING:
    from dit.pipeline.pipeline import DiTTextToImagePipeline

CARD = "README.md"
WRITTEN = {
    CARD,
    "samples.png",
    "training.json",
    "evaluation.json",
    "model_index.json",
    "transformer",
    "scheduler",
    "vae",
    "text_encoder",
    "tokenizer",
}

LOADED = ("_name_or_path", "name_or_path", "is_local", "local_files_only")  # what the libraries note in a configuration


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `export` and its flags."""
    parser = commands.add_parser(
        "export",
        help="write the model and its encoders into one folder, for others",
        description="Write a folder that holds the whole pipeline - transformer, scheduler, VAE, text encoder, tokenizer\n"
        "and a model card with the evaluation - and that DiTTextToImagePipeline.from_pretrained loads.",
        epilog="examples:\n  dit export my-model\n  dit export my-model --scheduler dpm++             the default of the export\n"
        "  dit export my-model --checkpoint models/base --lora models/dit/lora",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder; an earlier export in its place is replaced")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("models/dit"), metavar="FOLDER", help="the model; default: %(default)s"
    )
    parser.add_argument(
        "--scheduler",
        choices=get_args(Scheduler),
        metavar="NAME",
        help=f"{', '.join(get_args(Scheduler))}; default: the checkpoint's, {DEFAULTS.scheduler} for what `dvc repro` trained",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="adapters to merge into the weights, and how much of them; may be given several times",
    )
    parser.set_defaults(action=export)


def export(arguments: argparse.Namespace) -> None:
    """Write the export beside its place, put it there when it is whole, and say what there is and how to load it."""
    checkpoint, output = arguments.checkpoint, arguments.output
    read_index(checkpoint)
    loras = [parse_lora(text) for text in arguments.lora]
    check_place(output, checkpoint)

    from safetensors import SafetensorError

    pipeline = load_to_export(checkpoint, arguments.scheduler, loras)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as aside:
            new = Path(aside) / "new"
            missing = write_export(pipeline, checkpoint, new, merged=bool(loras))
            replace_folder(output, new, Path(aside) / "old")
    except (OSError, SafetensorError) as error:  # the disk is full, most often
        raise UserError(f"{output}: cannot be written: {getattr(error, 'strerror', None) or one_line(error)}") from None
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size / 1e6:.1f} MB: transformer, scheduler, VAE, text encoder, tokenizer, {CARD}")
    if missing:
        print(f"{CARD} is without an evaluation: {missing}")
    print("load it:   from dit import DiTTextToImagePipeline")
    print(f'           pipeline = DiTTextToImagePipeline.from_pretrained("{output}")')
    print(f'or run:    dit generate --checkpoint {output} --prompt "a red circle above a blue star"')


def load_to_export(checkpoint: Path, scheduler: str | None, loras: Sequence[tuple[Path, float]] = ()) -> DiTTextToImagePipeline:
    """Load the pipeline in fp32, with the scheduler of that name or with the checkpoint's own, and adapters merged into it."""
    from transformers.utils.logging import disable_progress_bar

    from dit.pipeline.lora import apply_loras
    from dit.pipeline.pipeline import DiTTextToImagePipeline
    from dit.pipeline.schedulers import make_scheduler

    disable_progress_bar()
    pipeline = DiTTextToImagePipeline.from_pretrained(checkpoint)
    if loras:
        apply_loras(pipeline, loras)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    if scheduler:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.config.prediction_type)
    return pipeline


def write_export(
    pipeline: DiTTextToImagePipeline, checkpoint: Path, folder: Path, repository: str | None = None, merged: bool = False
) -> str:
    """Write the whole export into `folder`; the same model gives the same bytes.

    Args:
        pipeline: what `load_to_export` returned for `checkpoint`.
        checkpoint: the model's folder, which has the facts of its training.
        folder: a new one.
        repository: where on the Hub it will be, for the card; None if it stays a folder.
        merged: whether adapters were merged into its weights, so that its evaluation does not hold.

    Returns:
        why the card is without an evaluation, "" where it has one.
    """
    from dit.pipeline.schedulers import scheduler_name

    save_pipeline(pipeline, folder)
    return write_card(checkpoint, folder, scheduler_name(pipeline.scheduler), repository, merged)


def check_place(output: Path, checkpoint: Path) -> None:
    """Raise a `UserError` unless `output` is free, empty, or an earlier export with nothing else in it."""
    if Path.cwd().is_relative_to(output.resolve()):
        raise UserError(f"{output}: is the folder that you are in, or above it; name another folder")
    if output.resolve().is_relative_to(checkpoint.resolve()):
        raise UserError(f"{output}: is the model itself, or inside it; name another folder")
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; name a folder")
    found = {path.name for path in output.iterdir()}
    if not found:
        return
    if not {"model_index.json", "vae", "transformer"} <= found:
        raise UserError(f"{output}: exists and is no earlier export; name another folder")
    read_index(output)
    if found - WRITTEN:
        raise UserError(f"{output}: holds {min(found - WRITTEN)}, which no export wrote; name another folder, or move it away")


def save_pipeline(pipeline: DiTTextToImagePipeline, folder: Path) -> None:
    """Save as `pipeline.save_pretrained`, without where and how its files were loaded, and readable for all."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for config in (*folder.rglob("config.json"), folder / "tokenizer" / "tokenizer_config.json"):
        values = json.loads(config.read_text(encoding="utf-8"))
        if [values.pop(name) for name in LOADED if name in values]:
            config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8", newline="\n")
    for weights in folder.rglob("*.safetensors"):
        shutil.copymode(folder / "model_index.json", weights)  # they are written for their owner alone


def write_card(checkpoint: Path, folder: Path, scheduler: str, repository: str | None, merged: bool) -> str:
    """Write the card and what it is rendered from into `folder`; return why it is without an evaluation, "" where it has one.

    Where adapters are `merged` into the checkpoint, what was measured of it does not hold.
    """
    from dit.commands.model_card import EVALUATION, IMAGE, evaluation_facts, export_card, read_facts, without_paths
    from dit.training.export import FACTS

    training, facts, missing = without_paths(read_facts(checkpoint, FACTS)), read_facts(checkpoint, EVALUATION), ""
    if merged:
        facts, missing = None, "it was of the model before adapters were merged into it"
    image = checkpoint / IMAGE
    if facts is None and not merged:  # else it is an export of an export
        evaluation, missing = find_evaluation(checkpoint)
        facts = evaluation_facts(evaluation) if evaluation else None
        image = evaluation.image or image if evaluation else image
    for name, content in ((FACTS, training), (EVALUATION, facts)):
        if content:
            write_json(folder / name, content)
    if facts and image.is_file():
        shutil.copyfile(image, folder / IMAGE)
    (folder / CARD).write_text(export_card(training, facts, scheduler, repository), encoding="utf-8", newline="\n")
    return missing


def replace_folder(place: Path, new: Path, old: Path) -> None:
    """Put the folder `new` in the place of an earlier one, which becomes `old`."""
    if place.exists():
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
