"""`dit compare`: trained models side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit.commands._args import make_folder_of, save_picture


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `compare` and its flags."""
    parser = commands.add_parser(
        "compare",
        help="lay trained models side by side: their figures, what was set differently, what they draw",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit compare                                all of MLflow's runs that were evaluated, the best first\n"
        "  dit compare shapes hungry-lamb 3f2a        some, by name or by the beginning of their id\n"
        "  dit compare --metric val_loss --csv runs.csv",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="its name, or the beginning of its id; default: all")
    parser.add_argument("--metric", default="prompt_accuracy", help="that orders them; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="the picture; default: %(default)s")
    parser.add_argument("--csv", type=Path, help="write the table here, too")
    parser.set_defaults(action=run_compare)


def run_compare(arguments: argparse.Namespace) -> None:
    """Print the table of runs, and write it and their images."""
    from dit.commands.comparison import comparison_picture, comparison_table, read_runs

    make_folder_of(arguments.output)
    if arguments.csv:
        make_folder_of(arguments.csv, "--csv")
    runs = read_runs(arguments.runs, arguments.metric)
    table = comparison_table(runs, arguments.metric)
    print(table.reset_index().to_string(index=False, float_format="{:.4g}".format))
    written = []
    if arguments.csv:
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
