"""params.yaml as frozen dataclasses, and one clear line for whatever is wrong with it.

`load_config` is the only place that reads params.yaml. All recipes are checked, so that switching to another one
later holds no surprise.
"""

from __future__ import annotations

import difflib
import os
import reprlib
from dataclasses import fields, is_dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from dit.errors import UserError
from dit.utils.files import expand_home
from dit.yaml_file import read_yaml

# Pixels of a latent's side, of the bundled VAE and of Stable Diffusion's. Others are asked by `dit check` and the encode stage.
VAE_FACTOR = 8

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]
Item = TypeVar("Item")
# A list; a single text or number is a list of one, so that `-S folder.data.paths=custom_data` does what it seems to.
Several = Annotated[tuple[Item, ...], BeforeValidator(lambda value: [value] if isinstance(value, (str, int, float)) else value)]
Storage = Literal["auto", "files", "shards"]
Precision = Literal["fp32", "fp16", "bf16"]
Scheduler = Literal["euler", "heun", "dpm++", "unipc", "ddim", "stochastic"]


# Of the command line, MLflow's model and the pipeline; `sample` of params.yaml has the same values.
class Defaults(NamedTuple):
    """Sampling settings where nothing else is set."""

    num_inference_steps: int = 10
    guidance_scale: float = 1.5
    scheduler: str = "stochastic"


DEFAULTS = Defaults()
STRENGTH = 0.6  # of image to image without a mask: objects keep their places and may change colour (docs/performance.md)
# Of figures that one stage makes and the report describes.
WORST_SHOWN = 18  # samples in samples/worst.png
GRID_PROMPTS = 4  # prompts in a cell of samples/grids/settings.png, and in the denoising strip

STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=STRICT)
class ShapesData:
    """Rendered scenes."""

    source: Literal["shapes"]
    num_samples: Annotated[int, Field(strict=True, ge=10)]
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]
    image_size: Annotated[int, Field(strict=True, ge=16, le=1024)]
    layout: Literal["free", "quarters"]
    level: Annotated[int, Field(strict=True, ge=1, le=3)]
    storage: Storage
    seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class CocoData:
    """Photographs of COCO."""

    source: Literal["coco"]
    split: Literal["train2017", "val2017", "both"]
    num_samples: Annotated[int, Field(strict=True, ge=2)]
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]
    base_url: Text
    captions_per_image: PositiveInt
    storage: Storage
    max_bad_fraction: Fraction
    seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class FolderData:
    """Your own images and captions."""

    source: Literal["folder"]
    paths: Annotated[Several[Text], Field(min_length=1)]
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]
    storage: Storage
    max_bad_fraction: Fraction
    seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class HubData:
    """A data set of the Hugging Face Hub."""

    source: Literal["hub"]
    dataset: Text
    config: Text | None
    revision: Text | None
    split: Text
    image_column: Text
    caption_columns: Annotated[Several[Text], Field(min_length=1)]
    num_samples: Annotated[int, Field(strict=True, ge=2)]
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]
    storage: Storage
    max_bad_fraction: Fraction
    seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class WebdatasetData:
    """Tar shards of a WebDataset, as img2dataset writes them."""

    source: Literal["webdataset"]
    shards: Annotated[Several[Text], Field(min_length=1)]
    image_keys: Annotated[Several[Text], Field(min_length=1)]
    caption_keys: Annotated[Several[Text], Field(min_length=1)]
    min_side: NonNegativeInt
    max_aspect_ratio: Annotated[Float, Field(ge=1)] | None
    min_caption_length: NonNegativeInt
    max_caption_length: PositiveInt | None
    num_samples: Annotated[int, Field(strict=True, ge=2)] | None
    val_fraction: Annotated[Float, Field(gt=0, lt=1)]
    storage: Storage
    max_bad_fraction: Fraction
    seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class Encode:
    """The encoders, and what they encode."""

    image_size: PositiveInt
    aspect_ratios: Literal["square", "buckets"]
    vae: Text
    vae_revision: Text | None
    vae_slicing: Flag
    vae_tiling: Flag
    clip: Text
    clip_revision: Text | None
    long_captions: Literal["cut", "chunks"]
    crops: Annotated[int, Field(strict=True, ge=0, le=16)]
    batch_size: PositiveInt
    precision: Precision


@dataclass(frozen=True, config=STRICT)
class Model:
    """The size of the transformer."""

    patch_size: Literal[1, 2, 4, 8]
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    conv_channels: NonNegativeInt
    output: Literal["velocity", "image"]


@dataclass(frozen=True, config=STRICT)
class Optim:
    """How long and how fast a recipe trains."""

    num_epochs: PositiveInt
    learning_rate: PositiveFloat
    logit_mean: Annotated[Float, Field(ge=-3, le=3)]
    compile_model: Literal["auto", True, False]


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """The blocks that all recipes have; each adds its own `data`."""

    encode: Encode
    model: Model
    optim: Optim


@dataclass(frozen=True, config=STRICT)
class ShapesRecipe(Recipe):
    """The recipe `shapes`."""

    data: ShapesData


@dataclass(frozen=True, config=STRICT)
class CocoRecipe(Recipe):
    """The recipe `coco`."""

    data: CocoData


@dataclass(frozen=True, config=STRICT)
class FolderRecipe(Recipe):
    """The recipe `folder`."""

    data: FolderData


@dataclass(frozen=True, config=STRICT)
class HubRecipe(Recipe):
    """The recipe `hub`."""

    data: HubData


@dataclass(frozen=True, config=STRICT)
class Lora:
    """The adapters that are trained where `train.method` is lora."""

    rank: PositiveInt
    alpha: PositiveInt
    target_modules: Annotated[Several[Text], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class WebdatasetRecipe(Recipe):
    """The recipe `webdataset`."""

    data: WebdatasetData


@dataclass(frozen=True, config=STRICT)
class Train:
    """The training, of every recipe."""

    method: Literal["scratch", "full", "lora"]
    init_from: Text | None
    lora: Lora
    batch_size: PositiveInt
    mixed_precision: Literal["no", "fp16", "bf16"]
    objective: Literal["flow", "ddpm"]
    prediction_type: Literal["epsilon", "v_prediction"]
    snr_gamma: PositiveFloat | None
    gradient_accumulation_steps: PositiveInt
    gradient_checkpointing: Flag
    max_grad_norm: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    lr_scheduler: Literal["cosine", "linear", "constant"]
    ema_decay: Fraction
    caption_dropout: Fraction
    horizontal_flip: Flag
    validate_every: PositiveInt
    early_stopping_patience: PositiveInt | None
    max_nonfinite_steps: PositiveInt
    seed: NonNegativeInt


@dataclass(frozen=True, config=STRICT)
class Sample:
    """What is sampled for the evaluation, and how."""

    num_inference_steps: PositiveInt
    guidance_scale: Annotated[Float, Field(ge=1)]
    scheduler: Scheduler
    num_samples: PositiveInt
    batch_size: PositiveInt
    seed: NonNegativeInt
    prompts: Several[Text]
    grid_guidance_scales: Annotated[Several[Annotated[Float, Field(ge=1)]], Field(min_length=1)]
    grid_steps: Annotated[Several[PositiveInt], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """The evaluation."""

    confidence: Annotated[Float, Field(gt=0.5, lt=1)]
    val_passes: PositiveInt
    features: Text
    resamples: Annotated[int, Field(strict=True, ge=2)]


@dataclass(frozen=True, config=STRICT)
class Runtime:
    """How, not what: these change no result."""

    num_workers: NonNegativeInt
    prefetch_factor: PositiveInt
    num_processes: PositiveInt | Literal["auto"]
    sharding: Literal["none", "full"]
    checkpoint_every: PositiveInt
    keep_checkpoints: PositiveInt
    sample_every: PositiveInt
    log_every: PositiveInt
    deterministic: Flag
    download_connections: PositiveInt
    data_on_device: Literal["auto", True, False]
    register_model: Flag
    keep_state: Flag


RECIPES = ("shapes", "coco", "folder", "hub", "webdataset")


@dataclass(frozen=True, config=STRICT)
class Params:
    """The whole of params.yaml."""

    recipe: Literal["shapes", "coco", "folder", "hub", "webdataset"]
    shapes: ShapesRecipe
    coco: CocoRecipe
    folder: FolderRecipe
    hub: HubRecipe
    webdataset: WebdatasetRecipe
    train: Train
    sample: Sample
    evaluate: Evaluate
    runtime: Runtime

    @property
    def active(self) -> ShapesRecipe | CocoRecipe | FolderRecipe | HubRecipe | WebdatasetRecipe:
        """Return the block that `recipe` names."""
        return getattr(self, self.recipe)


def load_config(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml.

    Raises:
        UserError: one line that names the file, the key, the value and what would be right.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's folder") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected blocks of settings, found {type(values).__name__}")
    return parse_config(values, path.name)


def parse_config(values: dict[str, Any], name: str = "params.yaml") -> Params:
    """Check settings that were read from `name`; raise a `UserError` as `load_config` does."""
    try:
        params = TypeAdapter(Params).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{name}: {_explain(_most_telling(error.errors()), error.errors())}") from None
    if params.train.objective == "flow" and params.sample.scheduler == "ddim":
        raise UserError(f"{name}: sample.scheduler: ddim is for train.objective ddpm; for a flow the same thing is called euler")
    if (params.train.method == "scratch") != (params.train.init_from is None):
        raise UserError(f"{name}: {_init_problem(params.train)}")
    if params.train.objective == "ddpm" and params.active.model.output == "image":
        raise UserError(f"{name}: {params.recipe}.model.output: image is for train.objective flow; velocity would be right")
    for recipe in RECIPES:
        problem = _impossible(recipe, getattr(params, recipe))
        if problem:
            raise UserError(f"{name}: {problem}")
    return params


# What became of the keys of version 0.1.
RENAMED = {"schedule": "optim", "max_skipped": "max_nonfinite_steps", "layout": "storage"}
WORDING = {  # by pydantic's type of error
    "bool_type": "must be true or false",
    "tuple_type": "must be a list: [one, another]",
    "string_type": "must be a text",
    "string_too_short": "must not be empty",
    "string_unicode": "a text holds half of a UTF-16 pair, which is no character",
}
SHORTENED = reprlib.Repr()  # of values in messages; its default is a few items and levels of what is nested
SHORTENED.maxstring = SHORTENED.maxother = 160


def _init_problem(train: Train) -> str:
    """Word what is wrong where `method` and `init_from` do not go together."""
    if train.init_from is None:
        return (
            f"train.method: {train.method} begins with a trained model; set train.init_from to its folder, such as models/base, "
            "or to its address in MLflow, such as models:/dit-coco/3"
        )
    return (
        f"train.init_from: {train.init_from} is given, and train.method: scratch begins with random weights; method full (all "
        "weights of that model are trained) or lora (adapters) would be right, or init_from null"
    )


def _impossible(recipe: str, settings: Recipe) -> str | None:
    """Return what is wrong with a combination of values, each of which is fine by itself."""
    model = settings.model
    if isinstance(settings, ShapesRecipe) and settings.data.layout == "quarters" and settings.data.level > 2:
        return f"{recipe}.data.level: {settings.data.level} is of layout free; 1 or 2 would be right with layout quarters"
    if model.hidden_size % model.num_heads:
        fits = _nearest(model.hidden_size, 4 * model.num_heads)
        return (
            f"{recipe}.model.hidden_size: {model.hidden_size} is not a multiple of num_heads ({model.num_heads}); "
            f"{fits} would be right"
        )
    if (model.hidden_size // model.num_heads) % 4:
        fits = _nearest(model.hidden_size, 4 * model.num_heads)
        return (
            f"{recipe}.model.hidden_size: {model.hidden_size} with num_heads {model.num_heads} makes heads of "
            f"{model.hidden_size // model.num_heads}, which is not a multiple of 4 (2-D rotary positions); {fits} would be right"
        )
    is_folder = os.path.isdir(expand_home(settings.encode.vae))  # noqa: PTH112 (Path raises where it is no path)
    return None if is_folder else sides_problem(recipe, settings, VAE_FACTOR)


def sides_problem(recipe: str, settings: Recipe, factor: int) -> str | None:
    """Return what is wrong with the sides of the images where a latent of the VAE is `factor` pixels wide and high, or None."""
    patch_size, size = settings.model.patch_size, settings.encode.image_size
    cell = factor * patch_size
    if size % cell:
        return (
            f"{recipe}.encode.image_size: {size} is not a multiple of {cell} (VAE factor {factor} x patch_size {patch_size}); "
            f"{_nearest(size, cell)} would be right"
        )
    if settings.encode.aspect_ratios == "square":
        return None
    from dit.dataset.aspect_ratios import side_step  # numpy takes a tenth of a second

    step = side_step(size)
    if step % cell or size % step:
        return (
            f"{recipe}.encode.aspect_ratios: buckets with the area of {size} x {size} pixels have sides of multiples of {step}; "
            f"model.patch_size {patch_size} needs those of {cell}; a smaller patch_size or a larger image_size would be right"
        )
    return None


def _nearest(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _most_telling(errors: list[ErrorDetails]) -> ErrorDetails:
    """Return the first error; where a key is missing and an old spelling of it is there, the latter."""
    return next((error for error in errors if error["loc"] and error["loc"][-1] in RENAMED), errors[0])


def _explain(error: ErrorDetails, errors: list[ErrorDetails]) -> str:
    """Word one of pydantic's `errors` as `key: value is wrong; this would be right`."""
    location = [str(part) for part in error["loc"]]
    if not location:  # of a key that is no text
        return _remedy(error, "")
    known = _keys(location[:-1])
    while not known:  # pydantic goes on below our keys: into tuples, and into the members of a union
        location.pop()
        known = _keys(location[:-1])
    key = " ".join(".".join(location).split())
    if location[-1] not in known and RENAMED.get(location[-1]) in known:
        return f"{key}: is called {RENAMED[location[-1]]} now; rename it"
    if error["type"] in ("unexpected_keyword_argument", "invalid_key"):
        close = difflib.get_close_matches(location[-1], known, n=1)
        return f"{key}: unknown key; " + (f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{key}: missing; add it, or take the line from the params.yaml in git"
    words = (
        other["ctx"]["expected"]
        for other in errors
        if other["type"] == "literal_error" and other["loc"][:-1] == error["loc"][:-1]
    )
    alternative = "".join(f", or {expected}".replace("'", "") for expected in words if len(error["loc"]) > len(location))
    return f"{key}: {SHORTENED.repr(error['input'])}: {_remedy(error, key)}{alternative}"


def _remedy(error: ErrorDetails, key: str) -> str:
    """Return what the value of `key` must be, in a user's words where pydantic's are a programmer's."""
    value, kind = error["input"], error["type"]
    if kind == "string_type" and (value is None or isinstance(value, (bool, int, float, date))):
        # What was typed is not known any more: 1e5 is 100000.0 by now, and 0123 is 123.
        quoted = "['…']" if isinstance(error["loc"][-1], int) else "'…'"
        return f"must be a text, and YAML reads something else; put it in quotes: '…', or with -S: -S \"{key}={quoted}\""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"must be a valid integer; {int(value)} would be right"
    if kind in WORDING:
        return WORDING[kind]
    message = error["msg"].removeprefix("Input ").replace("'", "").replace("should be", "must be")
    return message.replace("a dictionary or an instance of", "a block of settings, see class")


def _keys(location: list[str]) -> list[str]:
    """Return the keys that are known in the block at `location`; none if there is no such block."""
    block: Any = Params
    for part in location:
        block = get_type_hints(block).get(part) if is_dataclass(block) else None
    return [field.name for field in fields(block)] if is_dataclass(block) else []
