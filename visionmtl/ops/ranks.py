"""Sums over the ranks of a distributed run; the identity in a single process."""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, detached."""
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def per_rank(count: Tensor) -> Tensor:
    """Denominator of a loss: labelled items over all ranks, divided by the number of ranks.

    Gradients are averaged over ranks afterwards, so a rank's sum of losses divided by this is its share of the mean
    over all labelled items. Nothing labelled anywhere gives 1: the loss above it is 0 anyway.
    count: float scalar, this rank's labelled items (or any non-negative normaliser).
    """
    total = sum_over_ranks(count)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return torch.where(total > 0, total / ranks, torch.ones_like(total))
