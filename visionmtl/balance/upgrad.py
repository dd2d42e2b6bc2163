"""Methods that project on the cone of directions in which no task is hurt: UPGrad, DualProj."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import nonnegative_qp, unit


class UPGrad(GramianBalance, frozen=True):
    """UPGrad: sum over i of v_i, the v >= e_i that minimises v' G v (Quinton and Rey 2024, arXiv:2406.16232, eq. 5).

    Each task's gradient is projected on the cone, and the projections are added. Deviation: added where the paper takes
    their mean, so that without conflict the step is that of fixed weights.
    """

    type: Literal["upgrad"] = "upgrad"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return lambda seen: project(seen.gramian).sum(dim=0)


class DualProj(GramianBalance, frozen=True):
    """DualProj: the v >= 1 that minimises v' G v (Lopez-Paz and Ranzato 2017, arXiv:1706.08840, GEM, sec. 3).

    The sum of the gradients is projected on the cone. Deviation: the paper projects the gradient of the newest task,
    here the sum takes its place.
    """

    type: Literal["dualproj"] = "dualproj"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""

        def weights(seen: TaskGradients) -> Tensor:
            of = unit(seen.gramian)
            total = seen.present * of.lengths  # of unit gradients
            return (total + nonnegative_qp(of.cosines, -(of.cosines @ total)[None])[0]) / of.lengths

        return weights


def project(gramian: Tensor) -> Tensor:
    """Row i is the v >= e_i that minimises v' G v (Quinton and Rey, prop. 1), where e_i is the i-th unit vector.

    J' v is then the projection of task i's gradient on the cone of directions that raise no task's loss; G = J J'.
    gramian: float [T, T], positive semidefinite -> [T, T]

    In float64, without waiting for the device, in terms of unit gradients: v = d_i D^-1 y, where y >= e_i minimises
    y' C y. A task without a gradient (a row of zeros) has no part in it. NaN anywhere is NaN everywhere in the answer.
    """
    of = unit(gramian)
    eye = torch.eye(len(gramian), device=gramian.device, dtype=of.cosines.dtype)
    y = eye + nonnegative_qp(of.cosines, -of.cosines)
    return (y * of.lengths[:, None] / of.lengths + 0 * gramian.sum()).to(gramian.dtype)
