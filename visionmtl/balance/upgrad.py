"""UPGrad: project each task's gradient on the cone in which no task is hurt, then add."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchjd.aggregation import UPGradWeighting
from torchjd.linalg import DualConeProjector

from visionmtl.balance.base import GramianBalance, Weighting
from visionmtl.ops.cone import project


class UPGrad(GramianBalance, frozen=True):
    """Quinton and Rey 2024, arXiv:2406.16232, eq. 5, on the shared maps, through TorchJD.

    Preference 1 for each task: where no gradients conflict, the result is their plain sum.
    TorchJD's own projector needs a GPL solver on the CPU; ours stays on the device.
    """

    type: Literal["upgrad"] = "upgrad"

    def weighting(self, num_tasks: int) -> Weighting:
        """See the base."""
        return UPGradWeighting(torch.ones(num_tasks), projector=_OnDevice())


class _OnDevice(DualConeProjector):
    def __call__(self, U: Tensor, G: Any) -> Tensor:
        # U as TorchJD made it, from the preference 1, lies on the CPU: to move it would make the host wait
        return project(torch.eye(len(U), dtype=U.dtype, device=G.device), G)
