"""Write a trained transformer as a diffusers model folder: weights, scheduler, which encoders it needs, a model card."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
from safetensors import SafetensorError

from dit.config import Lora, Model, Optim, Train
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.model.objectives import euler_scheduler, make_objective
from dit.model.transformer import DiT
from dit.training.checkpoint import open_checkpoint
from dit.training.init_model import load_init
from dit.training.lora import FOLDER, add_adapters, count_parameters, has_adapters, merge_adapters, save_adapters
from dit.utils.files import write_json

# How a card words what `train.method` began with.
ORIGINS = {"scratch": "from scratch", "full": "from `{}` on", "lora": "as adapters (LoRA) to `{}`, which are merged into it,"}
# Of the cache's index; the last two are there where they are not as usual.
ENCODERS = ("vae", "clip", "image_size", "sizes", "long_captions")
FACTS = "training.json"  # what the card is rendered from
METADATA = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "apache-2.0"}
CARD = """\
# A text-to-image Diffusion Transformer

{parameters:.1f} M parameters, trained {origin} with {objective} on {images} images of {size} pixels for
{num_epochs} epochs at batch size {batch_size}. These are the moving average (EMA) weights, in fp32.

    from dit import DiTTextToImagePipeline

    pipeline = DiTTextToImagePipeline.from_pretrained("{folder}")
    pipeline("{prompt}").images[0].save("image.png")

It needs the VAE `{vae}` and the CLIP text encoder `{clip}`, which are loaded with it. It can generate what the captions of its
training set speak of. The licence above is that of the code; the licence and the biases of the training data apply, too.
{sections}
Settings:

{settings}
"""


def save_model(folder: Path, transformer: DiT, cache: LatentCache, model: Model, optim: Optim, train: Train) -> None:
    """Write the model folder. The same training gives the same bytes: no run id, no time stamp, no machine.

    Adapters in `transformer` are written into `lora/`, and then merged into it: the folder is a whole pipeline in any case.
    """
    _write_folder(folder, transformer, describe_model(transformer, cache, model, optim, train))


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write the model folder of a training that is not done: the EMA weights of the checkpoint at `path`, and what they need.

    Raises:
        UserError: there is no whole checkpoint, it was deleted meanwhile, or the model that its adapters belong to is gone; one
            line that names it.
    """
    checkpoint = open_checkpoint(path)
    try:
        description = checkpoint.record["model"]
        transformer = DiT(**description["transformer"])
        if "lora" in description:
            load_init(Path(description["init"]["path"]), description["init"]["name"]).load_into(transformer)
            add_adapters(transformer, Lora(**description["lora"]), seed=0)
        tensors = checkpoint.tensors()
    except KeyError:
        raise UserError(f"{path}: of an earlier version, which did not record its model; newer checkpoints will do") from None
    except (OSError, SafetensorError):
        raise UserError(f"{path}: deleted while it was read, as the training writes newer ones; try again") from None
    ema = {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
    transformer.load_state_dict(ema, strict="lora" not in description)
    _write_folder(folder, transformer, description)


def describe_model(transformer: DiT, cache: LatentCache, model: Model, optim: Optim, train: Train) -> dict[str, Any]:
    """Return what a model folder holds beside its weights, as JSON: `transformer` (its arguments), `index` and `facts`."""
    objective, cached = make_objective(train.objective, train.prediction_type), dict(cache.index)
    scheduler = euler_scheduler(objective.prediction_type)
    index = {
        "_class_name": "DiTTextToImagePipeline",
        "_diffusers_version": diffusers.__version__,
        "transformer": ["dit.model", "DiT"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "vae": ["diffusers", cached.get("vae_class", "AutoencoderKL")],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "prediction_type": objective.prediction_type,
        "encoders": {name: cached[name] for name in ENCODERS if name in cached},
    }
    facts: dict[str, Any] = {
        "parameters": count_parameters(transformer) / 1e6,
        "objective": "rectified flow" if train.objective == "flow" else f"DDPM ({train.prediction_type})",
        "images": len(cache.train),
        "image_size": cache.index["image_size"],
        "num_epochs": optim.num_epochs,
        "batch_size": train.batch_size * train.gradient_accumulation_steps,
        "prompt": cache.captions(cache.val[:1])[0][0]["text"].replace('"', "'"),
        "vae": cache.index["vae"]["name"],
        "clip": cache.index["clip"]["name"],
        "settings": {"model": asdict(model), "optim": asdict(optim), "train": asdict(train)},
    }
    if "sizes" in cached:
        facts["sizes"] = [f"{width} x {height}" for width, height in cache.sizes]
    if train.method == "scratch":
        for name in ("method", "init_from", "lora"):  # so that the card of such a model is what it was before there were others
            del facts["settings"]["train"][name]
    arguments = {name: transformer.config[name] for name in inspect.signature(DiT.__init__).parameters if name != "self"}
    lora = {"lora": asdict(train.lora)} if train.method == "lora" else {}
    return {"transformer": arguments, "index": index, "facts": facts} | lora


def _write_folder(folder: Path, transformer: DiT, description: dict[str, Any]) -> None:
    index, facts = description["index"], description["facts"]
    if has_adapters(transformer):
        save_adapters(transformer, folder / FOLDER)
        merge_adapters(transformer)
    transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    euler_scheduler(index["prediction_type"]).save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", index)
    write_json(folder / FACTS, facts)
    front_matter = "".join(f"{key}: {value}\n" for key, value in METADATA.items())
    card = f"---\n{front_matter}---\n{render_card(facts, 'models/dit')}"
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def render_card(facts: dict[str, Any], folder: str, sections: Sequence[str] = ()) -> str:
    """Render the model card, without its front matter.

    Args:
        facts: what `save_model` wrote into training.json.
        folder: where the example loads the model from.
        sections: Markdown that goes before the settings.
    """
    settings = "\n".join("    " + line for line in json.dumps(facts["settings"], indent=2).splitlines())
    trained = facts["settings"].get("train", {})
    origin = ORIGINS[trained.get("method", "scratch")].format(trained.get("init_from"))
    size = ", ".join(facts.get("sizes", [f"{facts['image_size']} x {facts['image_size']}"]))
    facts = facts | {"settings": settings, "origin": origin, "size": size}
    return CARD.format(**facts, folder=folder, sections="".join(f"\n{text}\n" for text in sections))
