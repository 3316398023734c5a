"""Two machines, here network namespaces with a cable between them, train by `accelerate launch` what one machine trains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from helpers.clones import Clone, environment

WEIGHTS = Path("models/dit/transformer/diffusion_pytorch_model.safetensors")
ADDRESSES = {"dit-test-a": "10.77.0.1", "dit-test-b": "10.77.0.2"}
CABLE = "dit-cable"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces that reach nothing but each other."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    names = list(ADDRESSES)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in ADDRESSES.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in (CABLE, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_as_one(tmp_path, hosts):
    clone = Clone(tmp_path / "one")
    settings = yaml.safe_load((clone.root / "params.yaml").read_text())
    settings["shapes"]["optim"]["num_epochs"] = 16
    settings["train"]["mixed_precision"] = "no"
    (clone.root / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    clone.dvc("repro", "encode")
    folders = [tmp_path / name for name in hosts]
    for folder in folders:
        shutil.copytree(clone.root, folder, symlinks=True)
    clone.run(sys.executable, "-m", "stages.train")
    launched = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-m", "accelerate.commands.launch"]
            + f"--multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank}".split()
            + f"--main_process_ip {ADDRESSES[hosts[0]]} --main_process_port 29500".split()
            + ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "stages.train"],
            cwd=folder,
            env=environment(folder) | {"GLOO_SOCKET_IFNAME": CABLE},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (host, folder) in enumerate(zip(hosts, folders, strict=True))
    ]
    printed = [process.communicate(timeout=600)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], "\n".join(printed)
    one, two = (load_file(folder / WEIGHTS) for folder in (clone.root, folders[0]))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    assert "48 steps of 16, fp32 on cpu, 2 processes" in printed[0]
    assert not (folders[1] / "models").exists() and not (folders[1] / "mlflow.db").exists()  # the first machine writes
