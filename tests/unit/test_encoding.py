"""Encoding: the same input and settings give byte-identical shards, whatever was killed and however the work was shared."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.config import Encode, load_config
from dit.dataset.image_io import center_crop, load_crops, open_rgb, random_crop
from dit.dataset.reader import read_metadata
from dit.encode import encode as encoding
from dit.encode import moments
from dit.encode.cache_writer import ShardBuffer
from dit.encoders.loading import EncoderSource, load_vae
from dit.errors import UserError
from dit.latents.cache import LatentCache
from dit.sources.writer import DatasetWriter, FetchResult
from helpers import REPO, SHARED
from stages.processes import ProcessFailed, run_processes

PARAMS = load_config(REPO / "params.yaml")
RUNTIME = replace(PARAMS.runtime, num_workers=0)


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """22 pictures of several sizes, with one to three captions each."""
    folder = tmp_path_factory.mktemp("raw")
    writer = DatasetWriter(folder, replace(PARAMS.folder.data, val_fraction=0.2, layout="files"), 22)
    for k in range(22):
        content = io.BytesIO()
        pixels = np.random.default_rng(k).integers(0, 255, (40 + k, 90 - k, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((180, 120)).save(content, "JPEG")
        captions = [f"a red circle left of number {k}", "a blue star", "a small green heart on white"][: 1 + k % 3]
        writer.add(f"images/{k}.jpg", content.getvalue(), captions)
    writer.close(FetchResult())
    return folder


def settings(**changes) -> Encode:
    return replace(PARAMS.shapes.encode, batch_size=4, **changes)


def encode(raw: Path, folder: Path, runtime=RUNTIME, **changes) -> dict:
    return encoding.encode_dataset(raw, folder, settings(**changes), runtime, folder.parent / "picture.png")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_shards(monkeypatch):
    """Two batches of four images fit into a shard."""
    monkeypatch.setattr(encoding, "SHARD_BYTES", 2**15)


@pytest.mark.usefixtures("small_shards")
def test_shards_are_of_whole_batches_and_hold_everything_in_order(raw, tmp_path):
    metrics = encode(raw, tmp_path / "latents")
    cache = LatentCache(tmp_path / "latents")
    cache.verify()
    entries = read_metadata(raw)
    assert metrics["images"] == len(cache) == 22 and metrics["captions"] == len(entries) == cache.index["captions"]
    sizes = [shard["images"] for shard in cache.index["shards"]]
    assert len(sizes) > 2 and all(size % 4 == 0 for size in sizes[:-1])
    assert all(shard["bytes"] < 2**15 + 2**13 for shard in cache.index["shards"])
    rows = [row for each in cache.captions(np.arange(22)) for row in each]
    assert [(row["image"], row["text"], row["split"]) for row in rows] == [(e.image, e.text, e.split) for e in entries]
    assert len(cache.val) == 4 and not list((tmp_path / ".state" / "encode").iterdir())


@pytest.mark.usefixtures("small_shards")
def test_a_run_that_was_stopped_goes_on_at_the_last_whole_shard_to_the_same_bytes(raw, tmp_path, monkeypatch, capsys):
    encode(raw, tmp_path / "undisturbed")
    written = []
    write = ShardBuffer.write

    def stop_at_the_third(self, folder, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(self, folder, number, *rest)

    monkeypatch.setattr(ShardBuffer, "write", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(raw, tmp_path / "stopped")
    monkeypatch.setattr(
        ShardBuffer, "write", lambda self, folder, number, *rest: (written.append(number), write(self, folder, number, *rest))
    )
    encode(raw, tmp_path / "stopped")
    assert written[:3] == [0, 1, 2] and len(written) == len(set(written))
    assert "going on where the last run was stopped" in capsys.readouterr().out
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    assert not list((tmp_path / ".state" / "encode").iterdir())


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["picture", "damage"])
def test_a_shard_of_other_pictures_or_a_damaged_one_is_made_again(raw, tmp_path, monkeypatch, change):
    mine = tmp_path / "raw"
    shutil.copytree(raw, mine)
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)
    encode(mine, tmp_path / "first")
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    (parts,) = (tmp_path / ".state" / "encode").iterdir()
    if change == "picture":
        (mine / "images" / "0.jpg").write_bytes((raw / "images" / "1.jpg").read_bytes())
    else:
        shard = parts / "shard-00000.safetensors"
        shard.unlink()  # it is a hard link to the one in the cache
        shard.write_bytes(b"\0" * 1000)
    written = []
    write = ShardBuffer.write
    monkeypatch.setattr(
        ShardBuffer, "write", lambda self, folder, number, *rest: (written.append(number), write(self, folder, number, *rest))
    )
    encode(mine, tmp_path / "second")
    assert written == [0]
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(encoding, "SHARD_BYTES", 2**15)
    encode(mine, tmp_path / "third")
    assert contents(tmp_path / "second") == contents(tmp_path / "third")


def test_workers_and_layout_change_nothing(raw, tmp_path):
    writer = DatasetWriter(tmp_path / "shards", replace(PARAMS.folder.data, val_fraction=0.2, layout="shards"), 22)
    captions: dict[str, list[str]] = {}
    for entry in read_metadata(raw):
        captions.setdefault(entry.image, []).append(entry.text)
    for image, texts in captions.items():
        writer.add(image, (raw / image).read_bytes(), texts)
    writer.close(FetchResult())
    encode(raw, tmp_path / "a")
    encode(tmp_path / "shards", tmp_path / "b", replace(RUNTIME, num_workers=2, prefetch_factor=2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


SHARE = """
import sys
from dataclasses import replace
from pathlib import Path
from dit.encode import encode as encoding
from dit.config import load_config
params = load_config(sys.argv[1])
encoding.SHARD_BYTES = 2**15
settings = replace(params.shapes.encode, batch_size=4)
runtime = replace(params.runtime, num_workers=0)
result = encoding.encode_dataset(Path(sys.argv[2]), Path(sys.argv[3]), settings, runtime, Path(sys.argv[3] + ".png"))
Path(sys.argv[3]).with_name(f"result-{result is None}").touch()
"""


@pytest.mark.usefixtures("small_shards")
def test_two_processes_share_the_shards_and_write_the_same_bytes(raw, tmp_path, monkeypatch):
    encode(raw, tmp_path / "one")
    (tmp_path / "share.py").write_text(SHARE)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    run_processes([sys.executable, *map(str, (tmp_path / "share.py", REPO / "params.yaml", raw, tmp_path / "two"))], 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.glob("result-*")) == ["result-False", "result-True"]


def test_what_goes_wrong_in_one_of_several_processes_is_said_and_ends_the_others(tmp_path, capfd):
    (tmp_path / "fail.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('the disk of 1 is full')\ntime.sleep(600)\n"
    )
    with pytest.raises(ProcessFailed, match="process 1 of 2 failed"):
        run_processes([sys.executable, str(tmp_path / "fail.py")], 2)
    assert "the disk of 1 is full" in capfd.readouterr().out


# --- views ----------------------------------------------------------------------------------------------------------


def jpeg(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=100, subsampling=0, **options)
    return stream.getvalue()


def test_a_picture_is_turned_upright_and_made_rgb():
    halves = Image.new("RGB", (40, 20), "red")
    halves.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise make it upright
    upright = open_rgb(jpeg(halves, exif=exif))
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200
    for mode in ("L", "CMYK"):
        assert open_rgb(jpeg(halves.convert(mode))).mode == "RGB"
    assert center_crop(upright, 16).size == (16, 16)


def test_random_crops_are_the_same_every_time_and_lie_in_the_picture():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    crops = [np.asarray(random_crop(ramp, 32, "images/x.jpg", number)) for number in range(1, 9)]
    again = np.asarray(random_crop(ramp, 32, "images/x.jpg", 3))
    assert np.array_equal(crops[2], again) and not np.array_equal(crops[2], np.asarray(random_crop(ramp, 32, "y", 3)))
    widths = [int(crop[0, -1, 0]) - int(crop[0, 0, 0]) for crop in crops]
    assert len({crop[0, 0, 0] for crop in crops}) > 5 and all(60 <= width <= 100 for width in widths)  # of 100 at most


def test_crops_are_views_beside_the_central_one(raw, tmp_path):
    encode(raw, tmp_path / "plain")
    encode(raw, tmp_path / "cropped", crops=2)
    plain, cropped = LatentCache(tmp_path / "plain"), LatentCache(tmp_path / "cropped")
    assert (plain.crops, cropped.crops) == (0, 2)
    every, no = np.arange(22), np.zeros(22, dtype=bool)
    central = plain.read(every, np.zeros(22), no).moments
    assert torch.equal(central, cropped.read(every, np.zeros(22), no).moments)
    assert torch.equal(central, cropped.read(every, np.zeros(22), no, np.full(22, 0.3)).moments)
    others = [cropped.read(every, np.zeros(22), no, np.full(22, choice)).moments for choice in (0.4, 0.99)]
    assert not torch.equal(others[0], central) and not torch.equal(others[0], others[1])
    pixels, _ = next(load_crops(raw, [[("images/5.jpg", "images/5.jpg")]], 64, crops=2))
    vae, _ = load_vae(EncoderSource("builtin"))
    alone = moments.encode_moments(vae, pixels, settings(crops=2))[0, 4].float()
    assert torch.allclose(alone, others[1][read_order(raw).index("images/5.jpg")].float(), atol=0.02)


def read_order(raw: Path) -> list[str]:
    return list(dict.fromkeys(entry.image for entry in read_metadata(raw)))


# --- what can go wrong ----------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_read_is_one_clear_line_from_a_worker_too(raw, tmp_path):
    mine = tmp_path / "raw"
    shutil.copytree(raw, mine)
    (mine / "images" / "9.jpg").write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(UserError) as error:
            encode(mine, tmp_path / "out", replace(RUNTIME, num_workers=workers))
        assert "9.jpg: cannot be decoded" in str(error.value) and "\n" not in str(error.value)
    (mine / "images" / "9.jpg").unlink()
    with pytest.raises(UserError, match="9.jpg: missing or not readable"):
        encode(mine, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_out_of_memory_says_which_batch_size_would_fit(raw, tmp_path, monkeypatch):
    plain = moments._moments

    def only_three_fit(vae, pixels):
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return plain(vae, pixels)

    monkeypatch.setattr(moments, "_moments", only_three_fit)
    with pytest.raises(UserError) as error:
        encode(raw, tmp_path / "out")
    assert str(error.value) == (
        "encode.batch_size: 4 pictures of 64 pixels do not fit into memory; 2 would fit, or set encode.vae_slicing"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_out_of_memory_of_a_real_gpu_is_one_clear_line(raw, tmp_path):
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        pixels = torch.zeros(512, 1, 1024, 1024, 3, dtype=torch.uint8)
        vae, _ = load_vae(EncoderSource("builtin"), device="cuda")
        with pytest.raises(UserError, match=r"do not fit into memory; \d+ would fit"):
            moments.encode_moments(vae, pixels, replace(settings(), batch_size=512, image_size=1024))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_numbers_that_overflow_are_one_clear_line(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "_moments", lambda vae, pixels: torch.full((4, 2, 8, 8, 8), float("inf")).half())
    with pytest.raises(UserError, match="encode.precision: with fp32 the numbers of 'builtin' overflow; bf16 or fp32"):
        encode(raw, tmp_path / "out")


def test_the_vae_in_the_box_warns_of_photographs_and_not_of_drawings(tmp_path, raw, capsys):
    encode(raw, tmp_path / "noise")
    assert "was fitted on drawings and keeps little of these pictures" in capsys.readouterr().out
    from dit.sources import fetch

    fetch(replace(PARAMS.shapes.data, num_samples=20), tmp_path / "drawn", RUNTIME)
    encode(tmp_path / "drawn", tmp_path / "drawings")
    assert "fitted on drawings" not in capsys.readouterr().out


@pytest.mark.skipif(
    not (SHARED / "captioned-folder").is_dir(), reason="the folder of real captioned images is not beside this repository"
)
def test_real_photographs_are_encoded(tmp_path, capsys):
    from dit.sources import fetch

    fetch(replace(PARAMS.folder.data, paths=(str(SHARED / "captioned-folder"),)), tmp_path / "raw", RUNTIME)
    metrics = encode(tmp_path / "raw", tmp_path / "latents")
    assert metrics["images"] == 100 and 5 < metrics["reconstruction_psnr"] < 30
    assert "fitted on drawings" in capsys.readouterr().out
    LatentCache(tmp_path / "latents").verify()
