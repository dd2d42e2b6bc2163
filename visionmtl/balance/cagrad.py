"""CAGrad: the best worst improvement near the mean gradient."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import along_mean, check_num_tasks, unit


class CAGrad(GramianBalance, frozen=True):
    """CAGrad: the d that maximises min over i of g_i . d with |d - g_0| <= c |g_0|, where g_0 is the mean gradient
    (Liu et al. 2021, arXiv:2110.14048, eq. 3): d = g_0 + c |g_0| / |g_w| g_w, where w minimises
    g_w . g_0 + c |g_0| |g_w| over w >= 0 with sum 1, and g_w = J' w.

    Its limits are the mean gradient (c = 0) and MGDA's direction. Deviation: solved exactly, and not divided by
    1 + c^2 or 1 + c afterwards as some implementations do.
    """

    type: Literal["cagrad"] = "cagrad"
    c: float = Field(0.4, gt=0, lt=1, description="how far from the mean gradient, as a part of its length")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        check_num_tasks(self.type, len(tasks))

        def weights(seen: TaskGradients) -> Tensor:
            mean = seen.present.double() / seen.present.sum().clamp(min=1)
            radius = self.c * (mean @ seen.gramian @ mean).clamp(min=0).sqrt()
            w = along_mean(unit(seen.gramian, seen.present), seen.present, mean, radius)
            length = (w @ seen.gramian @ w).clamp(min=0).sqrt()
            return mean + radius / length.clamp(min=1e-150) * w * (length > 0)

        return weights
