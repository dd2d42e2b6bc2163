"""Methods that see only how long the gradients are: GradNorm, DB-MTL, AutoScale, ExcessMTL."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting


class GradNorm(GramianBalance, frozen=True):
    """GradNorm: learnt weights w with sum T that lower the sum over i of |w_i |g_i| - mean(w |g|) r_i^alpha|, where r
    is L(t) / L(0) divided by its mean (Chen et al. 2018, arXiv:1711.02257, alg. 1).

    State: w and L(0). Deviations: gradients on the shared maps (see `level`) instead of one layer's weights, so there
    is no second backward; w moves by `rate` times the slope divided by the mean of |g|, so that the loss's unit does
    not matter, and stays above 0.01.
    """

    type: Literal["gradnorm"] = "gradnorm"
    heads: Literal["raw", "weighted"] = "weighted"
    alpha: float = Field(1.5, ge=0, description="how strongly tasks that lag behind are preferred")
    rate: float = Field(0.025, gt=0)

    @model_validator(mode="after")
    def _losses_fall(self) -> Self:
        if self.loss_scale == "log":
            raise ValueError(
                "loss_scale is log, which makes every loss 1 all the time, so that no task lags behind and alpha would "
                "have no effect; none and initial are allowed; choose one"
            )
        return self

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _GradNorm(len(tasks), self.alpha, self.rate)


class DBMTL(GramianBalance, frozen=True):
    """DB-MTL: gradients of log L_i, each made as long as the longest (Lin et al. 2023, arXiv:2308.12029, alg. 1).

    Deviation: without the moving average of the gradients themselves, which would keep T copies of all parameters, and
    has no meaning for maps, that belong to other images at each step.
    """

    type: Literal["db_mtl"] = "db_mtl"
    loss_scale: Literal["none", "log", "initial"] = "log"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return lambda seen: _lengths(seen).amax() / _lengths(seen).clamp(min=1e-300)


class AutoScale(GramianBalance, frozen=True):
    """AutoScale: weights 1 for `steps` steps, in which the tasks' gradients are measured; then fixed ones, under which
    their lengths are most similar (Yang et al. 2025, arXiv:2508.13979): 1 / geometric mean of |g_i|, with sum T.

    State: what was measured. The magnitude similarity 2 a b / (a^2 + b^2) of every pair is then 1 on average.
    Deviation: of the paper's measures of good weights this takes the gradients' magnitudes alone, in closed form, and
    all steps of the phase count alike.
    """

    type: Literal["autoscale"] = "autoscale"
    heads: Literal["raw", "weighted"] = "weighted"
    steps: int = Field(1000, ge=1, description="optimiser steps of the first phase")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _AutoScale(len(tasks), self.steps)


class ExcessMTL(GramianBalance, frozen=True):
    """ExcessMTL: weights w with sum T, w_i times exp(rate * excess risk of i) at each step, the excess risk being
    g_i' H_i^-1 g_i with AdaGrad's H_i, divided by its first value (He et al. 2024, arXiv:2402.02009, alg. 1).

    State: w, sums of squares, first excess risks. Tasks far from their optimum gain weight; label noise, which no
    weight removes, does not count. Deviation: H_i is one number a task, the root of the sum of |g_i|^2 so far
    (AdaGrad-Norm, Ward et al. 2019), since a Gramian has no coordinates.
    """

    type: Literal["excess_mtl"] = "excess_mtl"
    heads: Literal["raw", "weighted"] = "weighted"
    rate: float = Field(0.01, gt=0, description="eta, step of the exponentiated update")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _ExcessMTL(len(tasks), self.rate)


def _lengths(seen: TaskGradients) -> Tensor:
    return seen.gramian.diagonal().clamp(min=0).sqrt()


def _with_mean_1(weights: Tensor, present: Tensor) -> Tensor:
    """Absent tasks keep theirs; those of the present ones get the mean 1."""
    mean = torch.where(present, weights, 0.0).sum() / present.sum().clamp(min=1)
    return torch.where(present, weights / torch.where(mean > 0, mean, 1.0), weights)


class _GradNorm(nn.Module):
    def __init__(self, num_tasks: int, alpha: float, rate: float) -> None:
        super().__init__()
        self.alpha, self.rate = alpha, rate
        self.weights = nn.Buffer(torch.ones(num_tasks, dtype=torch.float64))
        self.initial = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))
        """0: not seen yet."""

    def forward(self, seen: TaskGradients) -> Tensor:
        used = _with_mean_1(self.weights, seen.labelled)
        seen = seen.so_far or seen
        present, num = seen.present, seen.present.sum().clamp(min=1)
        self.initial.copy_(torch.where(present & (self.initial == 0), seen.losses, self.initial))
        length = _lengths(seen)
        ratio = torch.where(present, seen.losses / torch.where(self.initial == 0, 1.0, self.initial), 0.0)
        ratio = ratio / (ratio.sum() / num).clamp(min=1e-300)
        weighted = used * length
        target = weighted.sum() / num * ratio**self.alpha  # a constant to the derivative
        slope = (weighted - target).sign() * length / (length.sum() / num).clamp(min=1e-300)
        moved = (used - self.rate * slope).clamp(min=0.01)
        self.weights.copy_(_with_mean_1(torch.where(present, moved, self.weights), present))
        return used


class _AutoScale(nn.Module):
    def __init__(self, num_tasks: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.done = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.logs = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))
        self.counts = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))

    def forward(self, seen: TaskGradients) -> Tensor:
        measuring = self.done < self.steps
        mean = self.logs / self.counts.clamp(min=1)
        known = self.counts > 0
        inverse = torch.where(known, (-mean).exp(), 0.0)
        scale = inverse.sum() / known.sum().clamp(min=1)
        fixed = torch.where(known, inverse / torch.where(scale > 0, scale, 1.0), 1.0)
        seen = seen.so_far or seen
        counted = measuring & seen.present
        logs = _lengths(seen).clamp(min=1e-300).log()
        self.logs.add_(torch.where(counted, logs, 0.0))
        self.counts.add_(counted)
        self.done.add_(1)
        return torch.where(measuring, 1.0, fixed)


class _ExcessMTL(nn.Module):
    def __init__(self, num_tasks: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.weights = nn.Buffer(torch.ones(num_tasks, dtype=torch.float64))
        self.squares = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))
        self.initial = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))

    def forward(self, seen: TaskGradients) -> Tensor:
        labelled, seen = seen.labelled, seen.so_far or seen
        present, own = seen.present, seen.gramian.diagonal().clamp(min=0)
        self.squares.add_(own)
        excess = own / self.squares.clamp(min=1e-300).sqrt()
        self.initial.copy_(torch.where(present & (self.initial == 0), excess, self.initial))
        relative = excess / torch.where(self.initial == 0, 1.0, self.initial)
        grown = self.weights * (self.rate * relative).exp()
        self.weights.copy_(_with_mean_1(torch.where(present, grown, self.weights), labelled))
        return self.weights
