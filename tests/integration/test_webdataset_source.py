"""Source `webdataset`: tar shards as img2dataset writes them, from a folder, an HTTP server and a bucket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from dit.commands.check import check_data
from dit.config import load_config
from dit.dataset.reader import read_images, read_metadata
from dit.dataset.storage import StoredImages
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.sources import fetch, http
from dit.sources.tar_shards import expand
from dit.sources.watch import identify
from helpers import REPO
from helpers.encoding import contents, encode
from helpers.images import BAD, saved
from helpers.remotes import s3_storage
from helpers.servers import always, once, serve
from helpers.sources import RUNTIME, captions_of, noise_file, shard_members, webdataset_data, write_shards, write_tar


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(http, "BACK_OFF", 0.01)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reasons(result) -> dict[str, str]:
    return {row["image"]: row["reason"] for row in result.rejected}


# What is fetched.


def test_fetch_copies_images_and_captions(tmp_path):
    write_shards(tmp_path / "set")
    result = fetch(webdataset_data("set/*.tar"), tmp_path / "out", RUNTIME)
    assert (result.images, result.captions, result.rejected, result.filtered) == (12, 12, [], {})
    names = [f"images/{number:05d}/{k:06d}.jpg" for number in range(3) for k in range(4)]
    assert captions_of(tmp_path / "out") == {name: [f"caption {k}"] for k, name in enumerate(names)}
    for k, entry in enumerate(read_metadata(tmp_path / "out")):
        assert StoredImages(tmp_path / "out").read(entry.stored) == noise_file(k)
    assert {"metadata.json", "source.json"} < set(tree(tmp_path / "out"))
    assert not [name for name in tree(tmp_path / "out") if "part" in name]


@pytest.mark.parametrize("storage", ["files", "shards"])
def test_fetch_is_deterministic(tmp_path, storage):
    write_shards(tmp_path / "set")
    for name in "ab":
        fetch(webdataset_data("set/*.tar", storage=storage, num_samples=9), tmp_path / name, RUNTIME)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("txt",), ["caption 3"]),
        (("json:caption",), ["caption 3"]),
        (("JSON:meta.text",), ["text 3"]),
        (("json:meta.all",), ["one 3", "two 3"]),
        (("txt", "json:caption", "json:meta.text", "cls"), ["caption 3", "text 3"]),
    ],
)
def test_fetch_captions_by_key_and_path(tmp_path, keys, expected):
    write_shards(tmp_path / "set")
    fetch(webdataset_data("set/*.tar", caption_keys=keys), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out")["images/00000/000003.jpg"] == expected


def test_fetch_stops_at_num_samples(tmp_path):
    first, second, third = write_shards(tmp_path / "set")
    third.write_bytes(b"not read")
    members = {"a.jpg": b"<html>", "a.txt": b"a"} | shard_members(range(4, 8))
    write_tar(second, members)
    result = fetch(webdataset_data("set/*.tar", num_samples=6, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
    assert result.images == 6 and reasons(result) == {"set/00001.tar/a": "a web page, not an image"}
    with pytest.raises(
        UserError, match="num_samples: 9 images wanted, 8 are there and pass; null takes all; 2 rejected, such as"
    ):
        fetch(webdataset_data("set/*.tar", num_samples=9, max_bad_fraction=0.4), tmp_path / "more", RUNTIME)


def test_fetch_filters(tmp_path):
    images = {"small": (40, 200), "wide": (200, 60), "square": (80, 80), "upright": (60, 120)}
    members = {}
    for k, (name, size) in enumerate(images.items()):
        members |= {f"{name}.png": noise_file(k, size, "PNG"), f"{name}.txt": b"a caption of some length"}
    for name, text in {"short": "cat", "long": "cat " * 20}.items():
        members |= {f"{name}.jpg": noise_file(9, (80, 80)), f"{name}.txt": text.encode()}
    members |= {"kinds.webp": saved(Image.new("RGB", (90, 90)), "WEBP"), "kinds.txt": b"a webp of ninety pixels"}
    write_tar(tmp_path / "a.tar", members)
    filters = {"min_side": 60, "max_aspect_ratio": 2.0, "min_caption_length": 4, "max_caption_length": 50}
    result = fetch(webdataset_data("a.tar", **filters), tmp_path / "out", RUNTIME)
    assert list(captions_of(tmp_path / "out")) == [
        f"images/00000/{k:06d}.{end}" for k, end in ((2, "png"), (3, "png"), (6, "webp"))
    ]
    assert result.rejected == [] and result.metrics()["filtered"] == result.filtered
    assert result.filtered == {
        "a side of less than 60 pixels": {"count": 1, "example": "a.tar/small"},
        "sides of more than 2 to 1": {"count": 1, "example": "a.tar/wide"},
        "no caption of 4 to 50 characters": {"count": 2, "example": "a.tar/short"},
    }
    assert "2 left out by the settings: no caption of 4 to 50 characters, such as a.tar/short" in list(result.summary())


def test_fetch_drops_captions_that_do_not_fit(tmp_path):
    write_shards(tmp_path / "set")
    keys = ("txt", "json:meta.text")
    fetch(webdataset_data("set/*.tar", caption_keys=keys, max_caption_length=7), tmp_path / "out", RUNTIME)
    assert set(map(tuple, captions_of(tmp_path / "out").values())) == {(f"text {k}",) for k in range(12)}


def test_fetch_names_of_any_bytes(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "été", "a\x1b[31mb", "deep/er/c", "../../d", "/etc/e"]
    members = {}
    for k, name in enumerate(names):
        members |= {f"{name}.JPG": noise_file(k), f"{name}.txt": f"number {k}".encode()}
    members |= {f"{names[0]}x.jpg": b"", f"{names[0]}x.txt": b"empty", "._a.jpg": b"of macOS", "README": b"no ending"}
    write_tar(tmp_path / "a.tar", members)
    result = fetch(webdataset_data("a.tar", max_bad_fraction=0.5), tmp_path / "out", RUNTIME)
    assert captions_of(tmp_path / "out") == {f"images/00000/{k:06d}.jpg": [f"number {k}"] for k in range(6)}
    assert reasons(result) == {"a.tar/caf\\udce9x": "empty file"}
    assert len(tree(tmp_path / "out")) == 8  # nothing outside


def test_fetch_counts_bad_samples(tmp_path):
    members = {}
    for k, (name, (content, _)) in enumerate(BAD.items()):
        members |= {f"{k}.{name.split('.')[1]}": content, f"{k}.txt": b"fine"}
    members |= {"no-text.jpg": noise_file(1), "no-text.json": b"{}"}
    members |= {"no-image.txt": b"fine", "no-image.json": b"{}"}
    members |= {"latin.jpg": noise_file(2), "latin.txt": b"caf\xe9"}
    members |= {"empty.jpg": noise_file(3), "empty.txt": b" \n\x00"}
    members |= {"dots.a.jpg": noise_file(3), "dots.a.txt": b"fine"}
    write_tar(tmp_path / "a.tar", members | shard_members(range(20)))
    result = fetch(webdataset_data("a.tar", max_bad_fraction=0.5), tmp_path / "out", RUNTIME)
    assert result.images == 20
    found = reasons(result)
    for k, (_, reason) in enumerate(BAD.values()):
        assert reason in found.pop(f"a.tar/{k}")
    assert found == {
        "a.tar/no-text": "no caption: the sample has no txt",
        "a.tar/no-image": "no image: the sample has txt, json, and none of jpg, jpeg, png, webp",
        "a.tar/latin": "no caption: its txt is not UTF-8",
        "a.tar/empty": "no caption: it is empty",
        "a.tar/dots": "no image: the sample has a.jpg, a.txt, and none of jpg, jpeg, png, webp",
    }
    with pytest.raises(
        UserError, match=r"webdataset.data.max_bad_fraction: 12 of 32 images are unusable, more than 30.0%"
    ) as error:
        fetch(webdataset_data("a.tar", max_bad_fraction=0.3), tmp_path / "again", RUNTIME)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        (b"{}", "nothing at json:meta.text"),
        (b'{"meta": 3}', "nothing at json:meta.text"),
        (b'{"meta": {"text": 3}}', "no text at json:meta.text"),
        (b'{"meta": {"text": null}}', "it is empty"),
        (b'{"meta": {"text": ', "its json is not JSON"),
        (b"[" * 100_000, "its json is not JSON"),
        (b'{"meta": "\xe9"}', "its json is not UTF-8"),
        (b'{"meta": {"text": "\\ud800"}}', "half a surrogate pair"),
    ],
)
def test_fetch_json_that_holds_no_caption(tmp_path, about, reason):
    write_tar(tmp_path / "a.tar", {"x.jpg": noise_file(99), "x.json": about} | shard_members(range(4)))
    data = webdataset_data("a.tar", caption_keys=("json:meta.text",), max_bad_fraction=0.2)
    result = fetch(data, tmp_path / "out", RUNTIME)
    assert result.images == 4 and list(reasons(result)) == ["a.tar/x"] and reason in reasons(result)["a.tar/x"]


def test_fetch_stops_as_soon_as_too_many_are_bad(tmp_path):
    first, second, _ = write_shards(tmp_path / "set", images=20)
    second.write_bytes(b"not read")
    with pytest.raises(UserError, match=r"max_bad_fraction: 3 of 3 images are unusable, more than 5.0%; .*has no cls$"):
        fetch(
            webdataset_data("set/*.tar", caption_keys=("cls",), num_samples=40, max_bad_fraction=0.05), tmp_path / "out", RUNTIME
        )


# Shards that are bad.


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


IMAGE = 512 + -(-len(noise_file(4)) // 512) * 512  # bytes of the first member, with its header


@pytest.mark.parametrize(
    ("harm", "left", "says"),
    [
        (lambda path: path.unlink(), 8, "no such shard"),
        (lambda path: path.write_bytes(b""), 8, "a damaged shard: empty file"),
        (lambda path: path.write_bytes(b"<html>" * 999), 8, "a damaged shard: "),
        (lambda path: cut(path, 700), 8, "a damaged shard: unexpected end of data"),  # in an image
        (lambda path: cut(path, IMAGE), 8, "a damaged shard: it breaks off"),  # between two members; the image has no caption yet
        (lambda path: cut(path, IMAGE + 1024 + 100), 9, "a damaged shard: it breaks off"),  # in a header
        (lambda path: cut(path, IMAGE + 1024 + 1024), 9, "a damaged shard: it breaks off"),  # after a sample
    ],
)
def test_fetch_bad_shard(tmp_path, harm, left, says):
    paths = write_shards(tmp_path / "set")
    harm(paths[1])
    data = webdataset_data("set/{00000..00002}.tar", max_bad_fraction=0.4)
    result = fetch(data, tmp_path / "out", RUNTIME)
    assert result.images == left
    assert says in reasons(result)["set/00001.tar"]
    assert captions_of(tmp_path / "out")["images/00002/000000.jpg"] == ["caption 8"]  # the others keep their names
    with pytest.raises(
        UserError, match=r"max_bad_fraction: 1 of 3 shards are unusable, more than 20.0%; .*set/00001.tar: "
    ) as error:
        fetch(replace(data, max_bad_fraction=0.2), tmp_path / "again", RUNTIME)
    assert "\n" not in str(error.value)


def test_fetch_header_that_is_none(tmp_path):
    paths = write_shards(tmp_path / "set")
    content = bytearray(paths[1].read_bytes())
    content[IMAGE : IMAGE + 512] = b"x" * 512  # of the first caption: tarfile takes it for the end
    paths[1].write_bytes(content)
    result = fetch(webdataset_data("set/*.tar", max_bad_fraction=0.4), tmp_path / "out", RUNTIME)
    assert reasons(result)["set/00001.tar"] == "a damaged shard: it breaks off" and result.images == 8


# Which shards there are.


def test_expand(tmp_path, monkeypatch):
    write_shards(tmp_path / "set", images=1)
    write_tar(tmp_path / "odd" / "[1].tar", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # of Windows

    def shown(pattern: str) -> list[str]:
        return [shard.shown for shard in expand(pattern)]

    names = [f"set/{k:05d}.tar" for k in range(3)]
    assert shown("set/*.tar") == shown("set/{00000..00002}.tar") == shown("**/0*.tar") == names
    assert shown("~/set/*.tar") == [f"~/{name}" for name in names]  # without the user's name
    assert shown(f"{tmp_path}/set/0000[01].tar") == [str(tmp_path / name) for name in names[:2]]
    assert shown("odd/[1].tar") == ["odd/[1].tar"]
    assert shown("http://me:secret@host/{a,b}.tar") == ["http://host/a.tar", "http://host/b.tar"]
    for pattern, says in {
        "set/*.zip": "nothing matches set/\\*.zip",
        "set/{0.tar": "a brace is missing",
        "http://host/*.tar": "an HTTP server does not list its files",
        "nonsense://host/a*.tar": "Protocol not known: nonsense",
    }.items():
        with pytest.raises(UserError, match=f"^webdataset.data.shards: .*{says}"):
            expand(pattern)


def test_expand_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[webdataset\]'"):
        expand("{0..1}.tar")
    assert len(expand("0.tar")) == 1


def test_fetch_takes_a_shard_of_two_patterns_once(tmp_path):
    write_shards(tmp_path / "set")
    assert fetch(webdataset_data("set/00000.tar", "set/*.tar"), tmp_path / "out", RUNTIME).images == 12


def test_settings_keep_no_password(tmp_path):
    write_shards(tmp_path / "set")
    with serve(tmp_path / "set") as (address, _):
        address = address.replace("//", "//me:secret@")
        fetch(webdataset_data(f"{address}/00000.tar"), tmp_path / "out", RUNTIME)
        version, lines = identify(webdataset_data(f"{address}/00000.tar"), {})
    for text in ((tmp_path / "out" / "source.json").read_text(), json.dumps(version), *lines):
        assert "secret" not in text and "127.0.0.1" in text


# Over HTTP.


def test_fetch_over_http(tmp_path):
    write_shards(tmp_path / "set")
    with serve(tmp_path / "set") as (address, log):
        pattern = address + "/{00000..00002}.tar"
        fetch(webdataset_data(pattern), tmp_path / "http", RUNTIME)
        assert log.names() == [f"0000{k}.tar" for k in range(3)]
        fetch(webdataset_data(pattern, num_samples=5), tmp_path / "again", RUNTIME)
        assert len(log.names()) == 3  # they are kept
    fetch(webdataset_data("set/*.tar"), tmp_path / "local", RUNTIME)
    local, remote = tree(tmp_path / "local"), tree(tmp_path / "http")
    assert local.pop("source.json") != remote.pop("source.json") and local == remote


@pytest.mark.parametrize("trick", ["truncate", "drop", "429 0", "503 0", "page", "overstate"])
def test_fetch_over_a_bad_connection(tmp_path, trick):
    write_shards(tmp_path / "set", images=30)
    fetch(webdataset_data("set/*.tar"), tmp_path / "local", RUNTIME)
    with serve(tmp_path / "set", once(trick, ["00001.tar"])) as (address, log):
        result = fetch(webdataset_data(address + "/{00000..00002}.tar"), tmp_path / "out", RUNTIME)
    assert log.tricks[trick] == 1 and result.rejected == []
    if trick == "truncate":
        assert log.asked[2][0] == "00001.tar" and log.asked[2][1] > 0  # resumed
    assert captions_of(tmp_path / "out") == captions_of(tmp_path / "local")


def test_fetch_missing_and_refused_over_http(tmp_path):
    write_shards(tmp_path / "set")
    (tmp_path / "set" / "00001.tar").unlink()
    with serve(tmp_path / "set", always("403", ["00002.tar"])) as (address, _):
        data = webdataset_data(address + "/{00000..00001}.tar", max_bad_fraction=0.5)
        result = fetch(data, tmp_path / "out", RUNTIME)
        assert result.images == 4 and reasons(result) == {f"{address}/00001.tar": "no such shard"}
        with pytest.raises(UserError, match=r"^webdataset.data.shards: .*00002.tar answers 403 Forbidden; check the address"):
            fetch(webdataset_data(f"{address}/00002.tar", max_bad_fraction=0.9), tmp_path / "refused", RUNTIME)
    with pytest.raises(UserError, match=r"^webdataset.data.shards: cannot reach http://127.0.0.1:\d+ \(refused\)"):
        fetch(data, tmp_path / "gone", RUNTIME)


def test_fetch_shard_that_has_changed_on_the_server(tmp_path):
    (path,) = write_shards(tmp_path / "set", count=1)
    with serve(tmp_path / "set") as (address, log):
        data = webdataset_data(f"{address}/00000.tar")
        fetch(data, tmp_path / "before", RUNTIME)
        before, _ = identify(data, {})
        assert identify(data, before)[0] == before
        write_tar(path, shard_members(range(10, 14)))
        os.utime(path, (2e9, 2e9))
        assert identify(data, before)[0] != before
        fetch(data, tmp_path / "after", RUNTIME)
    assert len(log.names()) == 2
    assert captions_of(tmp_path / "after")["images/00000/000000.jpg"] == ["caption 10"]


FETCH = """
import json, sys
from pathlib import Path
from dit.config import WebdatasetData
from dit.sources import fetch
fetch(WebdatasetData(**json.loads(sys.argv[1])), Path(sys.argv[2]), None)
"""


def test_fetch_that_was_killed_resumes(tmp_path):
    write_shards(tmp_path / "set", images=30)
    with serve(tmp_path / "set", once("stall", ["00001.tar"])) as (address, log):
        data = webdataset_data(address + "/{00000..00002}.tar", storage="shards")
        environment = os.environ | {"PYTHONPATH": str(REPO), "DVC_ROOT": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, json.dumps(asdict(data)), str(tmp_path / "out")],
            env=environment,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size for part in (tmp_path / ".state").rglob("00001.tar.part")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(UserError, match="no such file"):
            read_images(tmp_path / "out")  # nothing that could be taken for a data set
        fetch(data, tmp_path / "out", RUNTIME)
        fetch(data, tmp_path / "undisturbed", RUNTIME)
    asked = [first for name, first in log.asked if name == "00001.tar"]
    assert len(asked) == 2 and asked[1] > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


# From a bucket.


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with s3_storage(tmp_path_factory.mktemp("s3")) as storage:
        yield storage


@pytest.fixture
def s3(bucket, monkeypatch):
    own = {"AWS_ACCESS_KEY_ID": bucket.own["access_key_id"], "AWS_SECRET_ACCESS_KEY": bucket.own["secret_access_key"]}
    for name, value in (own | {"AWS_ENDPOINT_URL": bucket.settings["endpointurl"]}).items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield bucket
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def upload(paths: list[Path], folder: str) -> None:
    system, root = fsspec.core.url_to_fs(folder)
    for path in paths:
        system.pipe(f"{root}/{path.name}", path.read_bytes())


@pytest.mark.parametrize("pattern", ["{00000..00002}.tar", "*.tar"])
def test_fetch_from_a_bucket(tmp_path, s3, pattern):
    upload(write_shards(tmp_path / "set"), f"{s3.url}/set")
    result = fetch(webdataset_data(f"{s3.url}/set/{pattern}"), tmp_path / "out", RUNTIME)
    fetch(webdataset_data("set/*.tar"), tmp_path / "local", RUNTIME)
    local, remote = tree(tmp_path / "local"), tree(tmp_path / "out")
    assert result.images == 12 and local.pop("source.json") != remote.pop("source.json") and local == remote


def test_fetch_bad_shards_from_a_bucket(tmp_path, s3):
    paths = write_shards(tmp_path / "set", count=4)
    cut(paths[2], 700)
    upload([paths[0], *paths[2:]], f"{s3.url}/bad")
    result = fetch(webdataset_data(s3.url + "/bad/{00000..00003}.tar", max_bad_fraction=0.6), tmp_path / "out", RUNTIME)
    assert result.images == 8
    assert reasons(result) == {
        f"{s3.url}/bad/00001.tar": "no such shard",
        f"{s3.url}/bad/00002.tar": "a damaged shard: unexpected end of data",
    }


def test_identify_shards_of_a_bucket(tmp_path, s3):
    paths = write_shards(tmp_path / "set", count=2)
    upload(paths[:1], f"{s3.url}/seen")
    data = webdataset_data(f"{s3.url}/seen/*.tar")
    known, (line,) = identify(data, {})
    assert line.endswith(": 1 shards, 0.0 MB") and identify(data, {})[0] == known
    upload([write_tar(paths[0], shard_members(range(50, 54)))], f"{s3.url}/seen")
    changed = identify(data, known)[0]
    assert changed != known
    upload(paths[1:], f"{s3.url}/seen")
    assert identify(data, changed)[0]["shards"][f"{s3.url}/seen/*.tar"]["files"] == 2


def test_fetch_from_a_bucket_that_refuses(tmp_path, s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(
        UserError, match=r"^webdataset.data.shards: s3://.* cannot be read \(PermissionError.*your credentials$"
    ) as error:
        fetch(webdataset_data(f"{s3.url}/set/00000.tar"), tmp_path / "out", RUNTIME)
    assert "\n" not in str(error.value)


# Watch, check, and the stages after it.


def test_identify_shards_here(tmp_path):
    paths = write_shards(tmp_path / "set")
    data = webdataset_data("set/{00000..00003}.tar")
    known, (line,) = identify(data, {})
    assert line.startswith("set/{00000..00003}.tar: 3 shards, 0.")
    assert known["shards"]["set/{00000..00003}.tar"]["files"] == 3
    found = [known]
    os.utime(paths[0], (1, 1))
    found.append(identify(data, known)[0])
    paths[1].unlink()
    found.append(identify(data, known)[0])
    write_shards(tmp_path / "set", count=4)
    found.append(identify(data, known)[0])
    assert all(a != b for k, a in enumerate(found) for b in found[:k])
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    version, (line,) = identify(data, known)
    assert version == known and line.endswith("set/{00000..00003}.tar is taken for unchanged")
    with pytest.raises(UserError, match="there is no such shard"):
        identify(data, {})


def test_check_data(tmp_path):
    write_shards(tmp_path / "set")
    params = load_config(REPO / "params.yaml")

    def check(data) -> None:
        check_data(replace(params, recipe="webdataset", webdataset=replace(params.webdataset, data=data)))

    check(webdataset_data("set/*.tar"))
    for data, says in (
        (webdataset_data("set/9.tar"), "set/9.tar: no such shard"),
        (
            webdataset_data("set/*.tar", caption_keys=("json:title",)),
            "nothing in the first 100 samples .*: nothing at json:title",
        ),
        (webdataset_data("set/*.tar", image_keys=("avif",)), "no image: the sample has jpg, txt, json, and none of avif"),
        (webdataset_data("set/*.parquet"), "a damaged shard: "),
    ):
        with pytest.raises(UserError, match=f"^webdataset.data.shards: .*{says}"):
            check(data)
    with serve(tmp_path / "set") as (address, log):
        check(webdataset_data(f"{address}/00000.tar"))
        assert log.asked == []
        with pytest.raises(UserError, match="9.tar: no such shard"):
            check(webdataset_data(f"{address}/9.tar"))


def test_from_shards_to_latents(tmp_path):
    write_shards(tmp_path / "set")
    for storage in ("files", "shards"):
        fetch(webdataset_data("set/*.tar", caption_keys=("txt", "json:meta.text"), storage=storage), tmp_path / storage, RUNTIME)
        metrics = encode(tmp_path / storage, tmp_path / f"{storage}-latents", replace(RUNTIME, num_workers=0))
        assert (metrics["images"], metrics["captions"]) == (12, 24)
    assert contents(tmp_path / "files-latents") == contents(tmp_path / "shards-latents")
    cache = LatentCache(tmp_path / "shards-latents")
    cache.verify()
    rows = [row for each in cache.captions(np.arange(12)) for row in each]
    assert [(row["image"], row["text"]) for row in rows] == [(e.image, e.text) for e in read_metadata(tmp_path / "shards")]
