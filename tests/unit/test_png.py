"""PNG files say how they were generated, are whole or not there, and are read as what anybody may have written."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dit import cli
from dit.commands.png import write_png
from helpers import REPO


@pytest.fixture
def there(tmp_path, monkeypatch) -> Path:
    """An empty folder, in which a user works."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_write_png_failure_keeps_the_file(there, monkeypatch):
    path = there / "a.png"
    write_png(path, Image.new("RGB", (16, 16)), {"prompt": "before"})
    before = hashlib.sha256(path.read_bytes()).digest()

    def half(self, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space"):
        write_png(path, Image.new("RGB", (16, 16), "red"), {})
    assert hashlib.sha256(path.read_bytes()).digest() == before and list(there.glob("*.png*")) == [path]


def test_inspect_escapes_control_characters(there, capsys):
    write_png(Path("a.png"), Image.new("RGB", (16, 16)), {"prompt": "a\x1b[2J red\ncircle é\u202e"})
    assert cli.main(["inspect", "a.png"]) == 0
    assert capsys.readouterr().out == f"{'prompt':20} a\\x1b[2J red\n{'':20} circle é\\u202e\n"


def test_inspect_into_a_closed_pipe(there):
    write_png(Path("a.png"), Image.new("RGB", (16, 16)), {"prompt": "\n".join(map(str, range(50_000)))})
    command, env = f"{sys.executable} -m dit.cli inspect a.png | head -1", os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("prompt") and not done.stderr


def test_inspect_refuses(there, capsys):
    Image.new("RGB", (16, 16)).save("plain.png")
    Path("text.png").write_text("no image")
    Path("text").write_text("no image")
    for name, message in (
        ("plain.png", "nothing is written in it"),
        ("text.png", "not an image"),
        ("text", "not an image"),
        ("none.png", "no such file"),
    ):
        assert cli.main(["inspect", name]) == 1
        assert capsys.readouterr().err.startswith(f"dit: {name}: {message}")
