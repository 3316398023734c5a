"""`dit demo`: a page in the browser to draw with the trained models, to change pictures and to compare settings."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from pathlib import Path

from dit.commands._args import add_flag
from dit.errors import UserError

EXAMPLES = """\
examples:
  dit demo                                             the trained model, and all others that are found, at http://127.0.0.1:7860
  dit demo --checkpoint my-export --checkpoint other   these models first
  dit demo --output drawings --port 8000 --no-browser
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `demo` and its flags."""
    parser = commands.add_parser(
        "demo",
        help="draw, change pictures and compare settings on a page in the browser",
        description="Serve a page to draw with the trained models, to change pictures with a brush and to compare settings.\n"
        "It is served to this machine alone, and fetches and sends nothing. Needs the extra: pip install -c constraints.txt "
        "-e '.[demo]'",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flag(
        parser,
        "checkpoint",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a model to offer first; default: models/dit, model folders in the project and registered models",
    )
    add_flag(
        parser,
        "output",
        type=Path,
        default=Path("drawings"),
        metavar="FOLDER",
        help="where every picture is saved, with its settings in it; default: %(default)s",
    )
    add_flag(parser, "host", default=LOOPBACK[0], metavar="ADDRESS", help="0.0.0.0 serves all networks; default: %(default)s")
    add_flag(parser, "port", type=int, default=7860, metavar="N", help="default: %(default)s")
    add_flag(parser, "browser", action=argparse.BooleanOptionalAction, default=True, help="open it in the browser; default: yes")
    parser.set_defaults(action=demo)


def demo(arguments: argparse.Namespace) -> None:
    """Find the models, load the first, and serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("demo: the page needs gradio: pip install -c constraints.txt -e '.[demo]'")
    check_port(arguments.host, arguments.port)
    output: Path = arguments.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot be made: {error.strerror}") from None
    # Before gradio is imported: what the page uploads and shows lies in the output folder, too.
    os.environ["GRADIO_TEMP_DIR"] = str(output / ".page")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

    from dit.commands.demo.models import Models, find_models
    from dit.commands.demo.page import Page, launch

    models = find_models(Path(), arguments.checkpoint)
    print(f"models: {', '.join(models)}\npictures are saved in {output}", file=sys.stderr)
    if arguments.host not in LOOPBACK:
        print(f"dit: everybody who reaches {arguments.host} can draw here, and sees the models' names", file=sys.stderr)
    launch(Page(Models(models), output, Path()), arguments.host, arguments.port, arguments.browser)


def check_port(host: str, port: int) -> None:
    """Raise a `UserError` where the page cannot be served at `port`."""
    if not 0 < port < 65536:
        raise UserError(f"--port: {port} is not between 1 and 65535")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; another --port, such as {port + 1}, may be free"
        ) from None
