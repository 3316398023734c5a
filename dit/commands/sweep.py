"""`dit sweep`: which guidance scale and how many steps are worth their time, with a model as it is."""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path
from typing import get_args

from dit.commands._args import add_flag, make_folder_of
from dit.config import DEFAULTS, Scheduler
from dit.errors import UserError
from dit.pipeline.model_folder import read_index

EXAMPLES = """\
examples:
  dit sweep
  dit sweep --guidance_scale 1.5 --num_inference_steps 5 10 20 50
  dit sweep --scheduler euler dpm++ stochastic --guidance_scale 1.5 --num_inference_steps 10 20 100 --num_samples 1000
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `sweep` and its flags, which are spelled as diffusers' arguments are."""
    parser = commands.add_parser(
        "sweep",
        help="sample with several guidance scales and numbers of steps: a table and a plot of quality against seconds",
        description="Sample the same prompts from the same seeds with every combination, and score the images: by prompt\n"
        "accuracy where they are of coloured shapes, else by CLIP score. Nothing is trained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "default: %(default)s"
    add_flag(parser, "checkpoint", type=Path, default=Path("models/dit"), metavar="FOLDER", help=f"the model; {default}")
    add_flag(parser, "guidance_scale", type=float, nargs="+", default=[1.0, 1.5, 3.0], metavar="X", help="default: 1 1.5 3")
    steps = [5, 10, 20, 40]
    add_flag(parser, "num_inference_steps", type=int, nargs="+", default=steps, metavar="N", help="default: 5 10 20 40")
    add_flag(
        parser,
        "scheduler",
        choices=get_args(Scheduler),
        nargs="+",
        default=[DEFAULTS.scheduler],
        metavar="NAME",
        help=f"{', '.join(get_args(Scheduler))}; default: {DEFAULTS.scheduler}",
    )
    add_flag(parser, "num_samples", type=int, default=200, metavar="N", help=f"prompts, the same for all; {default}")
    add_flag(
        parser,
        "tolerance",
        type=float,
        default=0.02,
        metavar="X",
        help=f"how much worse than the best the cheapest may be; {default}",
    )
    add_flag(
        parser, "output", type=Path, default=Path("sweep"), metavar="NAME", help=f"NAME.csv and NAME.png are written; {default}"
    )
    parser.set_defaults(action=run_sweep)


def run_sweep(arguments: argparse.Namespace) -> None:
    """Print the table and the cheapest good setting, and write the table and its plot."""
    check_numbers(arguments)
    table_file, plot_file = find_outputs(arguments.output)
    read_index(arguments.checkpoint)

    from dit.commands.sampler_sweep import Setting, cheapest, describe, margin_of_error, plot, readable, sweep
    from dit.config import load_config

    every = product(arguments.scheduler, arguments.guidance_scale, arguments.num_inference_steps)
    settings = list(dict.fromkeys(Setting(scheduler, steps, scale) for scheduler, scale, steps in every))
    params, latents, raw = load_config(), Path("data/latents"), Path("data/raw")
    table = sweep(params, arguments.checkpoint, latents, raw, settings, arguments.num_samples)
    table.to_csv(table_file, index=False, float_format="%.5g")
    plot(table).savefig(plot_file, dpi=110)
    print(f"\n{readable(table).to_string(index=False)}")
    row = cheapest(table, arguments.tolerance)
    print(
        f"\nwithin {arguments.tolerance:g} of the best, the cheapest: {describe(row)}: {row['seconds']:.2f} s for 100 images\n"
        f"{row['prompts']} prompts leave a margin of error of {margin_of_error(table):.2g}; a larger --num_samples reduces it\n"
        f"{table_file}\n{plot_file}"
    )


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise a `UserError` for the first number out of range."""
    if arguments.num_samples < 2:
        raise UserError(f"--num_samples: {arguments.num_samples} is not at least 2")
    for steps in arguments.num_inference_steps:
        if steps < 1:
            raise UserError(f"--num_inference_steps: {steps} is not a positive number")
    for scale in arguments.guidance_scale:
        if not 1 <= scale < math.inf:
            raise UserError(f"--guidance_scale: {scale:g} is not a number from 1 (which is without guidance) on")
    if not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance: {arguments.tolerance:g} is not a number from 0 on")


def find_outputs(name: Path) -> tuple[Path, Path]:
    """Return the files of the table and of the plot; the folder that they lie in is made.

    Raises:
        UserError: `name` is a folder, or the files cannot be written.
    """
    name = name.with_suffix("") if name.suffix in (".csv", ".png") else name
    make_folder_of(name)
    files = name.with_name(f"{name.name}.csv"), name.with_name(f"{name.name}.png")
    for file in files:
        make_folder_of(file)
    return files
