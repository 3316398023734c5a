"""`dit benchmark`: how fast training, data and sampling are here, and what each setting of the recipe buys."""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dit.commands._args import add_flag
from dit.commands._benchmark import add_kind, require_positive
from dit.commands.benchmark_objects import add_objects
from dit.config import load_config
from dit.errors import UserError

LATENTS, RAW = Path("data/latents"), Path("data/raw")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `benchmark` and its subcommands; without one, it prints its help."""
    parser = commands.add_parser("benchmark", help="measure how fast training, data and sampling are, and what settings buy")
    parser.set_defaults(action=lambda _: parser.print_help(), threads_sleep=False)  # it measures torch as it comes
    kinds = parser.add_subparsers(metavar="KIND")
    _add_training(kinds)
    _add_data(kinds)
    _add_sampling(kinds)
    _add_speedrun(kinds)
    _add_race(kinds)
    _add_recipe(kinds)
    _add_busy(kinds)
    _add_gpu(kinds)
    add_objects(kinds)


def _add_training(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "training",
        run_training,
        "measure training: against the hardware's peak, other transformers, and encoding at every step",
        "  dit benchmark training                              some minutes on a GPU, a quarter of an hour on 2 cores\n"
        "  dit benchmark training --text-tokens 77 --compile   another length of captions; compiled on a CPU, too",
    )
    add_flag(parser, "batch-size", type=int, help="default: 96 on a GPU, 16 on a CPU")
    add_flag(parser, "text-tokens", type=int, default=24, help="length that captions are padded to; default: %(default)s")
    add_flag(parser, "steps", type=int, default=4, help="of each; the fastest counts; default: %(default)s")
    add_flag(parser, "hidden-size", type=int, default=768, help="default: %(default)s")
    add_flag(parser, "num-layers", type=int, default=16, help="default: %(default)s")
    add_flag(parser, "num-heads", type=int, default=12, help="default: %(default)s")
    add_flag(parser, "patch-size", type=int, default=2, choices=[1, 2, 4, 8], help="default: %(default)s")
    add_flag(parser, "conv-channels", type=int, default=0, help="of the convolutions before and after; default: none")
    add_flag(parser, "precision", choices=["no", "fp16", "bf16"], default="bf16", help="default: %(default)s")
    compile_help = "torch.compile this model and its peers; default: on a GPU"
    add_flag(parser, "compile", action=argparse.BooleanOptionalAction, help=compile_help)


def run_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure training steps and print the table."""
    require_positive(arguments, "batch_size", "text_tokens", "steps", "hidden_size", "num_layers", "num_heads")
    if arguments.conv_channels < 0:
        raise UserError(f"--conv-channels: {arguments.conv_channels} is negative; 0 would be none")
    if arguments.hidden_size % (4 * arguments.num_heads):
        raise UserError(f"--hidden-size: {arguments.hidden_size} is not a multiple of 4 x --num-heads")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: its profiler logs its starts and stops

    import torch

    from dit.benchmark.training import benchmark_training, training_table
    from dit.config import Model

    gpu = torch.cuda.is_available()
    flags = [field.name for field in fields(Model) if field.name != "output"]  # --output is the file; both outputs cost the same
    results = benchmark_training(
        load_config(),
        Model(**{name: getattr(arguments, name) for name in flags}, output="velocity"),
        batch=arguments.batch_size or (96 if gpu else 16),
        tokens=arguments.text_tokens,
        rounds=arguments.steps,
        precision=arguments.precision,
        compiled=gpu if arguments.compile is None else arguments.compile,
    )
    print(training_table(results))
    return results


def _add_data(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "data",
        run_data,
        "measure how fast images are downloaded and encoded, and a latent cache is read",
        "  dit benchmark data                       all of it; 5 minutes on 2 cores, and 7 GB on the disk for a while\n"
        "  dit benchmark data encode --images 256   encoding alone, of more images: what a GPU needs to get going\n"
        "  dit benchmark data read --entries 118000",
    )
    parser.add_argument("part", nargs="?", choices=("download", "encode", "read"), help="default: all of them")
    add_flag(parser, "images", type=int, default=16, help="to encode; 16 times as many to download; default: %(default)s")
    sizes = [1000, 10_000, 118_000]
    add_flag(parser, "entries", type=int, nargs="+", default=sizes, metavar="N", help="of caches; default: 1000 10000 118000")
    add_flag(parser, "folder", type=Path, help="where temporary files are written; default: the system's folder for them")


def run_data(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts of the way that data takes, and print a table for each."""
    require_positive(arguments, "images")
    if min(arguments.entries) < 1:
        raise UserError(f"--entries: {min(arguments.entries)} is not a positive number")

    params, part = load_config(), arguments.part
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, os.environ["DVC_ROOT"] = Path(name), name
        if part in ("download", None):
            from dit.benchmark.data import benchmark_download, download_table

            connections = params.runtime.download_connections
            results["download"] = benchmark_download(folder, 16 * arguments.images, connections)
            print(f"\n{download_table(results['download'])}", flush=True)
        if part in ("encode", None):
            from dit.benchmark.data import benchmark_encode, encode_table

            results["encode"] = benchmark_encode(folder, arguments.images, params)
            print(f"\n{encode_table(results['encode'])}", flush=True)
        if part in ("read", None):
            from dit.benchmark.synthetic import benchmark_read, read_table

            results["read"] = [benchmark_read(folder / f"cache-{count}", count) for count in arguments.entries]
            print(f"\n{read_table(results['read'])}")
    return results


def _add_sampling(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "sampling",
        run_sampling,
        "measure what caching the text and guiding in one batch buy, or what editing keeps of an image",
        "  dit benchmark sampling text      with the model of models/dit, and a large one with random weights\n"
        "  dit benchmark sampling editing   how often a red circle becomes a blue one in its place, by strength",
    )
    parser.add_argument("part", nargs="?", choices=("text", "editing"), help="default: both")
    add_flag(parser, "batch-size", type=int, default=32, help="images at once, for text; default: %(default)s")
    add_flag(parser, "checkpoint", type=Path, default=Path("models/dit"), metavar="FOLDER", help="default: %(default)s")


def run_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure sampling or editing with a trained model, and print the table."""
    require_positive(arguments, "batch_size")

    from dit.pipeline.model_folder import read_index

    read_index(arguments.checkpoint)

    from dit.benchmark.editing import benchmark_editing, editing_table
    from dit.benchmark.sampling import benchmark_text, text_table

    results: dict[str, Any] = {}
    if arguments.part in ("text", None):
        results["text"] = benchmark_text(arguments.checkpoint, arguments.batch_size)
        print(f"\n{text_table(results['text'])}", flush=True)
    if arguments.part in ("editing", None):
        results["editing"] = benchmark_editing(arguments.checkpoint)
        print(f"\n{editing_table(results['editing'])}")
    return results


def _add_speedrun(kinds: argparse._SubParsersAction) -> None:
    add_kind(
        kinds,
        "speedrun",
        run_speedrun,
        "train the recipe shapes as params.yaml has it, and measure after how many seconds the images are right",
        "  dit benchmark speedrun   seconds of training until prompt_accuracy reaches 0.95; needs data/latents",
    )


def run_speedrun(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, score, and print after how many seconds the goal was reached."""
    from dit.benchmark.speedrun import GOAL, speedrun, speedrun_line

    points = speedrun(load_config(), LATENTS, RAW)
    print(speedrun_line(points))
    return {"goal": GOAL, "points": [asdict(point) for point in points]}


def _add_race(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "race",
        run_race,
        "train this model and its peers, of the same size, in the same loop, and measure after how long the images are right",
        "  dit benchmark race                     all of them, one after the other; needs data/latents\n"
        "  dit benchmark race this-model pixart   these two",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="this-model, pixart or sit; default: all")
    add_flag(parser, "prompts", type=int, default=300, help="validation captions to score; default: %(default)s")


def run_race(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the networks, and print a row for each as soon as it is trained."""
    require_positive(arguments, "prompts")

    from dit.benchmark.peers import PEERS
    from dit.benchmark.race import HEADER, race, race_row
    from dit.benchmark.results import markdown_table

    unknown = [name for name in arguments.names if name not in PEERS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such network; they are {', '.join(PEERS)}")
    params, results = load_config(), {}
    for number, name in enumerate(arguments.names or PEERS):
        parameters, points = race(params, LATENTS, name, arguments.prompts)
        results[name] = {"parameters": parameters, "points": [asdict(point) for point in points]}
        lines = markdown_table(HEADER, [race_row(name, parameters, points)]).splitlines()
        print("\n".join(lines[-1:] if number else lines), flush=True)
    return results


def _add_recipe(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "recipe",
        run_recipe,
        "train variants of the recipe shapes for about the same time, and measure what each of its settings buys",
        "  dit benchmark recipe                    all variants, two to three minutes each on 2 cores; needs data/latents\n"
        "  dit benchmark recipe default batch-48   these two",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a variant, such as default or patch-4; default: all")


def run_recipe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the variants, and print a row for each as soon as it is trained."""
    from dit.benchmark.recipe import HEADER, VARIANTS, run_variant
    from dit.benchmark.results import markdown_table

    unknown = [name for name in arguments.names if name not in VARIANTS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such variant; they are {', '.join(VARIANTS)}")
    params, rows = load_config(), []
    for name in arguments.names or VARIANTS:
        point = run_variant(params, name, LATENTS, RAW)
        rows.append({"variant": name} | asdict(point))
        cells = (name, str(point.step), f"{point.seconds:.0f}", f"{point.accuracy:.3f}")
        lines = markdown_table(HEADER, [cells]).splitlines()
        print("\n".join(lines if len(rows) == 1 else lines[-1:]), flush=True)
    return {"variants": rows}


def _add_busy(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "busy",
        run_busy,
        "measure what is left of the training's speed beside a busy process, by how the threads of a CPU wait for each other",
        "  dit benchmark busy               5 minutes on 2 cores that are quiet; needs data/latents\n"
        "  dit benchmark busy --steps 200   with less noise",
    )
    add_flag(parser, "steps", type=int, default=60, help="of training, for each measurement; default: %(default)s")


def run_busy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train for a while in each of the ways, and print the table."""
    require_positive(arguments, "steps")

    from dit.benchmark.busy import benchmark_busy, busy_table

    rows = benchmark_busy(arguments.steps)
    print(busy_table(rows))
    return {"rows": rows}


def _add_gpu(kinds: argparse._SubParsersAction) -> None:
    parser = add_kind(
        kinds,
        "gpu",
        run_gpu,
        "run the tests that need a GPU and measure all that only a GPU can show; without DVC, MLflow, network and data",
        "  dit benchmark gpu              under 8 minutes on a GPU\n"
        "  dit benchmark gpu --rehearse   the same with a small model, on the CPU where there is no GPU",
    )
    add_flag(parser, "batch-size", type=int, help="default: 96; 4 in a rehearsal")
    add_flag(parser, "text-tokens", type=int, default=24, help="length that captions are padded to; default: %(default)s")
    add_flag(parser, "steps", type=int, default=10, help="of each; the fastest counts; default: %(default)s")
    add_flag(parser, "rehearse", action="store_true", help="with a small model")


def run_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print the tables."""
    require_positive(arguments, "batch_size", "text_tokens", "steps")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: its profiler logs its starts and stops

    import torch

    from dit.benchmark.gpu import benchmark_gpu, gpu_table, small

    gpu, rehearse = torch.cuda.is_available(), arguments.rehearse
    if not gpu and not rehearse:
        raise UserError(
            "there is no GPU here that torch can use; `dit benchmark gpu --rehearse` does the same on the CPU, in small"
        )
    params = load_config()
    model = small(params.coco.model) if rehearse else params.coco.model
    batch = arguments.batch_size or (4 if rehearse else 96)
    results = benchmark_gpu(params, model, batch, arguments.text_tokens, arguments.steps, compiled=gpu)
    print(gpu_table(results))
    return results
