"""Sums over the ranks of a distributed run; the identity in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


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


def per_rank(count: Tensor, least: float = 1.0) -> Tensor:
    """Denominator of a loss: labelled items over all ranks, divided by the number of ranks.

    Gradients are averaged over ranks afterwards, so a rank's sum of losses divided by this is its share of the mean
    over all labelled items.
    count: float scalar, this rank's labelled items (or any non-negative normaliser)
    least: what the sum over ranks counts as where it is smaller
    """
    return sum_over_ranks(count).clamp(min=least) / num_ranks()


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
    """This process's share of a tensor that is spread over ranks, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0])
