"""`dit push`: the Hub's own client against a server on loopback with the Hub's routes, and what has arrived there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from dit import cli
from dit.commands.model_card import without_paths
from dit.config import DEFAULTS
from dit.pipeline.pipeline import DiTTextToImagePipeline
from dit.pipeline.schedulers import scheduler_name
from dit.utils.files import sha256_file
from helpers import REPO
from helpers.hub_server import LARGE, Hub
from helpers.hub_uploads import serve_uploads, use_hub

TOKEN, READ_TOKEN = "hf_planted0write", "hf_planted0read"
CODE = {"pipeline.py", "transformer/latent_dit.py"}


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A `Hub` on which anna has a token, and who has a model in the folder that is worked in."""
    (tmp_path / "work").mkdir()
    shutil.copytree(model, tmp_path / "work" / "models" / "dit")
    monkeypatch.chdir(tmp_path / "work")
    with serve_uploads(tmp_path / "server") as (address, hub):
        hub.tokens |= {TOKEN: ("anna", "write"), READ_TOKEN: ("anna", "read")}
        hub.address = address
        use_hub(monkeypatch, address, tmp_path / "home", TOKEN)
        yield hub


def files(hub: Hub, repository: str = "anna/shapes", branch: str = "main") -> dict[str, bytes]:
    """What a branch holds."""
    root = hub.branches[repository, branch][1]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def push(*arguments: str) -> None:
    assert cli.main(["push", *arguments]) == 0


def error_of(capsys, *arguments: str) -> str:
    """The one line that a push ends with that fails."""
    capsys.readouterr()
    assert cli.main(["push", *arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit: ")]
    assert len(lines) == 1
    return lines[0]


def test_push_uploads_the_export(hub, capsys):
    push("anna/shapes")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"{hub.address}/anna/shapes" and "anna/shapes has it, private" in printed
    assert hub.uploads.created == [{"name": "shapes", "organization": "anna", "visibility": "private"}]
    assert cli.main(["export", "exported"]) == 0
    exported = {path.relative_to("exported").as_posix(): path for path in Path("exported").rglob("*") if path.is_file()}
    pushed = files(hub)
    assert set(pushed) == {*exported, *CODE, ".gitattributes"}
    differing = {name for name, path in exported.items() if path.read_bytes() != pushed[name]}
    assert differing == {"README.md", "model_index.json"}
    large = {sha256_file(path) for path in exported.values() if path.stat().st_size > LARGE}
    assert len(large) == 4 and Counter(hub.uploads.received) == dict.fromkeys(large, 1)
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-to-image"
    for line in ('from_pretrained("anna/shapes")', "dit generate --model anna/shapes", 'custom_pipeline="pipeline"'):
        assert line in card.text
    assert "path/to/this/folder" not in card.text and "does not know its class" not in card.text


def test_push_again_uploads_nothing(hub):
    push("anna/shapes")
    assert len(hub.uploads.received) == 4
    push("anna/shapes")
    assert len(hub.uploads.received) == 4 and len(hub.uploads.commits) == 1 and len(hub.uploads.created) == 1


def test_push_of_a_changed_model_uploads_what_changed(hub):
    push("anna/shapes")
    push("anna/shapes", "--scheduler", "euler")
    assert hub.uploads.commits[1][2:] == (["README.md", "scheduler/scheduler_config.json"], [])
    assert len(hub.uploads.received) == 4


def test_push_is_private_unless_public(hub, capsys):
    push("anna/open", "--public")
    push("anna/closed")
    assert [row["visibility"] for row in hub.uploads.created] == ["public", "private"] and hub.private == {"anna/closed"}
    before = hub.uploads.requests.copy()
    assert "anna/open: is public, and everybody would see the model; --public" in error_of(capsys, "anna/open")
    assert not any("preupload" in route or "commit" in route for route in hub.uploads.requests[len(before) :])
    push("anna/closed", "--public")
    assert "private as it was before" in capsys.readouterr().out and hub.private == {"anna/closed"}


def test_push_dry_run_sends_nothing(hub, capsys, monkeypatch, tmp_path):
    use_hub(monkeypatch, hub.address, tmp_path / "home", HF_HUB_OFFLINE=True)  # it needs no token, and no network
    push("anna/shapes", "--dry-run")
    listed = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert hub.uploads.requests == []
    use_hub(monkeypatch, hub.address, tmp_path / "home", TOKEN)
    push("anna/shapes")
    sizes = {name: len(content) for name, content in files(hub).items() if name != ".gitattributes"}
    assert {name: int(size.replace(",", "")) for size, name in listed} == sizes


def test_push_to_a_branch(hub, capsys):
    push("anna/shapes")
    main = files(hub)
    push("anna/shapes", "--revision", "v2", "--scheduler", "euler")
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.address}/anna/shapes/tree/v2"
    assert files(hub) == main != files(hub, branch="v2")
    for revision, name in ((None, DEFAULTS.scheduler), ("v2", "euler")):
        assert scheduler_name(DiTTextToImagePipeline.from_pretrained("anna/shapes", revision=revision).scheduler) == name
    push("anna/shapes", "--revision", "v2", "--scheduler", "euler")
    assert len(hub.uploads.commits) == 2


def test_push_replaces_what_pushes_wrote_and_nothing_else(hub):
    push("anna/shapes")
    root = hub.branches["anna/shapes", "main"][1]
    for name in ("evaluation.json", "samples.png", "vae/diffusion_pytorch_model-00001-of-00002.safetensors", "notes/of-anna.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("earlier")
    push("anna/shapes")
    deleted = {"evaluation.json", "samples.png", "vae/diffusion_pytorch_model-00001-of-00002.safetensors"}
    assert set(hub.uploads.commits[1][3]) == deleted and hub.uploads.commits[1][2] == []
    assert files(hub)["notes/of-anna.txt"] == b"earlier" and ".gitattributes" in files(hub)


def test_push_has_metrics_and_images(hub):
    metrics = {"prompt_accuracy": 0.9, "prompt_accuracy_low": 0.85, "prompt_accuracy_high": 0.94, "clip_score": 78.8}
    how = {"scheduler": "stochastic", "num_inference_steps": 10, "guidance_scale": 1.5}
    facts = {"recipe": "shapes", "confidence": 0.95, "sample": how, "metrics": metrics, "image": "samples.png"}
    assert cli.main(["export", "exported"]) == 0
    Path("exported/evaluation.json").write_text(json.dumps(facts))
    Path("exported/samples.png").write_bytes(b"image")
    push("anna/shapes", "--checkpoint", "exported")
    pushed = files(hub)
    card = ModelCard(pushed["README.md"].decode())
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "prompt_accuracy": 0.9,
        "clip_score": 78.8,
    }
    assert pushed["samples.png"] == b"image" and "(samples.png)" in card.text and "evaluation.json" in pushed


def test_push_has_no_secret_and_no_path(hub, tmp_path):
    training = json.loads(Path("models/dit/training.json").read_text())
    training["vae"] = str(tmp_path / "secret-project" / "my-vae")
    training["settings"]["train"] |= {"from": "~/somewhere/base", "data": "https://anna:password1@example.org/set"}
    training["settings"]["train"] |= {"method": "full", "init_from": str(tmp_path / "secret-project" / "base")}
    Path("models/dit/training.json").write_text(json.dumps(training))
    push("anna/shapes")
    pushed = files(hub)
    assert "trained from `base` on with" in pushed["README.md"].decode()
    assert "`my-vae`" in pushed["README.md"].decode() and json.loads(pushed["training.json"])["vae"] == "my-vae"
    for name, content in pushed.items():
        for secret in (TOKEN, "password1", "secret-project", "somewhere", str(tmp_path), str(Path.home()), str(REPO)):
            assert secret.encode() not in content, (name, secret)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/home/anna/vae", "vae"),
        ("~/vae/", "vae"),
        ("~anna/vae", "vae"),
        (r"C:\Users\anna\vae", "vae"),
        (r"\\server\share\vae", "vae"),
        ("file:///home/anna/vae", "vae"),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),
        ("a red circle / a blue star", "a red circle / a blue star"),
        ("~ 5 stars", "~ 5 stars"),
        ("s3://bucket/set", "s3://bucket/set"),
        (["https://a:b@example.org/x", {"n": 1, "none": None}], ["https://example.org/x", {"n": 1, "none": None}]),
    ],
)
def test_without_paths(given, expected):
    assert without_paths(given) == expected


def test_push_errors_are_one_line(hub, capsys, monkeypatch, tmp_path):
    home = tmp_path / "home"
    for repository in ("shapes", "anna/shapes/more", "anna/so many words", "anna/--", ""):
        assert f"push: {repository!r} is no id of a repository, OWNER/NAME" in error_of(capsys, repository)
    assert "models/nothing: no such folder" in error_of(capsys, "anna/shapes", "--checkpoint", "models/nothing")
    use_hub(monkeypatch, hub.address, home)
    line = error_of(capsys, "anna/shapes")
    assert f"you are not logged in; make a token that may write at {hub.address}/settings/tokens, then `hf auth login`" in line
    use_hub(monkeypatch, hub.address, home, TOKEN, HF_HUB_OFFLINE=True)
    assert "HF_HUB_OFFLINE is set, so that nothing can be sent" in error_of(capsys, "anna/shapes")
    assert hub.uploads.requests == []
    use_hub(monkeypatch, hub.address, home, "hf_nobody")
    assert f"{hub.address} does not accept your token; make a token" in error_of(capsys, "anna/shapes")
    for token, repository in ((READ_TOKEN, "anna/shapes"), (TOKEN, "bert/shapes")):
        use_hub(monkeypatch, hub.address, home, token)
        assert f"{repository}: your token has no right to write there" in error_of(capsys, repository)
    for route, status, problem in (
        ("/commit/", 403, "your token has no right to write there"),
        ("/commit/", 503, "answers 503; run again later: what has been uploaded is not uploaded again"),
        ("/branch/", 400, "refuses it: refused by this test"),
        ("/validate-yaml", 400, "refuses it: "),
    ):
        hub.uploads.refusing = {route: status}
        assert problem in error_of(capsys, "anna/shapes", "--revision", "v2"), (route, status)
    assert hub.uploads.commits == []
    use_hub(monkeypatch, "http://127.0.0.1:9", home, TOKEN)
    assert "push: the connection to http://127.0.0.1:9 broke off (ConnectError: " in error_of(capsys, "anna/shapes")


def test_push_takes_the_token_of_a_login(hub, monkeypatch, tmp_path):
    use_hub(monkeypatch, hub.address, tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)  # as `hf auth login` stores it
    push("anna/shapes")
    assert len(hub.uploads.commits) == 1


def test_push_resumes_after_a_broken_connection(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its own attempts
    hub.uploads.broken = 2
    line = error_of(capsys, "anna/shapes")
    assert f"anna/shapes: the connection to {hub.address} broke off (" in line
    assert line.endswith("; run again: what has been uploaded is not uploaded again")
    assert len(hub.uploads.received) == 2 and hub.uploads.commits == []
    hub.uploads.broken = None
    push("anna/shapes")
    assert sorted(Counter(hub.uploads.received).values()) == [1, 1, 1, 1] and len(hub.uploads.commits) == 1


@pytest.mark.slow
def test_push_killed_and_again(hub, tmp_path):
    """The process is killed as soon as a file has arrived whole; the next push does not send that one again."""
    started: list[subprocess.Popen] = []
    hub.uploads.on_file = lambda: started[0].send_signal(signal.SIGKILL)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "dit.cli", "push", "anna/shapes"]
    with subprocess.Popen(command, env=kept | settings | {"PYTHONPATH": str(REPO)}) as process:
        started.append(process)
    assert process.returncode == -signal.SIGKILL and hub.uploads.commits == []
    hub.uploads.on_file = lambda: None
    before = hub.uploads.received.copy()
    assert before
    push("anna/shapes")
    counts = Counter(hub.uploads.received)
    assert len(counts) == 4 and counts[before[0]] == 1 and len(hub.uploads.commits) == 1
    assert yaml.safe_load(files(hub)["README.md"].decode().split("---\n")[1])["license"] == "apache-2.0"
