"""Memory: decoding in parts, errors for want of it, and batches in shared memory. What a GPU needs: test_gpu_memory.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit.errors import UserError, is_out_of_memory, memory_errors, one_line, out_of_memory
from dit.utils.autoencoder import decode_latents, encode_image
from dit.utils.hardware import IN_USE, limit_workers
from helpers import REPO


@torch.no_grad()
def test_decode_latents_slices_large_batches():
    """What the default recipe decodes is one slice, to the same bits; more images are several, and only rounded otherwise."""
    from dit.encoders.loading import EncoderSource, load_vae

    vae, _ = load_vae(EncoderSource("builtin"))
    latents = torch.randn(130, vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(latents[:125] / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
    assert torch.equal(decode_latents(vae, latents[:125]), whole)
    decoded = decode_latents(vae, latents)
    assert decoded.shape == (130, 3, 64, 64) and torch.allclose(decoded[:125], whole, atol=1e-4)
    assert torch.allclose(decoded[128:], decode_latents(vae, latents[128:]), atol=1e-4)
    pixels = decoded.clamp(-1, 1)
    assert torch.allclose(encode_image(vae, pixels)[128:], encode_image(vae, pixels[128:]), atol=1e-3)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:116] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("unable to mmap 100 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. Workers may be out of shared memory."),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback\nunable to allocate shared memory(shm)"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=one_line)
def test_memory_errors_are_one_line_of_advice(error):
    with pytest.raises(UserError) as raised, memory_errors("a smaller x may fit"):
        raise error
    line = str(raised.value)
    assert "\n" not in line and len(line) < 250 and "; a smaller x may fit; " in line
    assert ("GPU" in line) == ("CUDA" in str(error)) and ("--shm-size" in line) == ("DataLoader" in str(error))
    assert out_of_memory(error, "a smaller x may fit") == line


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(28, "No space left"), ValueError("out of memory")])
def test_memory_errors_leave_others_alone(error):
    with pytest.raises(type(error)) as raised, memory_errors("a smaller x may fit"):
        raise error
    assert raised.value is error and not is_out_of_memory(error)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 10**9), st.integers(0, 10**11))
def test_limit_workers_stays_within_shared_memory(workers, prefetch, batch_bytes, free):
    fewer, ahead = limit_workers(workers, prefetch, batch_bytes, free)
    assert 0 <= fewer <= workers and 1 <= ahead <= prefetch
    assert fewer == 0 or (fewer * ahead + IN_USE) * batch_bytes <= free
    if (workers * prefetch + IN_USE) * batch_bytes <= free:
        assert (fewer, ahead) == (workers, prefetch)
    elif (workers + IN_USE) * batch_bytes <= free:
        assert fewer == workers  # as many as there is room for
    assert fewer or free < (1 + IN_USE) * batch_bytes


def test_limit_workers_names_the_setting(capsys):
    """Docker's 64 MB, and a batch of 32 images of 256 x 256: 8 workers with 4 batches each need 214 MB."""
    assert limit_workers(8, 4, 32 * 3 * 256 * 256, 64e6) == (8, 1)
    line = capsys.readouterr().out
    assert "64 MB are free, 214 are needed for runtime.num_workers 8 and prefetch_factor 4" in line and "--shm-size" in line


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from dit.dataset.image_io import load_crops
raw = Path(sys.argv[1])
(raw / "images").mkdir()
names = [f"images/{k}.png" for k in range(48)]
for k, name in enumerate(names):
    Image.fromarray(np.full((256, 256, 3), k, np.uint8)).save(raw / name)
batches = [[(name, name) for name in names[start : start + 8]] for start in range(0, 48, 8)]
loaded = load_crops(raw, batches, [(256, 256)], workers=2, prefetch=4)
found = [int(image[0, 0, 0, 0]) for pixels, *_ in loaded for image in pixels]
assert found == list(range(48)), found
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/shm")
@pytest.mark.parametrize("megabytes", [1, 5])
def test_load_crops_with_little_shared_memory(tmp_path, megabytes):
    """Batches of 1.6 MB, as in a container: a worker that writes more than there is dies of a bus error."""
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
    if subprocess.run([*namespace, mount], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    command = [*namespace, f'{mount} && exec "$@"', "sh", sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "/dev/shm" in done.stdout
