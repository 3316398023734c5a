"""The command line. Heavy libraries are imported by the command that needs them."""

from __future__ import annotations

import argparse
import os
import sys

import dit
from dit.commands import benchmark, check, compare, demo, export, generate, inspect, push, sweep, sync_runs, where
from dit.commands._args import not_understood
from dit.commands._threads import sleep_while_waiting
from dit.errors import UserError, is_out_of_memory, out_of_memory

EXAMPLES = """\
examples:
  dit check                                         is params.yaml right, is everything there that the pipeline needs
  dit where                                         where the results are, how to look at the runs
  dit inspect data/latents --decode 16              what is in the latent cache, and images of it
  dit generate --prompt "a red circle"              an image from the trained model, as generated.png
  dit demo                                          a page in the browser to generate and change images
  dit export my-model                               the model and its encoders in one folder, for others
  dit push anna/my-model                            the same in a private repository on the Hugging Face Hub
  dit sweep                                         which guidance scale and how many steps are worth their time
  dit benchmark training                            how fast training is here, and how fast it could be
  dit compare                                       all trained models side by side: a table and their images
"""
COMMANDS = (check, where, inspect, generate, demo, export, push, sweep, benchmark, compare, sync_runs)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `dit`; each command sets the function to call as `action`, and its own parser as `parser`."""
    parser = argparse.ArgumentParser(
        prog="dit", description=dit.__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(action=lambda _: parser.print_help(), parser=parser, threads_sleep=True)  # without a command
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; a user's mistake is one line on standard error and exit code 1."""
    arguments, rest = build_parser().parse_known_args(argv)
    if rest:
        arguments.parser.error(not_understood(arguments.parser, rest))
    if arguments.threads_sleep:
        sleep_while_waiting()
    try:
        arguments.action(arguments)
    except UserError as error:
        print(f"dit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dit: interrupted", file=sys.stderr)
        return 130  # as shells do
    except BrokenPipeError:  # what read the output has closed it: `dit inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's end has nothing left to write
        return 141  # as shells do
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            print(f"dit: {out_of_memory(error)}", file=sys.stderr)
        elif isinstance(error, OSError):  # a path that cannot be written, most often
            print(f"dit: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        else:
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
