"""`dit generate`: generate images from captions, or change an image by a caption."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, get_args

from dit import __version__
from dit.commands._args import add_flag, image_path
from dit.commands.inputs import (
    InputImage,
    check_numbers,
    check_output,
    check_text,
    find_checkpoints,
    parse_lora,
    read_images,
    read_prompts,
)
from dit.config import DEFAULTS, STRENGTH, Scheduler
from dit.errors import UserError
from dit.pipeline.hub import find_model
from dit.pipeline.model_folder import read_index, weights_hash
from dit.utils.files import sha256_file

if TYPE_CHECKING:
    from dit.pipeline.pipeline import DiTTextToImagePipeline

Loras = Sequence[tuple[Path, float]]  # files of adapters, and how strongly each is applied
EXAMPLES = """\
examples:
  dit generate --prompt "a large red circle above a small blue cross"
  dit generate --prompt "a red heart" --prompt "a green cross" --seed 7 --grid --output two.png
  dit generate --prompts-file prompts.txt --output images/image.png    images/image-0.png, image-1.png, ...
  dit generate --prompt "a green cross" --image generated.png --strength 0.8
  dit generate --prompt "a red circle" --image generated.png --mask mask.png --output mended.png
  dit generate --prompt "a red circle" --checkpoint latest                 with a training that is still going
  dit generate --prompt "a red circle" --model anna/shapes                 with a model on the Hugging Face Hub
  dit generate --prompt "a brown star" --checkpoint models/base --lora models/dit/lora:0.8      with adapters (LoRA)
  dit inspect generated.png                                                how an image was generated
"""
LOW_PSNR = 25  # dB of a VAE's reconstruction: the bundled one has 42 for rendered scenes, and 15 to 20 for photographs


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `generate` and its flags, which are spelled as diffusers' arguments are."""
    parser = commands.add_parser(
        "generate",
        help="generate images from captions with the trained model",
        description="Generate images from captions with a trained model, or change an image by a caption. The same\n"
        "command gives the same file; each PNG holds its prompt, seed, settings and the model's hash.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    what = parser.add_argument_group("what")
    add_flag(what, "prompt", action="append", default=[], metavar="TEXT", help="what to generate; may be given several times")
    add_flag(what, "prompts-file", type=Path, metavar="FILE", help="more prompts, one a line")
    add_flag(what, "negative_prompt", default="", metavar="TEXT", help="what no image should show")
    add_flag(what, "num_images_per_prompt", type=int, default=1, metavar="N", help="images of each prompt; default: %(default)s")
    add_flag(what, "height", type=int, metavar="PIXELS", help="default: of the images it was trained on")
    add_flag(what, "width", type=int, metavar="PIXELS", help="the same")
    add_flag(what, "seed", type=int, default=0, metavar="N", help="of the first image; the next has N + 1; default: %(default)s")
    how = parser.add_argument_group("how")
    which = how.add_mutually_exclusive_group()
    add_flag(
        which,
        "checkpoint",
        type=Path,
        default=Path("models/dit"),
        metavar="FOLDER",
        help="the model; or a checkpoint of a training that is still going, .state/train/.../step-....safetensors, or latest for "
        "the newest; default: %(default)s",
    )
    add_flag(which, "model", metavar="OWNER/NAME", help="a model on the Hugging Face Hub instead, which is downloaded once")
    add_flag(how, "revision", metavar="NAME", help="branch, tag or commit of --model; default: main")
    add_flag(
        how,
        "num_inference_steps",
        type=int,
        default=DEFAULTS.num_inference_steps,
        metavar="N",
        help="evaluations of the transformer; more take longer; default: %(default)s",
    )
    add_flag(
        how,
        "guidance_scale",
        type=float,
        default=DEFAULTS.guidance_scale,
        metavar="X",
        help="how strictly to follow the prompt; 1 is without, 3 breaks shapes, photographs need 3 to 7; default: %(default)s",
    )
    add_flag(
        how,
        "guidance_interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels, 0 to 1, at which guidance is used; default: all",
    )
    add_flag(
        how,
        "scheduler",
        choices=get_args(Scheduler),
        help=f"{', '.join(get_args(Scheduler))}; default: the checkpoint's, {DEFAULTS.scheduler} for what `dvc repro` trained",
        metavar="NAME",
    )
    add_flag(
        how,
        "lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="adapters that a training with train.method lora wrote, and how much of them; may be given several times",
    )
    add_flag(how, "batch_size", type=int, default=16, metavar="N", help="images generated at once; default: %(default)s")
    change = parser.add_argument_group("change an image")
    add_flag(change, "image", type=Path, metavar="FILE", help="start from this image instead of from noise")
    add_flag(
        change,
        "strength",
        type=float,
        metavar="X",
        help=f"from 0, no change, to 1, nothing is kept; few steps have no small ones; default: {STRENGTH}, with a mask 1",
    )
    add_flag(change, "mask", type=Path, metavar="FILE", help="change only where this image is white")
    where = parser.add_argument_group("where to")
    add_flag(
        where,
        "output",
        type=image_path,
        default=Path("generated.png"),
        metavar="FILE.png",
        help="of several images, k goes into FILE-k.png, from 0 on; a folder, or a name without a suffix, stands for "
        "generated.png in it; default: %(default)s",
    )
    add_flag(where, "grid", action="store_true", help="write one sheet with all images and their prompts, instead of each")
    parser.set_defaults(action=generate)


def generate(arguments: argparse.Namespace) -> None:
    """Generate and write images, and print their names. All inputs are checked before anything heavy is loaded."""
    check_numbers(arguments)
    prompts = read_prompts(arguments.prompt, arguments.prompts_file)
    check_text("--negative_prompt", arguments.negative_prompt)
    image, mask = read_images(arguments.image, arguments.mask, arguments.strength)
    if arguments.model:
        arguments.checkpoint = find_model(arguments.model, arguments.revision)
    elif arguments.revision:
        raise UserError("--revision: there is no --model that it could be of")
    checkpoints = find_checkpoints(arguments.checkpoint)
    if not checkpoints:
        read_index(arguments.checkpoint)
    check_output(arguments.output)
    loras = [parse_lora(text) for text in arguments.lora]

    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from dit.commands.png import write_png
    from dit.pipeline.generate import generate_images, load_pipeline
    from dit.pipeline.lora import apply_loras
    from dit.utils.images import labelled_grid

    disable_progress_bar()  # the weights are loaded at once; the bar is for the steps
    with model_folder(arguments.checkpoint, checkpoints) as folder:
        pipeline, weights = load_pipeline(folder, arguments.scheduler), weights_hash(folder)
    apply_loras(pipeline, loras)
    for line in [*merged_already(arguments.checkpoint, loras), *generation_warnings(pipeline, arguments, prompts, image, mask)]:
        print(f"dit: {line}", file=sys.stderr)

    prompts = [prompt for prompt in prompts for _ in range(arguments.num_images_per_prompt)]
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    images = generate_images(
        pipeline,
        prompts,
        seeds,
        arguments.batch_size,
        progress=True,
        **call_settings(arguments, image, mask),
    )
    shared = png_facts(pipeline, weights, arguments, image, mask, loras)
    output: Path = arguments.output
    if arguments.grid:
        generated = list(images)
        cell = max(160, generated[0].width)  # none is reduced
        sheet = labelled_grid(generated, prompts, columns=min(6, len(prompts)), cell=cell)
        lines = {
            "prompt": "\n".join(" ".join(prompt.split()) for prompt in prompts),
            "seed": "\n".join(map(str, seeds)),
        }  # one per image
        write_png(output, sheet, lines | shared)
        print(output)
        return
    with closing(images):  # and its progress bar, before an error of a file that cannot be written is printed
        for k, (generated_image, prompt, seed) in enumerate(zip(images, prompts, seeds, strict=True)):
            path = output if len(prompts) == 1 else output.with_name(f"{output.stem}-{k}{output.suffix}")
            write_png(path, generated_image, {"prompt": prompt, "seed": str(seed)} | shared)
            tqdm.write(str(path))  # above the progress bar


@contextmanager
def model_folder(given: Path, checkpoints: Sequence[Path]) -> Iterator[Path]:
    """Provide the model folder that `--checkpoint` asks for: `given` itself, or a temporary one of the first whole checkpoint.

    Raises:
        UserError: none of `checkpoints` is whole; the line is of the first.
    """
    if not checkpoints:
        yield given
        return
    from dit.training.export import export_checkpoint

    problems = []
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for path in checkpoints:
            try:
                export_checkpoint(path, Path(folder))
            except UserError as error:  # the training deletes old ones
                problems.append(error)
                continue
            if path != given:
                print(f"dit: {path.with_suffix('.safetensors')}", file=sys.stderr)
            break
        else:
            raise problems[0]
        yield Path(folder)


def merged_already(model: Path, loras: Loras) -> Iterator[str]:
    """Yield a line for each of `loras` that lies in the folder `model`, as a training of adapters leaves it."""
    for path, _ in loras:
        if model.resolve() in path.resolve().parents:
            yield f"{path.parent} is merged into {model} already and counts twice here; it is for the model that it began with"


def call_settings(arguments: argparse.Namespace, image: InputImage | None, mask: InputImage | None) -> dict[str, Any]:
    """Return what was asked for, but for prompts and seeds, as arguments of the pipeline's call."""
    names = ("negative_prompt", "strength", "height", "width", "num_inference_steps", "guidance_scale")
    settings = {name: getattr(arguments, name) for name in names}
    images = {"image": image and image.image, "mask_image": mask and mask.image}
    return settings | images | {"guidance_interval": tuple(arguments.guidance_interval)}


def generation_warnings(
    pipeline: DiTTextToImagePipeline,
    arguments: argparse.Namespace,
    prompts: Sequence[str],
    image: InputImage | None,
    mask: InputImage | None,
) -> Iterator[str]:
    """Yield a line for each thing that is done as asked, and may not be what was meant.

    Args:
        pipeline: what generates.
        arguments, prompts, image, mask: what was asked for.
    """
    from dit.commands.prompt_warnings import prompt_warnings
    from dit.utils.autoencoder import reconstruct
    from dit.utils.images import psnr

    for prompt in dict.fromkeys([*prompts, arguments.negative_prompt]):
        yield from prompt_warnings(pipeline.tokenizer, prompt, pipeline.config.long_captions)
    trained, cell = pipeline.trained_sizes, pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    width, height = arguments.width or trained[0][0], arguments.height or trained[0][1]
    if (width, height) not in trained and not (width % cell or height % cell):  # the pipeline refuses others
        known = " and ".join(f"{across} x {down}" for across, down in trained)
        yield f"the model was trained on {known} pixels; at {width} x {height} things may come out twice"
    if image and image.image.size != (width, height):
        own_width, own_height = image.image.size
        how = "it is resized to" if own_width * height == own_height * width else "its middle is taken, at"
        yield f"the image to start from has {own_width} x {own_height} pixels; {how} {width} x {height}"
    if mask and mask.image.histogram()[128:] == 128 * [0]:
        yield "the mask is white nowhere, so that nothing changes"
    if arguments.negative_prompt and arguments.guidance_scale == 1:
        yield "--negative_prompt changes nothing where --guidance_scale is 1"
    if image:
        pixels = pipeline.image_processor.preprocess(image.image.resize(trained[0]))
        quality = psnr(pixels.to(pipeline.vae.device), reconstruct(pipeline.vae, pixels))
        if quality < LOW_PSNR:
            yield f"the VAE of this model keeps little of this image ({quality:.0f} dB): it comes out changed"


def png_facts(
    pipeline: DiTTextToImagePipeline,
    weights: str,
    arguments: argparse.Namespace,
    image: InputImage | None,
    mask: InputImage | None,
    loras: Loras,
) -> dict[str, str]:
    """Return the settings of an image, for its PNG: all but its prompt and seed; no path, no machine, no time.

    Args:
        pipeline: what generates, with its scheduler.
        weights: the hash of its weights.
        arguments, image, mask, loras: what was asked for.
    """
    from dit.pipeline.schedulers import scheduler_name

    strength = arguments.strength if arguments.strength is not None else 1.0 if mask else STRENGTH
    facts = {
        "negative_prompt": (arguments.guidance_scale > 1 and arguments.negative_prompt) or None,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "guidance_interval": "{} {}".format(*arguments.guidance_interval),
        "scheduler": scheduler_name(pipeline.scheduler),
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "model": f"sha256:{weights}",
        "height": arguments.height or pipeline.trained_sizes[0][1],
        "width": arguments.width or pipeline.trained_sizes[0][0],
        "image": image and f"sha256:{image.sha256}",
        "mask": mask and f"sha256:{mask.sha256}",
        "strength": image and strength,
        "software": f"latent-dit {__version__}",
        "lora": " ".join(f"sha256:{sha256_file(path)}:{scale:g}" for path, scale in loras) or None,
    }
    return {name: str(value) for name, value in facts.items() if value is not None}
