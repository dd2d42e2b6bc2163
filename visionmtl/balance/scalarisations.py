"""One number made of all losses, other than their sum; a task's weight is that number's derivative by its loss."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.balance.base import LossRule, LossWeighting


class GLS(LossWeighting, frozen=True):
    """GLS: the geometric mean (L_1 ... L_T)^(1/T), computed as exp of the mean of logs (Chennupati et al. 2019,
    arXiv:1904.08492, eq. 4). Losses must be positive; their units do not matter to the direction."""

    type: Literal["gls"] = "gls"

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _GLS()


class ScaleInvariant(LossWeighting, frozen=True):
    """Scale-invariant: the sum of log L_t, so the weight is 1 / L_t (e.g. Navon et al. 2022, arXiv:2202.01017, sec. 6).

    What uncertainty weighting gives when its scales are at their optimum at each step. Losses must be positive.
    """

    type: Literal["scale_invariant"] = "scale_invariant"

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _ScaleInvariant()


class SoftOptimalUncertainty(LossWeighting, frozen=True):
    """UW-SO: T softmax(1 / (tau L_t)) (Kirchdorfer et al. 2024, arXiv:2408.07985, eq. 7).

    Deviation: times T, so that the mean weight is 1. `temperature` decides nearly everything and needs a search.
    """

    type: Literal["uw_so"] = "uw_so"
    temperature: float = Field(1.0, gt=0)

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _SoftOptimal(self.temperature)


class STCH(LossWeighting, frozen=True):
    """STCH: T mu log sum_t exp(log(L_t / L_t(0)) / mu), the smooth maximum (Lin et al. 2024, arXiv:2402.19078, eq. 12).

    The task that has improved least gets most of the weight; mu = 1 makes it the log of the sum of relative losses,
    and large mu the sum of their logs, as `scale_invariant`.
    State: L(0). Deviation: each loss is compared with its value in the first step, the paper's with an average over
    the first epochs.
    """

    type: Literal["stch"] = "stch"
    mu: float = Field(0.5, gt=0, description="smoothness; towards 0 only the worst task counts")

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _STCH(len(tasks), self.mu)


class PBI(LossWeighting, frozen=True):
    """PBI: d_1 + theta d_2 of the relative losses l = L / L(0): d_1 = l . r along the ray r, d_2 = |l - d_1 r| off it
    (Zhang and Li 2007, "MOEA/D", IEEE Trans. Evol. Comput. 11(6), eq. 6), r = (1, ..., 1) / T^(1/2).

    It asks all losses to shrink at the same rate. State: L(0). Deviation: a weight below 0, which would raise the loss
    of a task that is ahead, is 0.
    """

    type: Literal["pbi"] = "pbi"
    theta: float = Field(1.0, gt=0)

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _PBI(len(tasks), self.theta)


class COSMOS(LossWeighting, frozen=True):
    """COSMOS: mean of the relative losses l = L / L(0), minus lambda times the cosine between l and (1, ..., 1)
    (Ruchte and Grabocka 2021, arXiv:2103.13392, eq. 6).

    Deviations: the scalarisation alone, for one fixed preference; the paper trains a network that gets the preference
    as an input. A weight below 0 is 0. State: L(0).
    """

    type: Literal["cosmos"] = "cosmos"
    penalty: float = Field(1.0, gt=0, description="lambda")

    def rule(self, tasks: Sequence[str]) -> LossRule:
        """See the base."""
        return _COSMOS(len(tasks), self.penalty)


class _GLS(LossRule):
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        safe, num = _safe(losses, present), present.sum().clamp(min=1)
        return (torch.where(present, safe.log(), 0.0).sum() / num).exp() / (num * safe)


class _ScaleInvariant(LossRule):
    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        return 1 / _safe(losses, present)


class _SoftOptimal(LossRule):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        inverse = (1 / _safe(losses, present) / self.temperature).masked_fill(~present, -torch.inf)
        return present.sum() * inverse.softmax(dim=0)


class RelativeRule(LossRule):
    """Of losses divided by their values in the first step that had them."""

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        self.initial = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))
        """0: not seen yet."""

    def relative(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Relative losses, 0 for absent tasks, and what they were divided by."""
        reference = _safe(torch.where(self.initial == 0, losses, self.initial), present)
        return torch.where(present, losses / reference, 0.0), reference

    def update(self, losses: Tensor, present: Tensor) -> None:
        self.initial.copy_(torch.where(present & (self.initial == 0), losses, self.initial))


class _STCH(RelativeRule):
    def __init__(self, num_tasks: int, mu: float) -> None:
        super().__init__(num_tasks)
        self.mu = mu

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        relative, _ = self.relative(losses, present)
        logs = (_safe(relative, present).log() / self.mu).masked_fill(~present, -torch.inf)
        return present.sum() * logs.softmax(dim=0) / _safe(losses, present)


class _PBI(RelativeRule):
    def __init__(self, num_tasks: int, theta: float) -> None:
        super().__init__(num_tasks)
        self.theta = theta

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        relative, reference = self.relative(losses, present)
        ray = present.double() / present.sum().clamp(min=1).double().sqrt()
        away = torch.where(present, relative - (relative @ ray) * ray, 0.0)
        distance = away.square().sum().sqrt()
        # at the start all relative losses are 1 and nothing lies away from the ray but rounding
        direction = torch.where(distance > 1e-9 * relative.abs().sum(), away / distance.clamp(min=1e-300), 0.0)
        return (ray + self.theta * direction).clamp(min=0) / reference


class _COSMOS(RelativeRule):
    def __init__(self, num_tasks: int, penalty: float) -> None:
        super().__init__(num_tasks)
        self.penalty = penalty

    def forward(self, losses: Tensor, present: Tensor) -> Tensor:
        relative, reference = self.relative(losses, present)
        num = present.sum().clamp(min=1)
        ray = present.double() / num.double().sqrt()
        length = relative.square().sum().sqrt().clamp(min=1e-300)
        cosine = (relative @ ray) / length
        slope = ray / length - cosine * relative / length**2
        return (1 / num - self.penalty * slope).clamp(min=0) / reference


def _safe(losses: Tensor, present: Tensor) -> Tensor:
    """1 instead of the losses of absent tasks."""
    return torch.where(present, losses, 1.0)
