"""Methods that look for the shortest vector among the mixtures of the gradients: MGDA, SDMGrad."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from visionmtl.balance.base import GramianBalance, TaskGradients, Weighting
from visionmtl.balance.solvers import check_num_tasks, nonnegative_qp, on_simplex, unit


class MGDA(GramianBalance, frozen=True):
    """MGDA: argmin w' G w over w >= 0 with sum 1 (Desideri 2012; Sener and Koltun 2018, arXiv:1810.04650, eq. 3).

    No task is hurt, and the direction vanishes only where no direction helps all. Long gradients weigh little.
    Deviation: solved exactly instead of by Frank-Wolfe steps.
    """

    type: Literal["mgda"] = "mgda"

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        return _shortest


def _shortest(seen: TaskGradients) -> Tensor:
    """On its support G w is constant, so w is the solution of min w' G w / 2 - 1' w, divided by its sum."""
    of = unit(seen.gramian, seen.present)
    w = nonnegative_qp(of.cosines, (seen.present.double() / of.lengths)[None])[0] / of.lengths
    return w / w.sum().clamp(min=1e-300)


class SDMGrad(GramianBalance, frozen=True):
    """SDMGrad: (w + lambda a) / (1 + lambda), w = argmin |J' w + lambda J' a|^2 / 2 over w >= 0 with sum 1, a = 1 / T
    (Xiao, Ban, Ji 2023, arXiv:2305.18409, eq. 4: MGDA pulled towards the mean gradient).

    Deviation: w is the exact solution for each step's gradients, as MGDA's is. The paper follows it by small steps
    with gradients of two further independent batches, which removes a bias this has, and costs three batches a step.
    """

    type: Literal["sdmgrad"] = "sdmgrad"
    pull: float = Field(0.3, ge=0, description="lambda; 0 is MGDA, large values the mean gradient")

    def weighting(self, tasks: Sequence[str]) -> Weighting:
        """See the base."""
        check_num_tasks(self.type, len(tasks))

        def weights(seen: TaskGradients) -> Tensor:
            mean = seen.present.double() / seen.present.sum().clamp(min=1)
            w = on_simplex(unit(seen.gramian, seen.present), seen.present, self.pull * (seen.gramian @ mean))
            return (w + self.pull * mean) / (1 + self.pull)

        return weights
