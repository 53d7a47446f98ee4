"""Weights in shards: torch's FSDP2 on the packed bytes themselves.

`fully_shard` goes over each decoder layer, over embeddings and head (one unit where they are tied), and over the rest.
A unit is gathered when its forward or backward pass begins and freed when that ends, so blocks that read a layer's
parameters within these passes see full tensors. Frozen embeddings need no gathering after their forward pass, nor does
a head whose loss computes its gradient there. What is gathered are 4-bit codes and their scales:
both are uint8 parameters without gradient, which FSDP2 sends together with the unit's others as bytes. Adapters, their
gradients and the optimizer's state are sharded with them; gradients are the mean over the processes. Where groups of
them hold a copy each, a unit is gathered within the group, and gradients go between the groups too.

Only the first process has read the weights; the others hold the same modules on the meta device and receive one layer
at a time, of which all but their shard is let go before the next. So the host's memory holds one packed copy, and no
device more than its shards and one whole layer. We call `fully_shard` ourselves, since accelerate sends a model's
state dict, which for packed weights has bitsandbytes' keys instead of the parameters'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nybble.errors import RecipeError
from nybble.models.blocks import has_fused_head
from nybble.models.skeleton import base_of, decoder_layers
from nybble.nn import Linear4bit
from nybble.recipe import TrainingSection
from nybble.run.processes import Processes


def shard(
    model: Any,
    processes: Processes,
    device: torch.device,
    *,
    n_shards: int | None = None,
    offload: bool = False,
) -> None:
    """Shard `model` over `processes`, in place; its tensors are on the host in the first and on meta in the others.

    Args:
        model: the base with its adapters.
        processes: those that share it.
        device: the device of this process.
        n_shards: how many neighbours share a copy; by default all processes share one.
        offload: shards wait in pinned host memory, and a layer's shard goes to the device when it is gathered.

    Raises:
        InputError: the processes' models differ.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    root = base_of(model)
    packed = [module for module in root.modules() if isinstance(module, Linear4bit)]
    kinds = processes.gather([(module.quant_type, module.source_dtype) for module in packed])[0]
    for module in packed:
        module.scales_as_parameter()
    tensors = [*root.named_parameters(), *root.named_buffers()]
    processes.agree({name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors})
    for module, (quant_type, source_dtype) in zip(packed, kinds, strict=True):
        module.quant_type, module.source_dtype = quant_type, source_dtype
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
    size = n_shards or processes.count
    groups = {"copies": processes.count // size, "shards": size} if size < processes.count else {"shards": size}
    mesh = init_device_mesh(device.type, tuple(groups.values()), mesh_dim_names=tuple(groups))
    forward_only = tables(root)
    for unit in (*([layer] for layer in decoder_layers(root)), *forward_only, [root]):
        _receive(unit, processes, device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
    for first, *_ in forward_only:
        first.set_unshard_in_backward(False)
    root.generation_config = processes.gather(root.generation_config)[0]


def shards_among(training: TrainingSection, n_processes: int) -> int:
    """How many processes share one copy of the model; 1 if each of them holds it whole.

    Raises:
        RecipeError: the processes do not divide into groups of that size.
    """
    if training.distributed != "fsdp" or n_processes == 1:
        return 1
    n_shards = training.fsdp_shards or n_processes
    if n_processes % n_shards:
        raise RecipeError(
            f"training.fsdp_shards is {n_shards}, and {n_processes} processes do not divide into groups of that size; "
            f"set it to a divisor of {n_processes}, or start another number of processes"
        )
    return n_shards


def tables(model: Any) -> list[list[Any]]:
    """Units that are gathered only for the forward pass: frozen embeddings and head, which are one unit if tied."""
    root = base_of(model)
    ends = [root.get_input_embeddings(), root.get_output_embeddings()]
    weights = [getattr(module, "weight", None) for module in ends]
    if any(w is None or w.requires_grad for w in weights) or not has_fused_head(root):
        return []
    return [ends] if weights[0] is weights[1] else [[module] for module in ends]


def _receive(unit: list[nn.Module], processes: Processes, device: torch.device) -> None:
    """Give every tensor of `unit` that is not sharded yet the values of the first process, on `device`."""
    import torch.distributed
    from torch.distributed.tensor import DTensor

    made: dict[int, Any] = {}  # a shared tensor is sent once

    def received(tensor: Tensor) -> Tensor:
        there = (
            tensor.detach().to(device).contiguous() if processes.is_main else torch.empty_like(tensor, device=device)
        )
        torch.distributed.broadcast(there, src=0)
        return there

    for module in (inner for outer in unit for inner in outer.modules()):
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(received(parameter), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) not in made:
                made[id(buffer)] = received(buffer)
            setattr(module, name, made[id(buffer)])


def is_sharded(model: Any) -> bool:
    """True if `model` was sharded by `shard`."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(base_of(model), FSDPModule)


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that this process holds."""
    from torch.distributed.tensor import DTensor

    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    here = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in here)


def full_tensors(value: Any) -> Any:
    """`value` with sharded tensors gathered, also within dicts and lists; all processes must call this together."""
    from torch.distributed.tensor import DTensor

    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: full_tensors(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full_tensors(inner) for inner in value)
    return value


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, which every process has, cut into the shards of `parameter`, on its device; nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    shards = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return shards.to(parameter.device)  # the host, if shards wait there
