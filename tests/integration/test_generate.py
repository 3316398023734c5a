"""`dit generate`: its images, the settings in their files, its warnings, and its errors in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit import __version__, cli
from dit.commands.inputs import read_images
from dit.commands.png import read_facts
from dit.config import DEFAULTS
from dit.dataset.decode import open_rgb
from dit.encoders.vocabulary import unknown_words
from dit.latents.cache import LatentCache
from dit.pipeline.generate import load_pipeline
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.shapes.placement import sample_scene
from dit.shapes.render import render
from dit.shapes.scene import Kind, sample_description
from dit.training.export import save_model
from dit.training.stop import Stopped
from dit.utils.files import sha256_file
from helpers import REPO
from helpers.cache import write_cache
from helpers.small_models import CHANNELS
from helpers.training import MODEL, OPTIM, TRAIN, MemoryLogger, run

QUICK = ["--num_inference_steps", "3"]


@pytest.fixture
def there(model, tmp_path, monkeypatch) -> Path:
    """A folder with models/dit, in which a user works."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "dit").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments: str) -> int:
    return cli.main(["generate", *QUICK, *arguments])


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def scene(there) -> Path:
    """An image to start from."""
    rng = np.random.default_rng(0)
    render(sample_scene(sample_description(rng, Kind()), rng, "free")).save(there / "scene.png")
    return there / "scene.png"


def test_generate_is_reproducible_and_records_settings(there, model, capsys):
    command = ["--prompt", "a red circle", "--negative_prompt", "a blue star", "--seed", "7", "--scheduler", "euler"]
    assert generate(*command, "--output", "new/a.png") == 0
    assert capsys.readouterr().out == "new/a.png\n"
    assert generate(*command, "--output", "b.png", "--num-inference-steps", "3", "--guidance-scale", "2") == 0
    assert read_facts(Path("b.png"))["guidance_scale"] == "2.0"  # the other spelling is understood
    assert generate(*command, "--output", "b.png") == 0
    assert Path("new/a.png").read_bytes() == Path("b.png").read_bytes()
    assert read_facts(Path("b.png")) == {
        "prompt": "a red circle",
        "seed": "7",
        "negative_prompt": "a blue star",
        "num_inference_steps": "3",
        "guidance_scale": str(DEFAULTS.guidance_scale),
        "guidance_interval": "0.0 1.0",
        "scheduler": "euler",
        "dtype": str(load_pipeline(model).transformer.dtype).removeprefix("torch."),
        "height": "64",
        "width": "64",
        "model": "sha256:" + sha256_file(model / "transformer" / "diffusion_pytorch_model.safetensors"),
        "software": f"latent-dit {__version__}",
    }
    assert cli.main(["inspect", "b.png"]) == 0
    assert "negative_prompt      a blue star\n" in capsys.readouterr().out
    assert sorted(path.name for path in there.rglob("*.png*")) == ["a.png", "b.png"]  # nothing half-written


@pytest.mark.parametrize(
    "setting",
    [
        ["--seed", "8"],
        ["--negative_prompt", "a blue star"],
        ["--guidance_scale", "4"],
        ["--guidance_interval", "0", "0.5"],
        ["--scheduler", "heun"],
        ["--num_inference_steps", "5"],
    ],
)
def test_generate_setting_reaches_image_and_text(there, setting):
    base = ["--prompt", "a red circle", "--scheduler", "euler"]
    assert generate(*base, "--output", "a.png") == 0 and generate(*base, *setting, "--output", "b.png") == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    name, value = setting[0].strip("-"), " ".join(str(float(x)) if "guidance" in setting[0] else x for x in setting[1:])
    assert read_facts(Path("b.png"))[name] == value != read_facts(Path("a.png")).get(name)


def test_generate_equals_pipeline(there, model):
    command = ["--prompt", "a red circle", "--seed", "3", "--height", "32", "--width", "96"]
    assert generate(*command) == 0
    generated = load_pipeline(model, DEFAULTS.scheduler)(
        "a red circle", height=32, width=96, num_inference_steps=3, generator=[torch.Generator().manual_seed(3)]
    ).images[0]
    assert generated.size == (96, 32) and np.array_equal(pixels("generated.png"), np.asarray(generated))


def test_generate_several_prompts_in_batches(there, capsys):
    Path("prompts.txt").write_text("\ufeffein Würfel, 日本\r\n\n  a blue star \n", encoding="utf-8")
    several = ["--prompt", "a red circle", "--prompts-file", "prompts.txt", "--num_images_per_prompt", "2", "--seed", "5"]
    assert generate(*several, "--output", "p/x.png", "--batch_size", "4") == 0
    assert capsys.readouterr().out.split() == [f"p/x-{k}.png" for k in range(6)]
    facts = [read_facts(Path(f"p/x-{k}.png")) for k in range(6)]
    assert [fact["seed"] for fact in facts] == ["5", "6", "7", "8", "9", "10"]
    assert [fact["prompt"] for fact in facts[::2]] == ["a red circle", "ein Würfel, 日本", "a blue star"]
    assert generate("--prompt", "a blue star", "--seed", "10") == 0
    assert np.abs(pixels("generated.png") - pixels("p/x-5.png")).mean() < 1  # rounding
    assert np.abs(pixels("generated.png") - pixels("p/x-4.png")).mean() > 5
    assert generate("--prompt", "a blue star", "--seed", "10", "--batch_size", "1") == 0
    assert read_facts(Path("generated.png")) == facts[5]


def test_generate_grid(there, capsys):
    assert generate("--prompt", "a red circle", "--prompt", "a blue star", "--grid", "--output", "sheet.png") == 0
    assert capsys.readouterr().out == "sheet.png\n" and [path.name for path in there.glob("*.png")] == ["sheet.png"]
    facts = read_facts(Path("sheet.png"))
    assert facts["prompt"].split("\n") == ["a red circle", "a blue star"] and facts["seed"].split("\n") == ["0", "1"]
    assert generate("--prompt", "a blue star", "--seed", "1") == 0
    twice = Image.open("generated.png").resize((128, 128), Image.Resampling.LANCZOS)
    right = pixels("sheet.png")[8:136, 144:272]
    assert np.abs(np.asarray(twice) - right).mean() < 1 < np.abs(pixels("sheet.png")[8:136, 8:136] - right).mean()


@pytest.mark.parametrize("name", ["./outputs/generated", "new.png/", "there.png", "."])
def test_generate_output_may_be_a_folder(there, capsys, name):
    """One that exists, or one by its name: without a suffix, or with a slash behind it."""
    Path("there.png").mkdir()
    assert generate("--prompt", "a", "--prompt", "b", "--output", name) == 0
    expected = [Path(name) / f"generated-{k}.png" for k in range(2)]
    assert capsys.readouterr().out.split() == [str(path) for path in expected] and all(path.is_file() for path in expected)
    assert generate("--prompt", "a", "--output", name) == 0
    assert read_facts(Path(name) / "generated.png")["prompt"] == "a"


@pytest.fixture(scope="module")
def trainings(tmp_path_factory) -> Path:
    """What two trainings that were stopped have left in .state/train: steps 4 and 6 of one, then step 2 of another."""
    folder = tmp_path_factory.mktemp("trainings")
    cache = write_cache(folder / "latents", text_sizes=(128, 128), channels=CHANNELS)
    for name, step in (("first", 6), ("second", 2)):
        stop = MemoryLogger(
            lambda line, step=step: line.startswith(f"step {step}/9 loss") and os.kill(os.getpid(), signal.SIGTERM)
        )
        with pytest.raises(Stopped):
            run(cache, folder / "train" / name, {"lr_scheduler": "constant"}, logger=stop)
    return folder


def test_generate_with_checkpoint_of_running_training(there, trainings):
    """The images of the model that the training would be if it ended there."""
    cache = LatentCache(trainings / "latents")
    transformer, _ = run(cache, there / "state", {"lr_scheduler": "constant"}, num_epochs=2)  # six steps
    save_model(there / "done", transformer, cache, MODEL, OPTIM, replace(TRAIN, lr_scheduler="constant"))
    command = ["--prompt", "a red circle"]
    assert generate(*command, "--checkpoint", "done", "--output", "expected.png") == 0
    for suffix in ("safetensors", "json"):
        assert generate(*command, "--checkpoint", str(trainings / "train" / "first" / f"step-00000006.{suffix}")) == 0
        assert Path("generated.png").read_bytes() == Path("expected.png").read_bytes()
    assert generate(*command, "--checkpoint", str(trainings / "train" / "first" / "step-00000004.json")) == 0
    assert read_facts(Path("generated.png"))["model"] != read_facts(Path("expected.png"))["model"]


def test_generate_with_latest_checkpoint(there, trainings, capsys):
    """The newest of all trainings that is whole; another one where it is still written, or was deleted meanwhile."""
    shutil.copytree(trainings / "train", ".state/train", copy_function=shutil.copy2)
    command, newest = ["--prompt", "a red circle", "--checkpoint", "latest"], Path(".state/train/second/step-00000002.json")
    assert generate(*command) == 0
    assert f"dit: {newest.with_suffix('.safetensors')}\n" in capsys.readouterr().err
    newest.with_suffix(".safetensors").unlink()
    assert generate(*command) == 0
    assert "dit: .state/train/first/step-00000006.safetensors\n" in capsys.readouterr().err
    newest.unlink()
    for path in Path(".state/train/first").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert generate(*command) == 1
    error = capsys.readouterr().err
    assert error.startswith("dit: .state/train/first/step-00000006.safetensors: damaged") and error.count("\n") == 1
    shutil.rmtree(".state/train/first")
    assert generate(*command) == 1
    assert capsys.readouterr().err.startswith("dit: --checkpoint latest: there is none in .state/train")


def test_generate_refuses_unusable_checkpoints(there, trainings, capsys):
    shutil.copytree(trainings / "train" / "first", "first")
    record = json.loads(Path("first/step-00000006.json").read_text())
    del record["record"]["model"]  # as version 0.2.0 wrote it
    Path("first/step-00000006.json").write_text(json.dumps(record))
    Path("first/step-00000004.json").unlink()
    for step, message in (
        (6, "of an earlier version, which did not record its model"),
        (4, "a training is still writing it, or has"),
    ):
        assert generate("--prompt", "a", "--checkpoint", f"first/step-{step:08d}.safetensors") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"dit: first/step-{step:08d}.") and message in error and error.count("\n") == 1


def test_generate_strength(there, scene):
    change = ["--prompt", "a red circle", "--image", str(scene), "--num_inference_steps", "10", "--strength"]
    distances = []
    for strength in ("0", "0.6", "1"):
        assert generate(*change, strength) == 0
        distances.append(np.abs(pixels("generated.png") - pixels(scene)).mean())
    assert distances[0] < 3 < min(distances[1:]) and distances[1] != distances[2]
    facts = read_facts(Path("generated.png"))
    assert facts["image"] == f"sha256:{sha256_file(scene)}" and facts["strength"] == "1.0" and "mask" not in facts
    assert str(scene) not in str(facts)


def test_generate_mask(there, scene):
    white = np.zeros((64, 64), np.uint8)
    white[16:40, 16:48] = 255
    Image.fromarray(white).save("mask.png")
    assert generate("--prompt", "a red circle", "--image", str(scene), "--mask", "mask.png") == 0
    changed = np.abs(pixels("generated.png") - pixels(scene)).max(2)
    assert changed[white == 0].max() <= 1 and changed[white > 0].mean() > 5
    facts = read_facts(Path("generated.png"))
    assert facts["mask"] == f"sha256:{sha256_file(Path('mask.png'))}" and facts["strength"] == "1.0"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_image_is_white_everywhere(there, model, mode):
    """In `dit generate`, in the pipeline and in training."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (16, 16, 48, 48))
    image.convert(mode).save("holes.png")
    given, _ = read_images(Path("holes.png"), None, None)
    trained = open_rgb(Path("holes.png").read_bytes())
    assert given.image == trained and trained.getpixel((0, 0)) == (255, 255, 255)
    settings = {"strength": 0.0, "num_inference_steps": 3}
    pipeline = load_pipeline(model, DEFAULTS.scheduler)
    by_hand, expected = (pipeline("a", image=image, **settings).images[0] for image in (Image.open("holes.png"), trained))
    assert by_hand == expected
    assert generate("--prompt", "a", "--image", "holes.png", "--strength", "0") == 0
    assert np.array_equal(pixels("generated.png"), np.asarray(expected))


def test_generate_refuses_transparent_mask(there, scene, capsys):
    """White and black beneath it may mean anything: painted on nothing, or erased."""
    Image.new("RGBA", (64, 64), (255, 255, 255, 0)).save("mask.png")
    assert generate("--prompt", "a", "--image", str(scene), "--mask", "mask.png") == 1
    assert "--mask mask.png: transparent in places, which may mean either; put it on a" in capsys.readouterr().err


def test_generate_mask_may_be_a_pixel_off(there):
    """As an editor makes it that halves 1024 x 683 pixels."""
    Image.new("RGB", (1024, 683)).save("image.png")
    Image.new("L", (512, 342), 255).save("mask.png")
    assert generate("--prompt", "a red circle", "--image", "image.png", "--mask", "mask.png") == 0


def test_generate_warns_of_prompts_once(there, capsys):
    long = "a red circle " * 40 + "and the end"
    prompts = ["--prompt", long, "--prompt", long, "--prompt", "a Giraffe, giraffe, naïve circles", "--prompt", "a red circle."]
    assert generate(*prompts, "--batch_size", "1") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "generate" not in line]
    assert lines[0].startswith("dit: the prompt is longer than 77 tokens; not read: 'a red circle") and "and the end'" in lines[0]
    assert lines[1:] == [
        "dit: the text encoder does not know 'giraffe', 'naïve', 'circles', in 'a Giraffe, giraffe, naïve circles'; "
        "it knows 'circle'"
    ]


def test_generate_warns_of_poor_reconstruction(there, scene, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("noise.png")
    warnings = {}
    for name in ("scene.png", "noise.png"):
        assert generate("--prompt", "a red circle", "--image", name) == 0
        warnings[name] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit:")]
    assert warnings["scene.png"] == []
    (line,) = warnings["noise.png"]
    assert re.fullmatch(r"dit: the VAE of this model keeps little of this image \(1?\d dB\): it comes out changed", line)


def test_unknown_words_of_large_vocabulary(model):
    tokenizer = DiTTextToImagePipeline.from_pretrained(model).tokenizer
    assert unknown_words(tokenizer, "a giraffe") == ["giraffe"]
    tokenizer.add_tokens([f"word{k}" for k in range(10_000)])
    assert unknown_words(tokenizer, "a giraffe") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt; for instance: dit generate"),
        (["--prompt", " "], "--prompt: one is empty"),
        (["--prompt", os.fsdecode(b"caf\xe9")], "--prompt 'caf\\udce9': not UTF-8; set the terminal to UTF-8"),
        (["--prompt", "a", "--negative_prompt", os.fsdecode(b"\xe9")], "--negative_prompt '\\udce9': not UTF-8"),
        (["--prompt", "a", "--height", "1" + 20 * "0"], "--height: 100000000000000000000 is more than 100,000"),
        (["--prompts-file", "nowhere.txt"], "--prompts-file nowhere.txt: No such file"),
        (["--prompts-file", "blank.txt"], "--prompts-file blank.txt: there is no prompt in it"),
        (["--prompts-file", "latin.txt"], "--prompts-file latin.txt: not UTF-8 at byte 1"),
        (["--prompt", "a", "--num_inference_steps", "0"], "--num_inference_steps: 0 is not a positive number"),
        (["--prompt", "a", "--height", "-16"], "--height: -16 is not a positive number"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size: 0 is not a positive number"),
        (["--prompt", "a", "--num_images_per_prompt", "0"], "--num_images_per_prompt: 0 is not a positive number"),
        (["--prompt", "a", "--seed", "-1"], "--seed: -1 is not between 0 and"),
        (["--prompt", "a", "--guidance_scale", "0.5"], "--guidance_scale: 0.5 is not a number from 1"),
        (["--prompt", "a", "--guidance_scale", "nan"], "--guidance_scale: nan is not a number from 1"),
        (["--prompt", "a", "--guidance_interval", "0.6", "0.2"], "--guidance_interval: 0.6 0.2 does not rise"),
        (["--prompt", "a", "--mask", "text.png"], "--mask: there is no image to change; name one with --image"),
        (["--prompt", "a", "--strength", "0.5"], "--strength: there is no image to change"),
        (["--prompt", "a", "--image", "scene.png", "--strength", "1.1"], "--strength: 1.1 is not between 0 and 1"),
        (["--prompt", "a", "--image", "nowhere.png"], "--image nowhere.png: No such file"),
        (["--prompt", "a", "--image", "text.png"], "--image text.png: not an image"),
        (["--prompt", "a", "--image", "cut.png"], "--image cut.png: damaged"),
        (["--prompt", "a", "--image", "scene.png", "--mask", "text.png"], "--mask text.png: not an image"),
        (["--prompt", "a", "--image", "scene.png", "--mask", "wide.png"], "--mask wide.png: 64 x 32 pixels do not lie over"),
        (["--prompt", "a", "--output", "a.jpg"], "--output a.jpg: its name must end in .png"),
        (
            ["--prompt", "a", "--output", "v1.5"],
            "--output v1.5: its name must end in .png, since only a PNG keeps every pixel and",
        ),
        (["--prompt", "a", "--output", "text"], "--output text/generated.png: text cannot be made"),
        (["--prompt", "a", "--output", "text.png/a.png"], "--output text.png/a.png: text.png cannot be made"),
        (["--prompt", "a", "--checkpoint", "nowhere"], "nowhere: no such folder; run from the project's folder, or name one"),
        (["--prompt", "a", "--checkpoint", "."], ".: not a trained model, it has no model_index.json"),
        (["--prompt", "a", "--checkpoint", "other"], "other: holds a StableDiffusionPipeline; a DiTText"),
        (["--prompt", "a", "--checkpoint", "step-00000100.safetensors"], "step-00000100.json: cannot be read (No such file"),
        (
            ["--prompt", "a", "--checkpoint", "latest"],
            "--checkpoint latest: there is none in .state/train; a training writes one",
        ),
        (["--prompt", "a", "--checkpoint", "weights.safetensors"], "weights.safetensors: weights alone"),
        (["--prompt", "a", "--checkpoint", "model.ckpt"], "model.ckpt: a pickle, which may hold code"),
    ],
)
def test_generate_refuses_before_loading(there, scene, capsys, monkeypatch, arguments, message):
    Path("blank.txt").write_text(" \n\n")
    Path("latin.txt").write_bytes("Würfel".encode("latin-1"))
    Path("text.png").write_text("no image")
    Path("text").write_text("no image")
    Path("cut.png").write_bytes(scene.read_bytes()[:900])
    Image.new("L", (64, 32)).save("wide.png")
    Path("other").mkdir()
    Path("other/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name in ("step-00000100.safetensors", "weights.safetensors", "model.ckpt"):
        Path(name).write_bytes(b"")
    monkeypatch.setattr("dit.pipeline.generate.load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    assert generate(*arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("dit: ") and message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "60"], "height and width must be multiples of 16, not 60 x 64"),
        (["--scheduler", "ddim"], "scheduler: ddim is for train.objective ddpm"),
        (["--checkpoint", "larger"], "larger: not a trained model, or a damaged one"),
    ],
)
def test_generate_refuses_what_does_not_fit_the_model(there, model, capsys, arguments, message):
    shutil.copytree(model, "larger")
    config = json.loads(Path("larger/transformer/config.json").read_text())
    Path("larger/transformer/config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    assert generate("--prompt", "a red circle", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("dit: ") and message in error and error.count("\n") == 1
    assert not list(there.glob("*.png*"))


def test_generate_out_of_gpu_memory(there, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiTTextToImagePipeline, "__call__", full)
    assert generate("--prompt", "a", "--num_images_per_prompt", "6") == 1
    assert capsys.readouterr().err == (
        "dit: the GPU ran out of memory; 6 images at once are too many, 3 may fit: --batch_size, in params.yaml "
        "sample.batch_size; ending other programs that use it may help; nvidia-smi lists them\n"
    )


def test_generate_out_of_cpu_memory(there, capsys, monkeypatch):
    monkeypatch.setattr(DiTTextToImagePipeline, "__call__", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    assert generate("--prompt", "a") == 1
    assert capsys.readouterr().err == "dit: memory ran out; a smaller height and width may fit; ending other programs may help\n"


def test_generate_prints_after_the_progress_bar(there, capsys):
    """Errors, too: as a file that cannot be written, here since a folder is in its place."""
    Path("x-1.png").mkdir()
    assert generate("--prompt", "a", "--prompt", "b", "--prompt", "c", "--batch_size", "1", "--output", "x.png") == 1
    printed = capsys.readouterr()
    assert printed.out == "x-0.png\n" and printed.err.splitlines()[-1] == "dit: x-1.png.part: Is a directory"
    assert sorted(path.name for path in there.glob("x*")) == ["x-0.png", "x-1.png"]
    assert generate("--prompt", "a", "--output", "x.png") == 0
    bars, _, after = capsys.readouterr().err.rpartition("\n")
    assert "3/3" in bars and not after


def test_generate_ctrl_c(there, capsys, monkeypatch):
    calls = []
    call = DiTTextToImagePipeline.__call__

    def impatient(self, *arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, *arguments, **settings)

    monkeypatch.setattr(DiTTextToImagePipeline, "__call__", impatient)
    assert generate("--prompt", "a", "--prompt", "a", "--batch_size", "1") == 130
    assert capsys.readouterr().err.endswith("dit: interrupted\n")
    assert [path.name for path in there.glob("*.png*")] == ["generated-0.png"]


def test_read_images_scales_sixteen_bits(there):
    """Pillow alone makes white of all from 256 on, of 65,535."""
    grey = np.linspace(0, 65_535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(grey).save("deep.png")
    image, mask = read_images(Path("deep.png"), Path("deep.png"), None)
    for found in (image.image.convert("L"), mask.image, open_rgb(Path("deep.png").read_bytes()).convert("L")):
        assert np.abs(np.asarray(found).astype(int) - grey / 257).max() <= 1


def test_generate_help(there):
    """In processes of their own: the help, which loads no torch, and two images, with no lines but ours."""
    code = (
        "import sys\nfrom dit import cli\ntry:\n    cli.main(['generate', '--help'])\n"
        "except SystemExit:\n    print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    for flag in ("checkpoint FOLDER", "prompt TEXT", "prompts-file FILE", "num_inference_steps N", "height PIXELS", "seed N"):
        assert f"  --{flag}" in done.stdout
    for flag in ("width", "guidance_scale", "negative_prompt", "scheduler", "output", "image", "strength", "mask", "grid"):
        assert f"  --{flag}" in done.stdout
    assert f"default: {DEFAULTS.num_inference_steps}\n" in done.stdout and '\n  dit generate --prompt "a large' in done.stdout
    assert "--num-inference-steps" not in done.stdout  # understood, and not shown

    command = [sys.executable, "-m", "dit.cli", "generate", *QUICK, "--prompt", "a red circle " * 40, "--prompt", "a red circle"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "generated-0.png\ngenerated-1.png\n"
    first, *bars = done.stderr.strip().replace("\r", "\n").split("\n")
    assert first.startswith("dit: the prompt is longer than 77 tokens")
    assert all(bar.startswith("generate 2 images:") for bar in bars if bar) and "6/6" in bars[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "128"], "dit: the model was trained on 64 x 64 pixels; at 64 x 128 things may come out twice"),
        (["--image", "wide.png"], "dit: the image to start from has 96 x 64 pixels; its middle is taken, at 64 x 64"),
        (["--image", "large.png"], "dit: the image to start from has 128 x 128 pixels; it is resized to 64 x 64"),
        (["--image", "same.png", "--mask", "black.png"], "dit: the mask is white nowhere, so that nothing changes"),
        (
            ["--negative_prompt", "a blue star", "--guidance_scale", "1"],
            "dit: --negative_prompt changes nothing where --guidance_scale is 1",
        ),
    ],
)
def test_generate_warns_of_inputs(there, capsys, arguments, message):
    for name, size in (("wide", (96, 64)), ("large", (128, 128)), ("same", (64, 64))):
        Image.new("RGB", size, "white").save(f"{name}.png")
    Image.new("L", (64, 64)).save("black.png")
    assert cli.main(["generate", "--prompt", "a red circle", *QUICK, *arguments]) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit:")] == [message]
    assert Path("generated.png").exists()
    if "--negative_prompt" in arguments:
        assert "negative_prompt" not in read_facts(Path("generated.png"))
