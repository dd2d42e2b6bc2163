"""Learning with Preserving: distances between features stay as they were."""

from typing import Literal

from pydantic import Field

from visionmtl.transfer.base import Extend


class LwP(Extend, frozen=True):
    """Wang et al. 2025, arXiv:2511.11676: pairwise distances of shared features are held at the old network's.

    See `ops.soft_losses.distance_preservation`, also for what differs. The old decoders stay as they are.
    """

    type: Literal["lwp"] = "lwp"
    weight: float = Field(1.0, gt=0, description="factor on the loss; it counts as a part of the first new task's")

    @property
    def feature_weight(self) -> float:
        return self.weight
