"""Small problems over T tasks, solved in float64 on the device: a fixed number of steps, and nothing waits for a value.

Gradients are looked at as if all were of length 1: with d the lengths and D = diag(d), the Gramian is D C D, where C
holds the cosines. A ridge relative to each gradient is then the same for a short one and a long one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 5e-7
"""Added to the unit diagonal, so that parallel gradients have one answer: float32 Gramians are exact to about 1e-7.
Projecting a gradient that is r times longer than another one hurts that one by at most r * RIDGE of its square norm."""
MAX_SPLITS = 6
"""Up to so many tasks all 2^T splits into free and bound entries are solved at once; beyond, an interior point method
takes a fixed number of steps. With 3 tasks on a CPU core the splits take a tenth of its time."""
MAX_SUPPORTS = 10
"""The largest T of the problems that have no other method here: 1024 systems of 10 equations, some 5 ms."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A Gramian in terms of unit gradients. Absent tasks have length 1 and are orthogonal to all."""

    cosines: Tensor  # float64 [T, T], with the ridge on the diagonal
    lengths: Tensor  # float64 [T], positive


def unit(gramian: Tensor, present: Tensor | None = None) -> Unit:
    """gramian: [T, T], positive semidefinite. NaN or infinity spreads to its row and column."""
    g = gramian.double()
    length = g.diagonal().clamp(min=0).sqrt()  # clamp keeps NaN
    length = torch.where(length > 0, length, 1.0) + 0 * length  # inf * 0 is NaN: it spreads to the whole row
    eye = torch.eye(len(g), device=g.device, dtype=g.dtype)
    cosines = (g / length / length[:, None]).clamp(-1, 1) * (1 - eye) + eye
    if present is not None:
        both = present & present[:, None]
        cosines, length = torch.where(both, cosines, eye), torch.where(present, length, 1.0)
    return Unit(cosines + RIDGE * eye, length)


def supports(num_tasks: int, device: torch.device) -> Tensor:
    """float64 [2^T, T] of 0 and 1: every subset of the tasks, the empty one first."""
    numbers = torch.arange(2**num_tasks, device=device)[:, None] >> torch.arange(num_tasks, device=device)
    return (numbers & 1).double()


def solve_on(subsets: Tensor, c: Tensor, right: Tensor) -> Tensor:
    """For each subset S: x with C_SS x_S = right_S, and 0 outside. c: [T, T]; right: [T, B] -> [S, T, B]"""
    system = subsets[:, :, None] * c * subsets[:, None, :] + torch.diag_embed(1 - subsets)
    return torch.linalg.solve_ex(system, subsets[:, :, None] * right)[0]


def nonnegative_qp(c: Tensor, right: Tensor) -> Tensor:
    """argmin y' C y / 2 - b' y with y >= 0, for each row b of `right`.

    c: float64 [T, T], positive definite with a diagonal of about 1; right: float64 [B, T] -> [B, T]
    """
    size = right.abs().amax(dim=1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    solve = _by_splits if len(c) <= MAX_SPLITS else _by_interior_point
    return solve(c, right / size) * size


def _by_splits(c: Tensor, right: Tensor) -> Tensor:
    """Of the solutions for all sets of free entries, the best one without a negative entry."""
    y = solve_on(supports(len(c), c.device), c, right.T).movedim(-1, 0)  # [B, S, T]
    cost = ((y @ c) * y).sum(dim=-1) / 2 - (y * right[:, None]).sum(dim=-1)
    best = torch.where((y >= -1e-9).all(dim=-1), cost, torch.inf).argmin(dim=1)  # nothing free is always feasible
    return y.gather(1, best[:, None, None].expand(-1, 1, len(c))).squeeze(1).clamp(min=0)


def _by_interior_point(c: Tensor, right: Tensor, num_steps: int = 40) -> Tensor:
    """A primal-dual interior point method (Nocedal and Wright 2006, sec. 16.6) in a fixed number of steps.

    y >= 0 and its multiplier C y - b >= 0 have products that shrink to 1e-20 along the central path.
    """
    y, multiplier = torch.ones_like(right), torch.ones_like(right)
    for _ in range(num_steps):
        residual = y @ c - right - multiplier
        target = (0.1 * (y * multiplier).mean(dim=1, keepdim=True)).clamp(min=1e-20)
        system = c + torch.diag_embed(multiplier / y)
        d_y = torch.linalg.solve_ex(system, (target / y - multiplier - residual)[..., None])[0].squeeze(-1)
        d_multiplier = target / y - multiplier - multiplier / y * d_y

        # the longest step, up to 1, that keeps 1 % of every entry and multiplier
        shrinking = torch.cat([-d_y / y, -d_multiplier / multiplier], dim=1).amax(dim=1, keepdim=True)
        step = 0.99 / shrinking.clamp(min=0.99)
        y, multiplier = y + step * d_y, multiplier + step * d_multiplier
    return y


def on_simplex(of: Unit, present: Tensor, linear: Tensor) -> Tensor:
    """argmin w' G w / 2 + p' w over w >= 0 with sum 1, and w = 0 for absent tasks; linear: p, [T] -> [T]

    On a support, G w + p is the same everywhere: w = mu G^-1 1 - G^-1 p, with mu from the sum.
    """
    subsets = _present_supports(present)
    x, y = _solve_in_lengths(of, subsets, torch.ones_like(linear), linear)
    mu = (1 + y.sum(dim=1)) / x.sum(dim=1).clamp(min=1e-300)
    w = mu[:, None] * x - y
    scaled = w * of.lengths
    cost = ((scaled @ of.cosines) * scaled).sum(dim=1) / 2 + w @ linear
    return _best(w, cost, (w >= -1e-9).all(dim=1) & (subsets.sum(dim=1) > 0))


def along_mean(of: Unit, present: Tensor, mean: Tensor, radius: Tensor) -> Tensor:
    """argmin (G a)' w + r (w' G w)^(1/2) over w >= 0 with sum 1: the dual problem of CAGrad.

    mean: a, float64 [T]; radius: r >= 0 -> [T]. On a support w = (mu p - q) / s with p = G^-1 1, q = G^-1 G a, and
    mu the larger root of mu^2 1'p - 2 mu 1'q + (G a)'q = r^2, half the discriminant's root being s.
    """
    subsets = _present_supports(present)
    inner = of.lengths * (of.cosines @ (of.lengths * mean))
    p, q = _solve_in_lengths(of, subsets, torch.ones_like(mean), inner)
    a, b = p.sum(dim=1).clamp(min=1e-300), q.sum(dim=1)
    discriminant = b**2 - a * ((q @ inner) - radius**2)
    num_free = subsets.sum(dim=1)
    root = discriminant.clamp(min=1e-300).sqrt()
    w = p / a[:, None] + ((b / a)[:, None] * p - q) / root[:, None]
    scaled = w * of.lengths
    cost = w @ inner + radius * ((scaled @ of.cosines) * scaled).sum(dim=1).clamp(min=0).sqrt()
    # on one task alone only w = 1 is left, whatever rounding makes of the discriminant
    w = torch.where((num_free == 1)[:, None], subsets, w)
    single = subsets @ inner + radius * (subsets @ of.lengths)
    cost = torch.where(num_free == 1, single, cost)
    feasible = (w >= -1e-9).all(dim=1) & ((discriminant > 0) | (num_free == 1)) & (num_free > 0)
    return _best(w, cost, feasible)


def _present_supports(present: Tensor) -> Tensor:
    subsets = supports(len(present), present.device)
    return subsets * present  # those with absent tasks repeat others


def _solve_in_lengths(of: Unit, subsets: Tensor, *right: Tensor) -> tuple[Tensor, ...]:
    """G_SS^-1 r_S for each right side r -> [S, T] each."""
    scaled = solve_on(subsets, of.cosines, torch.stack([r / of.lengths for r in right], dim=1))
    return tuple((scaled / of.lengths[:, None]).unbind(dim=2))


def _best(w: Tensor, cost: Tensor, feasible: Tensor) -> Tensor:
    best = torch.where(feasible, cost, torch.inf).argmin()
    return w.index_select(0, best[None]).squeeze(0).clamp(min=0)


def check_num_tasks(method: str, num_tasks: int) -> None:
    """Raise ValueError where a method that tries all subsets of tasks has too many of them."""
    if num_tasks > MAX_SUPPORTS:
        raise ValueError(
            f"balance {method} has {num_tasks} tasks; it tries every subset of them, so up to {MAX_SUPPORTS} are "
            "allowed; choose another method, such as upgrad"
        )


def eigen(a: Tensor, num_sweeps: int = 6) -> tuple[Tensor, Tensor]:
    """Eigenvalues [T], in no order, and eigenvectors (columns) of a symmetric float64 [T, T], by Jacobi's rotations.

    `torch.linalg.eigh` waits for the device. Each round rotates T/2 disjoint pairs at once; a sweep meets every pair.
    """
    num = len(a)
    size = num + num % 2
    a = torch.nn.functional.pad(a, (0, size - num, 0, size - num))
    vectors = torch.eye(size, device=a.device, dtype=a.dtype)
    blocks = torch.eye(size // 2, device=a.device, dtype=a.dtype)[:, None, :, None]
    turn = _round_robin(size, a.device)
    for _ in range(num_sweeps * (size - 1) if size > 2 else 1):
        pairs = a.view(size // 2, 2, size // 2, 2).diagonal(dim1=0, dim2=2)  # [2, 2, pairs]
        difference, off = pairs[0, 0] - pairs[1, 1], pairs[0, 1]
        sign = torch.where(difference < 0, -1.0, 1.0)
        angle = torch.atan2(2 * sign * off, difference.abs()) / 2  # at most 45 degrees, or it may not converge
        cos, sin = angle.cos(), angle.sin()
        rotations = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
        rotation = (rotations[:, :, None, :] * blocks).reshape(size, size) @ turn
        a, vectors = rotation.T @ a @ rotation, vectors @ rotation
    # the padding is an eigenvector of its own, wherever it lies by now
    own = vectors[:num].square().sum(dim=0)
    order = own.argsort(descending=True, stable=True)[:num]
    return a.diagonal().index_select(0, order), vectors[:num].index_select(1, order)


def _round_robin(size: int, device: torch.device) -> Tensor:
    """The permutation after which columns 2k and 2k + 1 are the next pairs of a tournament, float64 [T, T].

    The first player stays; the others move around the table: 0 2 4 ... on one side, 1 3 5 ... on the other.
    """
    place = torch.arange(size, device=device)
    top, bottom = place % 2 == 0, place % 2 == 1
    goes_to = torch.where(top, place + 2, place - 2)
    goes_to = torch.where(place == 0, 0, goes_to)
    goes_to = torch.where(bottom & (place == 1), min(2, size - 1), goes_to)
    goes_to = torch.where(top & (place == size - 2) & (place > 0), size - 1, goes_to)
    return (goes_to[:, None] == place).double()


def fair(gramian: Tensor, exponent: float, num_steps: int = 25) -> Tensor:
    """w > 0 with G w = w^(-exponent), element by element; gramian: float64 [T, T], positive definite -> [T]

    It minimises the strictly convex w' G w / 2 - sum of u(w), with u' = w^(-exponent): Newton steps, each as long as
    the best of eight lengths.
    """
    w = gramian.diagonal() ** (-1 / (1 + exponent))  # what each would be alone
    halves = 2.0 ** -torch.arange(8, device=gramian.device, dtype=gramian.dtype)

    def cost(w: Tensor) -> Tensor:  # [..., T]
        utility = w.log() if exponent == 1 else w ** (1 - exponent) / (1 - exponent)
        return ((w @ gramian) * w).sum(dim=-1) / 2 - utility.sum(dim=-1)

    for _ in range(num_steps):
        slope = gramian @ w - w**-exponent
        hessian = gramian + torch.diag_embed(exponent * w ** (-exponent - 1))
        step = -torch.linalg.solve_ex(hessian, slope[:, None])[0].squeeze(-1)
        longest = 0.9 / (-step / w).amax().clamp(min=0.9)  # keeps a tenth of every weight
        tried = w + (halves * longest)[:, None] * step
        w = tried.index_select(0, cost(tried).nan_to_num(nan=torch.inf).argmin()[None]).squeeze(0)
    return w
