"""One network spread over the processes: each keeps a share of its weights, gradients and moments (FSDP2)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from visionmtl.network import LossNet
from visionmtl.run import Train

PARTS = 4
"""The encoder is gathered in pieces of at most one such part; smaller ones cost more exchanges, larger ones memory."""


def check_shard(settings: Train, balancer: nn.Module) -> None:
    """Raise ValueError for settings that cannot go with `train.distributed.shard`."""
    wrong = {
        f"train.compile is {settings.compile!r}": (bool(settings.compile), "set it to false"),
        "train.precision is 'fp16'": (settings.precision == "fp16", "choose bf16"),
        "train.distributed.static_graph is set": (settings.distributed.static_graph, "set it to false"),
        "train.distributed.bucket_mb is set": (settings.distributed.bucket_mb is not None, "remove it"),
        "the balancing method learns weights of its own": (
            any(True for _ in balancer.parameters()),
            "choose balance=fixed, or a method that learns none",
        ),
    }
    for found, (is_so, remedy) in wrong.items():
        if is_so:
            raise ValueError(f"{found}, which does not go with train.distributed.shard; {remedy}, or do not shard")


def shard(loss_net: LossNet, device: torch.device, world: int) -> None:
    """Spread the parameters of a network over all processes, each along its first axis; they become DTensors.

    A piece of the encoder, or a decoder, is gathered when it is needed and let go afterwards.
    """
    mesh = init_device_mesh(device.type, (world,))
    encoder = loss_net.net.encoder
    for piece in (*_pieces(encoder, _size(encoder) // PARTS), *loss_net.net.decoders.values()):
        fully_shard(piece, mesh=mesh)
    fully_shard(loss_net, mesh=mesh)


def _pieces(module: nn.Module, most: int) -> Iterator[nn.Module]:
    """Modules of at most so many parameters, or without smaller ones inside."""
    for child in module.children():
        list_of_some = isinstance(child, nn.ModuleList | nn.ModuleDict)  # such a list is never called itself
        if list_of_some or (_size(child) > most and any(True for _ in child.children())):
            yield from _pieces(child, most)
        elif _size(child):
            yield child


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gathered(value: Any) -> Any:
    """A nested value whose spread tensors are whole again, on the CPU. All processes must call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: gathered(inner) for key, inner in value.items()}
    return [gathered(inner) for inner in value] if isinstance(value, list) else value


def spread(whole: Mapping[str, Any], like: nn.Module) -> dict[str, Any]:
    """A module's whole state dict cut as its tensors are now. All processes must call it, with the same values."""
    now = like.state_dict()
    return {name: spread_one(value, now[name]) if name in now else value for name, value in whole.items()}


def spread_moments(whole: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As `spread`, of an optimiser's state dict: what has the shape of a parameter is cut as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {name: spread_one(value, parameters[index]) for name, value in of_one.items()}
        for index, of_one in whole["state"].items()
    }
    return {**whole, "state": state}


def spread_one(whole: Any, like: Tensor) -> Any:
    """`whole` cut as `like` is, where it is a tensor of that shape and `like` is spread."""
    if not (isinstance(whole, Tensor) and isinstance(like, DTensor) and whole.shape == like.shape):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
