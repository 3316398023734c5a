"""The figures that experiments are compared by."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

from dit.config import Evaluate
from dit.diffusion import make_objective
from dit.encoders import EncoderSource, load_clip
from dit.errors import UserError
from dit.evaluation.judge import judge
from dit.images import labelled_grid
from dit.latents import LatentCache
from dit.model import DiT
from dit.sources.captions import parse
from dit.training.validation import validation_loss

BATCH_SIZE = 100
WORST = 18  # pictures shown


def evaluate_samples(samples: Path, model: Path, latents: Path, settings: Evaluate, worst: Path) -> dict[str, float]:
    """Judge the pictures in `samples` and the model that drew them.

    Args:
        samples: pictures and their `prompts.json`, as the sample stage wrote them.
        model: the trained model's folder.
        latents: the cache whose validation images give the loss.
        settings: confidence of the intervals, passes of the validation loss.
        worst: where the worst pictures are drawn, with what is wrong with them.

    Returns:
        `clip_score`, `val_loss`, and for prompts about coloured shapes `prompt_accuracy` and `prompt_accuracy_unseen`,
        each in [0, 1] with `_low` and `_high`, the ends of its Wilson interval.
    """
    if not (samples / "prompts.json").exists():
        raise UserError(f"{samples}: no pictures to judge; `dvc repro` draws them first")
    prompts = json.loads((samples / "prompts.json").read_text(encoding="utf-8"))
    pictures = [Image.open(samples / prompt["file"]).convert("RGB") for prompt in prompts]
    texts = [prompt["text"] for prompt in prompts]
    cache = LatentCache(latents)
    scores = clip_scores(EncoderSource(**cache.index["clip"]), pictures, texts)
    problems = [find_problem(picture, text) for picture, text in zip(pictures, texts, strict=True)]
    groups = np.array([prompt["group"] for prompt in prompts])
    judged = np.array([problem is not None for problem in problems])
    results: dict[str, float] = {}
    for group, name in (("val", "prompt_accuracy"), ("unseen", "prompt_accuracy_unseen")):
        picked = [not problems[k] for k in np.flatnonzero((groups == group) & judged)]
        if picked:
            results |= accuracy(name, picked, settings.confidence)
    prediction_type = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["prediction_type"]
    objective = make_objective("flow" if prediction_type == "flow_prediction" else "ddpm", prediction_type)
    transformer = DiT.from_pretrained(model, subfolder="transformer").eval().to(_device())
    results["clip_score"] = round(float(scores.mean()), 3)
    results["val_loss"] = round(validation_loss(transformer, cache, BATCH_SIZE, objective, settings.val_passes), 5)
    draw_worst(pictures, texts, problems, scores, worst)
    return results


def find_problem(picture: Image.Image, text: str) -> str | None:
    """What is wrong with `picture` given its caption, "" if nothing is, None where the caption is not about our shapes."""
    description = parse(text)
    if description is None:
        return None
    return judge(picture, description).problem or ""


def accuracy(name: str, correct: list[bool], confidence: float) -> dict[str, float]:
    """Share of True, with its Wilson (1927) score interval."""
    interval = binomtest(sum(correct), len(correct)).proportion_ci(confidence, method="wilson")
    values = {name: sum(correct) / len(correct), f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {key: round(value, 4) for key, value in values.items()} | {f"{name}_prompts": len(correct)}


@torch.no_grad()
def clip_scores(source: EncoderSource, pictures: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """CLIPScore without its factor 2.5 (Hessel et al. 2021, equation 1): 100 max(cosine, 0) for each pair, (N,) float32."""
    clip, processor = load_clip(source, device=_device())
    scores = []
    for start in tqdm(range(0, len(pictures), BATCH_SIZE), desc="CLIP score", unit="batch"):
        rows = slice(start, start + BATCH_SIZE)
        inputs = processor(
            text=texts[rows],
            images=pictures[rows],
            padding="max_length",
            truncation=True,
            max_length=clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        out = clip(**inputs.to(_device()))
        scores.append((100 * (out.image_embeds * out.text_embeds).sum(-1)).clamp(min=0).cpu())
    return torch.cat(scores)


def draw_worst(pictures, texts, problems, scores: torch.Tensor, path: Path) -> None:
    """The pictures that are judged wrong, and then those of the lowest CLIP score, each with the reason."""
    order = sorted(range(len(pictures)), key=lambda k: (not problems[k], float(scores[k])))[:WORST]
    labels = [f"{texts[k]}: {problems[k] or f'CLIP score {scores[k]:.0f}'}" for k in order]
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid([pictures[k] for k in order], labels, columns=6, cell=192).save(path)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
