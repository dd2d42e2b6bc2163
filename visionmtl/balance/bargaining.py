"""Methods that share the improvement out among the tasks: Nash-MTL, FairGrad."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import RIDGE, fair


class NashMTL(GramianBalance, frozen=True):
    """Nash-MTL: the w > 0 with G w = 1 / w, Nash's bargaining solution (Navon et al. 2022,
    arXiv:2202.01017, sec. 3).

    Every task improves: g_i . d = 1 / w_i > 0. How long a gradient is does not matter, the direction is the same.
    Deviation: solved to the end at each step by Newton's method, instead of by a sequence of convex problems from the
    weights of the step before; the gradient is not clipped here (`optim.clip_norm` does that).
    """

    type: Literal["nash"] = "nash"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return lambda seen: _solve(seen, 1.0)


class FairGrad(GramianBalance, frozen=True):
    """FairGrad: the w > 0 with G w = w^(-1 / alpha) (Ban and Ji 2024, arXiv:2402.15638, eq. 5): alpha-fair shares.

    alpha 1 is Nash-MTL; large values come near to max-min fairness, small ones to the plain sum. Every task improves.
    Deviation: solved by Newton's method instead of a least-squares solver on the host.
    """

    type: Literal["fairgrad"] = "fairgrad"
    alpha: float = Field(2.0, gt=0, description="0.2 to 10")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        if not 0.2 <= self.alpha <= 10:
            raise ValueError(
                f"balance.alpha is {self.alpha:g}, for which 25 Newton steps do not reach the solution; 0.2 to 10 is "
                "allowed; choose such a value"
            )
        return lambda seen: _solve(seen, 1 / self.alpha)


def _solve(seen: TaskGradients, exponent: float) -> Tensor:
    diagonal = seen.gramian.diagonal()
    own = torch.where(seen.present, diagonal * RIDGE, 1.0)  # an absent task has weight 1 and no part in it
    return fair(seen.gramian + torch.diag_embed(own), exponent)
