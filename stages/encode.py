"""Stage 2: images and captions become latents and text embeddings, once, so that training touches neither encoder.

python -m stages.encode             as `dvc repro encode` does; goes on where a run was killed
python -m stages.encode --part 2/4  every fourth shard from the second on, into .state/encode: four machines share the work
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import stages.sleeping_threads  # noqa: F401 (before torch is loaded)
from dit.config import Params
from dit.encode.encode import WHOLE, Part, encode_dataset
from dit.encoders.loading import check_sides
from dit.utils.files import write_json
from stages import run_stage

METRICS = "metrics/encode.json"


def main(params: Params, part: Part = WHOLE) -> None:
    """Encode data/raw into data/latents, or a part of it into .state/encode; several processes share the work."""
    check_sides(params.recipe, params.active)
    metrics = encode_dataset(
        raw=Path("data/raw"),
        folder=Path("data/latents"),
        settings=params.active.encode,
        runtime=params.runtime,
        reconstructions=Path("data/reconstructions.png"),
        part=part,
    )
    if metrics is None:  # a part, or not the first of several processes
        return
    write_json(Path(METRICS), metrics)
    print(f"reconstruction {metrics['reconstruction_psnr']} dB: see data/reconstructions.png", flush=True)


def parse_part(text: str) -> Part:
    """Read a part as the command line has it: "2/4" is the second of four."""
    try:
        number, of = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2/4, the second of four parts") from None
    if not 1 <= number <= of:
        raise argparse.ArgumentTypeError(f"{text}: {of} parts are 1/{of} to {of}/{of}")
    return Part(number, of)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=parse_part, default=WHOLE, metavar="K/N", help="write the K-th of N parts of the shards")
    chosen = parser.parse_args().part
    run_stage("encode", partial(main, part=chosen), metrics=[METRICS], parallel=True, writes_outs=chosen == WHOLE)
