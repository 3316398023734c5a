"""Sources: the bytes arrive as they are, what is unusable is named, and nothing leaves its folder."""

from __future__ import annotations

import functools
import io
import json
import shutil
import threading
import zipfile
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SHARED
from PIL import Image

from dit.config import CocoData, FolderData, ShapesData, load_config
from dit.errors import UserError
from dit.sources import coco, fetch
from dit.sources.captions import parse
from dit.sources.dataset import check_image, read_metadata, split_by_image
from dit.sources.scene import UNSEEN_PAIRS

RUNTIME = replace(load_config(REPO / "params.yaml").runtime, download_connections=4)


def picture(seed: int, size: tuple[int, int] = (48, 32), kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def captions_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in read_metadata(folder):
        found.setdefault(entry.image, []).append(entry.text)
    return found


# --- shapes ---------------------------------------------------------------------------------------------------------


def test_shapes_are_the_same_on_every_machine_and_show_no_unseen_pair(tmp_path):
    data = ShapesData(source="shapes", num_samples=40, val_fraction=0.25, image_size=64, seed=3)
    report = fetch(data, tmp_path / "a", RUNTIME)
    fetch(data, tmp_path / "b", RUNTIME)
    assert (report.images, report.train_images, report.val_images) == (40, 30, 10)
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    for entry in read_metadata(tmp_path / "a"):
        assert not {thing.pair for thing in parse(entry.text).things} & UNSEEN_PAIRS


def test_the_split_is_by_image_and_has_both_sides():
    names = [f"images/{k}.jpg" for k in range(10)]
    splits = split_by_image(names, 0.3, seed=0)
    assert sorted(splits) == names and list(splits.values()).count("val") == 3
    assert splits == split_by_image(names[::-1], 0.3, seed=0)
    assert sorted(split_by_image(names[:2], 0.01, seed=0).values()) == ["train", "val"]
    with pytest.raises(UserError, match="at least 2"):
        split_by_image(names[:1], 0.5, seed=0)


# --- folder ---------------------------------------------------------------------------------------------------------


def folder_data(*paths: Path, limit: float = 0.0) -> FolderData:
    return FolderData(source="folder", paths=tuple(map(str, paths)), val_fraction=0.3, max_bad_fraction=limit, seed=0)


def add_pair(folder: Path, name: str, text: str | bytes, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_a_folder_of_pairs_arrives_byte_for_byte_with_a_caption_per_line(tmp_path):
    mine = tmp_path / "mine"
    add_pair(mine, "cat.jpg", "a cat\n\n  a   small cat \n", picture(1))
    add_pair(mine, "deep/er/DOG.PNG", "a dog", picture(2, kind="PNG"))
    add_pair(mine, "deep/bird.webp", "a bird", picture(3, kind="WEBP"))
    (mine / "alone.jpg").write_bytes(picture(4))
    (mine / "alone_too.txt").write_text("nothing to see")
    report = fetch(folder_data(mine), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {
        "images/cat.jpg": ["a cat", "a small cat"],
        "images/deep/er/DOG.PNG": ["a dog"],
        "images/deep/bird.webp": ["a bird"],
    }
    for name in ("cat.jpg", "deep/er/DOG.PNG", "deep/bird.webp"):
        assert (tmp_path / "out" / "images" / name).read_bytes() == (mine / name).read_bytes()
    assert [Path(name).name for name in report.unpaired] == ["alone.jpg", "alone_too.txt"]


def test_two_folders_may_hold_files_of_the_same_name(tmp_path):
    for k in range(2):
        add_pair(tmp_path / str(k), "x.jpg", f"number {k}", picture(k))
    fetch(folder_data(tmp_path / "0", tmp_path / "1"), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {"images/0/x.jpg": ["number 0"], "images/1/x.jpg": ["number 1"]}


BAD = {
    "zero.jpg": (b"", "empty file"),
    "page.jpg": (b"<html><body>404</body></html>", "a web page"),
    "half.jpg": (picture(5)[:700], "damaged"),
    "text.jpg": (b"this is no picture at all", "not a picture"),
    "dot.png": (picture(6, (1, 1), "PNG"), "only 1 x 1 pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_unusable_picture_is_recognised(name):
    assert BAD[name][1] in check_image(BAD[name][0])


def test_a_decompression_bomb_is_recognised(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "decompression bomb" in check_image(picture(7))
    monkeypatch.undo()
    assert check_image(picture(7)) is None


def test_unusable_pairs_are_set_aside_with_a_reason_up_to_a_limit(tmp_path):
    mine = tmp_path / "mine"
    for k in range(4):
        add_pair(mine, f"good{k}.jpg", "fine", picture(k))
    for name, (content, _) in BAD.items():
        add_pair(mine, name, "a caption", content)
    add_pair(mine, "latin.jpg", "caf\xe9".encode("latin-1"), picture(8))
    add_pair(mine, "silent.jpg", " \n", picture(9))
    report = fetch(folder_data(mine, limit=0.7), tmp_path / "out", RUNTIME)
    reasons = {Path(row["image"]).name: row["reason"] for row in report.bad}
    assert set(reasons) == {*BAD, "latin.jpg", "silent.jpg"}
    assert reasons["latin.jpg"] == "latin.txt is not UTF-8" and reasons["silent.jpg"] == "no caption in silent.txt"
    assert report.images == 4
    with pytest.raises(UserError, match="7 of 11 images are unusable"):
        fetch(folder_data(mine, limit=0.5), tmp_path / "again", RUNTIME)


def test_a_folder_without_pairs_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"folder.data.paths: no picture with a .txt beside it"):
        fetch(folder_data(tmp_path), tmp_path / "out", RUNTIME)
    with pytest.raises(UserError, match="is not a folder"):
        fetch(folder_data(tmp_path / "nowhere"), tmp_path / "out", RUNTIME)


# --- coco -----------------------------------------------------------------------------------------------------------


def make_mirror(folder: Path, names: list[str], caption=lambda k, c: f"caption {c} of {k}\n") -> None:
    images = [{"id": 100 - k, "file_name": name} for k, name in enumerate(names)]
    rows = [{"id": 10 * k + c, "image_id": 100 - k, "caption": caption(k, c)} for k in range(len(names)) for c in range(3)]
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    with zipfile.ZipFile(folder / "annotations" / "annotations_trainval2017.zip", "w") as archive:
        archive.writestr("annotations/captions_val2017.json", json.dumps({"images": images, "annotations": rows}))
    for k, name in enumerate(names):
        if "/" not in name:
            (folder / "val2017" / name).write_bytes(picture(k))


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder; cuts the first answer for every name in `cut` short; notes what was asked for."""

    cut: set[str] = set()  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.asked.append(name)
        if name in self.cut:
            self.cut.discard(name)
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:100])
            self.close_connection = True
        else:
            super().do_GET()


@pytest.fixture
def serve(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))
    servers = []

    def start(folder: Path) -> str:
        Quiet.cut, Quiet.asked = set(), []
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def coco_data(url: str, count: int, **changes) -> CocoData:
    return CocoData(
        **{
            "source": "coco",
            "split": "val2017",
            "num_samples": count,
            "val_fraction": 0.3,
            "base_url": url,
            "captions_per_image": 2,
            "max_bad_fraction": 0.0,
            "seed": 0,
        }
        | changes
    )


def test_coco_images_arrive_byte_for_byte_although_an_answer_is_cut_short(serve, tmp_path):
    names = [f"{k:012d}.jpg" for k in range(8)]
    make_mirror(tmp_path / "mirror", names)
    url = serve(tmp_path / "mirror")
    Quiet.cut = set(names[:3])
    report = fetch(coco_data(url, 8), tmp_path / "out", RUNTIME)
    assert report.images == 8 and report.captions == 16 and not report.bad
    for name in names:
        assert (tmp_path / "out" / "images" / name).read_bytes() == (tmp_path / "mirror" / "val2017" / name).read_bytes()
    assert captions_of(tmp_path / "out")[f"images/{names[2]}"] == ["caption 0 of 2", "caption 1 of 2"]
    assert not list(tmp_path.rglob("*.part"))


def test_coco_chooses_by_seed_and_keeps_the_annotations(serve, tmp_path):
    make_mirror(tmp_path / "mirror", [f"{k:012d}.jpg" for k in range(8)])
    url = serve(tmp_path / "mirror")
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        fetch(coco_data(url, 4, seed=seed), tmp_path / folder, RUNTIME)
    a, b, c = (set(captions_of(tmp_path / folder)) for folder in "abc")
    assert a == b != c
    assert Quiet.asked.count("annotations_trainval2017.zip") == 1


def test_a_missing_coco_image_is_set_aside(serve, tmp_path):
    names = [f"{k:012d}.jpg" for k in range(8)]
    make_mirror(tmp_path / "mirror", names)
    (tmp_path / "mirror" / "val2017" / names[5]).unlink()
    report = fetch(coco_data(serve(tmp_path / "mirror"), 8, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
    assert report.bad == [{"image": names[5], "reason": "the server answers 404 File not found"}]
    assert report.images == 7


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "sub/evil.jpg"])
def test_a_name_that_leaves_the_folder_is_refused(serve, tmp_path, name):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg", name])
    with pytest.raises(UserError, match="does not stay in its folder"):
        fetch(coco_data(serve(tmp_path / "mirror"), 2), tmp_path / "out", RUNTIME)


def test_too_many_coco_images_wanted_is_one_clear_line(serve, tmp_path):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg"])
    with pytest.raises(UserError, match="3 images wanted, val2017 has 2"):
        fetch(coco_data(serve(tmp_path / "mirror"), 3), tmp_path / "out", RUNTIME)


def test_an_unreachable_host_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    for attempt in (
        lambda: coco.check_host("http://127.0.0.1:9"),
        lambda: fetch(coco_data("http://127.0.0.1:9", 2), tmp_path, RUNTIME),
    ):
        with pytest.raises(UserError, match=r"coco.data.base_url: cannot reach http://127.0.0.1:9 \(refused\)"):
            attempt()


# --- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "coco-mirror").is_dir(), reason="the folder of real COCO images is not beside this repository")
def test_real_coco_files(serve, tmp_path):
    mirror = SHARED / "coco-mirror"
    report = fetch(coco_data(serve(mirror), 50, captions_per_image=5), tmp_path / "out", RUNTIME)
    assert report.images == 50 and 240 <= report.captions <= 250
    for path in (tmp_path / "out" / "images").iterdir():
        assert path.read_bytes() == (mirror / "val2017" / path.name).read_bytes()
    assert all(texts and all(text == text.strip() for text in texts) for texts in captions_of(tmp_path / "out").values())


@pytest.mark.skipif(
    not (SHARED / "captioned-folder").is_dir(), reason="the folder of real captioned images is not beside this repository"
)
def test_a_real_captioned_folder(tmp_path):
    shutil.copytree(SHARED / "captioned-folder", tmp_path / "mine")
    report = fetch(folder_data(tmp_path / "mine"), tmp_path / "out", RUNTIME)
    assert report.images == 100 and not report.bad
