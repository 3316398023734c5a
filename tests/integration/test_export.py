"""`dit export` writes a folder that others can load, with a card that has the evaluation of this model, and of no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from dit import cli
from dit.commands.png import read_facts
from dit.config import DEFAULTS
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.utils.files import sha256_file
from helpers import REPO
from helpers.small_models import rename_as_version_0_1

PROMPT = "a red circle above a blue star"
METRICS = {
    "prompt_accuracy": 0.9,
    "prompt_accuracy_low": 0.85,
    "prompt_accuracy_high": 0.94,
    "prompt_accuracy_prompts": 200,
    "clip_score": 78.8,
    "nested": {"not": "a metric"},
}
LOAD = """
import json, sys
import numpy, torch
from dit import DiTTextToImagePipeline
pipeline = DiTTextToImagePipeline.from_pretrained(sys.argv[1])
image = pipeline(sys.argv[2], num_inference_steps=3, generator=torch.Generator().manual_seed(5)).images[0]
print(json.dumps({"scheduler": type(pipeline.scheduler).__name__, "pixels": numpy.asarray(image).tolist()}))
"""
COPYING = """
import shutil, sys
from pathlib import Path
Path(sys.argv[2]).parent.mkdir(exist_ok=True)
shutil.copy(*sys.argv[1:])
"""
# A pipeline of two stages that cost nothing, with the names and the files of the real one.
STAGES = {
    "sample": {
        "cmd": "python copying.py generated samples/images",
        "deps": ["models/dit", "code.py"],
        "params": ["sample"],
        "outs": ["samples/images"],
    },
    "evaluate": {
        "cmd": "python copying.py evaluation-of-the-stage.json metrics/evaluate.json",
        "deps": ["models/dit", "samples/images"],
        "params": ["evaluate"],
        "metrics": [{"metrics/evaluate.json": {"cache": False}}],
    },
}


@pytest.fixture
def there(model, tmp_path, monkeypatch) -> Path:
    """A folder with models/dit, in which a user works."""
    shutil.copytree(model, tmp_path / "models" / "dit")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dvc(*arguments: str) -> None:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def evaluated(there) -> Path:
    """The same, where DVC has evaluated the model."""
    shutil.copy(REPO / "params.yaml", there)
    Path("copying.py").write_text(COPYING)
    Path("code.py").write_text("")
    Path("generated").write_text("images")
    Path("evaluation-of-the-stage.json").write_text(json.dumps(METRICS))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    dvc("init", "--no-scm", "--quiet")
    dvc("repro", "--quiet")
    Path("samples/grids").mkdir()
    Image.new("RGB", (16, 16), "teal").save("samples/grids/val.png")
    return there


def generate(folder: Path, **changes) -> tuple[DiTTextToImagePipeline, np.ndarray]:
    pipeline = DiTTextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(5), **changes).images[0]
    return pipeline, np.asarray(image)


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_export_generates_the_same_elsewhere(there, tmp_path_factory, capsys):
    assert cli.main(["export", "shared/my-model"]) == 0
    printed = capsys.readouterr().out
    assert 'DiTTextToImagePipeline.from_pretrained("shared/my-model")' in printed
    assert "README.md is without an evaluation: there is no metrics/evaluate.json" in printed
    _, generated = generate(Path("models/dit"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move("shared/my-model", elsewhere / "model")
    shutil.rmtree("models")
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "model", PROMPT], env=env, cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["scheduler"] == "FlowMatchEulerDiscreteScheduler" and np.array_equal(result["pixels"], generated)


def test_export_is_reproducible_and_names_no_path(there):
    assert cli.main(["export", "a"]) == 0
    shutil.move("models/dit", "moved")
    assert cli.main(["export", "elsewhere/b", "--checkpoint", "moved"]) == 0
    assert hashes(Path("a")) == hashes(Path("elsewhere/b"))
    assert {Path(name).suffix for name in hashes(Path("a"))} == {".json", ".safetensors", ".md"}
    index = json.loads(Path("a/model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list)} == {
        path.name for path in Path("a").iterdir() if path.is_dir()
    }
    for path in (path for path in Path("a").rglob("*") if path.is_file()):
        assert path.stat().st_mode & 0o777 == Path("a/README.md").stat().st_mode & 0o777, path  # as the umask says
        if path.suffix != ".safetensors":
            for found in (str(there), str(REPO), "models/dit", "_name_or_path"):
                assert found not in path.read_text(encoding="utf-8"), path
    assert sorted(path.name for path in there.iterdir()) == ["a", "elsewhere", "models", "moved"]


def test_export_scheduler(there):
    assert cli.main(["export", "a"]) == 0 and cli.main(["export", "b", "--scheduler", "euler"]) == 0
    (first, stochastic), (second, plain) = generate(Path("a")), generate(Path("b"))
    assert first.scheduler.config.stochastic_sampling and not second.scheduler.config.stochastic_sampling
    first.scheduler = second.scheduler
    generator = torch.Generator().manual_seed(5)
    again = first(PROMPT, num_inference_steps=3, generator=generator).images[0]
    assert np.array_equal(again, plain) and not np.array_equal(plain, stochastic)


def test_generate_with_export_equals_model(there):
    assert cli.main(["export", "a"]) == 0
    command = ["generate", "--prompt", PROMPT, "--num_inference_steps", "3"]
    assert cli.main(command) == 0 and cli.main([*command, "--checkpoint", "a", "--output", "b.png"]) == 0
    assert sha256_file(Path("generated.png")) == sha256_file(Path("b.png"))  # the hash of the model is in it, and is the same


def test_generate_records_scheduler_of_export(there):
    assert cli.main(["export", "a", "--scheduler", "euler"]) == 0
    command = ["generate", "--prompt", PROMPT, "--num_inference_steps", "3", "--checkpoint"]
    assert cli.main([*command, "a"]) == 0 and read_facts(Path("generated.png"))["scheduler"] == "euler"
    assert cli.main([*command, "models/dit", "--scheduler", "euler", "--output", "b.png"]) == 0
    assert cli.main([*command, "models/dit", "--output", "c.png"]) == 0
    assert sha256_file(Path("generated.png")) == sha256_file(Path("b.png")) != sha256_file(Path("c.png"))
    assert read_facts(Path("c.png"))["scheduler"] == DEFAULTS.scheduler


def test_export_card(evaluated, capsys):
    # Neither an edited file nor an empty cache makes them the metrics of another model.
    Path("code.py").write_text("# edited")
    shutil.rmtree(".dvc/cache")
    assert cli.main(["export", "a"]) == 0
    assert "without an evaluation" not in capsys.readouterr().out
    card = ModelCard.load(Path("a/README.md"))
    assert 'from_pretrained("path/to/this/folder")' in card.text and "pip install" in card.text
    table = [line for line in card.text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[:3] for line in table[2:]] == [
        ["| `prompt_accuracy`", "**0.9**", "0.85 to 0.94"],
        ["| `clip_score`", "**78.8**", ""],
    ]
    assert "95 % interval" in table[0] and len({line.count("|") for line in table}) == 1
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert card.data.model_name == "dit-shapes" and results == {"prompt_accuracy": 0.9, "clip_score": 78.8}
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    how = yaml.safe_load(Path("params.yaml").read_text())["sample"]
    assert f"`{how['scheduler']}` in {how['num_inference_steps']} evaluations" in card.text
    assert "(samples.png)" in card.text and sha256_file(Path("a/samples.png")) == sha256_file(Path("samples/grids/val.png"))
    assert "Settings:" in card.text and '"hidden_size": 32' in card.text  # what the train stage wrote
    assert cli.main(["export", "b", "--checkpoint", "a"]) == 0
    assert hashes(Path("a")) == hashes(Path("b"))  # an export of an export


def test_export_omits_metrics_of_other_models(evaluated, capsys):
    def missing(*arguments: str) -> str:
        assert cli.main(["export", "a", *arguments]) == 0
        card = Path("a/README.md").read_text()
        assert "Evaluation" not in card and "model-index" not in card and not Path("a/samples.png").exists()
        return capsys.readouterr().out.partition("is without an evaluation: ")[2].partition("\n")[0]

    shutil.copytree("models/dit", "other")
    weights = Path("other/transformer/diffusion_pytorch_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    assert missing("--checkpoint", "other") == "metrics/evaluate.json is not of this model"
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace("  seed: 42", "  seed: 43"))
    assert missing() == "metrics/evaluate.json is older than params.yaml; `dvc repro` evaluates anew"
    Path("params.yaml").write_text(params)
    Path("metrics/evaluate.json").write_text(json.dumps(METRICS | {"prompt_accuracy": 1.0}))
    assert "older than metrics/evaluate.json" in missing()
    Path("metrics/evaluate.json").write_text(json.dumps(METRICS))
    shutil.copy(weights, "models/dit/transformer")  # trained anew, and not evaluated since
    assert "older than models/dit" in missing()
    Path(".dvc").rename("away")  # removing it would race with what DVC still writes there
    assert missing() == "DVC does not know what metrics/evaluate.json is of"


def test_export_replaces_only_exports(there, capsys):
    assert cli.main(["export", "a"]) == 0
    before = hashes(Path("a"))
    Path("a/vae/config.json").unlink()
    Path("empty").mkdir()
    assert cli.main(["export", "a"]) == 0 and hashes(Path("a")) == before
    assert cli.main(["export", "empty"]) == 0 and hashes(Path("empty")) == before
    capsys.readouterr()
    Path("a/.git").mkdir()
    Path("file").write_text("")
    for place, message in (
        ("a", "holds .git, which no export wrote"),
        ("file", "is a file"),
        ("models", "exists and is no earlier export"),
        ("models/dit", "is the model itself"),
        ("models/dit/export", "is the model itself, or inside it"),
    ):
        assert cli.main(["export", place]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"dit: {place}: ") and message in error and error.count("\n") == 1
    assert cli.main(["export", "b", "--checkpoint", "nowhere"]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    for place in (".", "..", str(there)):
        assert cli.main(["export", place]) == 1
        assert "is the folder that you are in, or above it" in capsys.readouterr().err
    Path("a/.git").rmdir()
    assert hashes(Path("a")) == before and hashes(Path("models/dit"))


def test_export_keeps_its_neighbours(there):
    assert cli.main(["export", "a.old"]) == 0
    for name in ("a.part", ".a-notes"):
        Path(name).mkdir()
        Path(name, "thesis.txt").write_text("years of work")
    for _ in range(2):
        assert cli.main(["export", "a", "--checkpoint", "a.old"]) == 0
    assert hashes(Path("a")) == hashes(Path("a.old"))
    assert all(Path(name, "thesis.txt").is_file() for name in ("a.part", ".a-notes"))
    assert sorted(path.name for path in there.iterdir()) == [".a-notes", "a", "a.old", "a.part", "models"]


def test_export_of_export_names_its_scheduler(there):
    assert cli.main(["export", "a"]) == 0
    assert cli.main(["export", "b", "--checkpoint", "a", "--scheduler", "dpm++"]) == 0
    cards = [Path(name, "README.md").read_text() for name in ("a", "b")]
    assert "the scheduler `stochastic`, which is saved here" in cards[0] and "the scheduler `dpm++`, which" in cards[1]
    assert cards[0].replace("scheduler `stochastic`", "scheduler `dpm++`") == cards[1]


@pytest.mark.parametrize("damaged", [b"{", b"caf\xe9"])
def test_export_names_unreadable_training_facts(there, capsys, damaged):
    Path("models/dit/training.json").write_bytes(damaged)
    assert cli.main(["export", "a"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dit: models/dit/training.json: not readable") and error.count("\n") == 1
    assert [path.name for path in there.iterdir()] == ["models"]


def test_export_of_a_model_of_version_0_1_has_a_plain_card(there):
    Path("models/dit/training.json").unlink()
    assert cli.main(["export", "a"]) == 0
    card = ModelCard.load(Path("a/README.md"))
    assert card.data.license == "apache-2.0" and "dit generate --checkpoint" in card.text


def test_export_of_version_0_1_loads(there):
    """Its model_index.json names dit.model, too; the settings and the weights had other names."""
    assert cli.main(["export", "old"]) == 0
    _, expected = generate(Path("old"))
    rename_as_version_0_1(Path("old/transformer"))
    for name in ("training.json", "README.md"):
        Path("old", name).unlink()
    assert json.loads(Path("old/model_index.json").read_text())["transformer"] == ["dit.model", "DiT"]
    assert np.array_equal(generate(Path("old"))[1], expected)


def test_import_dit_loads_no_torch():
    code = "import sys, dit, dit.pipeline.model_folder; assert 'torch' not in sys.modules; dit.DiT; assert 'torch' in sys.modules"
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def without_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.pop(sorted(weights)[0])
    save_file(weights, path, metadata={"format": "pt"})


def with_other_values(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "no tokenizer": lambda a: shutil.rmtree(a / "tokenizer"),
    "no words": lambda a: (a / "tokenizer/tokenizer.json").unlink(),
    "no length": lambda a: (a / "tokenizer/tokenizer_config.json").unlink(),
    "no scheduler": lambda a: shutil.rmtree(a / "scheduler"),
    "half a VAE": lambda a: without_a_weight(a / "vae/diffusion_pytorch_model.safetensors"),
    "half a text encoder": lambda a: without_a_weight(a / "text_encoder/model.safetensors"),
    "half a transformer": lambda a: without_a_weight(a / "transformer/diffusion_pytorch_model.safetensors"),
    "an unnamed scheduler": lambda a: with_other_values(a / "model_index.json", scheduler=[]),
    "an unknown objective": lambda a: with_other_values(a / "model_index.json", prediction_type="x"),
    "a size in words": lambda a: with_other_values(a / "model_index.json", image_size="64"),
    "no heads": lambda a: with_other_values(a / "transformer/config.json", num_heads=0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_generate_refuses_damaged_export(there, capsys, damage):
    assert cli.main(["export", "a"]) == 0
    DAMAGE[damage](Path("a"))
    capsys.readouterr()
    assert cli.main(["generate", "--prompt", PROMPT, "--num_inference_steps", "1", "--checkpoint", "a"]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit:")]
    assert len(error) == 1 and error[0].startswith("dit: a: not a trained model, or a damaged one (")
    assert not list(there.glob("*.png")) and torch.get_default_dtype() == torch.float32


def test_export_failure_keeps_the_earlier_one(there, monkeypatch, capsys):
    assert cli.main(["export", "a"]) == 0
    before = hashes(Path("a"))

    def full(self, folder, **_):
        folder.mkdir()
        (folder / "model_index.json").write_text("half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(DiTTextToImagePipeline, "save_pretrained", full)
    assert cli.main(["export", "a"]) == 1
    assert capsys.readouterr().err == "dit: a: cannot be written: No space left on device\n"
    assert hashes(Path("a")) == before and sorted(path.name for path in there.iterdir()) == ["a", "models"]
