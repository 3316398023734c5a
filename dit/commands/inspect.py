"""`dit inspect`: what is in a latent cache; how an image was drawn."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit.commands._args import save_picture
from dit.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `inspect` and its flags."""
    parser = commands.add_parser(
        "inspect",
        help="summarise a latent cache, check it, show what is in it; or say how a picture was drawn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  dit inspect data/latents --decode 16 --output latents.png\n"
        "  dit inspect generated.png                   the prompt, seed and settings that `dit generate` has noted in it",
    )
    parser.add_argument(
        "what", nargs="?", type=Path, default=Path("data/latents"), help="a latent cache, or a .png; default: %(default)s"
    )
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="draw N originals beside their decoded latents")
    parser.add_argument("--raw", type=Path, default=Path("data/raw"), help="where the originals are; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("latents.png"), help="default: %(default)s")
    parser.set_defaults(action=run_inspect)


def printable(text: str) -> str:
    """`text` with what would command a terminal, or be nothing to see, as Python writes it: an image may be anybody's."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def run_inspect(arguments: argparse.Namespace) -> None:
    """Print a summary of a latent cache, compare it with its hashes, and draw some of it; of an image, how it was drawn."""
    if arguments.what.is_file() or arguments.what.suffix.lower() == ".png":
        from dit.commands.png import read_facts

        facts = read_facts(arguments.what)
        if not facts:
            raise UserError(f"{arguments.what}: nothing is noted in it on how it was drawn")
        for name, value in facts.items():
            lines = ("\n" + 21 * " ").join(printable(line) for line in value.split("\n"))
            print(f"{printable(name):20} {lines}")
        return
    if not arguments.what.is_dir():
        raise UserError(f"{arguments.what}: no such file or folder; `dvc repro encode` makes data/latents")
    if (arguments.what / "model_index.json").is_file():
        raise UserError(f"{arguments.what}: a trained model, not a latent cache; `dit generate --checkpoint` draws with it")
    if arguments.decode < 0:
        raise UserError(f"--decode: {arguments.decode} is not a number of pictures")

    from dit.commands.inspection import decode_pictures, describe_cache
    from dit.latents.cache import LatentCache

    cache = LatentCache(arguments.what)
    print(describe_cache(cache), flush=True)
    cache.verify()
    print(f"{'checked':16} every file is what {arguments.what / 'index.json'} says")
    if arguments.decode > 0:
        sheet = decode_pictures(cache, arguments.raw, arguments.decode)
        save_picture(sheet, arguments.output)
        print(f"{'picture':16} {arguments.output}: originals on the left, decoded latents on the right")
