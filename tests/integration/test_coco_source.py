"""COCO over a good connection, a bad one and none; annotations that lie."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from dit.dataset.filters import printable
from dit.errors import UserError
from dit.sources import coco, fetch, http
from dit.sources.http import CHUNK, Downloader
from helpers import SHARED
from helpers.servers import always, bad_connection, make_mirror, once, serve
from helpers.sources import RUNTIME, captions_of, coco_data


@pytest.fixture
def short_waits(monkeypatch):
    """Wait for a stalled body, and before another try, for less than users do."""
    monkeypatch.setattr(http, "TIMEOUT", (10, 0.5))
    monkeypatch.setattr(http, "BACK_OFF", 0.001)
    monkeypatch.setattr(http, "RETRIES", http.RETRIES.new(backoff_factor=0))


@pytest.fixture
def own_downloads(monkeypatch, tmp_path):
    """Keep downloads between runs in a folder of the test's own."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "root"))


NAMES = [f"{k:012d}.jpg" for k in range(8)]


@pytest.mark.usefixtures("own_downloads")
def test_fetch_resumes_truncated_bodies(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror", once("truncate", NAMES[:3])) as (url, log):
        result = fetch(coco_data(url, 8), tmp_path / "out", RUNTIME)
    assert result.images == 8 and result.captions == 16 and not result.rejected
    for name in NAMES:
        content = (tmp_path / "mirror" / "val2017" / name).read_bytes()
        assert (tmp_path / "out" / "images" / name).read_bytes() == content
        starts = [start for asked, start in log.asked if asked == name]
        assert starts[0] is None and len(starts) == (2 if name in NAMES[:3] else 1)
        assert len(starts) == 1 or len(content) // 2 - CHUNK < starts[1] <= len(content) // 2
    assert captions_of(tmp_path / "out")[f"images/{NAMES[2]}"] == ["caption 0 of 2", "caption 1 of 2"]
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.version"))


@pytest.mark.usefixtures("own_downloads")
def test_fetch_only_missing_images(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror") as (url, log):
        for folder, seed, count in (("a", 0, 4), ("b", 0, 4), ("c", 1, 4), ("d", 0, 6)):
            before = len(log.asked)
            fetch(coco_data(url, count, seed=seed), tmp_path / folder, RUNTIME)
            if folder == "b":
                assert len(log.asked) == before
        assert sorted(log.names()) == sorted(set(log.names()))
    a, b, c, d = (set(captions_of(tmp_path / folder)) for folder in "abcd")
    assert a == b != c and a < d


@pytest.mark.usefixtures("own_downloads")
def test_save_resumes_unless_the_file_has_changed(tmp_path):
    (tmp_path / "mirror").mkdir()
    for name, content in (("same", b"0123456789" * 1000), ("changed", b"abcdefghij" * 1000)):
        (tmp_path / "mirror" / name).write_bytes(content)
        (tmp_path / f"{name}.part").write_bytes(content[:4000])
        (tmp_path / f"{name}.version").write_text(f'"{hashlib.md5(content).hexdigest()}"')
    (tmp_path / "mirror" / "changed").write_bytes(b"something else")
    with serve(tmp_path / "mirror") as (url, log):
        for name in ("same", "changed"):
            assert Downloader("key").save(f"{url}/{name}", tmp_path / name) is None
            assert (tmp_path / name).read_bytes() == (tmp_path / "mirror" / name).read_bytes()
    assert log.asked == [("same", 4000), ("changed", 4000)]


@pytest.mark.usefixtures("own_downloads")
def test_save_discards_a_beginning_longer_than_the_file(tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "file").write_bytes(b"short")
    (tmp_path / "file.part").write_bytes(b"longer than that")
    (tmp_path / "file.version").write_text(f'"{hashlib.md5(b"short").hexdigest()}"')
    with serve(tmp_path / "mirror") as (url, _):
        assert Downloader("key").save(f"{url}/file", tmp_path / "file") is None
    assert (tmp_path / "file").read_bytes() == b"short"


@pytest.mark.usefixtures("own_downloads")
def test_fetch_both_splits_and_licences(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES[:4])
    make_mirror(tmp_path / "mirror", [f"9{name[1:]}" for name in NAMES[:3]], split="train2017")
    with serve(tmp_path / "mirror") as (url, log):
        result = fetch(coco_data(url, 7, split="both"), tmp_path / "out", RUNTIME)
    assert result.images == 7 and sum(name.startswith("9") for name in log.names()) == 3
    rows = json.loads((tmp_path / "out" / "metadata.json").read_text())
    licences = {row["image"]: row.get("licence") for row in rows}
    assert licences["images/000000000000.jpg"] == "https://example.org/0" and licences["images/000000000003.jpg"] is None


@pytest.mark.usefixtures("own_downloads")
def test_fetch_rejects_a_missing_image(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    (tmp_path / "mirror" / "val2017" / NAMES[5]).unlink()
    with serve(tmp_path / "mirror") as (url, _):
        result = fetch(coco_data(url, 8, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
    assert result.rejected == [{"image": NAMES[5], "reason": "the server answers 404 Not Found"}]
    assert result.images == 7


@pytest.mark.usefixtures("own_downloads")
def test_fetch_asks_again_for_a_damaged_image(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    good = (tmp_path / "mirror" / "val2017" / NAMES[5]).read_bytes()
    (tmp_path / "mirror" / "val2017" / NAMES[5]).write_bytes(good[:500])
    with serve(tmp_path / "mirror") as (url, _):
        result = fetch(coco_data(url, 8, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
        assert [row["image"] for row in result.rejected] == [NAMES[5]] and "damaged" in result.rejected[0]["reason"]
        (tmp_path / "mirror" / "val2017" / NAMES[5]).write_bytes(good)
        assert fetch(coco_data(url, 8), tmp_path / "again", RUNTIME).images == 8


ANNOTATIONS = "annotations_trainval2017.zip"


@pytest.mark.usefixtures("own_downloads", "short_waits")
@pytest.mark.parametrize("name", [NAMES[3], ANNOTATIONS])
@pytest.mark.parametrize(
    "trick", ["stall", "truncate", "drop", "overstate", "damage", "page", "408", "425", "429 0", "500", "503 0", "504", "520"]
)
def test_fetch_survives_what_goes_wrong_once(tmp_path, trick, name):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror", once(trick, [name])) as (url, log):
        result = fetch(coco_data(url, 8), tmp_path / "out", RUNTIME)
    assert log.tricks == {trick: 1}
    assert result.images == 8 and not result.rejected
    for image in NAMES:
        assert (tmp_path / "out" / "images" / image).read_bytes() == (tmp_path / "mirror" / "val2017" / image).read_bytes()


@pytest.mark.usefixtures("own_downloads", "short_waits")
def test_fetch_resumes_a_stalled_body(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror", once("stall", [NAMES[3]])) as (url, log):
        fetch(coco_data(url, 8), tmp_path / "out", RUNTIME)
    size = (tmp_path / "mirror" / "val2017" / NAMES[3]).stat().st_size
    first, second = [start for asked, start in log.asked if asked == NAMES[3]]
    assert first is None and size // 2 - CHUNK < second <= size // 2


@pytest.mark.usefixtures("own_downloads", "short_waits")
@pytest.mark.parametrize("name", [NAMES[3], ANNOTATIONS])
@pytest.mark.parametrize(
    ("trick", "says"),
    [
        ("stall", r": the connection broke off \(ConnectionError\), 6 times; try again later; what was downloaded stays"),
        ("truncate", r": the connection broke off \(ChunkedEncodingError\), 6 times; try again later"),
        ("drop", r": the connection broke off \(ConnectionError\), 6 times; try again later"),
        ("overstate", ": the connection broke off .*, 6 times; try again later"),
        ("page", ": a web page came instead of the file, .* 6 times; try again later"),
        ("moved", r"cannot reach http://127.0.0.1:\d+ \(TooManyRedirects\); check the address"),
        ("429 0", " answers 429 Too Many Requests; try again later; what was downloaded stays"),
        ("503", " answers 503 Service Unavailable; try again later; what was downloaded stays"),
        ("401", " answers 401 Unauthorized; check the address, and whether it wants a name and password"),
        ("403", " answers 403 Forbidden; check the address, and whether it wants a name and password"),
        ("400", " answers 400 Bad Request; check the address"),
        ("204", " answers 204 No Content; check the address"),
    ],
)
def test_fetch_ends_where_the_server_goes_on_failing(tmp_path, trick, says, name):
    """No image is left out because of the server, what has arrived stays, and a second run asks only for the rest."""
    make_mirror(tmp_path / "mirror", NAMES)
    failing = {name}
    with serve(tmp_path / "mirror", always(trick, failing)) as (url, log):
        with pytest.raises(UserError, match=f"^coco.data.base_url: .*{says}") as error:
            fetch(coco_data(url, 8, max_bad_fraction=0.5), tmp_path / "out", RUNTIME)
        assert "\n" not in str(error.value)
        failing.clear()
        assert fetch(coco_data(url, 8), tmp_path / "again", RUNTIME).images == 8
    assert {asked for asked in log.names() if log.names().count(asked) > 1} == {name}


@pytest.mark.usefixtures("own_downloads", "short_waits")
@pytest.mark.parametrize("status", ["404", "410"])
def test_fetch_rejects_only_what_the_server_does_not_have(tmp_path, status):
    make_mirror(tmp_path / "mirror", NAMES)
    with serve(tmp_path / "mirror", always(status, [NAMES[5]])) as (url, log):
        result = fetch(coco_data(url, 8, max_bad_fraction=0.2), tmp_path / "out", RUNTIME)
    assert [row["image"] for row in result.rejected] == [NAMES[5]] and f"answers {status}" in result.rejected[0]["reason"]
    assert result.images == 7 and log.names().count(NAMES[5]) == 1


@pytest.mark.usefixtures("own_downloads", "short_waits")
def test_fetch_annotations_damaged_twice(tmp_path):
    make_mirror(tmp_path / "mirror", NAMES)
    with (
        serve(tmp_path / "mirror", always("damage", [ANNOTATIONS])) as (url, log),
        pytest.raises(UserError, match=f"{ANNOTATIONS}: a damaged archive .*; check the address"),
    ):
        fetch(coco_data(url, 8), tmp_path / "out", RUNTIME)
    assert log.names() == [ANNOTATIONS] * 2 and not list((tmp_path / "root").rglob(ANNOTATIONS))


@pytest.mark.usefixtures("own_downloads", "short_waits")
def test_fetch_waits_as_long_as_the_server_asks(tmp_path, monkeypatch):
    """The seconds of Retry-After are slept, but no more than a minute, although a server may ask for a day."""
    waits = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waits.append)
    make_mirror(tmp_path / "mirror", NAMES)
    for trick in ("429 7", "503 86400"):
        with serve(tmp_path / "mirror", once(trick, NAMES[:1])) as (url, _):
            assert fetch(coco_data(url, 8), tmp_path / trick, RUNTIME).images == 8
    assert waits == [7, 60]


OUTSIDE = "a name that does not stay in its folder"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil.jpg", OUTSIDE),
        ("/etc/evil.jpg", OUTSIDE),
        ("C:evil.jpg", OUTSIDE),
        ("", OUTSIDE),
        ("sub/evil.jpg", "a name that is a path"),
        ("ev\x00il.jpg", "a name with a NUL in it"),
        (f"{'e' * 300}.jpg", "a name of 304 bytes; 255 are the most"),
    ],
)
@pytest.mark.usefixtures("own_downloads")
def test_fetch_rejects_a_name_that_is_none(tmp_path, name, reason):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg", name])
    with serve(tmp_path / "mirror") as (url, log):
        result = fetch(coco_data(url, 3, max_bad_fraction=0.4), tmp_path / "out", RUNTIME)
        assert result.rejected == [{"image": printable(name), "reason": reason}]
        assert result.images == 2 and len(log.asked) == 3
        with pytest.raises(UserError, match="coco.data.max_bad_fraction: 1 of 3 images are unusable"):
            fetch(coco_data(url, 3), tmp_path / "out", RUNTIME)


@pytest.mark.usefixtures("own_downloads")
def test_fetch_uses_a_repeated_name_once(tmp_path):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg", "1.jpg"])
    with serve(tmp_path / "mirror") as (url, log):
        result = fetch(coco_data(url, 3, max_bad_fraction=0.4), tmp_path / "out", RUNTIME)
    assert result.rejected == [{"image": "1.jpg", "reason": "its name comes twice in the annotations"}]
    assert result.images == 2 and log.names().count("1.jpg") == 1


def write_annotations(path: Path, content: object, member: str = "annotations/captions_val2017.json") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content if isinstance(content, bytes) else json.dumps(content))
    return path


def test_read_captions_uses_a_repeated_id_once(tmp_path):
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 5, "file_name": "b.jpg"}, {"id": 6, "file_name": "c.jpg"}]
    rows = [{"id": k, "image_id": image, "caption": "x"} for k, image in enumerate((5, 5, 6))]
    found = coco.read_captions(write_annotations(tmp_path / "a.zip", {"images": images, "annotations": rows}), ("val2017",))
    assert [(image.name, image.problem) for image in found] == [
        ("a.jpg", None),
        ("b.jpg", "image id 5 comes twice in the annotations"),
        ("c.jpg", None),
    ]


def test_read_captions_unpacks_nothing(tmp_path):
    outside = tmp_path / "outside.json"
    content = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a cat"}]}
    archive = write_annotations(tmp_path / "a.zip", content)
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr(str(outside), "{}")
        more.writestr("../outside.json", "{}")
    before = sorted(tmp_path.rglob("*"))
    assert [image.captions for image in coco.read_captions(archive, ("val2017",))] == [["a cat"]]
    assert sorted(tmp_path.rglob("*")) == before


def test_read_captions_without_the_member(tmp_path):
    archive = write_annotations(tmp_path / "a.zip", {}, "/annotations/captions_val2017.json")
    with pytest.raises(UserError, match="no readable annotations/captions_val2017.json"):
        coco.read_captions(archive, ("val2017",))


@pytest.mark.usefixtures("own_downloads")
def test_fetch_more_images_than_there_are(tmp_path):
    make_mirror(tmp_path / "mirror", ["1.jpg", "2.jpg"])
    with serve(tmp_path / "mirror") as (url, _), pytest.raises(UserError, match="3 images wanted, val2017 has 2"):
        fetch(coco_data(url, 3), tmp_path / "out", RUNTIME)


@pytest.mark.usefixtures("own_downloads")
@pytest.mark.parametrize("user", ["", "me:secret@"])
@pytest.mark.parametrize("attempt", [coco.check_host, lambda url: fetch(coco_data(url, 2), Path("nowhere"), RUNTIME)])
def test_unreachable_host(attempt, user):
    with pytest.raises(UserError, match=r"coco.data.base_url: cannot reach http://127.0.0.1:9 \(refused\)"):
        attempt(f"http://{user}127.0.0.1:9")


@pytest.mark.skipif(not (SHARED / "coco-mirror").is_dir(), reason="the folder of real COCO images is not beside this repository")
@pytest.mark.usefixtures("own_downloads")
def test_fetch_real_files_over_a_bad_connection(tmp_path):
    mirror = SHARED / "coco-mirror"
    files = {path.name: path for split in ("val2017", "train2017") for path in (mirror / split).glob("*.jpg")}
    with serve(mirror, bad_connection(0.2)) as (url, log):
        data = coco_data(url, len(files), split="both", captions_per_image=5)
        result = fetch(data, tmp_path / "out", RUNTIME)
        assert min(log.tricks.values()) >= 5, log.tricks
        asked = len(log.asked)
        fetch(data, tmp_path / "again", RUNTIME)
        assert len(log.asked) == asked
    assert result.images == len(files) == 250 and not result.rejected
    for folder in ("out", "again"):
        arrived = {path.name: path.read_bytes() for path in (tmp_path / folder / "images").iterdir()}
        assert arrived == {name: path.read_bytes() for name, path in files.items()}
    assert all(texts and all(text == text.strip() for text in texts) for texts in captions_of(tmp_path / "out").values())
