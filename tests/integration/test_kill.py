"""`kill -9` at any moment of download and of encode: the next `dvc repro` comes to the same outputs, hash by hash."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from helpers.clones import Clone, environment
from helpers.servers import make_mirror, serve

pytestmark = pytest.mark.slow
KILLS = 10
IMAGES = 60


def coco_clone(root, url: str) -> Clone:
    """A clone whose recipe is a small COCO from `url`, with shards of a few batches of images that take a while to encode."""
    clone = Clone(root)
    path = root / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["recipe"] = "coco"
    values["coco"]["data"].update(base_url=url, split="val2017", num_samples=IMAGES, captions_per_image=2)
    values["coco"]["encode"].update(vae="builtin", clip="builtin", image_size=256, batch_size=4, precision="fp32")
    values["runtime"].update(download_connections=4, num_workers=1)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    code = root / "dit" / "encode" / "encode.py"
    small = code.read_text().replace("SHARD_BYTES = 256 * 2**20", "SHARD_BYTES = 2**15")
    assert small != code.read_text()
    code.write_text(small)
    clone.dvc("repro", "-s", "watch")  # whose file is a dep of download; the stages are run one by one below
    return clone


def outs(clone: Clone) -> dict:
    """What DVC recorded of the outputs of both stages."""
    stages = yaml.safe_load((clone.root / "dvc.lock").read_text())["stages"]
    return {name: {out["path"]: out["md5"] for out in stages[name]["outs"]} for name in ("download", "encode")}


def kill_at_random(clone: Clone, stage: str, longest: float, rng: random.Random) -> int:
    """Start `stage` until it was killed `KILLS` times; returns how often there was some of its work to resume."""
    state = clone.root / ".state" / {"download": "downloads", "encode": "encode"}[stage]
    kills = with_work = 0
    while kills < KILLS:
        with (clone.root / "output.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dvc", "repro", "-f", "-s", stage],
                cwd=clone.root,
                env=environment(clone.root),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        time.sleep(rng.uniform(0.3, 1) * longest)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            had_work = any(path.is_file() for path in state.rglob("*"))
            with_work += had_work
            longest *= 1 if had_work else 1.1  # something else runs here by now, and all takes longer
        else:  # it was faster: from the start again
            assert process.returncode == 0, (clone.root / "output.log").read_text()
            longest *= 0.9
            shutil.rmtree(state, ignore_errors=True)
    return with_work


def test_download_and_encode_survive_ten_kills(tmp_path):
    make_mirror(tmp_path / "mirror", [f"{k:012d}.jpg" for k in range(IMAGES)])
    rng = random.Random(0)
    with serve(tmp_path / "mirror", lambda name: "delay") as (url, _):
        undisturbed = coco_clone(tmp_path / "a" / "undisturbed", url)
        seconds = {}
        for stage in ("download", "encode"):
            started = time.perf_counter()
            undisturbed.dvc("repro", "-s", stage)
            seconds[stage] = time.perf_counter() - started
        killed = coco_clone(tmp_path / "b" / "killed", url)
        for stage in ("download", "encode"):
            with_work = kill_at_random(killed, stage, seconds[stage], rng)
            print(f"{stage}: after {with_work} of {KILLS} kills there was work to resume")
            assert with_work > 0
            killed.dvc("repro", "-f", "-s", stage)  # forced: DVC would take what an attempt has finished from its cache
    assert outs(killed) == outs(undisturbed)
    assert not list((killed.root / ".state" / "encode").iterdir())
    assert not list((killed.root / "data").rglob("*.part"))
