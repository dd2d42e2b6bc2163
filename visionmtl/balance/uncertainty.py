"""Losses with learnt scales: uncertainty weighting in two forms, IMTL-L."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionmtl.balance.base import Balance, Balancer, Step
from visionmtl.config.suggest import did_you_mean


class _LearntScales(Balance):
    """sum_t w_t f(s_t) L_t + r(s_t) with a learnt s_t for each task.

    Deviation from all three papers: the s_t of a task without labels in a step gets no gradient, else its weight would
    grow for not being seen; what momentum the optimiser has still moves it.
    """

    @abstractmethod
    def factors(self, scales: Tensor, tasks: list[str]) -> Tensor:
        """f(s), [T]."""

    @abstractmethod
    def regulariser(self, scales: Tensor) -> Tensor:
        """r(s), [T]."""

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _Learnt(weights, self)


class Uncertainty(_LearntScales, frozen=True):
    """sum_t w_t * exp(-s_t) * L_t + s_t / 2 with learnt s_t (Kendall et al. 2018, arXiv:1705.07115, eq. 10).

    The paper gives regression losses the factor 1/2; here the tasks in `regression` get it, none by default.
    """

    type: Literal["uncertainty"] = "uncertainty"
    regression: tuple[str, ...] = ()
    """Names of tasks whose loss is a squared or absolute error."""

    def factors(self, scales: Tensor, tasks: list[str]) -> Tensor:
        """See the base."""
        precisions = torch.exp(-scales)
        if not self.regression:
            return precisions
        return torch.stack([p / 2 if task in self.regression else p for p, task in zip(precisions, tasks, strict=True)])

    def regulariser(self, scales: Tensor) -> Tensor:
        """See the base."""
        return scales / 2

    def build(self, weights: Mapping[str, float]) -> Balancer:
        if unknown := [task for task in self.regression if task not in weights]:
            raise ValueError(
                f"balance.regression names {unknown[0]!r}{did_you_mean(unknown[0], weights)}; the run has the tasks "
                f"{', '.join(weights)}; name some of them"
            )
        return super().build(weights)


class RevisedUncertainty(_LearntScales, frozen=True):
    """sum_t w_t * exp(-s_t) * L_t / 2 + log(1 + exp(s_t)) (Liebel and Koerner 2018, arXiv:1805.06334, eq. 3).

    The regulariser stays positive, so the sum cannot run away to minus infinity where losses become small.
    """

    type: Literal["revised_uncertainty"] = "revised_uncertainty"

    def factors(self, scales: Tensor, tasks: list[str]) -> Tensor:
        """See the base."""
        return torch.exp(-scales) / 2

    def regulariser(self, scales: Tensor) -> Tensor:
        """See the base."""
        return F.softplus(scales)


class IMTLL(_LearntScales, frozen=True):
    """IMTL-L: sum_t w_t * exp(s_t) * L_t - s_t (Liu et al. 2021, "Towards Impartial Multi-task Learning", ICLR, eq. 8).

    At its optimum in s every scaled loss is 1, whatever its unit.
    """

    type: Literal["imtl_l"] = "imtl_l"

    def factors(self, scales: Tensor, tasks: list[str]) -> Tensor:
        """See the base."""
        return torch.exp(scales)

    def regulariser(self, scales: Tensor) -> Tensor:
        """See the base."""
        return -scales


class _Learnt(Balancer):
    def __init__(self, weights: Mapping[str, float], spec: _LearntScales) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.spec = spec
        self.log_variances = nn.Parameter(torch.zeros(len(weights)))
        """The learnt s_t; named as in checkpoints of the first method that had them."""

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        tasks = list(self.weights)
        factors = self.spec.factors(self.log_variances, tasks)
        losses = torch.stack([self.weights[task] * step.losses[task] for task in tasks])
        regulariser = self.spec.regulariser(self.log_variances)
        if step.labelled is not None:
            regulariser = torch.where(torch.stack([step.labelled[task] for task in tasks]), regulariser, 0.0)
        total = (factors * losses + step.share * regulariser).sum()
        (total * step.scale).backward()
        return {task: self.weights[task] * factors[i].detach() for i, task in enumerate(tasks)}
