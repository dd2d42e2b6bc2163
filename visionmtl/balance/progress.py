"""Weights from how losses change over the steps: DWA, moving averages, FAMO, LDC-MTL, GO4Align."""

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.balance.base import LossRule, LossWeighting
from visionmtl.balance.scalarisations import RelativeRule


class DWA(LossWeighting, frozen=True):
    """DWA: T softmax(r / temperature), r_t = mean loss of the last window / mean loss of the window before
    (Liu, Johns, Davison 2019, arXiv:1803.10704, eq. 7). Tasks that improve slowly get more weight.

    State: the means. Deviation: a window of `steps` steps instead of an epoch; weights are 1 in the first two.
    """

    type: Literal["dwa"] = "dwa"
    temperature: float = Field(2.0, gt=0)
    steps: int = Field(200, ge=1, description="optimiser steps of a window")

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _DWA(len(tasks), self.temperature, self.steps)


class EMALoss(LossWeighting, frozen=True):
    """1 / moving average of L_t (Lakkapragada et al. 2022, arXiv:2211.12999). State: the averages.

    As `scale_invariant`, without the noise of single batches.
    """

    type: Literal["ema_loss"] = "ema_loss"
    decay: float = Field(0.99, gt=0, lt=1)

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _EMALoss(len(tasks), self.decay)


class FAMO(LossWeighting, frozen=True):
    """FAMO: T c z_t / L_t, z = softmax(xi), 1 / c = sum z / L; xi follows by Adam the slope of
    sum_t z_t (log L_t before - log L_t after a step) (Liu et al. 2023, arXiv:2306.03792, alg. 1).

    All losses shrink at nearly the same rate. State: xi, Adam's moments, the losses before.
    Deviations: the loss after the step is that of the next batch, where the paper runs the network once more on the
    same one; times T, so that the mean weight is 1.
    """

    type: Literal["famo"] = "famo"
    rate: float = Field(0.025, gt=0, description="learning rate of xi")
    decay: float = Field(0.01, ge=0, description="gamma, weight decay of xi")

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _FAMO(len(tasks), self.rate, self.decay)


class LDCMTL(LossWeighting, frozen=True):
    """LDC-MTL: the network lowers f + penalty * sum_t s_t l_t, and W lowers f = sum_t |s_t l_t - s_(t+1) l_(t+1)|, with
    l = L / L(0), s = T softmax(W) (Xiao et al. 2025, arXiv:2502.08585: the single loop without the term that the paper
    drops as negligible). f is the discrepancy of the weighted losses.

    State: W and L(0). Deviations: W is a vector, where the paper has a small network that reads the shared features;
    with `penalty` at 2 or more no loss has a negative weight, so less is refused.
    """

    type: Literal["ldc_mtl"] = "ldc_mtl"
    rate: float = Field(0.01, gt=0, description="step of W")
    penalty: float = Field(5.0, ge=2)

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _LDCMTL(len(tasks), self.rate, self.penalty)


class GO4Align(LossWeighting, frozen=True):
    """GO4Align: risk indicators p_t, times exp(rate * l_t) at each step with l = L / L(0), and mean 1, are put into
    groups by k-means; a task's weight is its group's mean indicator / L_t(0) (Shen et al. 2024, arXiv:2404.06486:
    adaptive group risk minimisation).

    State: p and L(0). Deviations: written from the paper's description, with the best grouping of the T numbers found
    by trying all of them, instead of random starts.
    """

    type: Literal["go4align"] = "go4align"
    rate: float = Field(1e-3, gt=0)
    groups: int = Field(2, ge=1)

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        if self.groups > max(2, len(tasks)):
            raise ValueError(
                f"balance.groups is {self.groups} for {len(tasks)} tasks ({', '.join(tasks)}); each group has one "
                "task or more; lower it"
            )
        return _GO4Align(len(tasks), self.rate, self.groups)


def _state(*shape: int, value: float = 0.0) -> nn.Buffer:
    return nn.Buffer(torch.full(shape, value, dtype=torch.float64))


class _DWA(LossRule):
    def __init__(self, num_tasks: int, temperature: float, steps: int) -> None:
        super().__init__()
        self.temperature, self.steps = temperature, steps
        self.sums, self.counts, self.done = _state(num_tasks), _state(num_tasks), _state()
        self.last, self.before = _state(num_tasks), _state(num_tasks)
        """Means of the last two windows; 0: the task was not seen in it."""

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        known = (self.last != 0) & (self.before != 0)
        ratio = torch.where(known, self.last / torch.where(known, self.before, 1.0), 1.0)
        share = (ratio / self.temperature).masked_fill(~present, -torch.inf).softmax(dim=0)
        return present.sum() * share

    def update(self, losses: Tensor, present: Tensor) -> None:
        self.sums.add_(torch.where(present, losses, 0.0))
        self.counts.add_(present)
        self.done.add_(1)
        full = self.done >= self.steps
        mean = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), self.last)
        self.before.copy_(torch.where(full, self.last, self.before))
        self.last.copy_(torch.where(full, mean, self.last))
        for part in (self.sums, self.counts, self.done):
            part.copy_(torch.where(full, 0.0, part))


class _EMALoss(LossRule):
    def __init__(self, num_tasks: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.mean = _state(num_tasks)
        """0: not seen yet."""

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        return 1 / torch.where(self.mean == 0, torch.where(present, losses, 1.0), self.mean)

    def update(self, losses: Tensor, present: Tensor) -> None:
        moved = torch.where(self.mean == 0, losses, torch.lerp(losses, self.mean, self.decay))
        self.mean.copy_(torch.where(present, moved, self.mean))


class _FAMO(LossRule):
    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, num_tasks: int, rate: float, decay: float) -> None:
        super().__init__()
        self.rate, self.decay = rate, decay
        self.xi, self.first, self.second, self.done = (
            _state(num_tasks),
            _state(num_tasks),
            _state(num_tasks),
            _state(),
        )
        self.before = _state(num_tasks)
        """The loss of the step before; 0: not seen yet."""

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        z = self.xi.masked_fill(~present, -torch.inf).softmax(dim=0)
        ratio = torch.where(present, z / torch.where(present, losses, 1.0), 0.0)
        return present.sum() * ratio / ratio.sum().clamp(min=1e-300)

    def update(self, losses: Tensor, present: Tensor) -> None:
        known = present & (self.before != 0)
        gain = torch.where(known, (self.before / torch.where(known, losses, 1.0)).log(), 0.0)
        z = self.xi.masked_fill(~known, -torch.inf).softmax(dim=0).nan_to_num()
        slope = z * (gain - (z * gain).sum()) + self.decay * self.xi
        moves = known.any()  # Adam stands still in the first step, and where no task has two losses to compare
        self.done.add_(moves)
        for moment, value, beta in ((self.first, slope, self.BETAS[0]), (self.second, slope**2, self.BETAS[1])):
            moment.copy_(torch.where(moves, torch.lerp(value, moment, beta), moment))
        first = self.first / (1 - self.BETAS[0] ** self.done).clamp(min=1e-300)
        second = self.second / (1 - self.BETAS[1] ** self.done).clamp(min=1e-300)
        self.xi.sub_(torch.where(moves, self.rate * first / (second.sqrt() + self.EPS), 0.0))
        self.before.copy_(torch.where(present, losses, self.before))


class _LDCMTL(RelativeRule):
    def __init__(self, num_tasks: int, rate: float, penalty: float) -> None:
        super().__init__(num_tasks)
        self.rate, self.penalty = rate, penalty
        self.logits = _state(num_tasks)

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        relative, reference = self.relative(losses, present)
        share = self._shares(present)
        return share * (self._signs(share * relative, present) + self.penalty) / reference

    def update(self, losses: Tensor, present: Tensor) -> None:
        super().update(losses, present)
        relative, _ = self.relative(losses, present)
        share = self._shares(present)
        of_share = self._signs(share * relative, present) * relative  # df / d s
        slope = share * (of_share - (share * of_share).sum() / present.sum().clamp(min=1))
        self.logits.sub_(torch.where(present, self.rate * slope, 0.0))

    def _shares(self, present: Tensor) -> Tensor:
        return present.sum() * self.logits.masked_fill(~present, -torch.inf).softmax(dim=0).nan_to_num()

    @staticmethod
    def _signs(weighted: Tensor, present: Tensor) -> Tensor:
        """The derivative of the discrepancy by each weighted loss; neighbours are the present tasks in their order."""
        num = len(weighted)
        place = torch.arange(num, device=weighted.device)
        # next present task of each: the smallest place behind it that is present
        later = present & (place > place[:, None])
        follower = torch.where(later, place, num).amin(dim=1)
        has = present & (follower < num)
        sign = torch.where(has, (weighted - weighted.gather(0, follower.clamp(max=num - 1))).sign(), 0.0)
        return sign - torch.zeros_like(sign).scatter_add(0, follower.clamp(max=num - 1), torch.where(has, sign, 0.0))


class _GO4Align(RelativeRule):
    def __init__(self, num_tasks: int, rate: float, groups: int) -> None:
        super().__init__(num_tasks)
        self.rate = rate
        self.risks = _state(num_tasks, value=1.0)
        groups = min(groups, num_tasks)  # of a single task
        cuts = [(0, *inner, num_tasks) for inner in combinations(range(1, num_tasks), groups - 1)]
        members = [[[float(lo <= t < hi) for t in range(num_tasks)] for lo, hi in pairwise(cut)] for cut in cuts]
        self.groupings = nn.Buffer(torch.tensor(members, dtype=torch.float64), persistent=False)
        """[ways, groups, T]: which of the T smallest to largest numbers form a group."""

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        _, reference = self.relative(losses, present)
        order = torch.where(present, self.risks, torch.inf).argsort(stable=True)  # absent ones last
        values, counted = self.risks[order], present[order].double()
        members = self.groupings * counted  # [ways, groups, T]
        means = (members @ values) / members.sum(dim=-1).clamp(min=1)
        of_each = (members * means[..., None]).sum(dim=1)  # [ways, T]
        variance = (counted * (values - of_each).square()).sum(dim=-1)
        best = of_each.index_select(0, variance.argmin()[None]).squeeze(0)
        return torch.zeros_like(best).scatter(0, order, best) / reference

    def update(self, losses: Tensor, present: Tensor) -> None:
        super().update(losses, present)
        relative, _ = self.relative(losses, present)
        grown = torch.where(present, self.risks * (self.rate * relative).exp(), self.risks)
        mean = torch.where(present, grown, 0.0).sum() / present.sum().clamp(min=1)
        self.risks.copy_(torch.where(present, grown / torch.where(mean > 0, mean, 1.0), grown))
