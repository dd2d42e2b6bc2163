"""Parameters that no output depends on: they would never learn, and processes would wait for their gradients."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def freeze_unused_parameters(net: nn.Module, size: tuple[int, int], device: torch.device) -> list[str]:
    """Stop what no output of a training step depends on from being trained; returns the names.

    Some encoders compute more than is read: of HRNet's maps the coarse ones, when tasks read the fine ones. Found by
    looking along the graph of one forward pass of two black images of `size` = (H, W); random numbers, statistics and
    gradients stay as they are.
    """
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    was_training = net.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        outputs = net.train()(torch.zeros(2, 3, *size, dtype=torch.uint8, device=device))
        read = {id(parameter) for parameter in _leaves(outputs)}
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    net.train(was_training)

    unread = [name for name, p in net.named_parameters() if p.requires_grad and id(p) not in read]
    for name in unread:
        net.get_parameter(name).requires_grad_(False)
    return unread


def _leaves(outputs: Any) -> Iterator[Tensor]:
    """The parameters that nested outputs were computed from."""
    waiting = [tensor.grad_fn for tensor in _tensors(outputs)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [before for before, _ in node.next_functions]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
