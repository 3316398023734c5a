"""Teach a trained model a colour that it has never seen, with adapters (LoRA), and count what it then can and what it forgot.

    python examples/new_colour.py                       in the project's folder, in its environment, after `dvc repro`
    python examples/new_colour.py --model my-export --steps 600

It renders scenes of which half show a lavender thing and half the old colours alone, encodes them, trains adapters to models/dit,
and scores images of held-out captions by the detector, without and with the adapters. Everything goes into new_colour/: the
adapters (`dit generate --lora new_colour/lora`), before.png, after.png, report.json. No setting and no stage is touched.

The bundled VAE was fitted to scenes of eight colours and shows another one as something between them: the detector looks for what
the VAE makes of lavender, and `new_ceiling` counts how many of the rendered scenes it confirms after the VAE alone.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from dit.shapes.scene import COLOURS, SHAPES

COLOUR, RGB = "lavender", (160, 100, 240)
COLOURS[COLOUR] = RGB  # before dit.shapes.captions is imported, which reads captions of the colours that there are
PAIRS = [(COLOUR, shape) for shape in SHAPES]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from dit.config import Model, Params, load_config  # noqa: E402
from dit.encode.encode import encode_dataset  # noqa: E402
from dit.encoders.loading import EncoderSource, load_vae  # noqa: E402
from dit.latents.cache import LatentCache  # noqa: E402
from dit.pipeline.generate import generate_images, load_pipeline  # noqa: E402
from dit.shapes.captions import describe  # noqa: E402
from dit.shapes.placement import sample_scene  # noqa: E402
from dit.shapes.render import render, render_mask  # noqa: E402
from dit.shapes.scene import Description, Kind, Scene, sample_description  # noqa: E402
from dit.shapes.scoring import score_image, score_objects  # noqa: E402
from dit.sources.writer import DatasetWriter, FetchResult  # noqa: E402
from dit.training.checkpoint import Checkpoints  # noqa: E402
from dit.training.init_model import load_init  # noqa: E402
from dit.training.logging import MetricLogger  # noqa: E402
from dit.training.lora import save_adapters  # noqa: E402
from dit.training.trainer import Trainer  # noqa: E402
from dit.utils.autoencoder import reconstruct  # noqa: E402
from dit.utils.files import write_json  # noqa: E402
from dit.utils.images import grid  # noqa: E402

FOLDER = Path("new_colour")
TRAIN_STREAM, NEW_STREAM, OLD_STREAM = 101, 102, 103  # no scene is in two of them, nor in those of dit/shapes/prompts.py
LEARNING_RATE = 6e-3  # of 2e-3, 4e-3 and 6e-3, with 300 to 400 steps, the one that knew most of the new colour


def scenes(params: Params, stream: int, count: int, share: float) -> Iterator[tuple[Description, Scene, str]]:
    """Yield scenes and captions; in so large a share of them, one thing has the new colour."""
    kind = Kind(params.shapes.data.layout, params.shapes.data.level)
    for k in range(count):
        rng = np.random.default_rng([params.shapes.data.seed, stream, k])
        description = sample_description(rng, kind, must_have=PAIRS if rng.random() < share else ())
        yield description, sample_scene(description, rng, kind.layout), describe(description, rng)


def write_latents(params: Params, count: int) -> LatentCache:
    """Render and encode the training set, as the first two stages do."""
    data = replace(params.shapes.data, num_samples=count)
    writer = DatasetWriter(FOLDER / "raw", data, count)
    for k, (_, scene, text) in enumerate(scenes(params, TRAIN_STREAM, count, share=0.5)):
        content = io.BytesIO()
        render(scene, data.image_size).save(content, "PNG")
        writer.add(f"images/{k:06d}.png", content.getvalue(), [text])
    writer.close(FetchResult())
    encode_dataset(FOLDER / "raw", FOLDER / "latents", params.shapes.encode, params.runtime, FOLDER / "reconstructions.png")
    return LatentCache(FOLDER / "latents")


def adapt_detector(params: Params, count: int) -> float:
    """Let the detector look for the colour as the VAE shows it; return the share of rendered scenes that it then confirms."""
    size = params.shapes.data.image_size
    vae, _ = load_vae(EncoderSource("builtin"))
    shown = list(scenes(params, NEW_STREAM, count, share=1))
    pixels = torch.stack([torch.from_numpy(np.array(render(scene, size))) for _, scene, _ in shown]).permute(0, 3, 1, 2)
    decoded = reconstruct(vae, pixels / 127.5 - 1)
    images = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    found = []
    for image, (_, scene, _) in zip(images, shown, strict=True):
        new = next(k for k, thing in enumerate(scene.objects) if thing.colour == COLOUR)
        inside = render_mask(scene.objects[new].shape, scene.positions[new], scene.radii[new], size) > 0.99
        found.append(np.median(image[inside], axis=0))
    red, green, blue = np.median(found, axis=0).round().astype(int).tolist()
    COLOURS[COLOUR] = (red, green, blue)
    right = [score_objects(image, description).correct for image, (description, _, _) in zip(images, shown, strict=True)]
    return sum(right) / count


def train_adapters(params: Params, model: Path, cache: LatentCache, steps: int) -> None:
    """Train adapters to `model`, as the train stage does, and write them into lora/."""
    init = load_init(model, str(model))
    config = init.transformer.config
    sizes = Model(**{field.name: config[field.name] for field in fields(Model)})
    train = replace(params.train, method="lora", init_from=str(model), validate_every=steps, warmup_steps=10)
    epochs = -(-steps * train.batch_size // len(cache.train))
    optim = replace(params.shapes.optim, num_epochs=epochs, learning_rate=LEARNING_RATE)
    checkpoints = Checkpoints(FOLDER / "state", keep=1)
    logger = MetricLogger(FOLDER / "train.log", FOLDER / "progress")
    transformer, _ = Trainer(cache, sizes, optim, train, params.runtime, logger, None, checkpoints, init=init).train()
    save_adapters(transformer, FOLDER / "lora")


def score(params: Params, model: Path, adapters: Path | None, count: int, sheet: Path) -> dict[str, float]:
    """Return the share of images that are right in everything: captions with the new colour, and with the old ones alone."""
    pipeline = load_pipeline(model)
    if adapters:
        pipeline.load_lora_weights(adapters)
    shares, shown = {}, []
    for name, stream, share in (("new", NEW_STREAM, 1), ("old", OLD_STREAM, 0)):
        prompts = [text for _, _, text in scenes(params, stream, count, share)]
        settings = {"num_inference_steps": params.sample.num_inference_steps, "guidance_scale": params.sample.guidance_scale}
        images: list[Image.Image] = list(generate_images(pipeline, prompts, range(count), batch_size=50, **settings))
        scores = [score_image(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        shares[name] = sum(not each.problem for each in scores if each) / count
        shown += images[:8]
    grid(shown, columns=8, scale=2).save(sheet)
    return shares


def main() -> int:
    """Run all of it; print the shares before and after, and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/dit"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=600, metavar="N", help="scenes to train on; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of training; default: %(default)s")
    parser.add_argument("--prompts", type=int, default=100, metavar="N", help="of each kind, to be scored; default: %(default)s")
    arguments = parser.parse_args()
    for name, least in (("images", 10), ("steps", 1), ("prompts", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} {getattr(arguments, name)}: at least {least}")
    if not (arguments.model / "model_index.json").is_file():
        print(f"new_colour: {arguments.model} is no trained model; `dvc repro` trains one in models/dit", file=sys.stderr)
        return 1
    started, params = time.perf_counter(), load_config()
    shutil.rmtree(FOLDER, ignore_errors=True)
    cache = write_latents(params, arguments.images)
    ceiling = adapt_detector(params, arguments.prompts)
    train_adapters(params, arguments.model, cache, arguments.steps)
    seconds = time.perf_counter() - started
    before = score(params, arguments.model, None, arguments.prompts, FOLDER / "before.png")
    after = score(params, arguments.model, FOLDER / "lora", arguments.prompts, FOLDER / "after.png")
    report = {
        f"{kind}_{when}": shares[kind] for kind in ("new", "old") for when, shares in (("before", before), ("after", after))
    }
    write_json(FOLDER / "report.json", report | {"new_ceiling": ceiling, "seconds": round(seconds, 1)})
    print(f"{COLOUR}: {before['new']:.0%} right before, {after['new']:.0%} after; the VAE alone {ceiling:.0%}")
    print(f"old colours: {before['old']:.0%} right before, {after['old']:.0%} after")
    print(f"{seconds:.0f} s to render, encode and train; try: dit generate --lora {FOLDER / 'lora'} --prompt 'a {COLOUR} star'")
    return 0


if __name__ == "__main__":
    sys.exit(main())
