"""Models on the Hub: what `dit push` uploaded is loaded by this package, by `dit generate`, and by diffusers' own class."""

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

from dit import cli
from dit.errors import UserError
from dit.pipeline.generate import load_pipeline
from dit.pipeline.hub import find_model, is_hub_id
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.utils.files import sha256_file
from helpers import REPO
from helpers.hub_server import commit_of
from helpers.hub_uploads import serve_uploads, use_hub

TOKEN = "hf_planted0write"
PROMPT = "a red circle above a blue star"
LOAD = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import check_imports

results = []
for custom_pipeline in ("pipeline", "anna/shapes"):
    try:
        DiffusionPipeline.from_pretrained("anna/shapes", custom_pipeline=custom_pipeline)
    except ValueError as error:
        results.append("trust_remote_code" in str(error))
    pipeline = DiffusionPipeline.from_pretrained("anna/shapes", custom_pipeline=custom_pipeline, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(sys.argv[1], num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="np").images
    results.append(images.tolist())
    results.append(type(pipeline).__module__)
folder = DiffusionPipeline.download("anna/shapes", custom_pipeline="pipeline", trust_remote_code=True)
sys.modules["dit"] = None  # as if the package were not installed
for file in ("pipeline.py", "transformer/latent_dit.py"):
    path = f"{folder}/{file}"
    check_imports(path)  # which warns of what is missing
    try:
        exec(compile(open(path).read(), path, "exec"))
    except ImportError as error:
        results.append(str(error))
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    """A `Hub` to which anna has pushed her model as anna/shapes, privately; `work` is the folder with the model."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(model, root / "work" / "models" / "dit")
    with serve_uploads(root / "server") as (address, hub), pytest.MonkeyPatch.context() as patch:
        hub.tokens[TOKEN] = ("anna", "write")
        hub.address, hub.work = address, root / "work"
        use_hub(patch, address, root / "pushing", TOKEN)
        patch.chdir(hub.work)
        assert cli.main(["push", "anna/shapes"]) == 0
        yield hub


@pytest.fixture
def hub(served, monkeypatch, tmp_path):
    """The same with an empty cache; the log of what was asked is empty, too."""
    use_hub(monkeypatch, served.address, tmp_path / "home", TOKEN)
    monkeypatch.chdir(served.work)
    served.asked.clear()
    served.uploads.requests.clear()
    return served


def pixels(pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(5), output_type="np").images


def test_from_pretrained_by_id_is_the_model(hub):
    expected = DiTTextToImagePipeline.from_pretrained("models/dit")
    assert hub.uploads.requests == []
    loaded = DiTTextToImagePipeline.from_pretrained("anna/shapes")
    for part in ("transformer", "vae", "text_encoder"):
        weights = getattr(expected, part).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in getattr(loaded, part).state_dict().items())
    assert np.array_equal(pixels(loaded), pixels(expected))
    assert loaded.config.prediction_type == expected.config.prediction_type and loaded.config.image_size == 64
    taken = {Path(name).name for name, _ in hub.asked}
    assert not any(name.endswith((".py", ".md", ".bin")) for name in taken) and "model.safetensors" in taken


def test_from_pretrained_by_id_offline(hub, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"anna/shapes: .* is not in the cache .*, and local_files_only is set; unset it once"):
        DiTTextToImagePipeline.from_pretrained("anna/shapes", local_files_only=True)
    assert hub.uploads.requests == []
    online = pixels(DiTTextToImagePipeline.from_pretrained("anna/shapes"))
    quick = pixels(load_pipeline("anna/shapes"))  # in bf16 where that is fast
    hub.uploads.requests.clear()
    assert np.array_equal(pixels(DiTTextToImagePipeline.from_pretrained("anna/shapes", local_files_only=True)), online)
    use_hub(monkeypatch, hub.address, tmp_path / "home", HF_HUB_OFFLINE=True)
    assert np.array_equal(pixels(DiTTextToImagePipeline.from_pretrained("anna/shapes")), online)
    assert np.array_equal(pixels(load_pipeline("anna/shapes")), quick)
    assert hub.uploads.requests == []
    with pytest.raises(UserError, match=r"anna/other: .* is not in the cache .*, and HF_HUB_OFFLINE is set"):
        DiTTextToImagePipeline.from_pretrained("anna/other")


def test_from_pretrained_by_id_takes_token_revision_and_subfolder(hub, monkeypatch, tmp_path):
    use_hub(monkeypatch, hub.address, tmp_path / "home")
    with pytest.raises(UserError, match=r"anna/shapes: there is no such folder, and on the Hub it is not on .*; check the id"):
        DiTTextToImagePipeline.from_pretrained("anna/shapes")  # it is private
    commit, root = hub.branches["anna/shapes", "main"]
    found = find_model("anna/shapes", revision=commit, token=TOKEN)
    assert found.name == commit
    with pytest.raises(UserError, match="it has no revision 'v9' on"):
        find_model("anna/shapes", revision="v9", token=TOKEN)
    shutil.copytree(root, hub.folder / "anna" / "many" / "small" / "first")
    shutil.copytree(root, hub.folder / "anna" / "many" / "large")
    hub.asked.clear()
    within = find_model("anna/many", subfolder="small/first", revision="v1")
    assert within.parts[-3:] == (commit_of("anna/many"), "small", "first") and not any("large" in name for name, _ in hub.asked)
    assert np.array_equal(
        pixels(DiTTextToImagePipeline.from_pretrained("anna/many", subfolder="small/first")),
        pixels(DiTTextToImagePipeline.from_pretrained(found)),
    )
    assert find_model("models", subfolder="dit") == Path("models/dit")
    with pytest.raises(UserError, match="models/dit: is a folder, and has no revision 'v1'"):
        find_model("models/dit", revision="v1")


def test_from_pretrained_by_id_refuses_other_models(hub):
    for name, index in (("sd", {"_class_name": "StableDiffusionPipeline"}), ("none", None), ("pickle", {})):
        folder = hub.folder / "bert" / name
        (folder / "transformer").mkdir(parents=True)
        (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"code")
        (folder / "transformer" / "config.json").write_text('{"_class_name": "DiT"}')
        if index is not None:
            own = json.loads(Path("models/dit/model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps(own | index))
    for name, problem in (
        ("bert/sd", "bert/sd: holds a StableDiffusionPipeline; a DiTTextToImagePipeline is needed"),
        ("bert/none", "bert/none: there is no such folder, and on the Hub it has no model_index.json, and so is no model"),
        ("bert/pickle", "not a trained model, or a damaged one"),
        ("bert/nothing", f"it is not on {hub.address}; check the id, or log in"),
    ):
        with pytest.raises(UserError) as caught:
            DiTTextToImagePipeline.from_pretrained(name)
        assert problem in str(caught.value) and "\n" not in str(caught.value)
    assert not any(name.endswith(".bin") for name, _ in hub.asked)


def test_from_pretrained_by_id_broken_connection(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own attempts
    hub.always_cut.add("model.safetensors")
    with pytest.raises(UserError, match=r"it is incomplete, .* broke off .*; run again to resume the download"):
        DiTTextToImagePipeline.from_pretrained("anna/shapes")
    hub.always_cut.clear()
    again = pixels(DiTTextToImagePipeline.from_pretrained("anna/shapes"))
    assert np.array_equal(again, pixels(DiTTextToImagePipeline.from_pretrained("models/dit")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("anna/shapes", True),
        ("anna/my-model_v1.2", True),
        ("models/dit", False),  # where the train stage writes, also before it has
        (Path("anna/shapes"), False),
        ("here/shapes", False),  # `here` is a folder
        ("shapes", False),
        ("./anna/shapes", False),
        ("/anna/shapes", False),
        ("~/shapes", False),
        ("../shapes", False),
        ("anna/shapes/more", False),
        (r"anna\shapes", False),
        ("", False),
    ],
)
def test_is_hub_id(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert is_hub_id(name) == expected


def test_generate_with_model_of_the_hub(hub, tmp_path, capsys):
    command = ["generate", "--prompt", PROMPT, "--num_inference_steps", "3", "--output"]
    assert cli.main([*command, str(tmp_path / "a.png"), "--model", "anna/shapes"]) == 0
    assert cli.main([*command, str(tmp_path / "b.png"), "--checkpoint", "models/dit"]) == 0
    assert sha256_file(tmp_path / "a.png") == sha256_file(tmp_path / "b.png")
    main = hub.branches["anna/shapes", "main"]
    assert cli.main([*command, str(tmp_path / "c.png"), "--model", "anna/shapes", "--revision", main[0]]) == 0
    capsys.readouterr()
    for arguments, problem in (
        (["--revision", "v2"], "dit: --revision: there is no --model that it could be of"),
        (
            ["--model", "anna/shapes", "--revision", "v9"],
            "dit: anna/shapes: there is no such folder, and on the Hub it has no rev",
        ),
        (["--model", "models/nothing"], "dit: models/nothing: no such folder"),
    ):
        assert cli.main([*command, "d.png", *arguments]) == 1
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith(problem), error
    with pytest.raises(SystemExit):
        cli.main([*command, "d.png", "--model", "anna/shapes", "--checkpoint", "models/dit"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_diffusers_loads_it_and_needs_this_package_alone(hub, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "other"), "HF_TOKEN": TOKEN, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", LOAD, PROMPT], env=kept | settings, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pip install" not in done.stderr  # `dit` on the public index is someone else's
    results = json.loads(done.stdout.split("RESULTS")[1])
    expected = pixels(DiTTextToImagePipeline.from_pretrained("models/dit"))
    for refused, images, module in (results[:3], results[3:6]):
        assert refused and np.array_equal(np.float32(images), expected) and module == "dit.pipeline.pipeline"
    assert results[6:] == 2 * ["this model needs the Python package latent-dit, as README.md in its repository says"]
