"""Aligned-MTL: gradients made orthogonal and equally long."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import eigen


class AlignedMTL(GramianBalance, frozen=True):
    """Aligned-MTL: weights s V S^-1 V' 1, where G = V S^2 V' and s is the smallest singular value
    (Senushkin et al. 2023, arXiv:2305.19000, alg. 1): the sum of the gradients once the system of linear equations
    that they form has condition number 1.

    Singular values below the precision of the Gramian count as zero and are left out, as in the paper. Duplicating a
    task changes the direction.
    """

    type: Literal["aligned_mtl"] = "aligned_mtl"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _aligned


def _aligned(seen: TaskGradients) -> Tensor:
    values, vectors = eigen(seen.gramian)
    precise = values.amax() * len(values) * torch.finfo(torch.float32).eps
    kept = values > precise
    smallest = torch.where(kept, values, torch.inf).amin()
    ratio = torch.where(kept, smallest / torch.where(kept, values, 1.0), 0.0).sqrt()
    return vectors @ (ratio * (vectors.T @ seen.present.double()))
