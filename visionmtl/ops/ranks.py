"""Sums over the ranks of a distributed run; the identity in a single process."""

import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, detached."""
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
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
    total = sum_over_ranks(count)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return total.clamp(min=least) / ranks
