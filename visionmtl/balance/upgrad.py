"""UPGrad: project each task's gradient on the cone in which no task is hurt, then add."""

from typing import Literal

import torch
from torchjd.aggregation import UPGradWeighting

from visionmtl.balance.base import GramianBalance, Weighting


class UPGrad(GramianBalance, frozen=True):
    """Quinton and Rey 2024, arXiv:2406.16232, eq. 5, on the shared maps; solved by TorchJD on the CPU (one host wait).

    Preference 1 for each task: where no gradients conflict, the result is their plain sum.
    """

    type: Literal["upgrad"] = "upgrad"

    def weighting(self, num_tasks: int) -> Weighting:
        return UPGradWeighting(torch.ones(num_tasks))
