"""Sums over the ranks of a distributed run; the identity in a single process."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Counts = dict[str, dict[str, Tensor]]
"""By task, then by the names of its `count`: float32 scalars."""


def num_ranks() -> int:
    """How many processes take part; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, detached."""
    value = value.detach()
    if num_ranks() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def step_totals(counts: Sequence[Counts]) -> Counts:
    """The denominators of the losses of one optimiser step: labelled items over all its micro-batches and ranks.

    counts: what the tasks count in each micro-batch of this rank, all with the same names.
    Divided by the number of ranks, because gradients are averaged over ranks afterwards: then every labelled item of
    the step weighs the same. At least 1e-6, so that nothing / nothing is 0.
    """
    names = [(task, name) for task, of_task in counts[0].items() for name in of_task]
    if not names:
        return {task: {} for task in counts[0]}
    own = torch.stack([torch.stack([of_batch[task][name] for task, name in names]) for of_batch in counts]).sum(0)
    values = (sum_over_ranks(own).clamp(min=1e-6) / num_ranks()).unbind()
    totals: Counts = {task: {} for task in counts[0]}
    for (task, name), value in zip(names, values, strict=True):
        totals[task][name] = value
    return totals


def joint_sum(value: Tensor) -> Tensor:
    """The sum over ranks, for a loss of which every rank then computes the whole from such sums.

    Its gradient is that of this rank's own part times the number of ranks: the mean over ranks, taken afterwards, is
    the gradient of the whole loss. Nothing is exchanged in the backward.
    """
    ranks = num_ranks()
    return value if ranks == 1 else sum_over_ranks(value) + ranks * (value - value.detach())


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks, whose backward is the sum over ranks too: for what is computed in the middle of a network.

    Every rank must take part in the backward, at the same place.
    """
    return value if num_ranks() == 1 else _Sum.apply(value)


def own_share(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is sharded over ranks, in the same memory; any other tensor itself."""
    # asked by its method: importing DTensor takes seconds, and every command imports this module
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0])
