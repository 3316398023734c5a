"""`dit benchmark`: how fast training is here, and how fast it could be."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from dit.commands._args import add_flag, make_folder_of
from dit.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `benchmark` and its flags."""
    parser = commands.add_parser(
        "benchmark",
        help="measure training: against the hardware's peak, other transformers, and encoding at every step",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit benchmark                              some minutes on a GPU, a quarter of an hour on 2 cores\n"
        "  dit benchmark --text-tokens 77 --compile   another length of captions; compiled on a CPU, too\n"
        "  dit benchmark --speedrun                   seconds of training until prompt_accuracy reaches 0.95",
    )
    add_flag(parser, "batch-size", type=int, help="default: 96 on a GPU, 16 on a CPU")
    add_flag(parser, "text-tokens", type=int, default=24, help="length that captions are padded to; default: %(default)s")
    add_flag(parser, "steps", type=int, default=4, help="of each; the fastest counts; default: %(default)s")
    add_flag(parser, "hidden-size", type=int, default=768, help="default: %(default)s")
    add_flag(parser, "num-layers", type=int, default=16, help="default: %(default)s")
    add_flag(parser, "num-heads", type=int, default=12, help="default: %(default)s")
    add_flag(parser, "patch-size", type=int, default=2, choices=[1, 2, 4, 8], help="default: %(default)s")
    add_flag(parser, "precision", choices=["no", "fp16", "bf16"], default="bf16", help="default: %(default)s")
    add_flag(
        parser, "compile", action=argparse.BooleanOptionalAction, help="torch.compile this model and its peers; default: on a GPU"
    )
    add_flag(
        parser,
        "speedrun",
        action="store_true",
        help="instead: train the recipe shapes as params.yaml has it, and say after how many seconds the pictures are right",
    )
    add_flag(parser, "output", type=Path, default=Path("benchmark.json"), help="default: %(default)s")
    parser.set_defaults(action=run_benchmark)


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Print the benchmark's table and write its figures as JSON."""
    make_folder_of(arguments.output)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: its profiler notes its starts and stops

    import torch

    from dit.benchmark.speedrun import speedrun, speedrun_line
    from dit.benchmark.training import benchmark, table
    from dit.config import Model, load_config
    from dit.utils.files import write_json

    params = load_config()
    if arguments.speedrun:
        points = speedrun(params, Path("data/latents"), Path("data/raw"))
        print(speedrun_line(points))
        write_json(arguments.output, [asdict(point) for point in points])
    else:
        numbers = ("batch_size", "text_tokens", "steps", "hidden_size", "num_layers", "num_heads")
        for name in (name for name in numbers if getattr(arguments, name) is not None and getattr(arguments, name) < 1):
            raise UserError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is not a positive number")
        if arguments.hidden_size % (4 * arguments.num_heads):
            raise UserError(f"--hidden-size: {arguments.hidden_size} is not a multiple of 4 x --num-heads")
        gpu = torch.cuda.is_available()
        results = benchmark(
            params,
            Model(**{name: getattr(arguments, name) for name in ("patch_size", "hidden_size", "num_layers", "num_heads")}),
            batch=arguments.batch_size or (96 if gpu else 16),
            tokens=arguments.text_tokens,
            rounds=arguments.steps,
            precision=arguments.precision,
            compiled=gpu if arguments.compile is None else arguments.compile,
        )
        print(table(results))
        write_json(arguments.output, results)
    print(f"\n{arguments.output}")
