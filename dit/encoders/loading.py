"""Find and load encoders: bundled ones, those of a local folder, or of a repository on the Hugging Face Hub.

The Hub's library keeps what it has downloaded and heeds HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from dit.config import Encode, Recipe, sides_problem
from dit.errors import UserError, one_line
from dit.hub import DownloadError, download_files
from dit.utils.autoencoder import HAS_POSTERIOR, set_statistics, vae_factor
from dit.utils.files import expand_home, sha256_files
from dit.utils.hardware import has_fast_bf16

if TYPE_CHECKING:  # it takes seconds to import, which a look at a configuration does not need
    from transformers import (
        BaseImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedModel,
    )

    from dit.utils.autoencoder import Autoencoder

BUILTIN = Path(__file__).parent / "builtin"
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of each kind: what it is called in params.yaml, its weights (never a pickle), and what else it needs.
SETTINGS = {"vae": "encode.vae", "clip": "encode.clip", "features": "evaluate.features"}
WEIGHTS = {"vae": "diffusion_pytorch_model*.safetensors", "clip": "model*.safetensors", "features": "model*.safetensors"}
BESIDES = {"vae": ["config.json"], "clip": ["*.json", "merges.txt", "vocab.txt"], "features": ["*.json"]}
COPIES = "encoders"  # in a model folder: encoders that were folders elsewhere, for MLflow's registry


@dataclass(frozen=True)
class EncoderSource:
    """Where an encoder's weights are, and exactly which they were.

    Attributes:
        name: "builtin", a Hub id (owner/name, or owner/name/subfolder for a VAE) or a local folder, as in params.yaml.
        revision: branch, tag or commit asked for; None for the default or where there is none.
        resolved: commit of the Hub repository, or `sha256:…` of the weights for a local folder.
        recorded_in: the folder of the model or cache that records this encoder, which a relative folder is looked for from, too.
        latents_mean, latents_std: of every channel of a VAE's latents, where they were measured: its configuration has none.
    """

    name: str
    revision: str | None = None
    resolved: str | None = None
    recorded_in: Path | None = None
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what a model or a cache records, by name, for JSON."""
        record = {"name": self.name, "revision": self.revision, "resolved": self.resolved}
        measured = {"latents_mean": self.latents_mean, "latents_std": self.latents_std}
        return record | measured if self.latents_mean else record


def with_fast_precision(settings: Encode, device: torch.device) -> Encode:
    """Return `settings`, with fp32 in the place of bf16 where `device` has no instructions for that."""
    return replace(settings, precision="fp32") if settings.precision == "bf16" and not has_fast_bf16(device) else settings


def load_vae(
    source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Autoencoder, EncoderSource]:
    """Load an autoencoder of one of the classes `HAS_POSTERIOR`; return it and its `EncoderSource` with `resolved` filled in.

    Raises:
        UserError: there are no such weights, or they are of another class.
    """
    vae, resolved, _ = _load(None, "vae", source, dtype, device)
    if source.latents_mean and source.latents_std:
        set_statistics(vae, source.latents_mean, source.latents_std)
    return vae, resolved


def check_sides(recipe: str, settings: Recipe) -> None:
    """Check that the images can be divided into the latents of the recipe's VAE, and those into patches.

    Raises:
        UserError: they cannot; or the VAE's configuration cannot be had.
    """
    factor = vae_factor(read_config("vae", EncoderSource(settings.encode.vae, settings.encode.vae_revision)))
    if problem := sides_problem(recipe, settings, factor):
        raise UserError(problem)


def read_config(kind: str, source: EncoderSource) -> dict[str, Any]:
    """Return the configuration of an encoder, downloaded if necessary, without its weights.

    Raises:
        UserError: there is none, or it is that of another class.
    """
    folder, _ = find_encoder(kind, source, weights=False)
    return _read_config(kind, source.name, folder)


def load_text_encoder(
    source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[CLIPTextModelWithProjection, CLIPTokenizer, EncoderSource]:
    """Load a CLIP text model with its projection, and its tokenizer; return both and the resolved `EncoderSource`."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would warn that the weights of the image side are not used
    model, resolved, folder = _load(CLIPTextModelWithProjection, "clip", source, dtype, device)
    return model, CLIPTokenizer.from_pretrained(folder), resolved


def load_clip(
    source: EncoderSource, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[CLIPModel, CLIPProcessor]:
    """Load the whole CLIP, text and image side, with its processor; return both. For the CLIP score."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    model, _, folder = _load(CLIPModel, "clip", source, dtype, device)
    return model, CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))


def load_image_model(source: EncoderSource, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load an image model of transformers, such as DINOv2, in float32, and its processor; return both. For distances of sets.

    Raises:
        UserError: there are no such weights, or they are of no model that makes one vector of an image.
    """
    from transformers import AutoImageProcessor, AutoModel

    model, _, folder = _load(AutoModel, "features", source, torch.float32, device)
    try:
        return model, AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise _unusable("features", source.name, f"has no image processor ({one_line(error)}); choose an image model") from None


def find_encoder(kind: str, source: EncoderSource, weights: bool = True) -> tuple[Path, str | None]:
    """Return the folder of an encoder's files, downloaded if necessary, and their version: a commit or `sha256:…`.

    Args:
        kind: "vae", "clip" or "features".
        source: as in params.yaml, or as a cache or a model recorded it: then exactly those weights.
        weights: whether the weights are needed, too; without them only the configuration is checked, and the version is None.

    Raises:
        UserError: they cannot be downloaded, or are of another class; one line that says what to do.
    """
    if source.name == "builtin":
        folder, commit = BUILTIN / kind, None
    elif is_folder(source):
        folder, commit = _find_folder(kind, source), None
    else:
        folder, commit = _download(kind, source, weights)
    _check_class(kind, source.name, folder)
    if not weights:
        return folder, None
    if not any(folder.glob(WEIGHTS[kind])):
        raise _unusable(kind, source.name, f"has no {WEIGHTS[kind]}; other formats may hold code and are never loaded")
    resolved = commit or _digest(folder)
    if source.resolved and resolved != source.resolved:
        raise _unusable(kind, source.name, f"is now {resolved}, but {source.resolved} is needed: the weights have changed")
    return folder, resolved


def is_folder(source: EncoderSource) -> bool:
    """Return whether `source` names a folder and no repository of the Hub, whether or not the folder is there.

    That is known once it has been loaded. Before, a name is a path if it looks like one, or if it begins with a folder's name.
    """
    name = source.name
    if name == "builtin":
        return False
    if source.resolved:
        return source.resolved.startswith("sha256:")
    if name.startswith((".", "/", "~")) or "\\" in name or Path(name).is_absolute():
        return True
    return any(_is_dir(root / name.split("/")[0]) for root in _roots(source))


def copy_folders(model: Path, sources: dict[str, EncoderSource]) -> None:
    """Copy those of the encoders ("vae", "clip") that are folders into the model folder that records them, for other machines.

    Raises:
        UserError: one is not there any more, or has changed.
    """
    for kind, source in sources.items():
        if is_folder(source):
            folder, _ = find_encoder(kind, source)
            for pattern in (*BESIDES[kind], "*.safetensors"):
                for path in folder.glob(pattern):
                    (model / COPIES / kind).mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, model / COPIES / kind / path.name)


def _roots(source: EncoderSource) -> list[Path]:
    """Return where a relative folder is looked for: here, in the project, and in the project that the model lies in."""
    roots = [Path(), Path(os.environ.get("DVC_ROOT", "."))]  # `dvc exp run --temp` runs in a copy of what git tracks
    if source.recorded_in:
        above = source.recorded_in.resolve().parents
        roots += [folder for folder in above if (folder / "dvc.yaml").is_file()][:1]
    return roots


def _find_folder(kind: str, source: EncoderSource) -> Path:
    """Return the folder of an encoder; of several places that have one, that of the weights that are needed."""
    named = [(root / expand_home(source.name)).absolute() for root in _roots(source)]
    copies = [source.recorded_in / COPIES / kind] if source.recorded_in else []
    found = [place for place in dict.fromkeys([*copies, *named]) if _is_dir(place)]
    if not found:
        looked = " and no ".join(map(str, dict.fromkeys(named)))
        raise _unusable(kind, source.name, f"is no folder, there is no {looked}; check the name")
    return next((place for place in found if len(found) > 1 and _digest(place) == source.resolved), found[0])


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or what is above it cannot be read
        return False


def _digest(folder: Path) -> str:
    return f"sha256:{sha256_files(sorted(folder.glob('*.safetensors')))}"


def _load(
    model_class: Any, kind: str, source: EncoderSource, dtype: torch.dtype, device: str | torch.device
) -> tuple[Any, EncoderSource, Path]:
    """Return the model, its resolved source, and the folder that it was loaded from.

    Args:
        model_class: whose `from_pretrained` loads it; None for the class of diffusers that its configuration names.
        kind, source: see `find_encoder`.
        dtype, device: of the model.
    """
    folder, resolved = find_encoder(kind, source)
    if model_class is None:
        import diffusers

        model_class = getattr(diffusers, _read_config(kind, source.name, folder)["_class_name"])
    try:
        model, info = model_class.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):  # both libraries initialise these at random
            raise ValueError(f"the weights lack {missing[0]}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # Both libraries report files that are missing or damaged, and weights of another shape, as one of these.
        raise UserError(
            f"{SETTINGS[kind]}: {source.name!r} cannot be loaded as {model_class.__name__} ({one_line(error)}); "
            f"{'save it' if is_folder(source) else f'delete {folder} to download it'} again, {_otherwise(kind)}"
        ) from None
    found = replace(source, resolved=resolved, recorded_in=None)
    return model.requires_grad_(False).eval().to(device), found, folder


def _download(kind: str, source: EncoderSource, weights: bool) -> tuple[Path, str]:
    """Return the folder of a Hub repository's files in the Hub's own cache, and their commit."""
    repository, subfolder = _parts(kind, source.name)
    within = f"{subfolder}/" if subfolder else ""
    wanted = [*BESIDES[kind], WEIGHTS[kind]] if weights else ["config.json"]
    ignored = ["*.fp16.*", "*.non_ema.*", *([] if subfolder else ["*/*"])]

    def download(revision: str | None, patterns: list[str]) -> Path:
        return download_files(repository, revision, [within + pattern for pattern in patterns], ignored)

    try:
        # The configuration first: a wrong repository should be noticed before gigabytes of it have been downloaded.
        snapshot = download(source.resolved or source.revision, ["config.json"])
        folder = snapshot / subfolder
        _check_class(kind, source.name, folder)
        if weights:
            folder = download(snapshot.name, wanted) / subfolder
    except DownloadError as error:
        raise _unusable(kind, source.name, str(error)) from None
    return folder, snapshot.name


def _parts(kind: str, name: str) -> tuple[str, str]:
    """Return the repository of a Hub id, and the subfolder that may follow it."""
    parts = name.split("/")
    if len(parts) > 3 or "" in parts:
        raise _unusable(kind, name, "is no folder")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _check_class(kind: str, name: str, folder: Path) -> None:
    """Raise a `UserError` unless the configuration in `folder` is that of an encoder that can be used."""
    config = _read_config(kind, name, folder)
    if kind == "features":
        return  # any; what loads it says more
    if kind == "vae":
        found, wanted = config.get("_class_name"), list(HAS_POSTERIOR)
    else:
        found, wanted = config.get("model_type"), ["clip", "clip_text_model"]
    if found not in wanted:
        raise _unusable(kind, name, f"is of class {found!r}, and {' or '.join(wanted)} is needed; choose another")
    if kind == "vae":
        try:
            vae_factor(config)
        except (KeyError, TypeError):
            raise _unusable(kind, name, "has a config.json without block_out_channels; choose another") from None


def _read_config(kind: str, name: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = f", perhaps {name.rstrip('/')}/vae has" if kind == "vae" else ""
        raise _unusable(kind, name, f"has no config.json{where}; choose another") from None
    except (OSError, ValueError, RecursionError):
        raise _unusable(kind, name, "has a config.json that is not readable; download it again") from None
    if not isinstance(config, dict):
        raise _unusable(kind, name, "has a config.json that is no configuration; download it again")
    return config


def _unusable(kind: str, name: str, problem: str) -> UserError:
    return UserError(f"{SETTINGS[kind]}: {name!r} {problem}, {_otherwise(kind)}")


def _otherwise(kind: str) -> str:
    return f"or set it to a local folder written by save_pretrained, or to {'clip' if kind == 'features' else 'builtin'}"
