"""Projection on the cone of directions that hurt no task, from the Gramian of the tasks' gradients alone."""

import torch
from torch import Tensor

MAX_TASKS = 10


def project(wishes: Tensor, gramian: Tensor, ridge: float = 1e-6) -> Tensor:
    """For each row u of `wishes`, the v >= u that minimises v' G v (Quinton and Rey 2024, arXiv:2406.16232, prop. 1).

    J' v is then the projection of J' u on the cone of directions that raise no task's loss, where G = J J'.
    wishes: float [R, T]; gramian: float [T, T], positive semidefinite, T <= MAX_TASKS
    ridge: added to the diagonal of G, relative to its mean, so that parallel gradients have one answer

    Exact, in float64, without waiting for the device: at the minimum some entries of v are free and the others lie on
    their bound, so all 2^T such splits are solved at once and the best that keeps v >= u is taken.
    Raises ValueError for more tasks.
    """
    num_tasks = gramian.shape[0]
    if num_tasks > MAX_TASKS:
        raise ValueError(
            f"found {num_tasks} tasks; this method tries all 2^T splits of them, so {MAX_TASKS} are allowed; "
            "choose a balancing method without a projection"
        )
    g, low = gramian.double(), wishes.double()[:, None]  # [R, 1, T]
    size = g.diagonal().mean()
    eye = torch.eye(num_tasks, device=g.device, dtype=g.dtype)
    g = g / torch.where(size > 0, size, 1.0) + ridge * eye

    splits = torch.arange(2**num_tasks, device=g.device)[:, None] >> torch.arange(num_tasks, device=g.device)
    free = (splits & 1).to(g.dtype)  # [S, T]
    bound = low * (1 - free)  # [R, S, T]
    system = free[:, :, None] * g * free[:, None, :] + torch.diag_embed(1 - free)  # [S, T, T]
    right = bound - (bound @ g) * free
    v = torch.linalg.solve_ex(system, right[..., None])[0].squeeze(-1)  # [R, S, T]

    cost = ((v @ g) * v).sum(dim=-1)
    kept = (v >= low - 1e-9).all(dim=-1)
    best = torch.where(kept, cost, torch.inf).argmin(dim=1)  # nothing free is always allowed
    return v.gather(1, best[:, None, None].expand(-1, 1, num_tasks)).squeeze(1).to(wishes.dtype)
