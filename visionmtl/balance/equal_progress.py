"""Methods whose direction makes the same angle with every gradient: IMTL-G, ConFIG."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import Unit, unit


class IMTLG(GramianBalance, frozen=True):
    """IMTL-G: weights with sum 1 whose direction has the same projection on every unit gradient (Liu et al. 2021,
    "Towards Impartial Multi-task Learning", ICLR, eq. 6): D^-1 C^-1 1 / 1' D^-1 C^-1 1, with lengths D and cosines C.

    Weights may be negative. Deviation: the sum's sign is not divided by, since a negative one would turn the direction
    round and hurt every task; the sum of the weights is then -1.
    """

    type: Literal["imtl_g"] = "imtl_g"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _equal_projections


def _equal_projections(seen: TaskGradients) -> Tensor:
    of = unit(seen.gramian, seen.present)
    weights = _bisecting(of, seen.present) / of.lengths
    return weights / weights.sum().abs().clamp(min=1e-12 * weights.abs().sum() + 1e-300)


class ConFIG(GramianBalance, frozen=True):
    """ConFIG: the direction u of pinv(U) 1, where U holds the unit gradients, times the sum over i of g_i . u
    (Liu, Chu, Thuerey 2024, arXiv:2408.11104, eq. 4).

    Every task improves at the same rate relative to its gradient's length, which itself does not matter to u.
    """

    type: Literal["config"] = "config"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _conflict_free


def _conflict_free(seen: TaskGradients) -> Tensor:
    of = unit(seen.gramian, seen.present)
    x = _bisecting(of, seen.present)
    inner = of.cosines @ x
    gain = (seen.present * of.lengths * inner).sum() / (x @ inner).clamp(min=1e-300)
    return gain * x / of.lengths


def _bisecting(of: Unit, present: Tensor) -> Tensor:
    """The mixture of unit gradients that has the inner product 1 with each, [T]."""
    x: Tensor = torch.linalg.solve_ex(of.cosines, present.double()[:, None])[0].squeeze(-1)
    return x
