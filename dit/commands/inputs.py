"""Read and check the inputs of `dit generate`, before anything heavy is loaded."""

from __future__ import annotations

import hashlib
import io
import math
import re
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dit.commands._args import make_folder_of
from dit.dataset.decode import open_named
from dit.dataset.filters import is_text
from dit.dataset.rgb import is_transparent
from dit.errors import UserError
from dit.pipeline.model_folder import find_lora

TRAININGS = Path(".state/train")  # where trainings that are not done keep their checkpoints, each in a folder of its own
LATEST = Path("latest")
SCALE = re.compile(r"-?\d+(\.\d*)?|-?\.\d+")  # behind the colon of --lora
LARGEST = 100_000  # of these
POSITIVE = ("num_inference_steps", "height", "width", "num_images_per_prompt", "batch_size")


@dataclass(frozen=True)
class InputImage:
    """An image to start from, or a mask, and the SHA-256 of its file."""

    image: Image.Image
    sha256: str


def check_numbers(arguments: Namespace) -> None:
    """Raise a `UserError` for the first number out of range; whether they fit the model is for the pipeline to say."""
    for name in POSITIVE:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} is not a positive number")
        if value is not None and value > LARGEST:
            raise UserError(f"--{name}: {value} is more than {LARGEST:,}")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed: {arguments.seed} is not between 0 and {2**63 - 1}")
    if not 1 <= arguments.guidance_scale < math.inf:
        raise UserError(f"--guidance_scale: {arguments.guidance_scale} is not a number from 1 (which is without guidance) on")
    low, high = arguments.guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"--guidance_interval: {low} {high} does not rise from 0 to 1")
    if arguments.strength is not None and not 0 <= arguments.strength <= 1:
        raise UserError(f"--strength: {arguments.strength} is not between 0 and 1")


def read_lines(file: Path, shown: str) -> list[str]:
    """Return the lines of a text file, which errors call `shown`.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """`prompts`, and those of `file`: a prompt a line, blank lines skipped.

    Raises:
        UserError: there is none, one is empty, or the file cannot be read.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt: one is empty")
    for prompt in prompts:
        check_text("--prompt", prompt)
    if file is None:
        if not prompts:
            raise UserError('no prompt; for instance: dit generate --prompt "a red circle above a blue star"')
        return prompts
    lines = read_lines(file, f"--prompts-file {file}")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--prompts-file {file}: there is no prompt in it; write one a line")
    return [*prompts, *found]


def parse_lora(text: str) -> tuple[Path, float]:
    """Return the file of adapters and the scale that `--lora PATH[:scale]` asks for; the scale is 1 where none is given.

    Raises:
        UserError: there is no such file.
    """
    path, colon, scale = text.rpartition(":")
    if not Path(text).exists() and colon and SCALE.fullmatch(scale):
        return find_lora(Path(path)), float(scale)
    return find_lora(Path(text)), 1.0


def check_text(flag: str, value: str) -> None:
    """Raise a `UserError` where the terminal has sent `value` in another encoding than UTF-8."""
    if not is_text(value):
        raise UserError(f"{flag} {value!r}: not UTF-8; set the terminal to UTF-8, or write it into a --prompts-file")


def read_images(image: Path | None, mask: Path | None, strength: float | None) -> tuple[InputImage | None, InputImage | None]:
    """Return the image to start from (RGB) and the mask (L), each turned as its EXIF data say.

    Raises:
        UserError: one cannot be used, they do not lie over each other, or the image is missing beside the others.
    """
    if image is None:
        for flag, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                raise UserError(f"{flag}: there is no image to change; name one with --image")
        return None, None
    given = _read_image("--image", image, "RGB")
    if mask is None:
        return given, None
    from dit.utils.images import lies_over  # here, since it imports torch

    over = _read_image("--mask", mask, "L")
    (width, height), (mask_width, mask_height) = given.image.size, over.image.size
    if not lies_over(given.image.size, over.image.size):
        raise UserError(
            f"--mask {mask}: {mask_width} x {mask_height} pixels do not lie over the image's {width} x {height}; "
            f"paint it on a copy of {image}"
        )
    return given, over


def _read_image(flag: str, path: Path, mode: str) -> InputImage:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    image = open_named(content, f"{flag} {path}").convert(mode)
    if mode == "L":
        with Image.open(io.BytesIO(content)) as file:
            if is_transparent(file):
                raise UserError(
                    f"{flag} {path}: transparent in places, which may mean either; put it on a background, white where it changes"
                )
    return InputImage(image, hashlib.sha256(content).hexdigest())


def find_checkpoints(given: Path) -> list[Path]:
    """Return the checkpoints that `--checkpoint` asks for: one, or those in a training's folder or ("latest") all, newest first.

    There is none where it names a model's folder.

    Raises:
        UserError: "latest" is asked for, and there is none.
    """
    if given.suffix in (".safetensors", ".json") and given.name.startswith("step-"):
        return [given]
    if given.is_dir() and not (given / "model_index.json").exists():
        return _newest_first(given.glob("**/step-*.json"))
    if given != LATEST or given.exists():
        return []
    records = _newest_first(TRAININGS.glob("*/step-*.json"))
    if not records:
        raise UserError(
            f"--checkpoint {given}: there is none in {TRAININGS}; a training writes one every runtime.checkpoint_every steps, "
            "and deletes them when it is done: then models/dit is its model"
        )
    return records


def _newest_first(records: Iterable[Path]) -> list[Path]:
    times = {path: path.stat().st_mtime for path in records}
    return sorted(times, key=lambda path: times[path], reverse=True)


def check_output(path: Path) -> None:
    """Make the folder that `path` lies in.

    Raises:
        UserError: `path` is no name for a PNG file, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(
            f"--output {path}: its name must end in .png, since only a PNG keeps every pixel and its settings; a folder's in /"
        )
    make_folder_of(path)
