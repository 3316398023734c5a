"""Weights, gradients, moments and EMA divided over all processes: FSDP2, torch's `fully_shard` (arXiv:2304.11277).

A block's weights are gathered when they are needed, and given up afterwards. accelerate's own FSDP works on GPUs alone, so
torch's function is called here, which works with gloo on CPUs, too. All processes have to call each of these functions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dit.model.transformer import Block, DiT


def shard(transformer: DiT, device: torch.device, processes: int) -> None:
    """Divide the parameters of `transformer`, which is on `device`, over `processes`; from now on they are `DTensor`s."""
    mesh = init_device_mesh(device.type, (processes,))
    for block in transformer.blocks:
        attention = cast(Block, block).cross_attn
        fully_shard(attention, mesh=mesh)
        register_fsdp_forward_method(attention, "keys_values")  # called before the block is, for all blocks at once
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh, reshard_after_forward=True)  # not only after a backward pass, which a validation has not


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this process holds but a part of `tensor`."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`: on the CPU, whose memory is larger, if it is divided; otherwise `tensor` itself."""
    return whole(tensor).cpu() if is_sharded(tensor) else tensor


def like(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return all of `value` on the device of `tensor`, and divided as that is."""
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value
