"""FSDP2: each process keeps a shard of weights, gradients and moments; checkpoints hold them whole."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from visionmtl.network import LossNet
from visionmtl.run import Train

PARTS = 4
"""The encoder is gathered in pieces of at most one such part; smaller ones cost more exchanges, larger ones memory."""


def check_shard(settings: Train, balancer: nn.Module, several_backwards: bool) -> None:
    """Raise ValueError for settings that cannot go with `train.distributed.shard`."""
    wrong = {
        f"train.compile is {settings.compile!r}": (bool(settings.compile), "set it to false"),
        "train.precision is 'fp16'": (settings.precision == "fp16", "choose bf16"),
        "the balancing method learns weights of its own": (
            any(True for _ in balancer.parameters()),
            "choose balance=fixed, or a method that learns none",
        ),
        "the backwards of several tasks reach the same parameters, by balance.level or model.sharing": (
            several_backwards,
            "choose balance=fixed",
        ),
    }
    for found, (is_so, remedy) in wrong.items():
        if is_so:
            raise ValueError(f"{found}, which does not go with train.distributed.shard; {remedy}, or do not shard")


def apply_fsdp(loss_net: LossNet, device: torch.device, world: int) -> None:
    """Shard the parameters of a network along their first axis; they become DTensors.

    A piece of an encoder, or a decoder, is gathered when it is needed and freed afterwards.
    Raises ValueError where encoders have weights in common.
    """
    encoders = loss_net.net.encoders()
    if len({id(p) for one in encoders for p in one.parameters()}) < sum(
        len(list(one.parameters())) for one in encoders
    ):
        raise ValueError(
            "train.distributed.shard is set, but this way of sharing (model.sharing) has the same weights in several "
            "encoders, and each can be sharded in one place only; set shard to false, or choose another sharing"
        )
    mesh = init_device_mesh(device.type, (world,))
    pieces = [piece for encoder in encoders for piece in _pieces(encoder, _size(encoder) // PARTS)]
    for piece in (*pieces, *loss_net.net.decoders.values()):
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


def full_weights(module: nn.Module, *, on_every_rank: bool = False) -> dict[str, Any]:
    """A sharded module's state dict with whole tensors. All processes must call it.

    On the CPU of the first process, and empty on the others; `on_every_rank`: on each one's device instead.
    """
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=not on_every_rank))


def load_full_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Undo `full_weights`. All processes must call it, with the same whole tensors."""
    set_model_state_dict(module, dict(weights), options=StateDictOptions(full_state_dict=True))


def full_moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As `full_weights`, the state dict of an optimiser of the module, with numbers for parameters as plain torch has.

    Checkpoints are the same whether the run that wrote them was sharded or not.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=options)
    if not named:
        return {}
    numbers = {name: number for number, name in enumerate(_names(module, optimizer))}
    return {
        "state": {numbers[name]: moments for name, moments in named["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]
        ],
    }


def load_full_moments(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Undo `full_moments`; the settings of the groups stay those of `optimizer`."""
    names = _names(module, optimizer)
    remaining = iter(names)
    named: dict[str, Any] = {
        "state": {names[number]: moments for number, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [next(remaining) for _ in group["params"]]} for group in optimizer.param_groups
        ],
    }
    set_optimizer_state_dict(module, optimizer, named, options=StateDictOptions(full_state_dict=True))


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of an optimiser's parameters, in its order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
