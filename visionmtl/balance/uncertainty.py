"""Uncertainty weighting: learnt log variances weigh the losses."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from visionmtl.balance.base import Balance, Balancer, Step


class Uncertainty(Balance, frozen=True):
    """sum_t w_t * exp(-s_t) * L_t + s_t / 2 with learnt s_t (Kendall et al. 2018, arXiv:1705.07115, eq. 10).

    Deviations: one form for all tasks, without the factor 1/2 that the paper gives regression losses only; the s_t of
    a task without labels in a step stays, else its weight would grow for not being seen.
    """

    type: Literal["uncertainty"] = "uncertainty"

    def build(self, weights: Mapping[str, float]) -> Balancer:
        return _Uncertainty(weights)


class _Uncertainty(Balancer):
    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.log_variances = nn.Parameter(torch.zeros(len(weights)))

    def backward(self, step: Step) -> Mapping[str, Tensor]:
        tasks = list(self.weights)
        precisions = torch.exp(-self.log_variances)
        losses = torch.stack([self.weights[task] * step.losses[task] for task in tasks])
        regulariser = self.log_variances / 2
        if step.labelled is not None:
            regulariser = torch.where(torch.stack([step.labelled[task] for task in tasks]), regulariser, 0.0)
        total = (precisions * losses + step.share * regulariser).sum()
        (total * step.scale).backward()
        return {task: self.weights[task] * precisions[i].detach() for i, task in enumerate(tasks)}
