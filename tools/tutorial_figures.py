"""Draw the figures of the tutorial's chapter 5, of data/raw and the model in models/dit: rendered shapes, a flow.

python tools/tutorial_figures.py     docs/images/patches.webp, autoencoder, text, cross_attention, gates, paths
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from dit.dataset.storage import StoredImages
from dit.evaluation.clip import read_split
from dit.model.transformer import Block
from dit.pipeline.generate import load_pipeline
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.utils.autoencoder import decode_latents, encode_image
from dit.utils.images import grid, to_images, to_tensor

ROOT = Path(__file__).parent.parent
IMAGES, MODEL, RAW = ROOT / "docs" / "images", ROOT / "models" / "dit", ROOT / "data" / "raw"
PROMPT, SEED = "a large red circle above a small blue square", 3
WORDS = ("large", "red", "circle", "above", "small", "blue", "square")
TIMES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
SHOWN = 6
COMPRESSION = {"quality": 85, "method": 6}  # of WebP
STYLE = {"font.size": 8, "axes.titlesize": 8, "figure.dpi": 110, "savefig.bbox": "tight", "svg.hashsalt": "1"}


def main() -> None:
    """Draw all of them."""
    pipeline = load_pipeline(MODEL, "stochastic")
    pipeline.set_progress_bar_config(disable=True)
    images = validation_images(SHOWN)
    with plt.rc_context(STYLE), torch.inference_mode():
        patches(pipeline, images[0], IMAGES / "patches.webp")
        autoencoder(pipeline, images, IMAGES / "autoencoder.webp")
        text(pipeline, IMAGES / "text.webp")
        cross_attention(pipeline, IMAGES / "cross_attention.webp")
        gates(pipeline, IMAGES / "gates.webp")
        paths(pipeline, images[:2], IMAGES / "paths.webp")


def validation_images(count: int) -> list[tuple[Image.Image, str]]:
    """Return `count` images of the validation set that show two things, with their captions."""
    stored = StoredImages(RAW)
    entries = [entry for entry in read_split(RAW, "val") if " and " in entry.text or " above " in entry.text][:count]
    return [(Image.open(io.BytesIO(stored.read(entry.stored))).convert("RGB"), entry.text) for entry in entries]


def encoded(pipeline: DiTTextToImagePipeline, images: list[Image.Image]) -> torch.Tensor:
    """Return the standardised latents (N, C, H, W) of `images`."""
    return encode_image(pipeline.vae, to_tensor(torch.from_numpy(np.stack([np.asarray(image) for image in images]))))


def patches(pipeline: DiTTextToImagePipeline, pair: tuple[Image.Image, str], path: Path) -> None:
    """An image, the channels of its latents, and the squares that become tokens."""
    image, latents = pair[0], encoded(pipeline, [pair[0]])[0].numpy()
    cell = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    columns = int(len(latents) ** 0.5)
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.5))
    axes[0].imshow(image)
    axes[0].set_title(f"{image.width} x {image.height} pixels, 3 colours")
    tiles = [np.pad(channel, 1, constant_values=np.nan) for channel in latents]
    rows = [np.concatenate(tiles[k : k + columns], axis=1) for k in range(0, len(tiles), columns)]
    axes[1].imshow(np.concatenate(rows), cmap="gray", vmin=-2, vmax=2)
    axes[1].set_title(f"latents: {len(latents)} channels of {latents.shape[2]} x {latents.shape[1]}")
    axes[2].imshow(image)
    for k, (row, column) in enumerate(np.ndindex(image.height // cell, image.width // cell)):
        axes[2].add_patch(plt.Rectangle((column * cell - 0.5, row * cell - 0.5), cell, cell, fill=False, edgecolor="gray"))
        axes[2].text(column * cell + 1, row * cell + 1, str(k), color="gray", fontsize=6, va="top")
    tokens = (image.height // cell) * (image.width // cell)
    axes[2].set_title(f"{tokens} tokens of {latents.size // tokens} numbers")
    save(figure, axes, path)


def autoencoder(pipeline: DiTTextToImagePipeline, pairs: list[tuple[Image.Image, str]], path: Path) -> None:
    """Images, what the VAE makes of them, and eight times the difference."""
    images = [image for image, _ in pairs]
    decoded = to_images(decode_latents(pipeline.vae, encoded(pipeline, images)))
    apart = [
        Image.fromarray((8 * np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))).clip(0, 255).astype(np.uint8))
        for a, b in zip(images, decoded, strict=True)
    ]
    grid([*images, *decoded, *apart], columns=len(images), scale=2).save(path, **COMPRESSION)


def text(pipeline: DiTTextToImagePipeline, path: Path) -> None:
    """How alike the tokens of a caption are to CLIP, as it gives them and with their mean subtracted."""
    tokens, names = tokens_of(pipeline)
    transformer = pipeline.transformer
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.2))
    for axis, rows, title in (
        (axes[0], tokens, "as CLIP gives them"),
        (axes[1], (tokens - transformer.tokens_mean) / transformer.tokens_std, "with mean and deviation taken out"),
    ):
        unit = torch.nn.functional.normalize(rows, dim=-1)
        shown = axis.imshow((unit @ unit.T).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [])
        axis.set_title(title)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="cosine")
    figure.savefig(path, pil_kwargs=COMPRESSION)
    plt.close(figure)


def tokens_of(pipeline: DiTTextToImagePipeline) -> tuple[torch.Tensor, list[str]]:
    """Return the vectors (L, E) of the tokens of `PROMPT` and what they stand for, without those of its begin and end."""
    names = [pipeline.tokenizer.decode([k]).strip() for k in pipeline.tokenizer(PROMPT)["input_ids"][1:-1]]
    return embeddings(pipeline, [PROMPT])[0][0, 1 : 1 + len(names)].float(), names


def cross_attention(pipeline: DiTTextToImagePipeline, path: Path) -> None:
    """How much each place of an image looks at each word of the caption: the mean over blocks, heads and steps."""
    found: list[torch.Tensor] = []

    def watch(module: torch.nn.Module, inputs: tuple) -> None:
        x, (keys, _), mask = inputs
        queries = module.norm_q(module.q(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)).float()
        scores = queries @ keys.float().transpose(-1, -2) / queries.shape[-1] ** 0.5  # (N, h, T, L)
        found.append(scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).mean(1)[0])  # with the caption: (T, L)

    hooks = [
        block.cross_attn.register_forward_pre_hook(watch) for block in pipeline.transformer.blocks if isinstance(block, Block)
    ]
    (image,) = pipeline(PROMPT, generator=torch.Generator().manual_seed(SEED), guidance_scale=1, num_inference_steps=20).images
    for hook in hooks:
        hook.remove()
    weights = torch.stack(found).mean(0)  # (T, L)
    _, names = tokens_of(pipeline)
    side = int(len(weights) ** 0.5)
    figure, axes = plt.subplots(1, 1 + len(WORDS), figsize=(9, 1.5))
    axes[0].imshow(image)
    axes[0].set_title(PROMPT.replace(" above", "\nabove"), fontsize=6)
    for axis, word in zip(axes[1:], WORDS, strict=True):
        part = weights[:, 1 + names.index(word)].reshape(side, side).numpy()
        axis.imshow(image, extent=(0, 1, 0, 1))
        axis.imshow(part / part.max(), extent=(0, 1, 0, 1), cmap="magma", alpha=0.7, vmin=0, vmax=1, interpolation="bilinear")
        axis.set_title(word)
    save(figure, axes, path)


def gates(pipeline: DiTTextToImagePipeline, path: Path) -> None:
    """How far adaLN opens the gates of each block, by noise level: 0 at the start of the training."""
    transformer, times = pipeline.transformer, torch.linspace(0.02, 1, 50)
    opened: dict[str, list[list[float]]] = {"self-attention": [], "cross-attention": [], "MLP": []}
    values: list[torch.Tensor] = []
    hooks = [block.adaLN_modulation.register_forward_hook(lambda _, __, out: values.append(out)) for block in transformer.blocks]
    embeds, mask, pooled = embeddings(pipeline, [PROMPT] * len(times))
    side = pipeline.config.image_size // pipeline.vae_scale_factor
    transformer(torch.zeros(len(times), transformer.config.in_channels, side, side), times, embeds, mask, pooled)
    for hook in hooks:
        hook.remove()
    for modulation in values:
        for name, gate in zip(opened, modulation.float().chunk(9, dim=-1)[2::3], strict=True):
            opened[name].append(gate.abs().mean(-1).tolist())
    figure, axes = plt.subplots(1, 3, figsize=(7.5, 2.1), sharey=True)
    for axis, (name, blocks) in zip(axes, opened.items(), strict=True):
        for number, block in enumerate(blocks):
            axis.plot(times, block, color=plt.cm.viridis(number / len(blocks)), label=f"block {number + 1}")
        axis.set_title(name)
        axis.set_xlabel("noise level t")
    axes[0].set_ylabel("mean |gate|")
    axes[0].set_ylim(0)
    axes[-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, pil_kwargs=COMPRESSION)
    plt.close(figure)


def embeddings(pipeline: DiTTextToImagePipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens (N, L, E), mask (N, L) and pooled vectors (N, P) of `prompts`."""
    encoded = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    return encoded.prompt_embeds, encoded.prompt_attention_mask, encoded.pooled_prompt_embeds


def paths(pipeline: DiTTextToImagePipeline, pairs: list[tuple[Image.Image, str]], path: Path) -> None:
    """Images on the straight way to noise, and what the trained model takes each of them for."""
    latents, captions = encoded(pipeline, [image for image, _ in pairs]), [caption for _, caption in pairs]
    noise = torch.randn(latents[:1].shape, generator=torch.Generator().manual_seed(SEED))
    rows = []
    for one, caption in zip(latents, captions, strict=True):
        t = torch.tensor(TIMES)[:, None, None, None]
        noisy = (1 - t) * one + t * noise
        embeds, mask, pooled = embeddings(pipeline, [caption] * len(TIMES))
        guessed = noisy - t * pipeline.transformer(noisy, torch.tensor(TIMES), embeds, mask, pooled)
        rows += [to_images(decode_latents(pipeline.vae, noisy)), to_images(decode_latents(pipeline.vae, guessed))]
    figure, axes = plt.subplots(len(rows), len(TIMES), figsize=(7.5, 4))
    for line, images in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
    for axis, time in zip(axes[0], TIMES, strict=True):
        axis.set_title(f"t = {time:g}")
    for k, line in enumerate(axes):
        line[0].set_ylabel(("(1 - t) x + t n", "the model's x")[k % 2], fontsize=6)
    save(figure, axes, path)


def save(figure: plt.Figure, axes: np.ndarray, path: Path) -> None:
    """Write a figure of images, without ticks."""
    for axis in np.ravel(axes):
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, pil_kwargs=COMPRESSION)
    plt.close(figure)


if __name__ == "__main__":
    main()
