"""UPGrad: project each task's gradient on the cone in which no task is hurt, then add."""

from typing import Literal

import torch
from torch import Tensor

from visionmtl.balance.base import GramianBalance, Weighting

RIDGE = 5e-7
"""Added to the unit diagonal, so that parallel gradients have one answer: float32 Gramians are exact to about 1e-7.
Projecting a gradient that is r times longer than another one hurts that one by at most r * RIDGE of its square norm."""
MAX_SPLITS = 6
"""Up to so many tasks all 2^T splits into free and bound entries are solved at once; beyond, an interior point method
takes a fixed number of steps. With 3 tasks on a CPU core the splits take a tenth of its time."""


class UPGrad(GramianBalance, frozen=True):
    """Quinton and Rey 2024, arXiv:2406.16232, eq. 5, on the shared maps.

    Preference 1 for each task: where no gradients conflict, the result is their plain sum.
    """

    type: Literal["upgrad"] = "upgrad"

    def weighting(self, num_tasks: int) -> Weighting:
        """See the base."""
        return upgrad_weights


def upgrad_weights(gramian: Tensor) -> Tensor:
    """Weight of each task, the sum over the tasks' projected gradients; float [T, T] -> [T].

    A task without a gradient (a row of zeros) has weight 1 and no part in the projection. One value that is not finite
    makes every weight NaN, so that the gradient's norm shows it; a training step then leaves the weights as they are.
    """
    return project(gramian).sum(dim=0)


def project(gramian: Tensor) -> Tensor:
    """Row i is the v >= e_i that minimises v' G v (Quinton and Rey, prop. 1), where e_i is the i-th unit vector.

    J' v is then the projection of task i's gradient on the cone of directions that raise no task's loss; G = J J'.
    gramian: float [T, T], positive semidefinite -> [T, T]

    In float64, without waiting for the device. Gradients are first scaled to length 1, for otherwise the ridge would
    drown the shorter ones: with D = diag(G)^(1/2) and G = D C D, v = d_i D^-1 y, where y >= e_i minimises y' C y.
    """
    g = gramian.double()
    length = g.diagonal().clamp(min=0).sqrt()  # clamp keeps NaN
    length = torch.where(length > 0, length, 1.0) + 0 * length  # inf * 0 is NaN: it spreads to the whole row
    eye = torch.eye(len(g), device=g.device, dtype=g.dtype)
    cosines = (g / length / length[:, None]).clamp(-1, 1) * (1 - eye) + eye
    unit = (_by_splits if len(g) <= MAX_SPLITS else _by_interior_point)(cosines + RIDGE * eye)
    # a task of length 0 is orthogonal to all; NaN anywhere in the Gramian is NaN everywhere in the answer
    return (unit * length[:, None] / length + 0 * g.sum()).to(gramian.dtype)


def _by_splits(c: Tensor) -> Tensor:
    """argmin y' C y with y >= e_i, for each i: of the solutions for all sets of free entries the best feasible one."""
    num_tasks = len(c)
    low = torch.eye(num_tasks, device=c.device, dtype=c.dtype)[:, None]  # [T, 1, T]
    splits = torch.arange(2**num_tasks, device=c.device)[:, None] >> torch.arange(num_tasks, device=c.device)
    free = (splits & 1).to(c.dtype)  # [S, T]
    bound = low * (1 - free)  # [T, S, T]
    system = free[:, :, None] * c * free[:, None, :] + torch.diag_embed(1 - free)  # [S, T, T]
    right = bound - (bound @ c) * free
    y = torch.linalg.solve_ex(system, right[..., None])[0].squeeze(-1)  # [T, S, T]

    cost = ((y @ c) * y).sum(dim=-1)
    feasible = (y >= low - 1e-9).all(dim=-1)
    best = torch.where(feasible, cost, torch.inf).argmin(dim=1)  # nothing free is always feasible
    return y.gather(1, best[:, None, None].expand(-1, 1, num_tasks)).squeeze(1)


def _by_interior_point(c: Tensor, num_steps: int = 40) -> Tensor:
    """The same by a primal-dual interior point method (Nocedal and Wright 2006, sec. 16.6) in a fixed number of steps.

    slack = y - e_i >= 0 and its multiplier C y >= 0 have products that choose_scale to 1e-20 along the central path.
    """
    low = torch.eye(len(c), device=c.device, dtype=c.dtype)
    slack, multiplier = torch.ones_like(c), torch.ones_like(c)  # row i belongs to e_i
    for _ in range(num_steps):
        residual = (low + slack) @ c - multiplier
        target = (0.1 * (slack * multiplier).mean(dim=1, keepdim=True)).clamp(min=1e-20)
        system = c + torch.diag_embed(multiplier / slack)
        right = target / slack - multiplier - residual
        d_slack = torch.linalg.solve_ex(system, right[..., None])[0].squeeze(-1)
        d_multiplier = target / slack - multiplier - multiplier / slack * d_slack

        # the longest step, up to 1, that keeps 1 % of every slack and multiplier
        shrinking = torch.cat([-d_slack / slack, -d_multiplier / multiplier], dim=1).amax(dim=1, keepdim=True)
        step = 0.99 / shrinking.clamp(min=0.99)
        slack, multiplier = slack + step * d_slack, multiplier + step * d_multiplier
    return low + slack
