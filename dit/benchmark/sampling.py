"""What sampling costs. How good each scheduler is, `dit sweep` measures."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dit.benchmark.results import default_device, markdown_table
from dit.model.objectives import apply_cfg
from dit.model.transformer import DiT
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.utils.hardware import has_fast_bf16, synchronize

STEPS, GUIDANCE, ROUNDS = 4, 3.0, 5
Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens (N, L, E), mask (N, L), pooled (N, P)


@torch.no_grad()
def sample_latents(
    transformer: DiT, noise: torch.Tensor, caption: Text, empty: Text, batched: bool, cached: bool
) -> torch.Tensor:
    """Make `STEPS` of Euler's method with guidance from `noise` (N, C, H, W).

    Args:
        transformer: predicts the velocity.
        noise: where the path begins.
        caption: text of each image.
        empty: the empty caption, as often.
        batched: whether predictions with and without caption are one call.
        cached: whether keys and values of the text are computed once, not at each step.
    """
    calls = [_concatenate(caption, empty)] if batched else [caption, empty]
    keys_values = [transformer.text_keys_values(tokens) if cached else None for tokens, _, _ in calls]
    x = noise
    for k in range(STEPS):
        predictions: list[torch.Tensor] = []
        for (tokens, mask, pooled), kv in zip(calls, keys_values, strict=True):
            inputs = x.repeat(2, 1, 1, 1) if batched else x
            t = torch.full((len(inputs),), 1 - k / STEPS, device=x.device)
            predictions += transformer(inputs, t, tokens, mask, pooled, kv).split(len(x))
        conditional, unconditional = predictions
        x = x - apply_cfg(conditional, unconditional, GUIDANCE) / STEPS
    return x


def _concatenate(first: Text, second: Text) -> Text:
    tokens, mask, pooled = (torch.cat(pair) for pair in zip(first, second, strict=True))
    return tokens, mask, pooled


def benchmark_text(model: Path, batch: int) -> list[dict[str, Any]]:
    """Measure what it buys to cache the text's keys and values, and to guide in one batch.

    Args:
        model: folder of a trained model; one of 768 x 16 x 12 with random weights is measured, too.
        batch: images at once with the trained model; a sixteenth of them with the large one.

    Returns:
        A row for each way with each model, as `text_table` prints them.
    """
    device = default_device()
    pipeline = DiTTextToImagePipeline.from_pretrained(model).to(device)
    side = pipeline.config.image_size // pipeline.vae_scale_factor
    texts = ["a small red circle above a large blue square"] * batch + [""] * batch
    tokens, _, pooled, _, mask, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
    assert tokens is not None and pooled is not None and mask is not None  # of negative prompts alone they may be
    caption, empty = (tokens[:batch], mask[:batch], pooled[:batch]), (tokens[batch:], mask[batch:], pooled[batch:])
    rows = _time_ways("default recipe", pipeline.transformer, side, caption, empty)
    torch.manual_seed(0)
    large = DiT().to(device).eval()
    for parameter in large.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    few = max(1, batch // 16)

    def random_text(length: int) -> Text:
        mask = (torch.arange(77, device=device) < length).expand(few, -1)
        return torch.randn(few, 77, 768, device=device), mask, torch.randn(few, 768, device=device)

    return rows + _time_ways(f"768 x 16 x 12, batch {few}", large, 32, random_text(77), random_text(2))


def _time_ways(name: str, transformer: DiT, side: int, caption: Text, empty: Text) -> list[dict[str, Any]]:
    """Measure one model: differences in fp32, times in the precision that it samples in."""
    device = caption[0].device
    noise = torch.randn(len(caption[0]), transformer.config.in_channels, side, side, device=device)
    ways = [(batched, cached) for batched in (False, True) for cached in (False, True)]

    def run(way: tuple[bool, bool]) -> torch.Tensor:
        return sample_latents(transformer, noise, caption, empty, *way)

    exact = {way: run(way) for way in ways}
    if has_fast_bf16(device):
        transformer.to(torch.bfloat16)
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):  # in turns, since the speed of machines drifts; of each the fastest counts
        for way in ways:
            synchronize(device)
            start = time.perf_counter()
            run(way)
            synchronize(device)
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    return [
        {
            "model": name,
            "text": "cached" if way[1] else "at each step",
            "guidance": "in one batch" if way[0] else "one after the other",
            "seconds_per_step": took / STEPS,
            "ratio": seconds[False, False] / took,
            "largest_difference": (exact[way] - exact[False, False]).abs().max().item(),
        }
        for way, took in seconds.items()
    ]


def text_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows of `benchmark_text` as a Markdown table."""
    return markdown_table(
        ("model", "text", "guidance", "ms/step", "faster by", "largest difference, fp32"),
        [
            (
                row["model"],
                row["text"],
                row["guidance"],
                f"{1000 * row['seconds_per_step']:.1f}",
                f"{row['ratio']:.2f}",
                f"{row['largest_difference']:.0e}",
            )
            for row in rows
        ],
    )
