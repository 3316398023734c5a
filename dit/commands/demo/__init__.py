"""`dit demo`: a page in the browser to generate images with the trained models, to change images and to compare settings."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil

from dit.commands._args import add_flag
from dit.errors import UserError

EXAMPLES = """\
examples:
  dit demo                                             the trained model, and all others that are found, at http://127.0.0.1:7860
  dit demo --checkpoint my-export --checkpoint other   these models first
  dit demo --lora new_colour/lora                      with these adapters in the list
  dit demo --output drawings --port 8000 --no-browser
"""
LOOPBACK = ("127.0.0.1", "localhost")
CACHE = ".page-"  # and the number of the process: of a folder with what the page has uploaded and shows


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `demo` and its flags."""
    parser = commands.add_parser(
        "demo",
        help="generate and change images, and compare settings, on a page in the browser",
        description="Serve a page to generate images with the trained models, to change images with a brush and to compare\n"
        "settings. It is served to this machine alone; nothing is sent anywhere, and nothing but models is fetched.\n"
        "Needs the extra: pip install -c constraints.txt -e '.[demo]'",
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
        "lora",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="adapters to offer first, a file or its folder; default: all that are found in the project",
    )
    add_flag(
        parser,
        "output",
        type=Path,
        default=Path("drawings"),
        metavar="FOLDER",
        help="where every image is saved, with its settings in it; default: %(default)s",
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
    remove_old_caches(output)
    cache = output / f"{CACHE}{os.getpid()}"
    # Before gradio is imported, which also asks itself whether it is there, and that through no proxy.
    os.environ |= {"GRADIO_TEMP_DIR": str(cache), "GRADIO_ANALYTICS_ENABLED": "False"}
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), arguments.host, *LOOPBACK]))

    from dit.commands.demo.models import Models, find_loras, find_models
    from dit.commands.demo.nearest import NearestTrainingImages
    from dit.commands.demo.page import Page, launch

    models, loras = find_models(Path(), arguments.checkpoint), find_loras(Path(), arguments.lora)
    print(f"models: {', '.join(models)}\nimages are saved in {output}", file=sys.stderr)
    nearest = None
    if arguments.host in LOOPBACK:
        nearest = NearestTrainingImages(Path())
    else:
        print(
            f"dit: everybody who reaches {arguments.host} can generate images here, and sees the names of models and adapters",
            file=sys.stderr,
        )
    # It ends it as Ctrl-C does, also where that is ignored, as in the background of a script.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        launch(Page(Models(models, loras), output, cache, nearest), arguments.host, arguments.port, arguments.browser)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def remove_old_caches(output: Path) -> None:
    """Remove what servers that were killed have left in `output`."""
    for folder in output.glob(f"{CACHE}*"):
        number = folder.name.removeprefix(CACHE)
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def check_port(host: str, port: int) -> None:
    """Raise a `UserError` where the page cannot be served at `port`."""
    if not 0 < port < 65536:
        raise UserError(f"--port: {port} is not between 1 and 65535")
    try:
        with socket.create_server((host, port)):
            return
    except socket.gaierror:
        raise UserError(f"--host: {host} is no address of this machine") from None
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}; another --port may be free") from None
