"""Count memory without having it: tensors on the meta device have shapes and no content."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """A context that adds up the storages of all tensors that operations return, as long as they live.

    Attributes:
        live, peak: bytes now, and the most there were. What kernels use within themselves does not count.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Count `tensor` from now on, unless it shares its storage with one that is counted."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def weights(*modules: torch.nn.Module) -> int:
    """Return the bytes of all weights and buffers."""
    return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))
