"""Encoders from the Hugging Face Hub: the real classes, from a loopback server with the Hub's routes, then offline.

The Hub's library reads its environment when it is imported, so whatever loads runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit.encoders.loading import BUILTIN
from helpers import REPO
from helpers.hub_server import commit_of, serve_hub

LOAD = """
import json, sys
import torch
from dit.encoders.loading import EncoderSource, find_encoder, load_clip, load_text_encoder, load_vae
from dit.errors import UserError

results = []
for kind, name, revision, resolved in json.loads(sys.argv[1]):
    source = EncoderSource(name, revision, resolved)
    try:
        torch.manual_seed(0)
        if kind == "check":
            find_encoder("vae", source, weights=False)
            results.append("fine")
        elif kind == "vae":
            vae, found = load_vae(source)
            moments = vae.encode(torch.randn(1, 3, 64, 64)).latent_dist.mean
            results.append([found.to_dict(), list(moments.shape), moments.double().sum().item()])
        elif kind == "clip":
            model, tokenizer, found = load_text_encoder(source)
            inputs = tokenizer(["a red circle"], return_tensors="pt").input_ids
            results.append([found.to_dict(), inputs.tolist(), model(input_ids=inputs).text_embeds.double().sum().item()])
        else:
            model, processor = load_clip(source)
            results.append([type(model).__name__, type(processor).__name__])
    except UserError as error:
        results.append(str(error))
print("RESULTS" + json.dumps(results))
"""


def load(home: Path, wanted: list[list], **environment: str) -> list:
    """Load each (kind, name, revision, resolved) in a new process; return facts about it, or the line of the error."""
    rows = [[*row, None, None][:4] for row in wanted]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "3", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(rows)], capture_output=True, text=True, env=kept | settings | environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[1])


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """Small repositories of random weights in the Hub's layout, good and bad ones."""
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    size = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    size |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**size, latent_channels=4).save_pretrained(root / "some" / "vae")
    modern = AutoencoderKL(**size, latent_channels=16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    modern.save_pretrained(root / "some" / "model" / "vae")
    (root / "some" / "model" / "model_index.json").write_text("{}")
    shutil.copytree(BUILTIN / "clip", root / "some" / "clip")
    for name in ("vae", "clip"):  # files that must not be downloaded
        for file in (
            "pytorch_model.bin",
            "flax_model.msgpack",
            "diffusion_pytorch_model.fp16.safetensors",
            "other/model.safetensors",
        ):
            (root / "some" / name / file).parent.mkdir(exist_ok=True)
            (root / "some" / name / file).write_bytes(b"nothing that we want")
    shutil.copytree(root / "some" / "vae", root / "some" / "gated")
    shutil.copytree(root / "some" / "vae", root / "some" / "cut")
    pickled = root / "some" / "pickled"
    pickled.mkdir()
    shutil.copy(root / "some" / "vae" / "config.json", pickled)
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"code")
    shutil.copytree(root / "some" / "vae", root / "some" / "damaged")
    weights = root / "some" / "damaged" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (root / "some" / "nonsense").mkdir()
    (root / "some" / "nonsense" / "config.json").write_text("[1, 2")
    return root


def test_load_downloads_once(repositories, tmp_path):
    wanted = [["vae", "some/vae"], ["vae", "some/model/vae", "v1"], ["clip", "some/clip", "main"], ["whole", "some/clip"]]
    with serve_hub(repositories) as (address, hub):
        hub.cut.add("model.safetensors")
        online = load(tmp_path, wanted, HF_ENDPOINT=address)
        asked = list(hub.asked)
        pinned = load(tmp_path, [["vae", "some/vae", None, commit_of("some/vae")]], HF_ENDPOINT=address)
        assert hub.asked == asked  # nothing is downloaded twice
    local = load(tmp_path, [["vae", str(repositories / "some/vae")], ["vae", str(repositories / "some/model/vae")]])
    for row, repository, shape in zip(online, ("some/vae", "some/model"), (4, 16), strict=False):
        assert row[0]["resolved"] == commit_of(repository) and row[1] == [1, shape, 8, 8]
    assert [row[1:] for row in online[:2]] == [row[1:] for row in local]
    assert pinned[0][1:] == online[0][1:]
    assert online[2][0] == {"name": "some/clip", "revision": "main", "resolved": commit_of("some/clip")}
    assert online[3] == ["CLIPModel", "CLIPProcessor"]
    files = {name for name, _ in asked}
    assert {name for name in files if "safetensors" in name} == {
        "some/vae/diffusion_pytorch_model.safetensors",
        "some/model/vae/diffusion_pytorch_model.safetensors",
        "some/clip/model.safetensors",
    }
    assert not any(name.endswith((".bin", ".msgpack")) for name in files)
    assert [name for name, _ in asked].count("some/clip/model.safetensors") == 2  # the first answer was cut
    assert load(tmp_path, wanted, HF_HUB_OFFLINE="1") == online
    assert load(tmp_path, wanted, HF_ENDPOINT=address) == online  # the server is gone


def test_load_problem_is_one_line(repositories, tmp_path):
    otherwise = ", or set it to a local folder written by save_pretrained, or to builtin"
    with serve_hub(repositories) as (address, hub):
        hub.gated.add("some/gated")
        expected = {
            ("vae", "some/nothing"): f"is not on {address}; check the id, or log in with `hf auth login` or set HF_TOKEN",
            ("vae", "some/gated"): f"is gated: accept its conditions at {address}/some/gated, then log in with `hf auth login`",
            ("vae", "some/vae", "v9"): f"has no revision 'v9' on {address}; one of its branches, tags or commits",
            (
                "vae",
                "some/pickled",
            ): "has no diffusion_pytorch_model*.safetensors; other formats may hold code and are never loaded",
            ("vae", "some/clip"): "is of class None, and AutoencoderKL or AutoencoderKLFlux2 or AutoencoderTiny or",
            ("clip", "some/vae"): "is of class None, and clip or clip_text_model is needed",
            ("vae", "some/model"): "has no config.json, perhaps some/model/vae has; choose another",
            ("vae", "some/nonsense"): "has a config.json that is not readable",
            ("vae", "some/damaged"): "cannot be loaded as AutoencoderKL",
            ("vae", "a very/bad id"): "is neither a folder nor an id on the Hub (owner/name)",
            ("vae", "./nowhere"): "is no folder",
            ("vae", str(repositories / "some")): f"has no config.json, perhaps {repositories / 'some'}/vae has; choose another",
            ("check", "some/vae"): "fine",
            ("check", "some/nothing"): f"is not on {address}",
        }
        lines = load(tmp_path, [list(case) for case in expected], HF_ENDPOINT=address)
        assert not any("model.safetensors" in name for name, _ in hub.asked if "clip" in name)
    for (kind, name, *_), problem, line in zip(expected, expected.values(), lines, strict=True):
        assert problem in line, (name, line)
        if problem != "fine":
            assert line.startswith(f"encode.{kind.replace('check', 'vae')}: {name!r} ") and line.endswith(otherwise), line
            assert "\n" not in line and len(line) < 600


@pytest.mark.slow
def test_load_broken_connection_is_one_line(repositories, tmp_path):
    with serve_hub(repositories) as (address, hub):
        hub.always_cut.add("diffusion_pytorch_model.safetensors")
        (cut,) = load(tmp_path / "a", [["vae", "some/cut"]], HF_ENDPOINT=address)
        hub.always_cut.clear()
        (again,) = load(tmp_path / "a", [["vae", "some/cut"]], HF_ENDPOINT=address)
        hub.down = 500
        (down,) = load(tmp_path / "b", [["vae", "some/vae"]], HF_ENDPOINT=address)
    assert f"is incomplete, {address} broke off" in cut and "run again to resume the download" in cut and "\n" not in cut
    assert again[0]["resolved"] == commit_of("some/cut")
    assert f"cannot be downloaded, {address} answers 500; try again later" in down and "\n" not in down
    (gone,) = load(tmp_path / "b", [["vae", "some/vae"]], HF_ENDPOINT=address)
    assert f"cannot be downloaded from {address} (ConnectError: " in gone and "check your network and HF_ENDPOINT" in gone
    (offline,) = load(tmp_path / "b", [["vae", "some/vae"]], HF_HUB_OFFLINE="1")
    assert f"is not in the cache {tmp_path / 'b' / 'hub'}, and HF_HUB_OFFLINE is set; unset it once, to download" in offline
