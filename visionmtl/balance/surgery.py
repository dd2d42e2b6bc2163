"""Methods that change one gradient after another pair by pair: PCGrad, GradVac."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.random_numbers import RandomNumbers
from visionmtl.balance.solvers import unit


class PCGrad(GramianBalance, frozen=True):
    """PCGrad: each g_i, for the others j in random order: g_i -= min(g_i . g_j, 0) / |g_j|^2 g_j; then their sum
    (Yu et al. 2020, arXiv:2001.06782, alg. 1).

    With two tasks neither is hurt; with more, a later projection may undo an earlier one.
    """

    type: Literal["pcgrad"] = "pcgrad"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _PCGrad()


class GradVac(GramianBalance, frozen=True):
    """GradVac: each g_i, for the others j in random order, where its cosine phi to g_j lies below their usual one,
    p_ij, is turned to it: g_i += |g_i| (p (1 - phi^2)^(1/2) - phi (1 - p^2)^(1/2)) / (|g_j| (1 - p^2)^(1/2)) g_j
    (Wang et al. 2021, arXiv:2010.05874, alg. 1 and eq. 4); p moves by `rate` towards phi.

    State: p, 0 at first. Deviation: p moves by the cosines of the original gradients, once a step, so that it is
    symmetric and no order of the tasks shows in it.
    """

    type: Literal["gradvac"] = "gradvac"
    rate: float = Field(0.01, gt=0, le=1, description="beta of the moving average of the cosines")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _GradVac(len(tasks), self.rate)


class _PCGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draws = RandomNumbers()

    def forward(self, seen: TaskGradients) -> Tensor:
        of = unit(seen.gramian, seen.present)
        order = _orders(self.draws, len(seen.gramian))
        mixed = torch.eye(len(seen.gramian), dtype=torch.float64, device=seen.gramian.device)  # of unit gradients
        for other in order.unbind(dim=1):  # [T]: whom each task meets now
            inner = (mixed @ of.cosines).gather(1, other[:, None])
            mixed = mixed.scatter_add(1, other[:, None], -inner.clamp(max=0))
        return _summed(mixed, of.lengths, seen.present)


class _GradVac(nn.Module):
    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.draws = RandomNumbers()
        self.usual = nn.Buffer(torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    def forward(self, seen: TaskGradients) -> Tensor:
        of = unit(seen.gramian, seen.present)
        order = _orders(self.draws, len(seen.gramian))
        mixed = torch.eye(len(seen.gramian), dtype=torch.float64, device=seen.gramian.device)
        for other in order.unbind(dim=1):
            products = mixed @ of.cosines
            size = (products * mixed).sum(dim=1, keepdim=True).clamp(min=1e-24).sqrt()
            phi = (products.gather(1, other[:, None]) / size).clamp(-1, 1)
            usual = self.usual.gather(1, other[:, None])
            aside = (1 - usual**2).clamp(min=1e-12).sqrt()
            more = size * (usual * (1 - phi**2).sqrt() - phi * aside) / aside
            turns = (phi < usual) & seen.present[:, None] & seen.present[other][:, None]
            mixed = mixed.scatter_add(1, other[:, None], torch.where(turns, more, 0.0))
        both = seen.present & seen.present[:, None]
        moved = torch.lerp(self.usual, of.cosines.clamp(-1, 1), self.rate)
        self.usual.copy_(torch.where(both, moved, self.usual))
        return _summed(mixed, of.lengths, seen.present)


def _orders(draws: RandomNumbers, num_tasks: int) -> Tensor:
    """int64 [T, T - 1]: for each task the others in random order."""
    chance = draws.uniform(num_tasks, num_tasks)
    draws.next()
    return (chance + 2 * torch.eye(num_tasks, device=chance.device)).argsort(dim=1)[:, :-1]


def _summed(mixed: Tensor, lengths: Tensor, present: Tensor) -> Tensor:
    """Rows of mixtures of unit gradients -> the weights of the sum of them all, each as long as its gradient."""
    return ((present * lengths) @ mixed) / lengths
