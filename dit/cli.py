"""The command line. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dit.commands import export, generate, sweep
from dit.errors import UserError, without_password

EXAMPLES = """\
examples:
  dit check                                         is params.yaml right, is everything there that the pipeline needs
  dit where                                         where the pictures are, how to look at the runs
  dit inspect data/latents --decode 16              what is in the latent cache, and a picture of it
  dit generate --prompt "a red circle"              draw it with the trained model, into generated.png
  dit export my-model                               the model and its encoders in one folder, for others
  dit sweep                                         which guidance scale and how many steps are worth their time
  dit benchmark                                     how fast training is here, and how fast it could be
  dit compare                                       all trained models side by side: a table and a picture
"""
PLACES = (
    ("metrics/report.md", "all of it on one page"),
    ("samples/grids", "grids of samples with their captions"),
    ("samples/images", "all samples"),
    ("samples/worst.png", "the worst ones, and what is wrong with them"),
    ("samples/nearest.png", "the pictures that are most like a training image, beside it"),
    ("samples/progress", "how the pictures became better during training"),
    ("data/reconstructions.png", "originals above what the VAE keeps of them"),
    ("models/dit", "the trained model"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit", description=__import__("dit").__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checking = commands.add_parser("check", help="check configuration, disk space, data source and weights before running")
    checking.set_defaults(action=check)
    places = commands.add_parser("where", help="say where the results are and how to open MLflow")
    places.set_defaults(action=where)
    inspecting = commands.add_parser(
        "inspect",
        help="summarise a latent cache, check it, show what is in it; or say how a picture was drawn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit inspect data/latents --decode 16 --output latents.png\n"
        "  dit inspect generated.png                   the prompt, seed and settings that `dit generate` has noted in it",
    )
    inspecting.add_argument(
        "what", nargs="?", type=Path, default=Path("data/latents"), help="a latent cache, or a .png; default: %(default)s"
    )
    inspecting.add_argument("--decode", type=int, default=0, metavar="N", help="draw N originals beside their decoded latents")
    inspecting.add_argument("--raw", type=Path, default=Path("data/raw"), help="where the originals are; default: %(default)s")
    inspecting.add_argument("--output", type=Path, default=Path("latents.png"), help="default: %(default)s")
    inspecting.set_defaults(action=inspect)
    bench = commands.add_parser(
        "benchmark",
        help="measure training: against the hardware's peak, other transformers, and encoding at every step",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit benchmark                              some minutes on a GPU, a quarter of an hour on 2 cores\n"
        "  dit benchmark --text-tokens 77 --compile   another length of captions; compiled on a CPU, too\n"
        "  dit benchmark --speedrun                   seconds of training until prompt_accuracy reaches 0.95",
    )
    bench.add_argument("--batch-size", type=int, help="default: 96 on a GPU, 16 on a CPU")
    bench.add_argument("--text-tokens", type=int, default=24, help="length that captions are padded to; default: %(default)s")
    bench.add_argument("--steps", type=int, default=4, help="of each; the fastest counts; default: %(default)s")
    bench.add_argument("--hidden-size", type=int, default=768, help="default: %(default)s")
    bench.add_argument("--num-layers", type=int, default=16, help="default: %(default)s")
    bench.add_argument("--num-heads", type=int, default=12, help="default: %(default)s")
    bench.add_argument("--patch-size", type=int, default=2, choices=[1, 2, 4, 8], help="default: %(default)s")
    bench.add_argument("--precision", choices=["no", "fp16", "bf16"], default="bf16", help="default: %(default)s")
    bench.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="torch.compile this model and its peers; default: on a GPU"
    )
    bench.add_argument(
        "--speedrun",
        action="store_true",
        help="instead: train the recipe shapes as params.yaml has it, and say after how many seconds the pictures are right",
    )
    bench.add_argument("--output", type=Path, default=Path("benchmark.json"), help="default: %(default)s")
    bench.set_defaults(action=run_benchmark)
    comparing = commands.add_parser(
        "compare",
        help="lay trained models side by side: their figures, what was set differently, what they draw",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit compare                                all of MLflow's runs that were evaluated, the best first\n"
        "  dit compare shapes hungry-lamb 3f2a        some, by name or by the beginning of their id\n"
        "  dit compare --metric val_loss --csv runs.csv",
    )
    comparing.add_argument("runs", nargs="*", metavar="RUN", help="its name, or the beginning of its id; default: all")
    comparing.add_argument("--metric", default="prompt_accuracy", help="that orders them; default: %(default)s")
    comparing.add_argument("--output", type=Path, default=Path("compare.png"), help="the picture; default: %(default)s")
    comparing.add_argument("--csv", type=Path, help="write the table here, too")
    comparing.set_defaults(action=compare)
    sending = commands.add_parser("sync-runs", help="send to MLflow what it did not take while its server was away")
    sending.set_defaults(action=sync)
    generate.add_parser(commands)
    export.add_parser(commands)
    sweep.add_parser(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on standard error and exit code 1."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.action(arguments)
    except UserError as error:
        print(f"dit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dit: interrupted", file=sys.stderr)
        return 130  # as a shell has it
    except OSError as error:  # a path that cannot be written, most often
        print(f"dit: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def check(arguments: argparse.Namespace) -> None:
    """Say that nothing is missing, or what is."""
    from dit.checks import check

    check()
    print("settings, disk space, data and weights: nothing is missing")


def where(arguments: argparse.Namespace) -> None:
    """Print what a run has left and where, and how to look at it."""
    import os

    from dit.checks import read_json

    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:
        print(f"before these commands:   . {os.path.relpath(sys.prefix)}/bin/activate")
    if Path("models/dit/model_index.json").exists():
        results = read_json(Path("metrics/evaluate.json")) or {}
        for name in ("prompt_accuracy", "prompt_accuracy_unseen", "clip_score", "val_loss"):
            if name in results:
                print(f"{name:24} {results[name]}")
        for path, what in PLACES:
            if Path(path).exists():
                print(f"{path:24} {what}")
        print('draw something:          dit generate --prompt "a red circle above a blue star"')
    else:
        print("no model yet:            `make repro` trains one; `dvc pull models/dit` fetches one that was pushed")
    uri = without_password(os.environ.get("MLFLOW_TRACKING_URI", ""))
    command = "mlflow ui --backend-store-uri sqlite:///mlflow.db   then open http://127.0.0.1:5000"
    if not uri and not Path("mlflow.db").exists():
        command = "none here yet: a training or an evaluation on this machine makes the first one"
    print(f"runs and curves:         {uri or command}")
    if Path(".state/unsent").exists():
        print("unsent runs:             dit sync-runs sends what MLflow's server did not take")


def inspect(arguments: argparse.Namespace) -> None:
    """Print a summary of a latent cache, compare it with its hashes, and draw some of it; of a picture, how it was drawn."""
    if arguments.what.is_file() or arguments.what.suffix.lower() == ".png":
        from dit.png import read_facts

        facts = read_facts(arguments.what)
        if not facts:
            raise UserError(f"{arguments.what}: nothing is noted in it on how it was drawn")
        for name, value in facts.items():
            print(f"{name:20} {value.replace(chr(10), chr(10) + 21 * ' ')}")
        return
    from dit.inspection import decode_pictures, describe_cache
    from dit.latents import LatentCache

    cache = LatentCache(arguments.what)
    print(describe_cache(cache), flush=True)
    cache.verify()
    print(f"{'checked':16} every file is what {arguments.what / 'index.json'} says")
    if arguments.decode > 0:
        sheet = decode_pictures(cache, arguments.raw, arguments.decode)
        save_picture(sheet, arguments.output)
        print(f"{'picture':16} {arguments.output}: originals on the left, decoded latents on the right")


def run_benchmark(arguments: argparse.Namespace) -> None:
    """Print the benchmark's table and write its figures as JSON."""
    import os
    from dataclasses import asdict

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is imported: its profiler notes its starts and stops

    import torch

    from dit.benchmark import benchmark, table
    from dit.config import Model, load_config
    from dit.files import write_json
    from dit.speedrun import speedrun, speedrun_line

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


def compare(arguments: argparse.Namespace) -> None:
    """Print the table of runs, and write it and their pictures."""
    from dit.compare import comparison_picture, comparison_table, read_runs

    runs = read_runs(arguments.runs, arguments.metric)
    table = comparison_table(runs, arguments.metric)
    print(table.reset_index().to_string(index=False, float_format="{:.4g}".format))
    written = []
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.csv)
        written.append(arguments.csv)
    picture = comparison_picture(runs, arguments.metric)
    if picture:
        save_picture(picture, arguments.output)
        written.append(arguments.output)
    else:
        print("no picture: these runs have no prompt in common")
    for path in written:
        print(path)


def sync(arguments: argparse.Namespace) -> None:
    """Send the runs that wait."""
    from dit.sync import sync_runs

    sent = sync_runs()
    print(f"{len(sent)} runs sent" if sent else "no run waits to be sent")


def save_picture(picture, path: Path) -> None:
    """Write a picture, in the format that the end of its name says, into a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        picture.save(path)
    except ValueError as error:
        raise UserError(f"--output {path}: {error}; a name that ends in .png will do") from None


if __name__ == "__main__":
    sys.exit(main())
