"""Aligned-MTL: gradients made orthogonal and equally long."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import eigen, unit

PRECISION = 1e-5
"""Eigenvalues of a matrix of cosines below count as zero; the ridge on its diagonal and float32 make some 1e-6."""


class AlignedMTL(GramianBalance, frozen=True):
    """Aligned-MTL: weights s V S^-1 V' 1, where G = V S^2 V' and s is the smallest singular value
    (Senushkin et al. 2023, arXiv:2305.19000, alg. 1): the sum of the gradients once the system of linear equations
    that they form has condition number 1.

    As many singular values as the rank of the unit gradients are kept, the others are rounding (the paper leaves out
    what is small beside the largest, which short gradients are, too). Duplicating a task changes the direction.
    """

    type: Literal["aligned_mtl"] = "aligned_mtl"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _aligned


def _aligned(seen: TaskGradients) -> Tensor:
    values, vectors = eigen(seen.gramian)
    # of unit gradients, since float32 leaves an error relative to the lengths of both in every inner product
    rank = (eigen(unit(seen.gramian).cosines * (seen.present & seen.present[:, None]))[0] > PRECISION).sum()
    kept = values.argsort(descending=True).argsort() < rank
    smallest = torch.where(kept, values, torch.inf).amin()
    ratio = torch.where(kept, smallest / torch.where(kept, values, 1.0), 0.0).sqrt()
    return vectors @ (ratio * (vectors.T @ seen.present.double()))
