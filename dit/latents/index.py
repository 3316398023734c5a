"""index.json of a latent cache: what made it and what it consists of, checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

FORMAT = 3  # 2 called `no_flip` and `fingerprint` otherwise
FORMAT_OF_SIZES = 4  # shards of several sizes, which what reads 3 does not expect
Count = Annotated[int, Field(strict=True, ge=1)]
LONGEST_CAPTION = 4096  # tokens; every batch is padded to the longest caption
Length = Annotated[int, Field(strict=True, ge=1, le=LONGEST_CAPTION)]
Text = Annotated[str, Field(strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[list[Number], Field(min_length=1)]


class ShardEntry(TypedDict):
    """One shard: its file, what is in it, its size in bytes and its SHA-256."""

    file: Annotated[str, Field(pattern=r"^shard-\d{5}\.safetensors$")]
    images: Count
    captions: Count
    tokens: Count
    longest_caption: Length
    bytes: Count
    sha256: Text


class EncoderEntry(TypedDict):
    """An encoder, as `EncoderSource` has it."""

    name: Text
    revision: Text | None
    resolved: Text | None
    latents_mean: NotRequired[Numbers]  # measured, of a VAE whose configuration says nothing of them
    latents_std: NotRequired[Numbers]


@with_config(ConfigDict(extra="allow"))  # what a person may want to know, and no program needs
class Index(TypedDict):
    """The whole of index.json. `fingerprint` is a digest of the encoders and settings and stands in every shard, too."""

    format: Literal[3, 4]
    fingerprint: Text
    image_size: Count
    sizes: NotRequired[list[tuple[Count, Count]]]  # width and height in pixels, of format 4
    long_captions: NotRequired[Literal["chunks"]]
    vae: EncoderEntry
    vae_class: NotRequired[Text]  # of diffusers; AutoencoderKL where it is not there
    clip: EncoderEntry
    vae_scaling: Number | Numbers
    vae_shift: Number | Numbers
    images: Count
    captions: Count
    tokens: Count
    longest_caption: Length
    captions_sha256: Text
    text_sha256: Text
    shards: Annotated[list[ShardEntry], Field(min_length=1)]


def image_sizes(index: Index) -> list[tuple[int, int]]:
    """Return width and height of the images, that of most of them first: the buckets, or the square."""
    return index.get("sizes", [(index["image_size"], index["image_size"])])


def read_index(path: Path) -> Index:
    """Read and check an index.json.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not the index of a latent cache of this format; one line that names what is wrong.
    """
    try:
        index = TypeAdapter(Index).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path.name}: {where}: {first['msg']}" if where else f"{path.name}: {first['msg']}") from None
    except RecursionError as error:
        raise ValueError(f"{path.name}: {error}") from None
    for name in ("images", "captions", "tokens"):
        held = sum(shard[name] for shard in index["shards"])
        if held != index[name]:
            raise ValueError(f"{path.name}: the shards hold {held} {name}, not {index[name]}")
    return index
