"""PCD: one task first, a share of progress for the others."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import RIDGE, nonnegative_qp, unit
from visionmtl.config.suggest import did_you_mean

PRECISION = 1e-3
"""Of a constraint; one that cannot be met is missed by much more, one that can be by the ridge times its multiplier."""


class PCD(GramianBalance, frozen=True):
    """PCD: the d nearest to h_1 with h_j . d >= tau |h_j|^2 for j > 1, made as long as g_1, where h_i = g_i / s_i and
    s_i^2 is the bias-corrected moving average of |g_i|^2 ("Priority-Constrained Descent", arXiv:2606.29521).

    The primary task is followed, and every other one gets the share tau of the progress that its own gradient would
    give it. Constraints that contradict each other are dropped. State: the moving averages.
    Deviation: a step without labels of the primary task takes the plain sum of the others.
    """

    type: Literal["pcd"] = "pcd"
    primary: str | None = Field(None, description="name of the task that comes first; None: the first of the config")
    tau: float = Field(0.02, ge=0, le=1)
    decay: float = Field(0.999, ge=0, lt=1, description="beta of the moving averages")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        if self.primary is not None and self.primary not in tasks:
            raise ValueError(
                f"balance.primary is {self.primary!r}{did_you_mean(self.primary, tasks)}; the run has the tasks "
                f"{', '.join(tasks)}; name one of them"
            )
        return _PCD(len(tasks), list(tasks).index(self.primary or tasks[0]), self.tau, self.decay)


class _PCD(nn.Module):
    def __init__(self, num_tasks: int, primary: int, tau: float, decay: float) -> None:
        super().__init__()
        self.primary, self.tau, self.decay = primary, tau, decay
        self.squares = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))
        self.seen = nn.Buffer(torch.zeros(num_tasks, dtype=torch.float64))
        """Sum of what the moving average's weights are by now, for the correction of its bias."""

    def forward(self, seen: TaskGradients) -> Tensor:
        own, present, first = seen.gramian.diagonal(), seen.present, self.primary
        self.squares.copy_(torch.where(present, torch.lerp(own, self.squares, self.decay), self.squares))
        self.seen.copy_(torch.where(present, 1 - self.decay * (1 - self.seen), self.seen))
        scale = torch.where(present, (self.squares / self.seen.clamp(min=1e-300)).clamp(min=1e-300).rsqrt(), 1.0)
        usual = seen.gramian * scale * scale[:, None]

        # d = h_1 + the sum of m_j h_j, where m >= 0 minimises m' H m / 2 - b' m; in terms of unit gradients
        of = unit(usual, present)
        other = present & (torch.arange(len(own), device=own.device) != first)
        eye = torch.eye(len(own), device=own.device, dtype=own.dtype)
        secondary = torch.where(other & other[:, None], of.cosines, eye)
        missing = torch.where(other, self.tau * of.lengths - of.cosines[first] * of.lengths[first], 0.0)
        m = nonnegative_qp(secondary, missing[None])[0]
        reached = secondary @ m - RIDGE * m
        met = (reached >= missing - PRECISION * missing.abs().amax()).all()
        mixed = torch.where(met & other, m / of.lengths, 0.0) + eye[first]
        square = mixed @ usual @ mixed
        long_enough = square > 10 * torch.finfo(torch.float32).eps * (mixed.abs() @ usual.diagonal().sqrt()) ** 2
        weights = torch.where(long_enough, mixed * scale * (own[first] / square.clamp(min=1e-300)).sqrt(), 0.0)
        return torch.where(present[first], weights, present.double())
