"""What drawing costs and what editing keeps, as the tables of docs/performance.md. How good which sampler is, `dit sweep` says.

    python -m dit.benchmark.sampling text        what it buys to keep the text's keys and values, and to apply_cfg in one batch
    python -m dit.benchmark.sampling editing     how often a red circle becomes a blue one in the same place, by strength

Both need models/dit (`dvc repro` or `dvc pull models/dit`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from dit.model.objectives import apply_cfg
from dit.model.transformer import DiT
from dit.pipeline.generate import load_pipeline
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.shapes.captions import parse
from dit.shapes.scene import Description, Object, Scene, render, sample_scene
from dit.shapes.scoring import judge
from dit.utils.hardware import has_fast_bf16

MODEL = Path("models/dit")
STEPS, GUIDANCE, ROUNDS = 4, 3.0, 5
CASES = 50
Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens (N, L, E), mask (N, L), pooled (N, P)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dit.benchmark.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["text", "editing"])
    parser.add_argument("--batch", type=int, default=32, help="pictures at once, for text; default: %(default)s")
    parser.add_argument("--model", type=Path, default=MODEL, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.what == "text":
        text_table(arguments.model, arguments.batch)
    else:
        editing_table(arguments.model)


@torch.no_grad()
def draw_latents(transformer: DiT, noise: torch.Tensor, caption: Text, empty: Text, batched: bool, kept: bool) -> torch.Tensor:
    """`STEPS` of Euler's method with guidance; both halves `batched` into one call or not, text keys and values `kept` or not."""
    if batched:
        calls = [tuple(torch.cat(pair) for pair in zip(caption, empty, strict=True))]
    else:
        calls = [caption, empty]
    keys_values = [transformer.text_keys_values(tokens) if kept else None for tokens, _, _ in calls]
    x = noise
    for k in range(STEPS):
        predicted = []
        for (tokens, mask, pooled), kv in zip(calls, keys_values, strict=True):
            inputs = x.repeat(2, 1, 1, 1) if batched else x
            t = torch.full((len(inputs),), 1 - k / STEPS, device=x.device)
            predicted += transformer(inputs, t, tokens, mask, pooled, kv).split(len(x))
        x = x - apply_cfg(*predicted, GUIDANCE) / STEPS
    return x


def text_table(model: Path, batch: int) -> None:
    """Print a row for each way to render with each model: milliseconds a step, how much faster, how different."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = DiTTextToImagePipeline.from_pretrained(model).to(device)
    side = pipeline.config.image_size // pipeline.vae_scale_factor
    both = pipeline.encode_prompt(["a small red circle above a large blue square"] * batch + [""] * batch)
    trained = [tuple(part[rows] for part in both) for rows in (slice(batch), slice(batch, None))]
    print("| model | text | guidance | ms/step | faster by | largest difference, fp32 |\n|---|---|---|---|---|---|")
    rows("default recipe", pipeline.transformer, (side, side), trained, device)
    torch.manual_seed(0)
    large = DiT().to(device).eval()
    for parameter in large.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    few = max(1, batch // 16)
    texts = []
    for length in (77, 2):
        mask = (torch.arange(77, device=device) < length).expand(few, -1)
        texts.append((torch.randn(few, 77, 768, device=device), mask, torch.randn(few, 768, device=device)))
    rows(f"768 x 16 x 12, batch {few}", large, (32, 32), texts, device)


def rows(name: str, transformer: DiT, size: tuple[int, int], texts: list[Text], device: torch.device) -> None:
    """The rows of one model; differences in fp32, times in what it is drawn with."""
    caption, empty = texts
    noise = torch.randn(len(caption[0]), transformer.config.in_channels, *size, device=device)
    ways = {(batched, kept): (noise, caption, empty, batched, kept) for batched in (False, True) for kept in (False, True)}
    exact = {way: draw_latents(transformer, *inputs) for way, inputs in ways.items()}
    if has_fast_bf16(device):
        transformer.to(torch.bfloat16)
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(ROUNDS):  # in turns, since the speed of machines drifts; of each the fastest counts
        for way, inputs in ways.items():
            seconds[way] = min(seconds[way], timed(lambda inputs=inputs: draw_latents(transformer, *inputs), device))
    for (batched, kept), took in seconds.items():
        change = (exact[batched, kept] - exact[False, False]).abs().max().item()
        print(
            f"| {name} | {'kept' if kept else 'at each step'} | {'in one batch' if batched else 'one after the other'} | "
            f"{1000 * took / STEPS:.1f} | {seconds[False, False] / took:.2f} | {change:.0e} |",
            flush=True,
        )


def timed(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def foreground(picture: Image.Image) -> np.ndarray:
    """(H, W) bool: where `picture` differs from the colour along its border."""
    pixels = np.asarray(picture, dtype=np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3)])
    return ndimage.binary_opening(np.linalg.norm(pixels - np.median(border, axis=0), axis=2) > 60)


def same_place(first: Image.Image, second: Image.Image) -> float:
    """Intersection over union of the two pictures' foregrounds, in [0, 1]."""
    a, b = foreground(first), foreground(second)
    return float((a & b).sum() / max(1, (a | b).sum()))


def editing_table(model: Path) -> None:
    """Print, by strength, in how many of `CASES` drawings a red circle becomes a blue one, and stays where it is."""
    rng = np.random.default_rng(0)
    before = Description((Object("red", "circle"),))
    scenes: list[Scene] = [sample_scene(before, rng) for _ in range(CASES)]
    pictures = [render(scene) for scene in scenes]
    wanted = parse("a blue circle")
    pipeline = load_pipeline(model, "stochastic")
    pipeline.set_progress_bar_config(disable=True)
    print("| strength | a blue circle | same place (IoU of 0.6 or more) | both |\n|---|---|---|---|")
    for strength in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        seeds = [torch.Generator().manual_seed(k) for k in range(CASES)]
        edited = pipeline(["a blue circle"] * CASES, image=pictures, strength=strength, generator=seeds).images
        right = np.array([judge(picture, wanted).correct for picture in edited])
        stays = np.array([same_place(*pair) >= 0.6 for pair in zip(pictures, edited, strict=True)])
        print(f"| {strength} | {right.mean():.0%} | {stays.mean():.0%} | {(right & stays).mean():.0%} |", flush=True)


if __name__ == "__main__":
    main()
